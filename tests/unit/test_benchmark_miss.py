"""The benchmark of misses still runs and adds up; its figures are no test's business."""

import contextlib
import json
from pathlib import Path

import pytest

from benchmarks import miss


def test_a_short_run_gives_figures_that_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "miss.json"

    assert 0 == miss.main(["--misses", "4", "--rounds", "1", "--json", str(record)])

    found = json.loads(record.read_text())
    parts = found["miss_cpu_us"]
    assert set(miss.PARTS) == set(parts)
    assert all(value > 0 for value in parts.values())
    signatures = parts["subject signature"] + parts["result signature"]
    assert found["miss_cpu_us_beside_signatures"] == pytest.approx(sum(parts.values()) - signatures)
    assert set(found["clients"]["plain"]) == set(found["clients"]["tls"]) >= {"requests.Session"}
    printed = capsys.readouterr().out
    assert "| CPU of a miss beside signature checks, us |" in printed
    assert "| subject signature |" in printed


def test_a_hit_is_not_taken_for_a_miss(tmp_path: Path) -> None:
    stage = miss.Stage(tmp_path)
    with miss.StubIssuer(stage.settings()) as stub, contextlib.closing(stage.shells):
        flow = stage.flow(f"http://localhost:{stub.plain_port}", miss.TOKEN_PATH)
        (token,) = stage.tokens(1)
        miss.miss(flow, token)

        with pytest.raises(RuntimeError, match="no miss"):
            miss.miss(flow, token)
        assert 1 == len(stub.own_times())
