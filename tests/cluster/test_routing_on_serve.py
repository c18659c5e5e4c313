"""Routing by image on real Serve, with replicas that only say who they are."""

import asyncio
import os
import signal
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from constant_load import Load, wait_for

from sima_ray.config import ServiceConfig
from sima_ray.ports import CompletionRequest, Policy, image_part, text_part

REPLICAS, SLACK = 3, 3
HELD = "Held:"
SERVICE = ServiceConfig(
    routing="image", target_ongoing_requests=4 * SLACK, min_replicas=REPLICAS, max_replicas=REPLICAS
)
IMAGES = [bytes([number]) * 100 for number in range(30)]


@pytest.fixture(scope="module", autouse=True)
def serve_running(ray_cluster: None) -> Iterator[None]:
    from ray import serve

    from sima_ray.runtime.serving import start_serve

    start_serve(port=0)
    yield
    serve.shutdown()


@pytest.fixture(scope="module")
def app(serve_running: None) -> str:
    """Three replicas, and a deployment that asks them for many things at once, as the critic does."""
    from ray import serve

    from sima_ray.runtime.client import DEPLOYMENT
    from sima_ray.runtime.deployment import scaling_options

    # Nested, so that they travel by value: Serve's workers do not know where tests live.
    class Who:
        async def complete_all(self, requests: Any) -> Any:
            question = requests[0]["content"][-1]["text"]
            if question.startswith(HELD):  # until so many are there
                _, count, folder = question.split(" ", 2)
                Path(folder, uuid.uuid4().hex).touch()
                while len(os.listdir(folder)) < int(count):
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.1 * max(request["max_tokens"] for request in requests))
            return [{"text": str(os.getpid())}] * len(requests)

    class Asker:
        def __init__(self, who: Any) -> None:
            self._who = who

        async def __call__(self, requests: Any) -> Any:
            calls = (self._who.complete_all.remote([request]) for request in requests)
            return [answer for (answer,) in await asyncio.gather(*calls)]

    options: Any = {"ray_actor_options": {"num_cpus": 0}, "health_check_period_s": 1}
    who: Any = serve.deployment(Who, name=DEPLOYMENT, **options, **scaling_options(SERVICE))
    asker: Any = serve.deployment(Asker, **options)
    serve.run(asker.bind(who.bind()), name="who", route_prefix=None)
    wait_for(lambda: replicas("who") == REPLICAS)
    return "who"


def replicas(name: str) -> int:
    from sima_ray.runtime.serving import running_replicas

    return len(running_replicas(name))


def client(app: str) -> Policy:
    from sima_ray.runtime.client import HandlePolicy

    return HandlePolicy(app, retries=5, timeout_s=30)


def about(image: bytes, question: str = "What is it?", tenths: int = 1) -> CompletionRequest:
    """A request that keeps its replica busy for so many tenths of a second."""
    return {
        "content": [image_part(image), text_part(question)],
        "max_tokens": tenths,
        "temperature": 0.0,
    }


def answers(policy: Policy, requests: Sequence[CompletionRequest]) -> list[str]:
    """Who answered each of them, all asked at once."""

    async def ask() -> list[Any]:
        return await asyncio.gather(*(policy.complete(request) for request in requests))

    return [answer["text"] for answer in asyncio.run(ask())]


def homes(policy: Policy) -> list[str]:
    """Who answers for each image when nobody is busy."""
    return [answers(policy, [about(image)])[0] for image in IMAGES]


def test_one_image_is_one_replicas(app: str) -> None:
    policy = client(app)
    expected = homes(policy)
    assert len(set(expected)) == REPLICAS
    for home, image in zip(expected, IMAGES, strict=True):
        assert answers(policy, [about(image, "And else?")]) == [home]
    assert homes(client(app)) == expected  # another caller ranks them alike


def test_a_hot_image_overflows_and_no_further(app: str, tmp_path: Path) -> None:
    policy = client(app)
    # None is answered before the last is there, however slow the machine.
    held = about(IMAGES[0], f"{HELD} 30 {tmp_path}")
    counts = Counter(answers(policy, [held] * 30))
    print(f"30 requests about one image: {sorted(counts.values())}")
    assert len(counts) == REPLICAS
    assert max(counts.values()) <= min(counts.values()) + 2 * SLACK


def test_requests_without_an_image_spread(app: str) -> None:
    question: CompletionRequest = {
        "content": [text_part("Hello?")],
        "max_tokens": 1,
        "temperature": 0,
    }
    assert len(set(answers(client(app), [question] * 30))) == REPLICAS


def test_calls_of_one_request_to_another_deployment(app: str) -> None:
    """They share a request id: each must get an answer, and that of its own image's replica."""
    from ray import serve

    expected = homes(client(app))
    handle = serve.get_app_handle(app)
    asked = [about(image) for image in IMAGES[:6]]
    found = handle.remote(asked + asked).result(timeout_s=20)
    assert len(found) == 12
    kept = sum(answer["text"] == home for answer, home in zip(found, expected[:6] * 2, strict=True))
    assert kept >= 8  # all, but for what overflows


def test_a_killed_replicas_images_move_and_nothing_fails(app: str) -> None:
    policy = client(app)
    before = homes(policy)
    victim = before[0]

    class Images(Policy):
        """A policy that asks about one image after the other, whatever it is asked."""

        def __init__(self) -> None:
            self._policy, self._number = client(app), 0

        async def complete(self, request: CompletionRequest) -> Any:
            self._number += 1
            return await self._policy.complete(about(IMAGES[self._number % len(IMAGES)]))

    with Load(Images, 8) as load:
        load.wait_for_more(20)
        os.kill(int(victim), signal.SIGKILL)
        load.wait_for_more(50)
    assert not load.failures
    wait_for(lambda: replicas(app) == REPLICAS)
    after = homes(policy)
    assert victim not in after
    changed = [(was, now) for was, now in zip(before, after, strict=True) if was != now]
    new = set(after) - set(before)
    # A replica that stays keeps its images, but for those that the new one takes.
    assert all(was == victim or now in new for was, now in changed)


def test_a_declared_service_routes_by_image_through_its_changes() -> None:
    from serve_apps.fixed_time import FixedTime, declaration
    from sima_ray.runtime.applications import apply, wait
    from sima_ray.runtime.deployment import scaling_options
    from sima_ray.runtime.scaling import scale_policy, wait_for_replicas
    from sima_ray.runtime.serving import live_policy, remove, replica_states, swap_user_config

    apply(declaration("declared", FixedTime(seconds=0.02, cpus=0), scaling_options(SERVICE)))
    wait("declared", 60)
    pids = {state["pid"] for state in replica_states("declared")}

    def with_image() -> Policy:
        policy = client("declared")

        class One(Policy):
            async def complete(self, request: CompletionRequest) -> Any:
                return await policy.complete(about(IMAGES[0]))

        return One()

    with Load(with_image, 6) as load:
        _, bounds = scale_policy("declared", 1, 1)
        assert wait_for_replicas("declared", bounds, 60) == 1
        (state,) = swap_user_config({"model": "tuned", "version": "tuned"}, "declared", 60)
        load.wait_for_more(20)
    assert not load.failures and load.answers[-1].version == "tuned"
    assert state["pid"] in pids  # in place
    router = live_policy("declared").deployment_config.request_router_config
    assert router["request_router_class"] == "serve_apps.routing:ImageRouter"
    assert router["request_router_kwargs"] == {"slack": SLACK}
    remove("declared")


def test_a_controller_without_the_router_routes_by_load() -> None:
    from sima_ray.runtime.routing import with_possible_routing

    assert with_possible_routing(SERVICE) == SERVICE
    assert with_possible_routing(SERVICE, "no_such_module:Router").routing == "load"
