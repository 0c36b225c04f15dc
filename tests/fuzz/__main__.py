"""
Fuzzing for a while: `make fuzz`, or `python -m tests.fuzz --seconds 60 --only frames`.

Each run takes a seed of its own and prints it; the same seed makes the same input.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests.fuzz import mutants
from tests.fuzz.engine import run_for
from tests.fuzz.targets import TARGETS

MUTANTS = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="in all, shared by the targets")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--only", metavar="NAME", choices=[target.name for target in TARGETS])
    options = parser.parse_args()
    say(f"seed {options.seed}, {options.seconds:g} s")
    if options.only is None:
        for kind, counts in mutants.run(MUTANTS, options.seed).items():
            reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common(3))
            say(f"{kind:25} {counts.total():6,} refused   {reasons}")
        say(f"{MUTANTS:,} mutated tokens through the flow: none accepted, none unhandled\n")
    targets = [target for target in TARGETS if options.only in (None, target.name)]
    outcomes = run_for(targets, seconds=options.seconds, seed=options.seed, tell=say)
    failed = [outcome.name for outcome in outcomes if outcome.failure]
    total = sum(outcome.examples for outcome in outcomes)
    say(f"\n{total:,} inputs; {'failed: ' + ', '.join(failed) if failed else 'no promise broken'}")
    return 1 if failed else 0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
