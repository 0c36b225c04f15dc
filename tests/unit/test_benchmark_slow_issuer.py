"""The benchmark of a slow issuer still runs; its figures are no test's business."""

import json
from pathlib import Path

import pytest

from benchmarks import slow_issuer
from benchmarks.native import find_compiler
from benchmarks.slow_issuer import Figures

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler: cc")


def test_a_short_run_gives_plausible_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TOKENS", 20), ("ISSUER_S", 0.2), ("RUN_S", 0.5)):
        monkeypatch.setattr(slow_issuer, name, value)
    monkeypatch.setattr(slow_issuer, "CROWDS", {"a few": (3, 1), "many with one": (1, 50)})
    record = tmp_path / "slow.json"

    assert 0 == slow_issuer.main(["--rounds", "1", "--rate", "200", "--json", str(record)])

    found = json.loads(record.read_text())["cached_requests"]
    assert ["nobody", "a few", "many with one"] == list(found)
    assert all(0 < one["p50_us"] <= one["p99_us"] for one in found.values())
    assert "| many with one |" in capsys.readouterr().out


@pytest.mark.parametrize(("p99_us", "verdict"), [(11_999, "met"), (12_001, "**missed**")])
def test_the_growth_of_p99_is_judged(p99_us: float, verdict: str) -> None:
    alone = Figures(name="nobody", p50_us=100, p99_us=2_000)

    row = slow_issuer.text([alone, Figures(name="many", p50_us=100, p99_us=p99_us)]).splitlines()[-1]

    assert f"| below 10: {verdict} |" in row
