"""What routing by image brings and costs: Serve's own router, Ray's consistent hashing, and `serve_apps.routing`.

`python -m benchmarks.routing [--json FILE]`, on a local cluster of its own, 10 minutes. First the demo's policy on
vLLM replicas, which makes and judges pairs of candidates: how much of the prompts comes from the prefix cache, and
how long it takes. Then replicas that take a fixed time a request: throughput, of the possible. Each router has an
application of its own; they take turns, and each turn has new images.
"""

import argparse
import asyncio
import io
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count, cycle, islice, product
from pathlib import Path
from typing import Any, cast

from benchmarks.own_cluster import own_cluster
from benchmarks.pace import rate
from sima_ray.config import RunConfig, ServiceConfig
from sima_ray.ports import (
    Completion,
    CompletionRequest,
    JsonDict,
    Part,
    Policy,
    image_part,
    text_part,
)

ROUTERS = ("load", "hash", "image")
"""Serve's power of two choices; Ray's consistent hashing of a session id; ours."""
RAY_HASH = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
LAYOUTS = ("image_first", "examples_first")
ROWS, ROWS_AT_ONCE = 48, 32
FAKE_REPLICAS, AT_ONCE, SERVICE_TIME_S = 8, 4, 0.5
TRAFFIC = ("many images", "one hot image")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--replicas", type=int, default=2, help="of the real policy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measured throughput")
    parser.add_argument("--part", choices=("engine", "throughput"), help="only this one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    figures: JsonDict = {}
    with own_cluster():
        if options.part != "throughput":
            run = RunConfig.load(options.config)
            figures["engine"] = _engine(run, options.replicas, options.rounds)
        if options.part != "engine":
            figures["throughput"] = _throughput(options.rounds, options.seconds)
    for part, found in figures.items():
        for case, by_router in found.items():
            for router, values in by_router.items():
                words = [f"{name} {_spread(numbers)}" for name, numbers in values.items()]
                print(f"{part:<10}  {case:<14}  {router:<5}  {'   '.join(words)}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _spread(numbers: list[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{statistics.median(numbers):.3f} [{low:.3f}, {high:.3f}]"


def _options(router: str, service: ServiceConfig) -> JsonDict:
    """Serve's `request_router_config` of a router."""
    from sima_ray.runtime.deployment import router_options

    if router == "hash":
        return {"request_router_class": RAY_HASH}
    return router_options(service.model_copy(update={"routing": router}))


def _wait_for(router: str, replicas: int) -> None:
    """Wait until an application's replicas are there, by this router."""
    from sima_ray.errors import ServiceError
    from sima_ray.runtime.applications import POLL_S, wait
    from sima_ray.runtime.scaling import Bounds, wait_for_replicas
    from sima_ray.runtime.serving import live_policy

    deadline = time.monotonic() + 300
    while router == "hash":
        assert time.monotonic() < deadline, "the router has not changed"
        with suppress(ServiceError):  # none for a moment, while it is built anew
            config = live_policy(router).deployment_config.model_dump()
            if config["request_router_config"]["request_router_class"] == RAY_HASH:
                break
        time.sleep(POLL_S)
    wait(router, 300)
    wait_for_replicas(router, Bounds(replicas, replicas), 300)


class WithSession:
    """A policy's handle, whose requests carry their image as a session id: what Ray's router goes by."""

    def __init__(self, app: str) -> None:
        from ray.serve.handle import DeploymentHandle

        from sima_ray.runtime.client import DEPLOYMENT

        # Not Serve's own look-up, which gives the handle that deploying used: it keeps the router of then.
        self._handle: Any = DeploymentHandle(DEPLOYMENT, app)
        self.complete_all = self

    def remote(self, requests: list[CompletionRequest]) -> Any:
        """As of `handle.complete_all`."""
        from serve_apps.routing import image_key

        session = (image_key(requests) or b"").hex()
        return self._handle.options(session_id=session).complete_all.remote(requests)

    def close(self) -> None:
        """End what it keeps running."""
        self._handle.shutdown()


@contextmanager
def _clients() -> Iterator[dict[str, Policy]]:
    """A caller by each router; at the end their applications are removed."""
    from sima_ray.runtime.client import HandlePolicy
    from sima_ray.runtime.serving import remove

    handles = {router: WithSession(router) for router in ROUTERS}
    try:
        yield {
            router: HandlePolicy(router, handle=cast(Any, handle))
            for router, handle in handles.items()
        }
    finally:
        for router, handle in handles.items():
            handle.close()
            remove(router)


class Counted(Policy):
    """A policy that counts its prompts' tokens, and those of them that came from the prefix cache."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.prompt = self.cached = 0

    async def complete(self, request: CompletionRequest) -> Completion:
        """See `sima_ray.ports.Policy`."""
        (answer,) = await self.complete_all([request])
        return answer

    async def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """See `sima_ray.ports.Policy`."""
        answers = await self._policy.complete_all(requests)
        self.prompt += sum(answer.get("prompt_tokens", 0) for answer in answers)
        self.cached += sum(answer.get("cached_tokens", 0) for answer in answers)
        return answers


def _engine(run: RunConfig, replicas: int, rounds: int) -> JsonDict:
    """Cached share and seconds of making and judging pairs, by layout of the critic's prompt and router."""
    from sima_ray.runtime.applications import change, overridden
    from sima_ray.runtime.client import DEPLOYMENT
    from sima_ray.runtime.serving import deploy_policy

    sized = {"min_replicas": replicas, "max_replicas": replicas}
    service = run.policy.service.model_copy(update=sized)
    engine = run.policy.engine.model_copy(update={"cpus": 0.5})
    for router in ROUTERS:
        by = service.model_copy(update={"routing": "load" if router == "hash" else router})
        deploy_policy(run.policy.model_copy(update={"service": by, "engine": engine}), name=router)
        if router == "hash":
            options = {"request_router_config": _options(router, service)}
            change(router, partial(overridden, deployment=DEPLOYMENT, **options))
        _wait_for(router, replicas)
    figures: JsonDict = {layout: {router: _none() for router in ROUTERS} for layout in LAYOUTS}
    seeds = count()
    turns = product(range(-1, rounds), LAYOUTS, range(len(ROUTERS)))
    with _clients() as clients:
        for turn, layout, place in turns:
            router = ROUTERS[(turn + place) % len(ROUTERS)]  # another one is first each time
            policy = Counted(clients[router])
            started = time.perf_counter()
            asyncio.run(_pairs(policy, run, layout, next(seeds)))
            if turn >= 0:  # the first one warms up
                found = figures[layout][router]
                found["seconds"].append(time.perf_counter() - started)
                found["cached"].append(policy.cached / policy.prompt)
    return figures


def _none() -> dict[str, list[float]]:
    return {"cached": [], "seconds": []}


async def _pairs(policy: Policy, run: RunConfig, layout: str, seed: int) -> None:
    """Two candidates for each of some new scenes, and their critique in both orders, as a run makes them."""
    from sima_ray.critic.judge import Case, critique
    from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
    from sima_ray.demo.language import QUESTIONS, write_caption
    from sima_ray.demo.scenes import render, scenes

    assert run.critic.examples is not None
    prompt = CriticPrompt(Layout(layout), load_examples(Path(run.critic.examples)))
    places = asyncio.Semaphore(ROWS_AT_ONCE)

    async def row(number: int, scene: Any) -> None:
        file = io.BytesIO()
        render(scene).save(file, "PNG")
        image, question = file.getvalue(), QUESTIONS[number % len(QUESTIONS)]
        request: CompletionRequest = {
            "content": [image_part(image), text_part(question)],
            "max_tokens": run.generation.max_tokens,
            "temperature": 0.0,
        }
        async with places:
            drawn: CompletionRequest = {**request, "temperature": 1.0, "seed": number}
            answers = await policy.complete_all([request, drawn])
            greedy, sampled = (answer.get("text", "") for answer in answers)
            truth = write_caption(scene.truth)
            other = sampled if sampled != greedy else truth
            case = Case(image, question, truth, (greedy, other))
            await critique(policy, prompt, case, run.critic.max_tokens)

    drawn = islice(scenes("train", 1_000 + seed), ROWS)
    await asyncio.gather(*(row(number, scene) for number, scene in enumerate(drawn)))


def _throughput(rounds: int, seconds: float) -> JsonDict:
    """Answers a second, of the possible, of replicas that take a fixed time, by traffic and router."""
    from serve_apps.fixed_time import FixedTime, declaration
    from sima_ray.runtime.applications import apply
    from sima_ray.runtime.deployment import scaling_options

    service = ServiceConfig(
        min_replicas=FAKE_REPLICAS,
        max_replicas=FAKE_REPLICAS,
        target_ongoing_requests=AT_ONCE,
        max_ongoing_requests=4 * AT_ONCE,
    )
    settings = FixedTime(seconds=SERVICE_TIME_S, at_once=AT_ONCE)
    for router in ROUTERS:
        options = {"request_router_config": _options(router, service)}
        apply(declaration(router, settings, scaling_options(service) | options))
        _wait_for(router, FAKE_REPLICAS)
    figures: JsonDict = {
        traffic: {router: {"share": []} for router in ROUTERS} for traffic in TRAFFIC
    }
    possible = FAKE_REPLICAS * AT_ONCE / SERVICE_TIME_S
    turns = product(range(rounds), TRAFFIC, range(len(ROUTERS)))
    with _clients() as clients:
        for turn, traffic, place in turns:
            router = ROUTERS[(turn + place) % len(ROUTERS)]
            asyncio.run(_rate(clients[router], traffic, 4 * SERVICE_TIME_S))
            found = asyncio.run(_rate(clients[router], traffic, seconds))
            figures[traffic][router]["share"].append(found / possible)
    return figures


def _images(traffic: str) -> Iterator[bytes]:
    """Each image of many twice in a row, as the orders of a critique ask; or one and the same."""
    if traffic == "one hot image":
        return cycle([b"hot"])
    return (number.to_bytes(8, "big") for number in count() for _ in range(2))


async def _rate(policy: Policy, traffic: str, seconds: float) -> float:
    """Answers a second while all replicas are busy and twice as many requests wait."""
    images = _images(traffic)

    async def ask() -> None:
        content: list[Part] = [image_part(next(images))]
        await policy.complete({"content": content, "max_tokens": 1, "temperature": 0.0})

    return await rate(ask, 3 * AT_ONCE * FAKE_REPLICAS, seconds)


if __name__ == "__main__":
    main()
