"""
Which test proves which threat: `docs/security-coverage.md`, written from the sources of the tests.

    python -m tests.support.coverage --write      writes the page
    python -m tests.support.coverage --check      fails where the page is not what it would be

The ids are those of `docs/threats.md`. A test carries one in its name (`test_exc_04_...`,
`test_cache_06_07_...`, `test_clm_12_to_14_...`) or in a string that its decorators lead to: a
parameter's id (`EXC-10-dpop`), a key of the table it runs over. A row of the chaos suite carries
its own. Ids that nothing carries have their reason in `NOT_HERE` of tests/unit/test_requirements.py.
Sources are parsed and never imported, so that this takes a second.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
THREATS = ROOT / "docs" / "threats.md"
PAGE = ROOT / "docs" / "security-coverage.md"
REASONS = TESTS / "unit" / "test_requirements.py"

FAMILIES = ("GW", "HDR", "JWT", "CLM", "KEY", "EXC", "CACHE", "RES", "OUT", "FAULT")
_FAMILY = "|".join(FAMILIES)
_DEFINED = re.compile(rf"^\| ((?:{_FAMILY})-\d\d\d?) \| ([^|]+) \|", re.MULTILINE)
_IN_TEXT = re.compile(rf"(?<![A-Za-z0-9])({_FAMILY})-(\d\d\d?)(?!\d)")
_IN_NAME = re.compile(rf"(?<=_)({_FAMILY.lower()})((?:_\d\d\d?)+)(?:_to_(\d\d\d?))?(?=_|$)")
_CHAOS_ROW = re.compile(r"(\d\d\d?)r?")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Coverage:
    """By id: the tests that carry it, as `file::name`; and why a chaos row of it is not run."""

    tests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    not_run: dict[str, str] = field(default_factory=dict)


def defined(page: str) -> dict[str, str]:
    """Return the ids of `docs/threats.md` in their order, each with what happens."""
    found = _DEFINED.findall(page)
    twice = [name for name, _ in found if [name for name, _ in found].count(name) > 1]
    if twice:
        raise ValueError(f"defined twice: {sorted(set(twice))}")
    return dict(found)


def read_reasons(source: str) -> dict[str, str]:
    """Return the literal `NOT_HERE` of a module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NOT_HERE":
            reasons: dict[str, str] = ast.literal_eval(node.value)
            return reasons
    raise ValueError("no NOT_HERE")


def read_tests(folder: Path = TESTS) -> Coverage:
    """Return what the test modules and chaos rows below *folder* carry."""
    coverage = Coverage()
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder.parent).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name.startswith("test_"):
            for threat, name in carried_by_tests(tree):
                coverage.tests[threat].add(f"{place}::{name}")
        elif path.name.startswith("rows_"):
            for threat, action, reason in chaos_rows(tree):
                if action:
                    coverage.tests[threat].add(f"{place}::{action}")
                else:
                    coverage.not_run[threat] = reason
    return coverage


# --- tests ----------------------------------------------------------------------------


def carried_by_tests(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (id, name of the test) for a module; a method's name is `Class::method`."""
    definitions = dict(_definitions(tree))
    for function, name in _tests(tree.body):
        for threat in _ids_in_name(function.name):
            yield threat, name
        for decorator in function.decorator_list:
            for text in _texts(decorator, definitions, set()):
                for family, number in _IN_TEXT.findall(text):
                    yield f"{family}-{number}", name


def _tests(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[Function, str]]:
    for node in body:
        if isinstance(node, Function) and node.name.startswith("test_"):
            yield node, prefix + node.name
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _tests(node.body, f"{node.name}::")


def _ids_in_name(name: str) -> Iterator[str]:
    for family, numbers, last in _IN_NAME.findall(name):
        found = [int(number) for number in numbers.split("_") if number]
        if last:
            found += range(found[-1] + 1, int(last) + 1)
        yield from (f"{family.upper()}-{number:02}" for number in found)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield the module's tables and helpers by name: what a decorator may refer to."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), node.value
        elif isinstance(node, Function) and not node.name.startswith("test_"):
            yield node.name, node


def _texts(node: ast.AST, definitions: Mapping[str, ast.AST], seen: set[str]) -> Iterator[str]:
    """Yield every string that *node* holds or leads to, docstrings aside."""
    docstring = ast.get_docstring(node, clean=False) if isinstance(node, Function) else None
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value != docstring:
            yield part.value
        elif isinstance(part, ast.Name) and part.id in definitions and part.id not in seen:
            seen.add(part.id)
            yield from _texts(definitions[part.id], definitions, seen)


# --- chaos rows -----------------------------------------------------------------------


def chaos_rows(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield (id, name of the action, reason why there is none) for each `_row("37", ...)` or table row."""
    for node in ast.walk(tree):
        parts = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        number = _constant(parts[0]) if len(parts) >= 3 else ""
        if not (match := _CHAOS_ROW.fullmatch(number)):
            continue
        keywords = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
        action = parts[3] if len(parts) > 3 else keywords.get("action")
        if isinstance(action, ast.IfExp):
            action = action.body
        reason = _constant(keywords.get("reason")) or _module_reason(tree)
        yield f"FAULT-{match[1]}", action.id if isinstance(action, ast.Name) else "", reason


def _constant(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _module_reason(tree: ast.Module) -> str:
    """Return the constant `REASON` of a module whose rows share one."""
    found = [node.value for node in tree.body if isinstance(node, ast.Assign) if _names(node) == ["REASON"]]
    return _constant(found[0]) if found else ""


def _names(node: ast.Assign) -> list[str]:
    return [ast.unparse(target) for target in node.targets]


# --- the page -------------------------------------------------------------------------

_HEAD = """\
# Security coverage

Written by `make fmt` from the tests and `tests/unit/test_requirements.py`; `make generated` holds it in step.
Each id of [threats.md](threats.md) with the tests that carry it, or with the reason why none does.
Names below `tests/chaos` are rows of the suite that [resilience.md](resilience.md) describes.
"""


def render(threats: Mapping[str, str], coverage: Coverage, reasons: Mapping[str, str]) -> str:
    """Return the page: one line for each id, so that two changes seldom meet."""
    lines = [_HEAD]
    for family in FAMILIES:
        lines += [f"## {family}", "", "| id | threat | tested in, or why not |", "|---|---|---|"]
        for threat, words in threats.items():
            if threat.startswith(f"{family}-"):
                lines.append(f"| {threat} | {words} | {_proof(threat, coverage, reasons)} |")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def _proof(threat: str, coverage: Coverage, reasons: Mapping[str, str]) -> str:
    tests = [f"`{name}`" for name in sorted(coverage.tests.get(threat, ()))]
    if tests:
        return "<br>".join(tests)
    return f"*not here:* {reasons.get(threat) or coverage.not_run.get(threat) or 'NOTHING'}"


def written() -> str:
    """Return the page as it should be."""
    return render(
        defined(THREATS.read_text(encoding="utf-8")),
        read_tests(),
        read_reasons(REASONS.read_text(encoding="utf-8")),
    )


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is in step."""
    page = written()
    if arguments == ["--write"]:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        sys.stderr.write(f"{PAGE.relative_to(ROOT)} is not in step with the tests: run `make fmt`\n")
        return 1
    sys.stderr.write("usage: python -m tests.support.coverage --write | --check\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
