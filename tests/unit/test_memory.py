"""CACHE-17: a flood of valid tokens, scaled; at full length `python -m benchmarks.memory`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A quarter of these tokens fills the cache.
TOKENS, MIB = 8_000, 16


def test_cache_17_fault_112_a_flood_of_valid_tokens_stays_within_the_bound_and_a_fifth() -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--tokens", str(TOKENS), "--cache-size", str(MIB)]

    # A process of its own: this one's memory has seen other tests.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert 0 == done.returncode, done.stderr
    figures = json.loads(done.stdout)
    assert figures["holds"]
    assert figures["grown"] <= 1.2 * MIB * 2**20
    # The bound was reached, and whatever is not kept was counted.
    assert 0.95 * MIB * 2**20 <= figures["weighed"] <= MIB * 2**20
    kept = figures["kept_verified"] + figures["kept_exchanged"]
    assert 2 * TOKENS == kept + figures["evictions"]
    assert 0 < kept < TOKENS
