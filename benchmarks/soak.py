"""
Nothing grows: `python -m benchmarks.soak [--events 200000]`.

One server gets many events, of which one in ten is refused, one in a hundred raises an exception
(on the loop or in the pool), one in a hundred goes through the pool, and one client in a hundred
leaves in the middle. Then its threads, descriptors and memory must be what they were, within 10 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from benchmarks.arena import Arena, Contender, make_header, write_tokens
from benchmarks.machine import resident_bytes
from benchmarks.native import NoCompilerError
from benchmarks.plugins import POOL, POOL_RAISE, POOL_SLOW, RAISE

DEFAULT_EVENTS = 200_000
VANISH_EVERY = 100

# What a fresh server still has to allocate is no growth, nor are threads that it may have.
_WARMUP_EVENTS = 20_000
_THREADS = 4

_ALLOWED_GROWTH = 0.10
# Descriptors are closed within a second after an exit.
_SETTLE_S = 10.0

# Of a thousand tokens: how many are of which kind.
_KINDS = (
    ("exit", "", "401", 100),
    ("exit", RAISE, "500", 5),
    ("exit", POOL_RAISE, "500", 5),
    ("set", POOL, "", 10),
)
_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a server holds."""

    threads: int
    descriptors: int
    resident_kib: int

    def grown(self, before: Holdings) -> list[str]:
        """Name what is more than 10 % above *before*."""
        names = [field.name for field in fields(self)]
        return [name for name in names if getattr(self, name) > getattr(before, name) * (1 + _ALLOWED_GROWTH)]


def holdings(pids: Sequence[int]) -> Holdings:
    """Return what the processes hold now."""
    return Holdings(
        threads=_count(f"/proc/{pid}/task" for pid in pids),
        descriptors=_count(f"/proc/{pid}/fd" for pid in pids),
        resident_kib=resident_bytes(pids) // 1024,
    )


def _count(folders: Iterable[str]) -> int:
    return sum(1 for folder in folders for _ in Path(folder).iterdir())


def mixed_tokens(path: Path) -> Path:
    """Write a token file in which the kinds are spread evenly."""
    rows = [
        (kind, make_header(prefix), status or make_header())
        for kind, prefix, status, count in _KINDS
        for _ in range(count)
    ]
    rows += [("set", make_header(), make_header()) for _ in range(_TOKENS - len(rows))]
    # 379 and 1000 have no common factor, so every row is taken once, far from its neighbours.
    return write_tokens(path, [rows[index * 379 % _TOKENS] for index in range(_TOKENS)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; the exit status says whether anything has grown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Nothing grows.")
    parser.add_argument(
        "--events", type=int, default=DEFAULT_EVENTS, metavar="N", help="events (default: 200000)"
    )
    options = parser.parse_args(arguments)
    try:
        with Arena() as arena:
            return _soak(arena, options.events)
    except NoCompilerError as exc:
        print(exc, file=sys.stderr)
        return 2


def _soak(arena: Arena, events: int) -> int:
    tokens = mixed_tokens(arena.folder / "mixed")
    slow_rows = [("set", make_header(POOL_SLOW), make_header()) for _ in range(_THREADS)]
    slow = write_tokens(arena.folder / "slow", slow_rows)
    known = arena.folder / "known"
    known.write_text(tokens.read_text() + slow.read_text())
    server = arena.start("ours", "--threads", str(_THREADS), tokens=known)
    contender = Contender(name="ours", server=server, tokens=tokens)
    vanishing = ("--vanish-every", VANISH_EVERY)
    # One slow event for each thread of the pool, all at once: from now on all threads are there.
    everyone = ("--sockets", _THREADS, "--events", _THREADS)
    arena.run(replace(contender, tokens=slow), *everyone, pinned=False, seconds=0)
    arena.run(contender, *vanishing, "--events", _WARMUP_EVENTS, pinned=False, seconds=0)
    before = _settled(server.pids, None)
    result = arena.run(contender, *vanishing, "--events", events, pinned=False, seconds=0)
    after = _settled(server.pids, before)
    print(f"{result.events:,} events, {result.exits:,} exits, {result.vanished:,} clients that left")
    print(f"{'':14}{'before':>10}{'after':>10}")
    for field in fields(Holdings):
        print(f"{field.name:14}{getattr(before, field.name):>10,}{getattr(after, field.name):>10,}")
    grown = after.grown(before)
    print(f"grown: {', '.join(grown)}" if grown else "nothing has grown by more than 10 %")
    return 1 if grown else 0


def _settled(pids: Sequence[int], before: Holdings | None) -> Holdings:
    """Wait until descriptors are few again; without *before*, until they stay the same for a second."""
    deadline = time.monotonic() + _SETTLE_S
    now = holdings(pids)
    while time.monotonic() < deadline:
        time.sleep(0.1 if before is not None else 1.2)
        last, now = now, holdings(pids)
        if now.descriptors <= (before.descriptors if before is not None else last.descriptors):
            break
    return now


if __name__ == "__main__":
    sys.exit(main())
