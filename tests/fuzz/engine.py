"""Runs targets: some examples with a fixed seed, or many rounds until the time is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.targets import Target

ROUND = 400


@dataclass
class Outcome:
    """What came of one target."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    failure: str = ""

    @property
    def examples(self) -> int:
        return self.outcomes.total()


def attempt(target: Target, *, examples: int, seed: int) -> Counter[str]:
    """
    Try a target on made-up input; the same seed makes the same input.

    Raises:
        BaseException: what the target raised, with the smallest input that was found for it in its notes.
    """
    found: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def once(value: object) -> None:
        found[target.attempt(value)] += 1

    once()
    return found


def run_for(
    targets: Iterable[Target], *, seconds: float, seed: int, tell: Callable[[str], None]
) -> list[Outcome]:
    """Give each target its share of *seconds*; a target that fails ends there, the others go on."""
    chosen = list(targets)
    outcomes = []
    for target in chosen:
        outcome = Outcome(target.name)
        began, number = time.monotonic(), seed
        while not outcome.failure and outcome.seconds < seconds / len(chosen):
            try:
                outcome.outcomes += attempt(target, examples=ROUND, seed=number)
            # Exits and endless recursion are findings too.
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                notes = "\n".join(getattr(error, "__notes__", ()))
                outcome.failure = f"seed {number}: {type(error).__name__}: {error}\n{notes}"
            number += 1
            outcome.seconds = time.monotonic() - began
        outcomes.append(outcome)
        tell(describe(outcome))
    return outcomes


def describe(outcome: Outcome) -> str:
    common = ", ".join(f"{word} {count}" for word, count in outcome.outcomes.most_common(4))
    line = f"{outcome.name:15} {outcome.examples:9,} inputs in {outcome.seconds:5.1f} s   {common}"
    return f"{line}\nFAILED {outcome.name}: {outcome.failure}" if outcome.failure else line
