"""
Every row of the threat tables has a test here, or a reason why not.

A row counts as tested where its id stands in a test's name (`test_jwt_41_...`) or in the id of one
of its parameters (`JWT-16-duplicate-kid`).
"""

import inspect
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.unit.core import test_claims, test_jwk, test_jws
from tests.unit.protocol import test_bearer

TABLES = {
    "HDR": range(1, 26),
    "JWT": range(1, 42),
    "CLM": range(1, 30),
    "KEY": range(20, 34),
}

NOT_HERE = {
    "HDR-08": "nginx answers 400 to a second Authorization header; integration test through a gateway",
    "HDR-15": "nginx refuses folded lines and a space before the colon; integration test through a gateway",
    "HDR-17": "the plugin asks for one header by its name, never for a list with an end; test of the plugin",
    "HDR-22": "the plugin asks for `authorization`, so a look-alike name is never read; test of the plugin",
    "HDR-23": "nginx refuses such names on HTTP/2; integration test through a gateway",
    "HDR-24": "trailers come after the access phase, and Kong's PDK does not show them",
    "JWT-37": "no such row",
    "JWT-38": "no such row",
    "JWT-39": "no such row",
    "JWT-40": "no such row",
    "CLM-25": "a bearer token may be used again until it expires; its exp bounds that, and a cache that"
    " remembered each jti would have to be shared by every gateway",
    "CLM-28": "no actor token is read yet, and a configuration that asks for one does not load",
}

_ID = re.compile(r"(HDR|JWT|CLM|KEY)[-_](\d\d)", re.IGNORECASE)


def rows_of(module: ModuleType) -> Iterator[str]:
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_") or function.__module__ != module.__name__:
            continue
        texts = [name]
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize":
                texts += [str(getattr(value, "id", "")) for value in mark.args[1]]
                texts += [str(text) for text in mark.kwargs.get("ids") or ()]
        for text in texts:
            yield from ("-".join(found).upper() for found in _ID.findall(text))


TESTED = {row for module in (test_bearer, test_jws, test_claims, test_jwk) for row in rows_of(module)}
ROWS = [f"{table}-{number:02}" for table, numbers in TABLES.items() for number in numbers]


@pytest.mark.parametrize("row", ROWS)
def test_row_is_tested_or_has_a_reason(row: str) -> None:
    assert (row in TESTED) is not (row in NOT_HERE)


def test_nothing_else_is_named() -> None:
    assert set(NOT_HERE) <= set(ROWS)
    assert TESTED <= set(ROWS)
    assert all(NOT_HERE.values())
