"""How the service's throughput follows its replicas: a policy that takes a fixed time a request, 1 → 8 replicas.

`python -m benchmarks.scaling [--seconds S] [--json FILE]`, on a local cluster of its own. A request is an
asynchronous sleep, so the figures are those of routing, queues and clients, and say nothing of an engine.
"""

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.own_cluster import own_cluster
from benchmarks.pace import rate
from sima_ray.config import ServiceConfig
from sima_ray.ports import CompletionRequest, Policy

REPLICAS = (1, 2, 4, 8)
AT_ONCE = 4
"""Requests that one replica works on at once; twice as many again wait."""
REQUEST: CompletionRequest = {"content": [], "max_tokens": 1, "temperature": 0.0}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--service-time", type=float, default=0.5, help="seconds a request")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    with own_cluster():
        figures = _measure(options.service_time, options.seconds)
    one = figures[REPLICAS[0]]
    print("replicas   requests/s   times one   of the possible")
    for replicas, found in figures.items():
        possible = replicas * AT_ONCE / options.service_time
        print(f"{replicas:>8}   {found:>10.1f}   {found / one:>9.2f}   {found / possible:>14.0%}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _measure(service_time: float, seconds: float) -> dict[int, float]:
    from serve_apps.fixed_time import FixedTime, declaration
    from sima_ray.runtime.applications import apply, wait
    from sima_ray.runtime.client import connect_policy
    from sima_ray.runtime.deployment import scaling_options
    from sima_ray.runtime.scaling import scale_policy, wait_for_replicas

    service = ServiceConfig(target_ongoing_requests=AT_ONCE, max_ongoing_requests=4 * AT_ONCE)
    settings = FixedTime(seconds=service_time, at_once=AT_ONCE)
    apply(declaration("policy", settings, scaling_options(service)))
    wait("policy", 120)
    figures: dict[int, float] = {}
    for replicas in REPLICAS:
        _, bounds = scale_policy("policy", replicas, replicas)
        wait_for_replicas("policy", bounds, 300)
        in_flight = 3 * AT_ONCE * replicas
        asyncio.run(_rate(connect_policy(), in_flight, 4 * service_time))
        figures[replicas] = asyncio.run(_rate(connect_policy(), in_flight, seconds))
    return figures


async def _rate(connect: Callable[[], Policy], in_flight: int, seconds: float) -> float:
    policy = connect()
    return await rate(lambda: policy.complete(REQUEST), in_flight, seconds)


if __name__ == "__main__":
    main()
