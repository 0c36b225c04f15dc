"""
Every requirement on exchange, keys and caches has a test that carries its id, or a reason here.

An id stands in the name of a test (`test_exc_04_...`, `test_cache_06_07_...`) or in the id of a
parameter (`EXC-10-dpop`, `EXC-16-KEY-05-302`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

UNIT = Path(__file__).parent
MODULES = [
    UNIT / name
    for name in (
        "protocol/test_client_auth.py",
        "protocol/test_exchange.py",
        "protocol/test_http_message.py",
        "protocol/test_metadata.py",
        "shell/test_audit_log.py",
        "shell/test_http_client.py",
        "shell/test_key_source.py",
        "shell/test_token_cache.py",
        "test_flow.py",
        "test_flow_shared.py",
    )
]

ROWS = {"KEY": range(1, 20), "EXC": range(1, 33), "CACHE": range(1, 27), "FAULT": range(1, 55)}
REQUIRED = {f"{row}-{number:02}" for row, numbers in ROWS.items() for number in numbers}

NO_SUCH_ROW = "no such row"
NO_ACTOR = "actor tokens are not supported yet, and a configuration with one does not load"

NOT_HERE = {
    "KEY-09": "no address is blocked at connect time: a key set on another host must be served over https"
    " with a certificate for its name, so a name that is bound anew leads to nothing that answers",
    "KEY-19": NO_SUCH_ROW,
    "EXC-09": NO_ACTOR,
    "EXC-22": NO_ACTOR,
    "EXC-29": "nothing maps tokens to consumers yet; headers and shared facts are the plugin's, tested there",
    "EXC-31": "the depth of `act` chains is not judged yet; a result that comes in again is a token of the"
    " target issuer and meets its conditions like any other",
    "CACHE-02": "the encoding of the key is tested beside core/cache_key.py",
    "CACHE-20": "nothing negative is cached",
    "CACHE-25": "there is no way to purge from the data plane",
    "FAULT-10": "one request asks once, so nothing is amplified; the rest is a matter of load",
    "FAULT-22": "whether the client is still there is the plugin server's to notice",
    "FAULT-23": "the guard before the token endpoint decides that, and its tests show it",
    **{f"FAULT-{number}": NO_SUCH_ROW for number in (24, 25, 26, 27, 28, 29, 44, 45, 46, 47, 48, 49)},
}

_ID = re.compile(r"(KEY|EXC|CACHE|FAULT)-(\d\d)(?!\d)")
_IN_NAME = re.compile(r"(key|exc|cache|fault|res)((?:_\d\d)+)(_to_\d\d)?(?=_|$)")


def ids_in_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for row, numbers, last in _IN_NAME.findall(node.name):
                found = [int(number) for number in numbers.split("_") if number]
                if last:
                    found = list(range(found[-1], int(last.removeprefix("_to_")) + 1))
                yield from (f"{row.upper()}-{number:02}" for number in found)


def ids_of_parameters(tree: ast.Module) -> Iterator[str]:
    """Find ids in keys of tables, in lists of ids and in what makes ids; not in docstrings or comments."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from ("-".join(found) for found in _ID.findall(node.value))


@cache
def carried() -> set[str]:
    found: set[str] = set()
    for module in MODULES:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        found.update(ids_in_names(tree), ids_of_parameters(tree))
    return found


@pytest.mark.parametrize("requirement", sorted(REQUIRED))
def test_a_requirement_has_a_test_or_a_reason(requirement: str) -> None:
    assert (requirement in carried()) != (requirement in NOT_HERE)


def test_reasons_are_for_requirements() -> None:
    assert set(NOT_HERE) <= REQUIRED
