"""The pure parts stay pure: read from their syntax trees, so that an unused path counts too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kong_token_exchange

PACKAGE = Path(kong_token_exchange.__file__).parent
PURE = [path for part in ("core", "protocol") for path in sorted((PACKAGE / part).glob("**/*.py"))]

# No I/O, no time, no chance, no threads; `now` is an argument.
FORBIDDEN_MODULES = {
    *("socket", "ssl", "time", "random", "secrets", "asyncio", "threading", "os"),
    *("select", "selectors", "subprocess", "multiprocessing", "concurrent", "signal", "pathlib", "tempfile"),
    *("requests", "urllib3", "http", "logging", "kong_pdk"),
}
# Within a package that is otherwise harmless.
FORBIDDEN_PARTS = {"urllib.request", "datetime.datetime.now", "importlib"}
FORBIDDEN_CALLS = {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}

# What of ours each part may import (design: dependencies point one way).
OURS = {
    "core": ("errors", "secret", "core"),
    "protocol": ("errors", "secret", "core", "protocol"),
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports of the pure parts are absolute, so that they can be read"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_read() -> None:
    assert {"claims.py", "jws.py", "bearer.py"} <= {path.name for path in PURE}


@pytest.mark.parametrize("path", PURE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_pure_module_imports_nothing_impure(path: Path) -> None:
    names = list(imported(ast.parse(path.read_text())))

    assert not [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    assert not [name for name in names if any(f"{name}.".startswith(f"{part}.") for part in FORBIDDEN_PARTS)]


@pytest.mark.parametrize("path", PURE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_pure_module_imports_of_ours_what_is_below_it(path: Path) -> None:
    allowed = tuple(f"kong_token_exchange.{part}." for part in OURS[path.relative_to(PACKAGE).parts[0]])
    ours = [name for name in imported(ast.parse(path.read_text())) if name.startswith("kong_token_exchange")]

    assert not [name for name in ours if not f"{name}.".startswith(allowed)]


@pytest.mark.parametrize("path", PURE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_pure_module_calls_nothing_impure(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]

    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id in FORBIDDEN_CALLS]
    clocks = {"now", "utcnow", "today", "time", "monotonic", "urandom", "getrandbits", "uuid4", "sleep"}
    assert not [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in clocks]


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import os.path",
        "from os import path",
        "def f():\n    import time",
        "from http.client import x",
    ],
)
def test_impure_import_would_be_found(source: str) -> None:
    assert [name for name in imported(ast.parse(source)) if name.split(".")[0] in FORBIDDEN_MODULES]
