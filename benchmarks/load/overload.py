"""Ten times as many requests in flight as the service and its queue take, for a minute; then, is it well again?

Allowed are answers, and 503 or 429 in our own shape with a Retry-After. Clients do not heed that: each asks again
as soon as it was refused. The fixed-time engine answers, so that a request's time says nothing of this machine.
"""

import time
from collections.abc import Callable

from benchmarks.load.cases import body_of, demo_cases
from benchmarks.load.clients import Connection, Door, Load, other_process
from benchmarks.load.figures import GROWTH, RECOVERY_S, Result, peaks
from benchmarks.load.service import Engine, deployed
from benchmarks.load.watch import Watch
from sima_ray.config import ServiceConfig
from sima_ray.ports import JsonDict

TIMES = 10
ALLOWED = {200, 429, 503}
LIMITS = ServiceConfig(
    max_ongoing_requests=8, target_ongoing_requests=8, max_queued_requests=16, request_timeout_s=30
)
CAPACITY = LIMITS.max_ongoing_requests + LIMITS.max_queued_requests
WELL = 5
"""Critiques in a row that are answered."""

GIVE_UP_S = 60.0

_BODY = body_of(demo_cases(1, seed=1)[0])


def measure(engine: Engine, seconds: float, root: int, say: Callable[[str], None]) -> Result:
    """Statuses, recovery, and the memory of the processes below `root`."""
    with deployed(engine, LIMITS) as service:
        well_after(service.door, time.monotonic())  # up and warm
        with Watch(root, every_s=1.0) as watch:
            load = overload(service.door, seconds)
        recovery_s = well_after(service.door, load.ended)
    memory = peaks(watch.samples)
    found = {
        "in_flight": TIMES * CAPACITY,
        "capacity": CAPACITY,
        "seconds": round(load.seconds, 1),
        "statuses": {str(status): n for status, n in sorted(load.statuses.items())},
        "problems": load.problem_count,
        "first_problems": load.problems,
        "recovery_s": None if recovery_s is None else round(recovery_s, 2),
        "memory": memory,
        "replaced": watch.replaced,
    }
    say(f"{found['statuses']} in {load.seconds:.0f} s, well again {found['recovery_s']} s after")
    for name, peak in memory.items():
        say(f"{name}: {peak['before_mb']:.0f} MB before, {peak['peak_mb']:.0f} MB at its peak")
    return Result(found, missed(load, recovery_s) + _growing(memory, watch.replaced))


def overload(door: Door, seconds: float) -> Load:
    """Ten times the capacity of `LIMITS`, for so long."""
    bodies = [body_of(case) for case in demo_cases(50, seed=0)]
    with other_process(door) as clients:
        return clients.start(bodies, TIMES * CAPACITY, seconds).result()


def well_after(door: Door, since: float) -> float | None:
    """Seconds from a moment until critiques are answered, one after another; None: not within a minute."""
    began: float | None = None
    answered = 0
    while answered < WELL:
        connection = Connection(door)
        ready = connection.get("/readyz").status == 200
        if ready and connection.post(_BODY).status == 200:
            began, answered = began or time.monotonic() - since, answered + 1
        else:
            began, answered = None, 0
        connection.close()
        if time.monotonic() - since > GIVE_UP_S:
            return None
    return began


def missed(load: Load, recovery_s: float | None) -> list[str]:
    """A line for each bar that was missed."""
    lines: list[str] = []
    if others := {status: n for status, n in load.statuses.items() if status not in ALLOWED}:
        lines.append(f"overload: other answers than 200, 429 and 503 (0: none came): {others}")
    if load.problem_count:
        lines.append(f"overload: {load.problem_count} answers not as agreed: {load.problems[0]}")
    if recovery_s is None or recovery_s > RECOVERY_S:
        words = "never" if recovery_s is None else f"after {recovery_s:.1f} s"
        lines.append(f"overload: well again {words}, over {RECOVERY_S:g} s")
    return lines


def _growing(memory: dict[str, JsonDict], replaced: list[str]) -> list[str]:
    lines = [
        f"overload: {name} went on growing, by {peak['late_growth']:.1%} in the last third"
        for name, peak in memory.items()
        if peak["late_growth"] > GROWTH
    ]
    return lines + [f"overload: {name} ended or was replaced" for name in replaced]
