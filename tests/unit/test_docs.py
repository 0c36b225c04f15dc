"""The documents against the code: every reason is explained, and every path and link leads somewhere."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kong_token_exchange import errors
from kong_token_exchange.protocol.bearer import render
from tests.support import coverage

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kong_token_exchange"
ERRORS_PAGE = ROOT / "docs" / "errors.md"

PAGES = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").rglob("*.md")},
)


# --- reasons --------------------------------------------------------------------------


@dataclass(frozen=True)
class Raised:
    """A reason in the code; `reason` ends in `*` where a prefix is put before another error's reason."""

    reason: str
    kind: str | None
    place: str


def find_raised(source: str, place: str) -> Iterator[Raised]:
    """Find every `reason=` of a module, with the error class it is given to."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for keyword in call.keywords:
            if keyword.arg == "reason":
                kind = error_class(call, parents)
                for reason in resolve(keyword.value, call, tree, parents):
                    yield Raised(reason, kind, f"{place}:{call.lineno}")
    for node in ast.walk(tree):
        # A row of a table of errors: (ClassError, "reason").
        match node:
            case ast.Tuple(elts=[ast.Name(id=kind), ast.Constant(value=str(reason))]) if kind.endswith(
                "Error"
            ):
                yield Raised(reason, kind, f"{place}:{node.lineno}")
            case ast.BinOp(left=ast.Constant(value=str(prefix)), right=ast.Attribute(attr="reason")):
                yield Raised(prefix + "*", None, f"{place}:{node.lineno}")


def error_class(call: ast.Call, parents: dict[ast.AST, ast.AST]) -> str | None:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name.endswith("Error"):
        return name
    if ast.unparse(call.func) == "super().__init__":
        return enclosing(call, parents, ast.ClassDef).name
    return None


def enclosing(node: ast.AST, parents: dict[ast.AST, ast.AST], kind: type) -> ast.AST | None:
    while node in parents:
        node = parents[node]
        if isinstance(node, kind):
            return node
    return None


def resolve(
    value: ast.expr, call: ast.Call, tree: ast.Module, parents: dict[ast.AST, ast.AST]
) -> Iterator[str]:
    """Return the constants that *value* may be; nothing for a reason that is handed on."""
    match value:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=first, orelse=second):
            yield from resolve(first, call, tree, parents)
            yield from resolve(second, call, tree, parents)
        case ast.BinOp(left=ast.Constant(value=str(prefix)), op=ast.Add()):
            yield prefix + "*"
        case ast.Attribute():
            return
        case ast.Name(id=name):
            yield from resolve_name(name, call, tree, parents)
        case ast.Call(func=ast.Name(id="next"), args=[ast.GeneratorExp() as first, otherwise]):
            yield from resolve(otherwise, call, tree, parents)
            yield from resolve_rows(ast.unparse(first.generators[0].iter), call, tree)
        case ast.Call(func=ast.Name(id=name)):
            yield from resolve_returns(name, call, tree, parents)
        case _:
            raise AssertionError(f"line {call.lineno}: cannot tell the reasons of {ast.unparse(value)}")


def resolve_name(
    name: str, call: ast.Call, tree: ast.Module, parents: dict[ast.AST, ast.AST]
) -> Iterator[str]:
    function = enclosing(call, parents, ast.FunctionDef)
    arguments = (*function.args.args, *function.args.kwonlyargs)
    if name in {argument.arg for argument in arguments}:
        return
    assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    targets = [target for node in assignments for target in node.targets if isinstance(target, ast.Tuple)]
    if any(isinstance(part, ast.Name) and part.id == name for target in targets for part in target.elts):
        return  # taken out of a table of errors, whose rows are found by themselves
    assigned = [node.value for node in assignments if name in map(ast.unparse, node.targets)]
    assert assigned, f"line {call.lineno}: where does {name} come from?"
    for value in assigned:
        yield from resolve(value, call, tree, parents)


def resolve_returns(
    name: str, call: ast.Call, tree: ast.Module, parents: dict[ast.AST, ast.AST]
) -> Iterator[str]:
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert functions, f"line {call.lineno}: {name} is not of this module"
    for node in ast.walk(functions[0]):
        if isinstance(node, ast.Return) and node.value is not None:
            yield from resolve(node.value, call, tree, parents)


def resolve_rows(name: str, call: ast.Call, tree: ast.Module) -> Iterator[str]:
    """Return the first members of the rows of a module's table."""
    tables = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    ]
    assert tables, f"line {call.lineno}: {name} is no table of this module"
    for row in tables[0].elts:
        yield ast.literal_eval(row.elts[0])


def all_raised() -> list[Raised]:
    files = [path for path in PACKAGE.rglob("*.py") if "sandbox" not in path.relative_to(PACKAGE).parts]
    return [
        raised
        for path in sorted(files)
        for raised in find_raised(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


def rows(page: str, header: str) -> list[list[str]]:
    """Return the cells of all tables whose head row begins with *header*."""
    found: list[list[str]] = []
    inside = False
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith(f"| {header} |"):
            inside = True
        elif inside and not line.startswith("|---"):
            found.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return found


def documented_reasons() -> set[tuple[str, str]]:
    return {(row[0], row[1]) for row in rows(ERRORS_PAGE.read_text(encoding="utf-8"), "reason")}


def test_every_reason_in_the_code_is_in_the_table_with_its_class() -> None:
    documented = documented_reasons()
    reasons = {reason for reason, _ in documented}

    missing = [
        raised
        for raised in all_raised()
        if raised.reason not in reasons
        or (raised.kind is not None and (raised.reason, raised.kind) not in documented)
    ]

    assert [] == missing


def test_every_reason_in_the_table_is_in_the_code() -> None:
    in_code = {raised.reason for raised in all_raised()}

    assert set() == {reason for reason, _ in documented_reasons()} - in_code


def test_reasons_are_found_in_every_spelling() -> None:
    source = """
def judge(given):
    word = "b" if given else "c"
    raise OneError(reason="a")
    raise OneError(reason=word)
    raise OneError(reason=choose(given))
    raise OneError(reason="p_" + given.reason)
    raise OneError(reason=given)
    first = next((reason for reason, known in ROWS if known & given), "h")
    raise OneError(reason=first)
def choose(given):
    return "d" if given else "e"
class TwoError:
    def __init__(self):
        super().__init__(reason="f")
ROWS = (("i", {1}), ("j", {2}))
TABLE = {1: (TwoError, "g")}
def look_up(given):
    make, reason = TABLE[given]
    raise make(reason=reason)
"""
    found = {(raised.reason, raised.kind) for raised in find_raised(source, "x") if raised.kind}

    ones = {(reason, "OneError") for reason in ("a", "b", "c", "d", "e", "h", "i", "j", "p_*")}
    assert ones | {("f", "TwoError"), ("g", "TwoError")} == found


def test_a_reason_that_cannot_be_told_is_no_silence() -> None:
    with pytest.raises(AssertionError, match="cannot tell"):
        list(find_raised('def f(x):\n    raise OneError(reason=f"a_{x}")\n', "x"))


# --- classes --------------------------------------------------------------------------


def leaves() -> dict[str, type[errors.TokenExchangeError]]:
    """Return the classes a caller can be answered with."""
    answered = (errors.RejectionError, errors.GatewayError)
    return {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, answered) and kind is not errors.RejectionError
    }


def make(kind: type[errors.TokenExchangeError]) -> errors.TokenExchangeError:
    if kind in (errors.TimestampError, errors.ClaimError):
        return kind(claim="exp")  # type: ignore[call-arg]
    return kind(reason="x")


def test_the_table_of_classes_is_what_callers_get() -> None:
    table = {row[0]: tuple(row[1:4]) for row in rows(ERRORS_PAGE.read_text(encoding="utf-8"), "class")}
    real: dict[str, tuple[str, str, str]] = {}
    for name, kind in leaves().items():
        answer = render(make(kind))
        body = ast.literal_eval(answer.body.decode("ascii"))
        real[name] = (str(answer.status), body["error"], body["error_description"])

    assert real == table


# --- generated pages ------------------------------------------------------------------


def test_the_security_coverage_is_in_step_with_the_tests() -> None:
    page = coverage.PAGE.read_text(encoding="utf-8")

    assert coverage.written() == page, "run `make fmt`, or python -m tests.support.coverage --write"


# --- links and paths ------------------------------------------------------------------

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:kong_token_exchange|tests|docs|docker|benchmarks)/[A-Za-z0-9_./-]+)`")


def text_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ +(.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken: list[str] = []
    for target in _LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)

    assert [] == broken


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = set(_PATH.findall(text_of(page)))

    assert [] == sorted(path for path in named if not (ROOT / path).exists())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=page_name)
def test_every_document_that_code_names_exists(path: Path) -> None:
    named = set(re.findall(r"\bdocs/[a-z0-9/-]+\.md", path.read_text(encoding="utf-8")))

    assert [] == sorted(name for name in named if not (ROOT / name).exists())


def test_pages_were_found() -> None:
    assert {"README.md", "docs/errors.md", "docs/architecture.md"} <= {page_name(page) for page in PAGES}


def test_everything_the_standards_page_names_exists() -> None:
    page = text_of(ROOT / "docs" / "standards.md")
    layers = "core|protocol|shell|config|errors|flow|plugin"
    named = set(re.findall(rf"`((?:{layers})(?:\.\w+)*)`", page))
    assert len(named) > 20

    missing = []
    for name in sorted(named):
        try:
            pkgutil.resolve_name(f"kong_token_exchange.{name}")
        except (ImportError, AttributeError):
            missing.append(name)
    assert [] == missing


def test_every_module_has_its_line_in_the_architecture() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]

    assert [] == sorted(page_name(path) for path in modules if f"`{page_name(path)}`" not in page)
