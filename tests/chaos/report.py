"""The table of docs/resilience.md, between its marks."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.chaos.run import VERDICTS, Result

BEGIN = "<!-- written by python -m tests.chaos: begin -->"
END = "<!-- written by python -m tests.chaos: end -->"

_COLUMNS = ("id", "gateway", "fault", "expected", "seen", "upstream saw", "recovery", "requests", "verdict")


def write(
    path: Path, results: Sequence[Result], *, command: str, seconds: float, rate: float, deadline_ms: int
) -> None:
    """Put the results of one run between the marks of *path*."""
    before = path.read_text(encoding="utf-8") if path.exists() else f"# Resilience\n\n{BEGIN}\n{END}\n"
    if BEGIN not in before or END not in before:
        before += f"\n{BEGIN}\n{END}\n"
    head, _, rest = before.partition(BEGIN)
    tail = rest.partition(END)[2]
    middle = _render(results, command=command, seconds=seconds, rate=rate, deadline_ms=deadline_ms)
    path.write_text(f"{head}{BEGIN}\n{middle}\n{END}{tail}", encoding="utf-8")


def _render(results: Sequence[Result], *, command: str, seconds: float, rate: float, deadline_ms: int) -> str:
    counts = Counter(result.verdict for result in results)
    gateways = sorted({result.gateway for result in results if result.verdict != "not run"})
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("requests", "urllib3", "PyJWT", "cryptography")
    )
    machine = f"{os.cpu_count()} processors, {platform.system()} {platform.machine()}"
    lines = [
        f"Made by `{command}` in {seconds:.0f} s.",
        "",
        f"- machine: virtual machine, {machine}, shared with other work",
        f"- gateways: {', '.join(gateways)}",
        "- identity provider: the suite's own, over the sandbox issuer",
        f"- Python {platform.python_version()}, {libraries}",
        f"- {rate:.0f} requests a second beside each fault, good and bad; deadline {deadline_ms} ms",
        f"- {sum(result.sent for result in results)} requests in all",
        f"- beside what issuers and clients did: {_made(results)}",
        "- " + ", ".join(f"{counts[name]} {word}" for name, word in VERDICTS.items()),
        "",
    ]
    for section in dict.fromkeys(result.row.section for result in results):
        lines += [
            f"### {section}",
            "",
            _table([result for result in results if result.row.section == section]),
            "",
        ]
    return "\n".join(lines)


def _made(results: Sequence[Result]) -> str:
    made: Counter[str] = Counter()
    for result in results:
        made.update(result.made)
    return ", ".join(f"{count} {name}" for name, count in sorted(made.items())) or "nothing"


def _table(results: Sequence[Result]) -> str:
    rows = [_cells(result) for result in sorted(results, key=_order)]
    head = "| " + " | ".join(_COLUMNS) + " |"
    rule = "|" + "---|" * len(_COLUMNS)
    return "\n".join([head, rule, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _order(result: Result) -> tuple[int, str, str]:
    digits = re.search(r"\d+", result.row.id)
    return int(digits[0]) if digits else 0, result.row.id, result.gateway


def _cells(result: Result) -> list[str]:
    verdict = result.verdict
    remarks = "; ".join(result.remarks)
    cells = [
        result.row.id.removeprefix("FAULT-"),
        result.gateway,
        result.row.fault,
        result.row.expected,
        re.sub(r"(\w)x(\d)", "\\1 x \\2", result.seen),
        result.upstream,
        result.recovery,
        str(result.sent or ""),
        f"**{verdict}**" + (f": {remarks}" if remarks else ""),
    ]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]
