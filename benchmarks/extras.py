"""
Figures beside the comparison: idle connections, a full pool, more workers.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arena import SOCKETS, Arena, Contender, Run, Series, alternate, make_header, write_tokens
from benchmarks.machine import peak_resident_bytes, resident_bytes
from benchmarks.plugins import POOL_SLOW, SLOW_S

# Kong pools up to 256 connections for each of its workers: eight workers.
OPEN_SOCKETS = 2000
BUSY_SOCKETS = 10

# Events that wait for an identity provider while warm ones go on.
WAITING_EVENTS = 200

_ROUNDS = 3
_RUN_S = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """One figure: what was measured with and without, and how low the ratio may be."""

    name: str
    without: float
    with_it: float
    ratio: float
    bound: float = 0.85
    rss_growth_mib: float | None = None


def measure(arena: Arena, *, progress: Callable[[str], None]) -> list[Extra]:
    """Measure all of them."""
    return [
        two_cores(arena, progress=progress),
        idle_connections(arena, progress=progress),
        waiting_events(arena, progress=progress),
        two_workers(arena, progress=progress),
    ]


def two_cores(arena: Arena, *, progress: Callable[[str], None]) -> Extra:
    """Compare server and generator on one core with both free to use two."""
    with arena.start("ours") as server:
        contender = Contender(name="ours", server=server, tokens=arena.tokens)
        series = alternate(
            {
                "without": functools.partial(arena.run_quietly, contender, pinned=True, seconds=_RUN_S),
                "with": functools.partial(arena.run_quietly, contender, pinned=False, seconds=_RUN_S),
            },
            rounds=2 * _ROUNDS - 1,
            progress=lambda text: progress(f"one core and two: {text}"),
        )
    return _extra("two cores instead of one", series, bound=1.0)


def idle_connections(arena: Arena, *, progress: Callable[[str], None]) -> Extra:
    """Compare the throughput of 10 busy connections with and without 1,990 idle ones."""
    with arena.start("ours") as server:
        contender = Contender(name="ours", server=server, tokens=arena.tokens)
        busy = ("--sockets", BUSY_SOCKETS)
        arena.run(contender, *busy, pinned=True, seconds=0.2)
        before = resident_bytes(server.pids)
        all_open = (*busy, "--idle", OPEN_SOCKETS - BUSY_SOCKETS)
        series = alternate(
            {
                "without": functools.partial(
                    arena.run_quietly, contender, *busy, pinned=True, seconds=_RUN_S
                ),
                "with": functools.partial(
                    arena.run_quietly, contender, *all_open, pinned=True, seconds=_RUN_S
                ),
            },
            rounds=_ROUNDS,
            progress=lambda text: progress(f"{OPEN_SOCKETS} open connections: {text}"),
        )
        grown = peak_resident_bytes(server.pids) - before
    return _extra(
        f"{OPEN_SOCKETS - BUSY_SOCKETS:,} idle connections beside {BUSY_SOCKETS} busy ones",
        series,
        rss_growth=grown,
    )


def waiting_events(arena: Arena, *, progress: Callable[[str], None]) -> Extra:
    """Compare warm throughput with and without 200 events that wait in the pool."""
    rows = [("set", make_header(POOL_SLOW), make_header()) for _ in range(WAITING_EVENTS)]
    warm = [line.split("\t") for line in arena.tokens.read_text().splitlines()]
    both = write_tokens(arena.folder / "slow-and-warm", [*rows, *((a, b, c) for a, b, c in warm)])
    slow = write_tokens(arena.folder / "slow", rows)
    with arena.start("ours", "--threads", str(WAITING_EVENTS), tokens=both) as server:
        contender = Contender(name="ours", server=server, tokens=arena.tokens)

        def run_with_waiting() -> Run:
            with _waiting(arena, server.socket_path, slow):
                return arena.run_quietly(contender, pinned=True, seconds=_RUN_S)

        series = alternate(
            {
                "without": functools.partial(arena.run_quietly, contender, pinned=True, seconds=_RUN_S),
                "with": run_with_waiting,
            },
            rounds=_ROUNDS,
            progress=lambda text: progress(f"{WAITING_EVENTS} waiting events: {text}"),
        )
    return _extra(f"{WAITING_EVENTS} events waiting {SLOW_S} s each in the pool", series)


def two_workers(arena: Arena, *, progress: Callable[[str], None]) -> Extra:
    """Compare one worker with two, not pinned."""
    with ExitStack() as stack:
        measured: dict[str, Callable[[], Run]] = {}
        for name, workers in (("without", "1"), ("with", "2")):
            server = stack.enter_context(arena.start("ours", "--workers", workers))
            contender = Contender(name=name, server=server, tokens=arena.tokens)
            measured[name] = functools.partial(
                arena.run_quietly, contender, "--sockets", 2 * SOCKETS, pinned=False, seconds=_RUN_S
            )
        series = alternate(measured, rounds=_ROUNDS, progress=lambda text: progress(f"two workers: {text}"))
    return _extra("two workers instead of one, two cores", series, bound=0.9)


class _waiting:  # noqa: N801 - used as a with statement's word
    """While this lasts, events wait in the server's pool."""

    def __init__(self, arena: Arena, socket_path: Path, tokens: Path) -> None:
        self._command = [
            *(str(arena.programs["loadgen"]), "--socket", str(socket_path), "--tokens", str(tokens)),
            *("--sockets", str(WAITING_EVENTS), "--events", str(WAITING_EVENTS * 2)),
        ]

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=sys.stderr)
        # Until the first of them come back after 2.5 s nothing but waiting happens.
        time.sleep(0.4)

    def __exit__(self, *_: object) -> None:
        if self._process.wait(60) != 0:
            raise RuntimeError("the waiting events did not end well")


def _extra(
    name: str, series: dict[str, Series], *, bound: float = 0.85, rss_growth: int | None = None
) -> Extra:
    return Extra(
        name=name,
        without=series["without"].median("events_per_s"),
        with_it=series["with"].median("events_per_s"),
        ratio=series["with"].ratio(series["without"], "events_per_s"),
        bound=bound,
        rss_growth_mib=None if rss_growth is None else rss_growth / 2**20,
    )
