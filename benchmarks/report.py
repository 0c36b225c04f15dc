"""
What was found, as text for a terminal, as JSON for a record, and from a record as Markdown.

    python -m benchmarks.report benchmarks/results.json                                prints Markdown
    python -m benchmarks.report benchmarks/results.json --write docs/performance.md    puts it there
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.arena import SOCKETS, Series
from benchmarks.extras import Extra

# What the JSON of a contender holds, and the heads of the columns.
FIGURES = {
    "events_per_s": "events/s",
    "cpu_us_per_event": "CPU us/event",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
}

BEGIN, END = "<!-- figures: python -m benchmarks.report -->", "<!-- /figures -->"


@dataclass(slots=True)
class Found:
    """Everything one run of the benchmark has measured."""

    machine: Mapping[str, str]
    rounds: int
    pinned: dict[str, Series] = field(default_factory=dict)
    unpinned: dict[str, Series] = field(default_factory=dict)
    kong: dict[str, Series] = field(default_factory=dict)
    kong_single: dict[str, Series] = field(default_factory=dict)
    extras: list[Extra] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that must be at least, or at most, so much."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Tell whether it is."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


_TITLES = {
    "pinned": f"Server and generator on one core, {SOCKETS} sockets",
    "unpinned": f"Not pinned, {SOCKETS} sockets",
    "kong": "Under Kong, one nginx worker, 32 connections",
    "kong_single": "Under Kong, one connection",
}


# --- out ------------------------------------------------------------------------------


def record(found: Found) -> dict[str, Any]:
    """Return everything for a file: medians, every round, ratios against their bounds."""
    return {
        "machine": dict(found.machine),
        "rounds": found.rounds,
        "tables": {name: _table(getattr(found, name)) for name in _TITLES if getattr(found, name)},
        "extras": [asdict(extra) for extra in found.extras],
        "targets": [{**asdict(target), "met": target.met} for target in targets(found)],
        "notes": found.notes,
    }


def _table(series: Mapping[str, Series]) -> dict[str, Any]:
    return {
        name: {
            "medians": {figure: round(one.median(figure), 2) for figure in FIGURES},
            # How many cores somebody else used meanwhile: what to think of the row.
            "others_cores": round(max(run.others for run in one.runs), 2),
            "rounds": [asdict(run.result) for run in one.runs],
        }
        for name, one in series.items()
    }


def text(record: Mapping[str, Any]) -> str:
    """Return a record as tables for a terminal."""
    lines = [", ".join(record["machine"].values()), f"medians of {record['rounds']} alternating rounds"]
    heads = [*FIGURES.values(), "of others"]
    for name, rows in record["tables"].items():
        lines += ["", f"{_TITLES[name]:40}" + "".join(f"{head:>14}" for head in heads)]
        for contender, row in rows.items():
            cells = [*(_number(value) for value in row["medians"].values()), str(row["others_cores"])]
            lines.append(f"  {contender:38}" + "".join(f"{cell:>14}" for cell in cells))
    if record["extras"]:
        lines += ["", f"{'Our server, events/s':54}{'without':>14}{'with':>14}{'ratio':>14}"]
    for extra in record["extras"]:
        cells = [_number(extra["without"]), _number(extra["with_it"]), f"{extra['ratio']:.2f}"]
        lines.append(f"  {extra['name']:52}" + "".join(f"{cell:>14}" for cell in cells))
    lines += ["", "Ratios: medians of the rounds' ratios"]
    for name, value, bound, met in _target_cells(record):
        lines.append(f"  {name:66}{value:>8}   {bound}{'' if met else '   MISSED'}")
    return "\n".join([*lines, *record["notes"]])


def markdown(record: Mapping[str, Any]) -> str:
    """Return a record as the tables of docs/performance.md."""
    machine = record["machine"]
    lines = [
        f"{machine['cpus']}, {machine['memory']}, Linux {machine['kernel']}, CPython {machine['python']}.",
        f"Medians of {record['rounds']} alternating rounds.",
    ]
    head = " | ".join([*FIGURES.values(), "others, cores"])
    for name, rows in record["tables"].items():
        lines += ["", f"### {_TITLES[name]}", "", f"| | {head} |", "|---" + "|---:" * 5 + "|"]
        for contender, row in rows.items():
            cells = " | ".join(_number(value) for value in row["medians"].values())
            lines.append(f"| `{contender}` | {cells} | {row['others_cores']:.2f} |")
    if record["extras"]:
        lines += ["", "### Our server, events/s", "", "| | without | with | ratio |", "|---|---:|---:|---:|"]
    for extra in record["extras"]:
        cells = f"{_number(extra['without'])} | {_number(extra['with_it'])} | {extra['ratio']:.2f}"
        lines.append(f"| {extra['name']} | {cells} |")
    lines += ["", "### Ratios", "", "| | measured | wanted | |", "|---|---:|---|---|"]
    for name, value, bound, met in _target_cells(record):
        lines.append(f"| {name} | {value} | {bound} | {'met' if met else '**missed**'} |")
    return "\n".join([*lines, *(f"\n{note}." for note in record["notes"])])


def insert(page: str, record: Mapping[str, Any]) -> str:
    """
    Return *page* with the figures between its marks replaced.

    Raises:
        ValueError: the page has no marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the page")
    return f"{head}{BEGIN}\n{markdown(record)}\n{END}{tail}"


def _target_cells(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    for target in record["targets"]:
        word = "at least" if target["at_least"] else "at most"
        yield target["name"], f"{target['value']:.2f}", f"{word} {target['bound']:g}", target["met"]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# --- what the project has set itself --------------------------------------------------


def targets(found: Found) -> list[Target]:
    """Return the ratios that count, as measured: medians of the rounds' ratios."""
    return [*_server_targets(found), *_extra_targets(found.extras), *_kong_targets(found)]


def _server_targets(found: Found) -> list[Target]:
    rate, cpu = "events_per_s", "cpu_us_per_event"
    pinned = found.pinned
    ours = pinned["ours"]
    return [
        Target("events/s, ours : kong-pdk threads", ours.ratio(pinned["kong_pdk_threads"], rate), 8),
        Target("events/s, ours : kong-pdk gevent", ours.ratio(pinned["kong_pdk_gevent"], rate), 4),
        Target("CPU per event, ours : C floor", ours.ratio(pinned["c_floor"], cpu), 4, at_least=False),
        Target("events/s, pipelined : not pipelined", ours.ratio(pinned["ours_unpipelined"], rate), 1.1),
        Target(
            "CPU per event, plugin warm : ours",
            pinned["ours_plugin_warm"].ratio(ours, cpu),
            1.6,
            at_least=False,
        ),
    ]


def _extra_targets(extras: Sequence[Extra]) -> list[Target]:
    measured = []
    for extra in extras:
        measured.append(Target(f"events/s with {extra.name} : without", extra.ratio, extra.bound))
        if extra.rss_growth_mib is not None:
            measured.append(
                Target("memory of those connections, MiB", extra.rss_growth_mib, 30, at_least=False)
            )
    return measured


def _kong_targets(found: Found) -> list[Target]:
    if not found.kong:
        return []
    rate, ours = "events_per_s", found.kong["kong_ours_1"]
    single = {name: one.median("p50_us") for name, one in found.kong_single.items()}
    added = {name: p50 - single["kong_none"] for name, p50 in single.items()}
    latency = added["kong_ours_1"] / added["kong_pdk_gevent"]
    return [
        Target("Kong, requests/s, ours : C floor", ours.ratio(found.kong["kong_c_floor"], rate), 0.9),
        Target(
            "Kong, requests/s, ours : kong-pdk threads", ours.ratio(found.kong["kong_pdk_threads"], rate), 3.5
        ),
        Target(
            "Kong, requests/s, ours : kong-pdk gevent", ours.ratio(found.kong["kong_pdk_gevent"], rate), 1.8
        ),
        Target("Kong, requests/s, two workers : one", found.kong["kong_ours_2"].ratio(ours, rate), 0.9),
        Target("Kong, added p50 at one connection, ours : kong-pdk gevent", latency, 0.6, at_least=False),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a record as Markdown, or write it into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Show a recorded benchmark."
    )
    parser.add_argument("record", type=Path, help="what `benchmarks.bench --record` wrote")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the figures in this page")
    options = parser.parse_args(arguments)
    found = json.loads(options.record.read_text(encoding="utf-8"))
    if options.write is None:
        print(markdown(found))
    else:
        options.write.write_text(insert(options.write.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
