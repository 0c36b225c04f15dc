"""The benchmark still builds, runs and says something plausible; its figures are no test's business."""

from collections.abc import Iterator

import pytest

from benchmarks import bench, kid_spray, report
from benchmarks.arena import Arena, Contender, make_header, write_tokens
from benchmarks.native import PROGRAMS, find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler: cc")

SERVERS = ("ours", "ours_unpipelined", "ours_2", "kong_pdk_threads", "kong_pdk_gevent", "c_floor")


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    with Arena() as arena:
        yield arena


def test_every_c_source_compiles(arena: Arena) -> None:
    assert set(PROGRAMS) == {name for name, path in arena.programs.items() if path.exists()}


@pytest.fixture(scope="module")
def round_of_each(arena: Arena) -> dict[str, bench.Series]:
    contenders = bench.start_contenders(arena, SERVERS)
    return bench.compare(arena, contenders, rounds=1, pinned=True, seconds=0.3)


@pytest.mark.parametrize("name", SERVERS)
def test_a_short_round_gives_plausible_figures(name: str, round_of_each: dict[str, bench.Series]) -> None:
    figures = bench.as_json(round_of_each)[name]

    assert set(figures) == {"events_per_s", "cpu_us_per_event", "p50_us", "p99_us"}
    assert figures["events_per_s"] > 100
    assert 0.1 < figures["cpu_us_per_event"] < 1e6 / figures["events_per_s"] * 2
    assert 0 < figures["p50_us"] <= figures["p99_us"]


def test_row_of_two_workers_is_the_one_on_two_cores() -> None:
    pinned, unpinned, kong = ({name: bench.Series() for name in ("ours", "ours_2")} for _ in range(3))
    found = report.Found(
        machine={}, rounds=1, pinned=pinned, unpinned=unpinned, kong={"kong_ours_2": kong["ours"]}
    )
    rows = bench.by_name(found)

    assert {"ours", "ours_2", "ours_unpinned", "kong_ours_2"} == set(rows)
    assert rows["ours"] is pinned["ours"]
    assert rows["ours_2"] is unpinned["ours_2"]
    assert rows["ours_unpinned"] is unpinned["ours"]
    assert {"ours", "ours_2"} == set(bench.by_name(report.Found(machine={}, rounds=1, pinned=pinned)))


def test_each_event_of_the_workload_is_one_get_and_one_set(round_of_each: dict[str, bench.Series]) -> None:
    assert dict.fromkeys(SERVERS, 2.0) == {
        name: series.median("calls_per_event") for name, series in round_of_each.items()
    }


def test_a_wrong_header_value_ends_the_load_generator(arena: Arena) -> None:
    expecting_others = [
        ("set", line.split("\t")[1], make_header()) for line in arena.tokens.read_text().splitlines()
    ]
    contender = Contender(
        name="c_floor",
        server=arena.start_floor(),
        tokens=write_tokens(arena.folder / "other-tokens", expecting_others),
    )

    with pytest.raises(RuntimeError, match="wrong header value"):
        arena.run(contender, pinned=False, seconds=0.1)


def test_a_ratio_beyond_its_bound_is_a_missed_target() -> None:
    assert report.Target("at least", 8.0, 8).met
    assert not report.Target("at least", 7.9, 8).met
    assert report.Target("at most", 4.0, 4, at_least=False).met
    assert not report.Target("at most", 4.1, 4, at_least=False).met


def test_key_13_fault_38_a_spray_of_made_up_keys_spares_the_issuer(arena: Arena) -> None:
    found = kid_spray.measure(arena, seconds=1.0, rate=500)

    assert (1, 1) == (found.fetches, found.allowed)
    assert found.spray.exits == found.spray.events > 100
    assert (0, 0) == (found.before.exits, found.during.exits)
    # Half of the rate at least, however busy the machine is with other things.
    assert found.during.events > kid_spray.GOOD_RATE / 2
