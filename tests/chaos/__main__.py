"""
The chaos suite: `python -m tests.chaos [--long] [--only FAULT-80,...] [--gateway sandbox|kong|all]`.

Exit status 1 when a row fails. With `--report docs/resilience.md` the table is written there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import report
from tests.chaos.rows import ROWS, rows_for
from tests.chaos.run import VERDICTS, Result
from tests.chaos.runner import RATE, Runner
from tests.chaos.stage import DEADLINE_MS
from tests.support.gateways import ROOT, kong_version

# Both forms end by themselves: rows not begun by then count as failed, and what still runs a
# while later is ended.
SHORT_S, LONG_S = 600.0, 3600.0
_LAST_ROW_S = {False: 30.0, True: 240.0}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Ended from outside, it still stops what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    only = {name.strip().upper() for name in options.only.split(",") if name.strip()}
    unknown = only - {row.id.upper() for row in ROWS}
    if unknown:
        _say(f"no such row: {', '.join(sorted(unknown))}", error=True)
        return 2
    kinds = _gateways(options.gateway)
    if not kinds:
        _say("gateway kong: no `kong` on PATH", error=True)
        return 2
    began = time.monotonic()
    several = len(kinds) > 1
    results = _run_side_by_side(kinds, options) if several else _run_here(kinds[0], only, options)
    seconds = time.monotonic() - began
    if options.results is not None:
        _write_results(options.results, results)
        return 0
    _summary(results, kinds, seconds)
    if options.report is not None:
        command = "make chaos LONG=1" if options.long else "make chaos"
        report.write(
            options.report, results, command=command, seconds=seconds, rate=RATE, deadline_ms=DEADLINE_MS
        )
    return 1 if any(result.verdict == "fail" for result in results) else 0


def bound_s(*, long: bool) -> float:
    """Return what one run may take."""
    return LONG_S if long else SHORT_S


def _run_here(kind: str, only: set[str], options: argparse.Namespace) -> list[Result]:
    rows = rows_for(kind, everything=options.long or not options.lane or bool(only))
    chosen = [row for row in rows if not only or row.id.upper() in only]
    _say(f"{kind}: {len(chosen)} rows, load {os.getloadavg()[0]:.1f}")
    deadline = time.monotonic() + bound_s(long=options.long) - _LAST_ROW_S[options.long]
    return Runner(kind, long=options.long, tell=_say, deadline=deadline).run(chosen)


def _run_side_by_side(kinds: Sequence[str], options: argparse.Namespace) -> list[Result]:
    """Run each gateway's rows in a process of its own: most of the time goes by in waiting."""
    with tempfile.TemporaryDirectory(prefix="kte-chaos-") as folder:
        lanes = []
        for kind in kinds:
            command = [
                sys.executable,
                "-m",
                "tests.chaos",
                "--gateway",
                kind,
                "--only",
                options.only,
                "--lane",
            ]
            command += ["--results", str(Path(folder, kind))] + (["--long"] if options.long else [])
            lanes.append(subprocess.Popen(command, cwd=ROOT))
        try:
            end = time.monotonic() + bound_s(long=options.long)
            for lane in lanes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    lane.wait(max(0.0, end - time.monotonic()))
        finally:
            for lane in lanes:
                if lane.poll() is None:
                    lane.terminate()
                    lane.wait()
        results: list[Result] = []
        for kind in kinds:
            found = _read_results(Path(folder, kind), kind)
            results += [result for result in found if not _told_already(result, results)]
        return results


def _write_results(path: Path, results: Sequence[Result]) -> None:
    documents = []
    for result in results:
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        documents.append({**fields, "row": result.row.id})
    path.write_text(json.dumps(documents), encoding="utf-8")


def _read_results(path: Path, kind: str) -> list[Result]:
    rows = {row.id: row for row in ROWS}
    if not path.exists():
        return [
            Result(row=ROWS[0], gateway=kind, verdict="fail", remarks=["the run on this gateway ended early"])
        ]
    documents = json.loads(path.read_text(encoding="utf-8"))
    return [Result(**{**document, "row": rows[document["row"]]}) for document in documents]


def _say(text: str, *, error: bool = False) -> None:
    print(text, flush=True, file=sys.stderr if error else sys.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults under real traffic.")
    parser.add_argument(
        "--long", action="store_true", help="full length, an hour at most, instead of 10 minutes"
    )
    parser.add_argument("--only", default="", metavar="ID,...", help="only these rows, as FAULT-80")
    parser.add_argument("--gateway", choices=["sandbox", "kong", "all"], default="all")
    # How one gateway's rows are run beside another's.
    parser.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, metavar="PATH", help="write the table there")
    return parser


def _gateways(chosen: str) -> list[str]:
    present = ["sandbox"] + (["kong"] if kong_version() is not None else [])
    if chosen == "all":
        if "kong" not in present:
            _say("gateway kong: no `kong` on PATH, the sandbox alone is used")
        return present
    return [kind for kind in present if kind == chosen]


def _told_already(result: Result, results: Sequence[Result]) -> bool:
    """A row that is not run has one reason, whatever the gateway."""
    return result.verdict == "not run" and any(
        other.row is result.row and other.verdict == "not run" for other in results
    )


def _summary(results: Sequence[Result], kinds: Sequence[str], seconds: float) -> None:
    counts = Counter(result.verdict for result in results)
    sent = sum(result.sent for result in results)
    _say(f"\nbackends: gateway={'|'.join(kinds)}   {sent} requests in {seconds:.0f} s")
    _say(", ".join(f"{counts[name]} {word}" for name, word in VERDICTS.items()))
    for result in results:
        if result.verdict == "fail":
            _say(f"  {result.row.id} on {result.gateway}: {'; '.join(result.remarks)}")


if __name__ == "__main__":
    sys.exit(main())
