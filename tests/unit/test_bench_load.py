"""The load benchmark's figures from samples, and its even clock."""

import time

import pytest

from benchmarks.load.cases import demo_cases, photo
from benchmarks.load.clients import Load, Tickets
from benchmarks.load.figures import (
    Sample,
    growth,
    peaks,
    percentile,
    percentiles_ms,
    ratio_figures,
    slope,
)
from benchmarks.load.overload import missed
from sima_ray.images import check_image

MB = 2**20


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile(range(1, 101), 99) == 99
    assert percentile(range(1, 301), 99) == 297
    assert percentile([7.0], 99) == 7
    assert percentiles_ms([0.010] * 99 + [0.5]) == {"p50": 10, "p99": 10}


def test_slope_is_that_of_the_line() -> None:
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)
    assert slope([0, 1, 2], [1, 4, 1]) == pytest.approx(0)
    assert slope([2, 2], [1, 9]) == 0


def test_ratios_are_taken_repeat_by_repeat() -> None:
    figures = ratio_figures([8, 9, 30], [10, 10, 40])
    assert (figures["ratio"], figures["ratio_min"], figures["ratio_max"]) == (0.8, 0.75, 0.9)


def line(rss_mb: float, mb_per_hour: float, fds: int = 50, fds_per_hour: float = 0) -> list[Sample]:
    """Half an hour, one look every ten seconds."""
    hours = [k / 360 for k in range(181)]
    return [
        Sample(3600 * h, int((rss_mb + mb_per_hour * h) * MB), int(fds + fds_per_hour * h))
        for h in hours
    ]


def test_growth_after_the_warm_up() -> None:
    figures = growth(line(200, 30))
    assert figures["rss_mb_per_hour"] == pytest.approx(30, abs=0.01)
    assert figures["rss_growth"] == pytest.approx(30 / 3 / 205, abs=1e-3)  # 20 min, from 205 MB
    assert figures["flat"]
    assert not growth(line(200, 40))["flat"]
    assert growth(line(200, -40))["flat"], "shrinking is no leak"
    assert growth(line(200, 0, fds_per_hour=8))["flat"]
    assert not growth(line(200, 0, fds_per_hour=60))["flat"]


def test_what_grows_in_the_warm_up_alone_is_flat() -> None:
    samples = [Sample(10.0 * k, min(100 + 10 * k, 600) * MB, 50) for k in range(181)]
    assert growth(samples)["flat"]
    assert growth(samples)["rss_peak_mb"] == 600


def test_peaks_tell_a_plateau_from_a_rise() -> None:
    plateau = [Sample(k, (100 + min(k, 5) * 10) * MB, 20 + k % 3) for k in range(60)]
    rise = [Sample(k, (100 + k) * MB, 20) for k in range(60)]
    figures = peaks({"proxy": plateau, "critic": rise})
    assert figures["proxy"] == {
        "before_mb": 100,
        "peak_mb": 150,
        "late_growth": 0,
        "fds_peak": 22,
    }
    assert figures["critic"]["late_growth"] == pytest.approx(159 / 139 - 1, abs=1e-4)


def test_what_an_overload_misses() -> None:
    load = Load()
    load.statuses.update({200: 10, 503: 90})
    assert missed(load, 2.0) == []
    load.statuses.update({500: 1, 0: 2})
    load.problems, load.problem_count = ["load: 500, a server error: x"], 1
    lines = missed(load, None)
    assert len(lines) == 3 and "{500: 1, 0: 2}" in lines[0] and "never" in lines[2]


def test_an_even_load_is_even() -> None:
    tickets = Tickets([b"a", b"b"], seconds=0.2, rate=50)
    drawn = []
    while (ticket := tickets.draw()) is not None:
        drawn.append(ticket)
    dues = [due - tickets.start for due, _ in drawn]
    assert dues == pytest.approx([k / 50 for k in range(10)])
    assert [body for _, body in drawn[:3]] == [b"a", b"b", b"a"]
    late = Tickets([b"a"], seconds=0.01, rate=1000)
    time.sleep(0.02)
    assert late.draw() is None, "nothing is sent after the end, not even what is late"


def test_cases_are_distinct_and_sound() -> None:
    cases = demo_cases(5, seed=3)
    assert len({case.image for case in cases}) == 5
    assert all(case.responses[0] != case.responses[1] for case in cases)
    assert cases == demo_cases(5, seed=3)
    info = check_image(photo(), 1_000_000)
    assert (info.format, info.width, info.height) == ("JPEG", 640, 480)
    assert 100_000 < len(photo()) < 250_000
