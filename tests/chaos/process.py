"""What a process holds, from /proc; and what a row may take from it."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """
    Threads, descriptors and resident bytes of a set of processes.

    Connections of the gateway are counted apart: it keeps up to 256 of them in a pool, and they
    are its own to close.
    """

    threads: int
    descriptors: int
    connections: int
    rss_bytes: int

    def text(self) -> str:
        return f"{self.threads} threads, {self.descriptors} fds, {self.rss_bytes / 2**20:.0f} MB"


def usage(pids: Iterable[int], socket_path: Path) -> Usage:
    threads = descriptors = connections = rss = 0
    accepted = _accepted_inodes(socket_path)
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = status(pid)
            threads += fields.get("Threads", 0)
            rss += fields.get("VmRSS", 0) * 1024
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()) in accepted:
                        connections += 1
                    else:
                        descriptors += 1
    return Usage(threads, descriptors, connections, rss)


def _accepted_inodes(socket_path: Path) -> set[str]:
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        # An accepted socket has the name that its listener was bound to, a temporary one here.
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith(str(socket_path)) and fields[5] == "03":
            found.add(f"socket:[{fields[6]}]")
    return found


def status(pid: int) -> dict[str, int]:
    """Return the numbers of /proc/PID/status; sizes in kB."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        first = value.split()
        if first and first[0].isdigit():
            found[name] = int(first[0])
    return found


def reset_peak(pid: int) -> None:
    """Let VmHWM start again from what is resident now."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    return status(pid).get("VmHWM", 0) * 1024


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def limited(pid: int, kind: int, soft: int) -> Iterator[None]:
    """Lower a running process's soft limit for a while."""
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (min(soft, before[1]) if before[1] >= 0 else soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            resource.prlimit(pid, kind, before)
