"""SIGUSR1 to a server that runs: each worker writes its counters, and everything goes on."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kong_token_exchange.pluginserver.ready import is_ready
from tests.support.running import WAIT_S, eventually

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_writes_one_line_and_goes_on(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = ["-m", "kong_token_exchange", "serve", "--socket", str(path), "--workers", str(workers)]
    server = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert server.stderr is not None
        for line in server.stderr:
            if "kong_token_exchange.metrics" in line:
                lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        eventually(lambda: is_ready(str(path), timeout_s=1))
        for _ in range(2):
            pids = set()
            # A worker that has just been started may not know the signal yet: it is sent until all answer.
            while len(pids) < workers:
                os.kill(server.pid, signal.SIGUSR1)
                report = json.loads(lines.get(timeout=WAIT_S).partition(": ")[2])
                assert "counters" == report["event"]
                pids.add(report["pid"])
            assert (server.pid in pids) is (workers == 1)
        assert server.poll() is None
        assert is_ready(str(path), timeout_s=WAIT_S)
    finally:
        server.terminate()
        assert 0 == server.wait(WAIT_S)
        reader.join(WAIT_S)
        assert server.stderr is not None
        server.stderr.close()
