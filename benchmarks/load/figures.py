"""From what was measured to figures and verdicts; the bars are written down here."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sima_ray.ports import JsonDict

ADDED_MS = {"p50": 10.0, "p99": 40.0}
"""Bars of the added latency."""

RATIO = 0.8
"""Bar of critiques over HTTP, as a share of those through the handle."""

RECOVERY_S = 10.0
"""Bar of the first healthy answer after an overload."""

GROWTH = 0.05
"""Bar of a process's growth while the load stays the same, of what it had at first: an allocator's noise, and
caches that go on filling, stay below it. The slope beside it tells of slower leaks."""

FEW_FDS = 3
"""Descriptors that come and go with connections; a growth by so many is none."""


@dataclass
class Result:
    """Figures of one measurement, and a line for each bar that was missed."""

    figures: JsonDict = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a process: seconds since the first look, resident bytes, open file descriptors."""

    at_s: float
    rss: int
    fds: int


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99, in milliseconds."""
    return {f"p{p}": round(1000 * percentile(seconds, p), 2) for p in (50, 99)}


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the least-squares line, per unit of `times`; 0 where all times are the same."""
    mean_t, mean_v = statistics.fmean(times), statistics.fmean(values)
    spread = sum((t - mean_t) ** 2 for t in times)
    if not spread:
        return 0.0
    both = zip(times, values, strict=True)
    return sum((t - mean_t) * (v - mean_v) for t, v in both) / spread


def ratio_figures(over_http: Sequence[float], by_handle: Sequence[float]) -> JsonDict:
    """Rates of repeats, and their ratios repeat by repeat: the median, the smallest and the largest."""
    ratios = [http / handle for http, handle in zip(over_http, by_handle, strict=True)]
    return {
        "http_per_s": [round(rate, 2) for rate in over_http],
        "handle_per_s": [round(rate, 2) for rate in by_handle],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def growth(samples: Sequence[Sample]) -> JsonDict:
    """Slopes over the last two thirds (the first is warm-up), and what they come to over that time."""
    warm = [s for s in samples if s.at_s >= samples[-1].at_s / 3]
    hours = [s.at_s / 3600 for s in warm]
    rss, fds = slope(hours, [s.rss for s in warm]), slope(hours, [s.fds for s in warm])
    window = hours[-1] - hours[0]
    more_rss, more_fds = rss * window / warm[0].rss, fds * window
    flat_fds = more_fds <= max(FEW_FDS, GROWTH * warm[0].fds)
    return {
        "samples": len(warm),
        "rss_mb": round(warm[-1].rss / 2**20, 1),
        "rss_peak_mb": round(max(s.rss for s in samples) / 2**20, 1),
        "rss_mb_per_hour": round(rss / 2**20, 2),
        "rss_growth": round(more_rss, 4),
        "fds": warm[-1].fds,
        "fds_per_hour": round(fds, 2),
        "fds_growth": round(more_fds, 2),
        "flat": more_rss <= GROWTH and flat_fds,
    }


def peaks(samples: Mapping[str, Sequence[Sample]]) -> dict[str, JsonDict]:
    """Resident memory of each process before and at its highest; and whether it went on rising.

    That is told by the highest of the last third, against the highest of the two before.
    """
    found: dict[str, JsonDict] = {}
    for name, looks in samples.items():
        late = [s.rss for s in looks if s.at_s > looks[-1].at_s * 2 / 3]
        early = [s.rss for s in looks if s.at_s <= looks[-1].at_s * 2 / 3]
        found[name] = {
            "before_mb": round(looks[0].rss / 2**20, 1),
            "peak_mb": round(max(s.rss for s in looks) / 2**20, 1),
            "late_growth": round(max(late, default=0) / max(early) - 1, 4),
            "fds_peak": max(s.fds for s in looks),
        }
    return found
