"""
Compile the programs in `native/` into a folder, and run the load generator.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
PROGRAMS = ("loadgen", "floor", "upstream")

# Beyond any run's own bound: the generator gives up by itself when nothing comes for 30 s.
_TIMEOUT_S = 240.0


class NoCompilerError(Exception):
    """There is no C compiler, so nothing can be measured."""

    def __init__(self) -> None:
        super().__init__(
            "the benchmark needs a C compiler: install gcc (Debian: apt-get install gcc libc6-dev)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run of the load generator; times in microseconds, CPU time of the server's processes."""

    events: int
    seconds: float
    events_per_s: float
    cpu_us_per_event: float
    own_cpu_us_per_event: float
    p50_us: float
    p99_us: float
    calls_per_event: float
    exits: int
    vanished: int
    connects: int


def find_compiler() -> str | None:
    """Return the C compiler: `$CC`, else `cc`; None where there is none."""
    return shutil.which(os.environ.get("CC") or "cc")


def build(folder: Path) -> dict[str, Path]:
    """
    Compile every program into *folder*.

    Returns:
        The programs by name.

    Raises:
        NoCompilerError: no compiler is here.
        RuntimeError: the compiler refused a source; its words are in the message.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError
    built = {}
    for name in PROGRAMS:
        target = folder / name
        files = ["-o", str(target), str(SOURCES / f"{name}.c")]
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Wno-unused-function", *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"{name}.c does not compile:\n{done.stderr}")
        built[name] = target
    return built


def pinned(command: Sequence[str | Path], cpu: int | None) -> list[str]:
    """Return *command* bound to one CPU, or free to move when *cpu* is None."""
    words = [str(word) for word in command]
    return words if cpu is None else ["taskset", "-c", str(cpu), *words]


def run_loadgen(loadgen: Path, arguments: Sequence[str | Path], *, cpu: int | None = None) -> Result:
    """
    Run the load generator once.

    Raises:
        RuntimeError: it found a mistake in what the server does.
    """
    done = subprocess.run(
        pinned([loadgen, *arguments], cpu), capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load generator says: {done.stderr.strip()}")
    return Result(**json.loads(done.stdout))
