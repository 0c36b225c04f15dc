"""The short form of `make fuzz`: every target on a fixed seed, and the engine itself."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.fuzz.engine import attempt, run_for
from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 150


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_no_input_breaks_a_promise(target: Target) -> None:
    outcomes = attempt(target, examples=EXAMPLES, seed=1)

    assert EXAMPLES == outcomes.total()


def explode(number: int) -> str:
    if number >= 1000:
        raise RecursionError("too large")
    return "small"


BAD = Target("bad", st.integers(0, 10_000), explode)
GOOD = Target("good", st.integers(0, 999), explode)


def test_a_broken_promise_is_told_with_its_seed_and_the_others_go_on() -> None:
    lines: list[str] = []

    bad, good = run_for([BAD, GOOD], seconds=0.1, seed=7, tell=lines.append)

    assert "seed 7: RecursionError" in bad.failure
    assert "number=1000" in bad.failure.replace("value", "number")
    assert ("", True) == (good.failure, good.examples > 0)
    assert "FAILED bad" in lines[0]


def test_the_same_seed_makes_the_same_input() -> None:
    seen: list[list[int]] = []
    for _ in range(2):
        numbers: list[int] = []
        keep = Target("keep", st.integers(), lambda number, to=numbers: str(to.append(number)))
        attempt(keep, examples=50, seed=3)
        seen.append(numbers)

    assert seen[0] == seen[1]
