"""
Every id of docs/threats.md has a test that carries it, or a reason here; no test names another id.

How a test carries an id: tests/support/coverage.py. docs/security-coverage.md shows the outcome.
"""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.support import coverage

PACKAGE = coverage.ROOT / "kong_token_exchange"
_MODULE = re.compile(r"`([a-z0-9_/]+\.py)`")

# One line for each id, read by tests/support/coverage.py as it stands: plain texts alone.
NOT_HERE = {
    "GW-21": "one version of Kong is at hand, 3.9.1, and every integration test that has it runs on it",
    "CLM-25": "a bearer token may be used again until `exp`; what remembers each jti is every gateway's",
    "KEY-09": "no address is judged: keys come over https, and TLS proves the name whatever it is bound to",
    "CACHE-25": "there is no way to purge from the data plane",
    "OUT-05": "not yet: no consumer is mapped, and a configuration that asks for one does not load",
    "OUT-15": "accepted, and out of scope in docs/security.md: no secret of ours is compared with input",
}


@cache
def threats() -> dict[str, str]:
    return coverage.defined(coverage.THREATS.read_text(encoding="utf-8"))


@cache
def carried() -> coverage.Coverage:
    return coverage.read_tests()


def test_every_threat_has_a_test_or_a_reason() -> None:
    tested, not_run = set(carried().tests), set(carried().not_run)

    assert set() == set(threats()) - tested - not_run - set(NOT_HERE), "neither a test nor a reason"
    assert set() == tested & set(NOT_HERE), "the reason no longer holds: there is a test"
    assert all(NOT_HERE.values())


def test_tests_and_reasons_name_threats_alone() -> None:
    strangers = {name: sorted(carried().tests[name]) for name in set(carried().tests) - set(threats())}

    assert {} == strangers
    assert set() == set(NOT_HERE) - set(threats())


def test_chaos_rows_that_are_not_run_say_why() -> None:
    assert {} == {name: reason for name, reason in carried().not_run.items() if not reason}


def test_what_is_decided_is_decided_somewhere() -> None:
    page = coverage.THREATS.read_text(encoding="utf-8")
    named = {name for line in page.splitlines() if line.startswith("| ") for name in _MODULE.findall(line)}

    assert len(named) > 20
    assert [] == sorted(name for name in named if not (PACKAGE / name).is_file())


def test_every_family_is_there() -> None:
    assert set(coverage.FAMILIES) == {name.partition("-")[0] for name in threats()}


# --- what makes the page --------------------------------------------------------------

SOURCE = '''
WORDS = {"EXC-10-dpop": 1, "other": 2}
MORE = [*WORDS, "EXC-11-KEY-05-302"]
def rows():
    """EXC-12 in a docstring."""
    return [f"EXC-13-{n}" for n in range(3)]
@pytest.mark.parametrize("word", WORDS)
def test_words(word): ...
@pytest.mark.parametrize("word", MORE, ids=["CLM-01-a", "XCLM-02", "CLM-003-no"])
def test_more(word):
    "EXC-14"
@pytest.mark.parametrize("word", rows())
def test_made(word): ...
class TestClass:
    def test_gw_01_02_and_hdr_12_to_14_hold(self): ...
def test_clm_1_and_clmx_03_and_notgw_04(): ...
def helper_gw_09(): ...
'''


def test_ids_are_found_in_names_and_in_what_decorators_lead_to() -> None:
    found: dict[str, set[str]] = {}
    for threat, name in coverage.carried_by_tests(ast.parse(SOURCE)):
        found.setdefault(name, set()).add(threat)

    assert {
        "test_words": {"EXC-10"},
        "test_more": {"EXC-10", "EXC-11", "KEY-05", "CLM-01", "CLM-003"},
        "test_made": {"EXC-13"},
        "TestClass::test_gw_01_02_and_hdr_12_to_14_hold": {"GW-01", "GW-02", "HDR-12", "HDR-13", "HDR-14"},
    } == found


def test_rows_of_the_chaos_suite_are_found_with_their_action_or_reason() -> None:
    source = """
REASON = "none yet"
ROWS = (
    _row("31", "down", "200", down, "plain"),
    _row("80r", "kill", "500", kill if it() else None, reason="" if it() else "none"),
    _row("97", "latch", "none", None, reason="not ours"),
)
TABLE = (("60", "down at start", "200"),)
"""

    assert {
        ("FAULT-31", "down", "none yet"),
        ("FAULT-80", "kill", "none yet"),
        ("FAULT-97", "", "not ours"),
        ("FAULT-60", "", "none yet"),
    } == set(coverage.chaos_rows(ast.parse(source)))


def test_a_page_has_one_line_for_each_id() -> None:
    found = coverage.Coverage({"GW-01": {"b::y", "a::x"}}, {"FAULT-60": "no server"})
    page = coverage.render({"GW-01": "dead", "GW-02": "odd", "FAULT-60": "down"}, found, {"GW-02": "why"})

    assert "| GW-01 | dead | `a::x`<br>`b::y` |\n| GW-02 | odd | *not here:* why |\n" in page
    assert "| FAULT-60 | down | *not here:* no server |\n" in page


def test_an_id_defined_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="GW-01"):
        coverage.defined("| GW-01 | a | b |\n| GW-01 | c | d |\n")
