"""What guard, critic and HTTP add to the engine's own time: idle, one request at a time.

The same case is asked over HTTP and through the in-cluster handle (its two completions together), in turns.
Of the HTTP request's time, from its first byte sent to its answer's last byte read, is subtracted

- with the fixed-time engine: the time that a completion takes there (both go on together), exactly;
- with the policy: what the same two completions took through the handle in the same turn. Everything is in the
  engine's caches by then, and a critique has few tokens, so that the engine's own scatter stays small.
"""

import asyncio
import time
from collections.abc import Callable

from benchmarks.load.cases import body_of, demo_cases, photo_case
from benchmarks.load.clients import Connection
from benchmarks.load.figures import ADDED_MS, Result, percentiles_ms
from benchmarks.load.service import Engine, InCluster, Service, deployed
from sima_ray.config import ServiceConfig
from sima_ray.critic.judge import Case
from sima_ray.ports import JsonDict

TOKENS = 16
WARM_UP = 20


def measure(engine: Engine, requests: int, say: Callable[[str], None]) -> Result:
    """Figures by image."""
    result = Result()
    case = demo_cases(1, seed=0)[0]
    with deployed(engine, ServiceConfig(), TOKENS) as service:
        for image, asked in (("demo", case), ("photo", photo_case(case))):
            http, handle = asyncio.run(_turns(service, asked, requests))
            figures = _figures(engine, http, handle)
            result.figures[image] = figures | {"image_bytes": len(asked.image or b"")}
            name, added = f"{engine.name}, {image} image", figures["added_ms"]
            say(f"{name}: {_words(figures['http_ms'])} ms over HTTP, {_words(added)} ms added")
            result.missed += [
                f"latency, {name}: {added[p]:.1f} ms added at {p}, over {bar:g}"
                for p, bar in ADDED_MS.items()
                if added[p] > bar
            ]
    return result


async def _turns(service: Service, case: Case, requests: int) -> tuple[list[float], list[float]]:
    """Seconds of each request over HTTP and through the handle."""
    connection, body, handle = Connection(service.door), body_of(case), InCluster(service)
    over_http: list[float] = []
    by_handle: list[float] = []
    for number in range(WARM_UP + requests):
        answer = await asyncio.to_thread(connection.post, body)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {answer.text}")
        start = time.perf_counter()
        await handle.judge(case)
        if number >= WARM_UP:
            over_http.append(answer.seconds)
            by_handle.append(time.perf_counter() - start)
    connection.close()
    return over_http, by_handle


def _figures(engine: Engine, over_http: list[float], by_handle: list[float]) -> JsonDict:
    figures: JsonDict = {
        "requests": len(over_http),
        "http_ms": percentiles_ms(over_http),
        "handle_ms": percentiles_ms(by_handle),
    }
    if engine.name == "policy":
        added = [http - handle for http, handle in zip(over_http, by_handle, strict=True)]
        return figures | {"added_ms": percentiles_ms(added)}
    return figures | {
        "added_ms": percentiles_ms([seconds - engine.seconds for seconds in over_http]),
        "of_that_the_handle_ms": percentiles_ms([s - engine.seconds for s in by_handle]),
    }


def _words(figures: dict[str, float]) -> str:
    return f"{figures['p50']:.1f} / {figures['p99']:.1f}"
