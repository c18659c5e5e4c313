"""Critiques a second over HTTP, against the same through the in-cluster handle, at the same concurrency.

Both in turns, repeated, who is first changing; every turn has images that no turn before had. The HTTP clients are
a process of their own; those of the handle are this one. With the fixed-time engine, which takes no CPU, the ratio
is that of the bare ways, and the least there can be; the bar is for the policy, which computes.
"""

import asyncio
from collections.abc import Callable
from itertools import cycle

from benchmarks.load.cases import body_of, demo_cases
from benchmarks.load.clients import Clients, other_process
from benchmarks.load.figures import RATIO, Result, ratio_figures
from benchmarks.load.service import Engine, InCluster, Service, deployed
from benchmarks.pace import rate
from sima_ray.config import ServiceConfig

IN_FLIGHT = 16
CASES = 400
"""Of a turn; asked again from the start where they do not last."""

WARM_UP_S = 3.0


def measure(engine: Engine, seconds: float, repeats: int, say: Callable[[str], None]) -> Result:
    """Rates of the repeats and their ratio."""
    over_http: list[float] = []
    by_handle: list[float] = []
    with (
        deployed(engine, ServiceConfig()) as service,
        other_process(service.door) as clients,
    ):
        _http(clients, -1, WARM_UP_S)
        _handle(service, -2, WARM_UP_S)
        for repeat in range(repeats):
            for turn in (0, 1):
                if turn == repeat % 2:
                    over_http.append(_http(clients, 2 * repeat + turn, seconds))
                else:
                    by_handle.append(_handle(service, 2 * repeat + turn, seconds))
            say(
                f"{engine.name}: {over_http[-1]:.1f} critiques/s over HTTP, "
                f"{by_handle[-1]:.1f} through the handle"
            )
    figures = ratio_figures(over_http, by_handle) | {"in_flight": IN_FLIGHT}
    result = Result(figures)
    say(
        f"{engine.name}: {figures['ratio']:.2f}×  [{figures['ratio_min']:.2f}, {figures['ratio_max']:.2f}]"
    )
    if engine.name == "policy" and figures["ratio"] < RATIO:
        result.missed.append(
            f"throughput, {engine.name}: {figures['ratio']:.2f} of the handle's, under {RATIO}"
        )
    return result


def _http(clients: Clients, seed: int, seconds: float) -> float:
    bodies = [body_of(case) for case in demo_cases(CASES, seed)]
    return clients.start(bodies, IN_FLIGHT, seconds).result().only_200().per_s


def _handle(service: Service, seed: int, seconds: float) -> float:
    cases = cycle(demo_cases(CASES, seed))

    async def ask() -> float:
        handle = InCluster(service)
        return await rate(lambda: handle.judge(next(cases)), IN_FLIGHT, seconds)

    return asyncio.run(ask())
