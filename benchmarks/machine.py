"""
What the machine does while something is measured: CPU time of processes, of everybody else, memory.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

NICENESS = -10


def process_tree(pid: int) -> list[int]:
    """Return *pid* and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    tree, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        tree.append(current)
        waiting += children.get(current, [])
    return tree


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return user and system time of *pids*, all their threads, by the kernel's exact clock."""
    # The clock id of another process, as clock_getcpuclockid(3) makes it.
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of *pids*."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * _PAGE


def peak_resident_bytes(pids: Iterable[int]) -> int:
    """Return the most resident memory that *pids* ever had, each by itself."""
    peaks = (
        line.split()[1]
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return sum(map(int, peaks)) * 1024


def set_affinity(pids: Iterable[int], cpus: Iterable[int]) -> None:
    """Bind every thread of *pids* to *cpus*."""
    wanted = set(cpus)
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), wanted)


@contextlib.contextmanager
def preferred() -> Iterator[None]:
    """Let this process, its children and its session go before others, as far as the user may."""
    prefer_session(os.getpid(), NICENESS)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    try:
        yield
    finally:
        prefer_session(os.getpid(), 0)


def prefer_session(pid: int, niceness: int = NICENESS) -> None:
    """Set the niceness of a session: where Linux groups tasks by session, a task's own counts within."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


class Watch:
    """
    How much of some CPUs others took, in cores, from its making to `others()`.

    Args:
        pids: Whose CPU time is no disturbance, beside this process and its ended children.
        cpus: Which CPUs are looked at; all of them when None.
    """

    def __init__(self, pids: Iterable[int], cpus: Iterable[int] | None = None) -> None:
        self._pids = list(pids)
        self._lines = {"cpu"} if cpus is None else {f"cpu{cpu}" for cpu in cpus}
        self._wall, self._busy, self._own = time.monotonic(), self._busy_seconds(), self._own_seconds()

    def others(self) -> float:
        """Return the cores that anybody else used; what the hypervisor took counts."""
        wall = time.monotonic() - self._wall
        busy = self._busy_seconds() - self._busy
        return max(0.0, (busy - (self._own_seconds() - self._own)) / wall)

    def _own_seconds(self) -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cpu_seconds(self._pids) + time.process_time() + children.ru_utime + children.ru_stime

    def _busy_seconds(self) -> float:
        ticks = 0
        for line in Path("/proc/stat").read_text().splitlines():
            name, *fields = line.split()
            if name in self._lines:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                ticks += user + nice + system + irq + softirq + steal
        return ticks / _TICKS


def describe() -> dict[str, str]:
    """Return what a reader must know of the machine, without its name."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    model = next((value.strip() for name, value in facts.items() if name.startswith("model name")), "unknown")
    virtual = (
        "hypervisor" in next((value for name, value in facts.items() if name.startswith("flags")), "").split()
    )
    memory = os.sysconf("SC_PHYS_PAGES") * _PAGE / 2**30
    return {
        "cpus": f"{len(os.sched_getaffinity(0))} {'virtual ' if virtual else ''}CPUs, {model}",
        "memory": f"{memory:.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }
