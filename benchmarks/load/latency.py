"""What guard, critic and HTTP add to the engine's own time: idle, one request at a time.

In turns the same case is asked over HTTP and, its two completions together, through the in-cluster handle; and its
body is sent to an application of nothing (`benchmarks.load.bare`). What is added is the HTTP request's time, from
its first byte sent to its answer's last byte read, less

- with the fixed-time engine: the time that a completion takes there (both go on together), exactly; so Serve's
  calls from the critic to the engine are in it;
- with the policy: what the two completions took through the handle in the same turn; so those calls are not. All
  is in the engine's caches by then, and a critique has few tokens, so that the engine's own scatter stays small.

What of it is Ray Serve's is told beside it: a request to the application of nothing, and an idle engine's handle.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.load.cases import body_of, demo_cases, photo_case
from benchmarks.load.clients import Connection, Door
from benchmarks.load.figures import ADDED_MS, Result, percentiles_ms
from benchmarks.load.service import Engine, InCluster, Service, bare_beside, deployed
from sima_ray.config import ServiceConfig
from sima_ray.critic.judge import Case
from sima_ray.ports import JsonDict

TOKENS = 16
WARM_UP = 20


def measure(engine: Engine, requests: int, say: Callable[[str], None]) -> Result:
    """Figures by image."""
    result = Result()
    case = demo_cases(1, seed=0)[0]
    with deployed(engine, ServiceConfig(), TOKENS) as service, bare_beside(service) as bare:
        for image, asked in (("demo", case), ("photo", photo_case(case))):
            figures = _figures(engine, asyncio.run(_turns(service, bare, asked, requests)))
            result.figures[image] = figures | {"image_bytes": len(asked.image or b"")}
            name, added = f"{engine.name}, {image} image", figures["added_ms"]
            say(f"{name}: {_words(figures['http_ms'])} ms over HTTP, {_words(added)} ms added")
            result.missed += [
                f"latency, {name}: {added[p]:.1f} ms added at {p}, over {bar:g}"
                for p, bar in ADDED_MS.items()
                if added[p] > bar
            ]
    return result


@dataclass(slots=True)
class Turns:
    """Seconds of each request: to the critic, through the handle, to the application of nothing."""

    http: list[float] = field(default_factory=list)
    handle: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)


async def _turns(service: Service, bare: Door, case: Case, requests: int) -> Turns:
    critic, nothing, body = Connection(service.door), Connection(bare), body_of(case)
    handle, turns = InCluster(service), Turns()
    for number in range(WARM_UP + requests):
        answer = await asyncio.to_thread(critic.post, body)
        start = time.perf_counter()
        await handle.judge(case)
        handle_s = time.perf_counter() - start
        none = await asyncio.to_thread(nothing.post, body)
        if (answer.status, none.status) != (200, 200):
            raise RuntimeError(f"{answer.status} {none.status}: {answer.text} {none.text}")
        if number >= WARM_UP:
            turns.http.append(answer.seconds)
            turns.handle.append(handle_s)
            turns.bare.append(none.seconds)
    critic.close()
    nothing.close()
    return turns


def _figures(engine: Engine, turns: Turns) -> JsonDict:
    figures: JsonDict = {
        "requests": len(turns.http),
        "http_ms": percentiles_ms(turns.http),
        "handle_ms": percentiles_ms(turns.handle),
        "bare_serve_http_ms": percentiles_ms(turns.bare),
    }
    if engine.name == "policy":
        added = [http - handle for http, handle in zip(turns.http, turns.handle, strict=True)]
        return figures | {"added_ms": percentiles_ms(added)}
    return figures | {
        "added_ms": percentiles_ms([seconds - engine.seconds for seconds in turns.http]),
        "serve_handle_ms": percentiles_ms([seconds - engine.seconds for seconds in turns.handle]),
    }


def _words(figures: dict[str, float]) -> str:
    return f"{figures['p50']:.1f} / {figures['p99']:.1f}"
