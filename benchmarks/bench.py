"""
Compare plugin servers: `python -m benchmarks.bench [--json PATH] [--rounds 5] [--kong auto|yes|no]`.

Contenders run one after the other within each round, so that a slow minute of the machine hits
them all. Pinned means that server and generator share one CPU: no wake-ups across CPUs, the mode
that repeats. What a run costs and what the figures mean: docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import extras, kong, report
from benchmarks.arena import SOCKETS, Arena, Contender, Run, Series, alternate
from benchmarks.machine import describe, preferred
from benchmarks.native import NoCompilerError

DEFAULT_ROUNDS = 5
RUN_S = 0.8

# In the table, but no contender of the JSON.
TABLE_ONLY = ("ours_plugin_default",)


def start_contenders(arena: Arena, names: Sequence[str] | None = None) -> list[Contender]:
    """Start the servers of the comparison, all of them unless *names* says which."""
    makers = {
        "ours": lambda: [Contender(name="ours", server=arena.start("ours"), tokens=arena.tokens)],
        "ours_unpipelined": lambda: [
            Contender(name="ours_unpipelined", server=arena.start("ours_unpipelined"), tokens=arena.tokens)
        ],
        "ours_2": lambda: [
            Contender(name="ours_2", server=arena.start("ours", "--workers", "2"), tokens=arena.tokens)
        ],
        "ours_plugin_warm": lambda: list(arena.token_exchange()),
        "kong_pdk_threads": lambda: [
            Contender(
                name="kong_pdk_threads", server=arena.start("stock"), tokens=arena.tokens, protocol="mp"
            )
        ],
        "kong_pdk_gevent": lambda: [
            Contender(
                name="kong_pdk_gevent",
                server=arena.start("stock", "--gevent"),
                tokens=arena.tokens,
                protocol="mp",
            )
        ],
        "c_floor": lambda: [Contender(name="c_floor", server=arena.start_floor(), tokens=arena.tokens)],
    }
    return [contender for name in names or makers for contender in makers[name]()]


def compare(
    arena: Arena, contenders: Sequence[Contender], *, rounds: int, pinned: bool, seconds: float = RUN_S
) -> dict[str, Series]:
    """Measure *contenders* in alternating rounds."""

    def run(contender: Contender) -> Run:
        return arena.run_quietly(contender, "--sockets", SOCKETS, pinned=pinned, seconds=seconds)

    mode = "one core" if pinned else "two cores"
    return alternate(
        {contender.name: functools.partial(run, contender) for contender in contenders},
        rounds=rounds,
        progress=lambda text: _say(f"{mode}: {text}"),
    )


def by_name(found: report.Found) -> dict[str, Series]:
    """
    Return what `--json` holds: one row a contender.

    That is its row on one core; of two workers, which are for two cores, the other one, and
    `ours_unpinned` beside it to compare with. Under Kong there is one only.
    """
    rows = {**found.pinned, **found.kong}
    if found.unpinned:
        rows |= {"ours_2": found.unpinned["ours_2"], "ours_unpinned": found.unpinned["ours"]}
    return rows


def as_json(series: Mapping[str, Series]) -> dict[str, dict[str, float]]:
    """Return the medians in the form of `--json`."""
    return {
        name: {figure: round(one.median(figure), 2) for figure in report.FIGURES}
        for name, one in series.items()
        if name not in TABLE_ONLY
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description="Compare plugin servers.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the medians as JSON")
    parser.add_argument(
        "--record", type=Path, metavar="PATH", help="also write every round, ratios and the machine"
    )
    parser.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, metavar="N", help="rounds (default: 5)")
    parser.add_argument(
        "--kong",
        choices=["auto", "yes", "no"],
        default="auto",
        help="measure under a real Kong, too (default: auto)",
    )
    parser.add_argument("--quick", action="store_true", help="the pinned comparison alone")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        with preferred(), Arena() as arena:
            found = _measure(arena, options)
    except NoCompilerError as exc:
        print(exc, file=sys.stderr)
        return 2
    recorded = report.record(found)
    print(report.text(recorded))
    print(f"\n{time.monotonic() - started:.0f} s")
    if options.json is not None:
        _write(options.json, as_json(by_name(found)))
    if options.record is not None:
        _write(options.record, recorded)
    return 0


def _measure(arena: Arena, options: argparse.Namespace) -> report.Found:
    _say("starting the servers; the token-exchange plugin exchanges all its tokens once")
    contenders = start_contenders(arena)
    found = report.Found(machine=describe(), rounds=options.rounds)
    found.pinned = compare(arena, contenders, rounds=options.rounds, pinned=True)
    if options.quick:
        return found
    found.unpinned = compare(arena, contenders, rounds=max(3, options.rounds - 2), pinned=False)
    found.extras = extras.measure(arena, progress=_say)
    if options.kong != "no":
        reason = kong.missing()
        if reason is None:
            found.kong, found.kong_single = kong.measure(arena, rounds=options.rounds, progress=_say)
        elif options.kong == "yes":
            raise SystemExit(f"no run under Kong: {reason}")
        else:
            found.notes.append(f"not measured under Kong: {reason}")
    return found


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
