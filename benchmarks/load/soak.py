"""Half load for half an hour: does the memory or the number of file descriptors of any process grow?

The rate is even: half of what the service answered over HTTP just before, or --rate. Quotas are on, so that their
keeper is looked at too. The same cases come again and again, so that the engine's caches are full when the
warm-up, the first third, is over. What counts is the growth over the rest, by the least-squares line.
"""

import time
from collections.abc import Callable, Sequence

from benchmarks.load.cases import body_of, demo_cases
from benchmarks.load.clients import Clients, other_process
from benchmarks.load.figures import GROWTH, Result, growth
from benchmarks.load.service import Engine, deployed
from benchmarks.load.throughput import IN_FLIGHT
from benchmarks.load.watch import Watch
from sima_ray.config import ServiceConfig

CASES = 200
LIMITS = ServiceConfig(requests_per_minute=100_000, concurrent_per_token=1_000)
CALIBRATION_S = 15.0
OURS = ("critic", "policy", "engine", "proxy", "controller", "quotas")
"""The service. Ray's own (raylet, gcs) are shown too, and not judged."""

TELL_EVERY_S = 60.0


def measure(
    engine: Engine, seconds: float, rate: float | None, root: int, say: Callable[[str], None]
) -> Result:
    """Slopes of every process below `root`."""
    with (
        deployed(engine, LIMITS) as service,
        other_process(service.door) as clients,
    ):
        bodies = [body_of(case) for case in demo_cases(CASES, seed=0)]
        rate = rate or _full_rate(clients, bodies) / 2
        say(f"{engine.name}: {rate:.1f} critiques/s for {seconds:.0f} s")
        with Watch(root, every_s=min(10.0, seconds / 30)) as watch:
            asked = clients.start(bodies, IN_FLIGHT, seconds, rate)
            told = time.monotonic()
            while not asked.done():
                time.sleep(0.5)
                if time.monotonic() - told > TELL_EVERY_S:
                    told = time.monotonic()
                    say(", ".join(f"{k} {v[-1].rss >> 20} MB" for k, v in watch.samples.items()))
            load = asked.result()
    found = {name: growth(samples) for name, samples in watch.samples.items()}
    for name, figures in found.items():
        say(
            f"{name}: {figures['rss_mb']:.0f} MB, {figures['rss_mb_per_hour']:+.1f} MB/h; "
            f"{figures['fds']} descriptors, {figures['fds_per_hour']:+.1f}/h"
        )
    missed = [
        f"soak: {name} grew by {found[name]['rss_growth']:.1%} and {found[name]['fds_growth']:.0f} "
        f"descriptors, over {GROWTH:.0%}"
        for name in OURS
        if name in found and not found[name]["flat"]
    ]
    missed += [f"soak: {name} ended or was replaced" for name in watch.replaced]
    if set(load.statuses) != {200} or load.problem_count:
        missed.append(f"soak: not all were answered: {dict(load.statuses)} {load.problems[:1]}")
    return Result(
        {
            "engine": engine.name,
            "seconds": round(load.seconds),
            "rate_per_s": round(rate, 2),
            "statuses": {str(status): n for status, n in sorted(load.statuses.items())},
            "late": load.late,
            "processes": found,
            "replaced": watch.replaced,
        },
        missed,
    )


def _full_rate(clients: Clients, bodies: Sequence[bytes]) -> float:
    """Answers a second with as many in flight as the throughput is measured with, once warm."""
    clients.start(bodies, IN_FLIGHT, CALIBRATION_S).result()
    return clients.start(bodies, IN_FLIGHT, CALIBRATION_S).result().only_200().per_s
