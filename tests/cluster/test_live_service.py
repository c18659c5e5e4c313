"""A live service under load, with a policy that takes a fixed time in place of an engine: no request fails.

Replicas by the load and by command, new weights in place, replicas that are killed, two policies at once.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from constant_load import REQUEST, Load, wait_for

from sima_ray.client import AsyncCriticClient, Case, CriticError, CritiqueResult
from sima_ray.config import CriticConfig, ServiceConfig
from sima_ray.errors import ClusterError, ConfigError, ServiceError
from sima_ray.runtime.client import connect_policy

SERVICE = ServiceConfig(
    max_replicas=3,
    target_ongoing_requests=2,
    max_ongoing_requests=8,
    upscale_delay_s=0.5,
    downscale_delay_s=1,
)


@pytest.fixture(scope="module", autouse=True)
def serve_running(ray_cluster: None) -> Iterator[None]:
    from ray import serve

    from sima_ray.runtime.serving import start_serve

    start_serve(port=0)
    yield
    serve.shutdown()


@pytest.fixture
def policy() -> Iterator[Any]:
    """Deploys fake policies by name, and removes them after the test."""
    from serve_apps.fixed_time import FixedTime, declaration
    from sima_ray.runtime.applications import apply, wait
    from sima_ray.runtime.deployment import scaling_options
    from sima_ray.runtime.serving import remove

    names: list[str] = []

    def deploy(name: str, service: ServiceConfig = SERVICE, **settings: Any) -> Any:
        names.append(name)
        apply(declaration(name, FixedTime(**settings), scaling_options(service)))
        wait(name, 60)
        return connect_policy(name, retries=5, timeout_s=60)

    yield deploy
    for name in names:
        remove(name)


def pids(name: str) -> set[int]:
    from sima_ray.runtime.serving import replica_states

    return {state["pid"] for state in replica_states(name)}


def replicas(name: str) -> int:
    from sima_ray.runtime.serving import running_replicas

    return len(running_replicas(name))


def version_of(connect: Any) -> str:
    return asyncio.run(connect().complete(REQUEST))["model_version"]


def test_replicas_follow_the_load(policy: Any) -> None:
    connect = policy("elastic")
    with Load(connect, 12) as load:
        up = wait_for(lambda: replicas("elastic") == 3)
        load.wait_for_more(50)
    down = wait_for(lambda: replicas("elastic") == 1)
    print(f"1 → 3 replicas in {up:.1f} s, back in {down:.1f} s; {len(load.answers)} answers")
    assert not load.failures


def test_scaling_by_command_restarts_nobody(policy: Any) -> None:
    from sima_ray.runtime.scaling import Bounds, scale_policy, wait_for_replicas

    connect = policy("sized", SERVICE.model_copy(update={"max_replicas": 1}))
    (first,) = pids("sized")
    with Load(connect, 4) as load:
        before, after = scale_policy("sized", 3, 3)
        assert (before, after) == (Bounds(1, 1), Bounds(3, 3))
        assert wait_for_replicas("sized", after, 60) == 3
        assert first in pids("sized")
        three = pids("sized")
        policy("neighbour")  # another application's change changes nothing here
        assert pids("sized") == three
        _, after = scale_policy("sized", 2, 2)
        assert wait_for_replicas("sized", after, 60) == 2
        assert pids("sized") < three
    assert not load.failures and load.answers


def test_to_zero_and_back_on_a_request(policy: Any) -> None:
    from sima_ray.runtime.scaling import Bounds, scale_policy, wait_for_replicas
    from sima_ray.runtime.serving import replica_states, swap_user_config

    connect = policy("resting")
    _, after = scale_policy("resting", 0)
    assert after == Bounds(0, 3)
    wait_for(lambda: replicas("resting") == 0, 20)
    assert wait_for_replicas("resting", after, 20) == 0
    # Weights that come while nobody is there are those that the next replica starts with.
    swap_user_config({"model": "tuned", "version": "tuned"}, "resting", 60)
    answer = asyncio.run(connect().complete(REQUEST))
    assert (answer["text"], answer["model_version"]) == ("tuned", "tuned")
    assert [state["version"] for state in replica_states("resting")] == ["tuned"]


def test_what_cannot_be_scaled_is_said(policy: Any) -> None:
    from sima_ray.runtime.scaling import scale_policy

    policy("bounded", cpus=2)
    with pytest.raises(
        ClusterError, match=r"9 replicas of 2 CPU each .* 1 nodes have 8 CPU .* room for 4"
    ):
        scale_policy("bounded", 9, 9)
    with pytest.raises(ServiceError, match=r"no policy application 'nobody' .*bounded"):
        scale_policy("nobody", 1, 1)
    with pytest.raises(ConfigError, match="at least 4 and at most 3"):
        scale_policy("bounded", 4)
    assert replicas("bounded") == 1


def test_twenty_swaps_under_load(policy: Any) -> None:
    """Each answer's version was live at some time between its sending and its receipt."""
    from sima_ray.runtime.serving import swap_user_config

    connect = policy("swapped", SERVICE.model_copy(update={"min_replicas": 3}), seconds=0.05)
    wait_for(lambda: replicas("swapped") == 3)
    before = pids("swapped")
    began: dict[str, float] = {"base": float("-inf")}  # when the first replica may have had it
    ended: dict[str, float] = {}  # when the last one had another
    version = "base"
    with Load(connect, 12) as load:
        for number in range(20):
            began[f"v{number}"] = time.monotonic()
            swap_user_config({"model": f"m{number}", "version": f"v{number}"}, "swapped", 60)
            ended[version] = time.monotonic()
            version = f"v{number}"
    ended[version] = float("inf")
    assert not load.failures
    for asked in load.answers:
        assert began[asked.version] <= asked.received and asked.sent <= ended[asked.version]
    assert {asked.version for asked in load.answers} >= {f"v{number}" for number in range(20)}
    assert pids("swapped") == before
    print(f"{len(load.answers)} answers over 20 swaps on 3 replicas")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"model": "bad-weights"}, "no such weights"),
        ({"model": "m1", "sample": {"held": ["something else"]}}, "compute something else"),
    ],
)
def test_weights_that_fail_answer_nobody(policy: Any, bad: dict[str, Any], words: str) -> None:
    from sima_ray.runtime.serving import replica_states, swap_user_config

    service = SERVICE.model_copy(update={"min_replicas": 2, "max_replicas": 2})
    connect = policy("guarded", service, seconds=0.05)
    wait_for(lambda: replicas("guarded") == 2)
    good = {"model": "m0", "version": "good", "sample": {"held": ["m0"]}}
    states = swap_user_config(good, "guarded", 60)
    assert [state["difference"] for state in states] == [0.0, 0.0]
    with Load(connect, 4) as load:
        with pytest.raises(ServiceError, match=f"{words}; 'good' answers again, on all 2 replicas"):
            swap_user_config({"version": "bad", **bad}, "guarded", 60)
        load.wait_for_more(20)
    assert not load.failures
    assert {asked.version for asked in load.answers} == {"good"}
    assert {(s["version"], s["swap_error"]) for s in replica_states("guarded")} == {("good", "")}


def test_killed_replicas_lose_no_request(policy: Any) -> None:
    connect = policy("killed", SERVICE.model_copy(update={"min_replicas": 3}), seconds=0.2)
    wait_for(lambda: replicas("killed") == 3)
    first = pids("killed")
    with Load(connect, 12) as load:
        for victim in sorted(first)[:2]:
            load.wait_for_more(20)
            os.kill(victim, signal.SIGKILL)
        load.wait_for_more(60)
        wait_for(lambda: replicas("killed") == 3 and not pids("killed") & set(sorted(first)[:2]))
    assert not load.failures
    print(f"{len(load.answers)} answers, 2 of 3 replicas killed")


def test_a_client_sees_nothing_of_killed_replicas(policy: Any) -> None:
    """Of the policy and of the critic: a retry, at most."""
    from sima_ray.runtime.applications import details
    from sima_ray.runtime.serving import deploy_critic, remove

    two = SERVICE.model_copy(
        update={"min_replicas": 2, "max_replicas": 2, "max_ongoing_requests": 64}
    )
    policy("asked", two)
    name, prefix = "critic-asked", "/critic-asked"
    url = deploy_critic(
        CriticConfig(), two, without_token=True, policy="asked", name=name, route_prefix=prefix
    )

    def critics() -> set[int]:
        found = details()
        replicas = found.applications[name].deployments["Critic"].replicas if found else []
        return {r.pid for r in replicas if r.state == "RUNNING" and r.pid is not None}

    wait_for(lambda: len(critics()) == replicas("asked") == 2)
    victims = (min(pids("asked")), min(critics()))
    results: list[CritiqueResult | CriticError] = []

    async def ask(client: AsyncCriticClient, done: asyncio.Event) -> None:
        cases = [Case("?", ["one", "two"])] * 40
        while not done.is_set():
            results.extend(await client.critique_many(cases, concurrency=8))

    async def kill_and_ask() -> None:
        done = asyncio.Event()
        async with AsyncCriticClient(url) as client, asyncio.TaskGroup() as group:
            group.create_task(ask(client, done))
            for victim in victims:
                await asyncio.sleep(1)
                os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(3)
            done.set()

    asyncio.run(kill_and_ask())
    remove(name)
    assert [result for result in results if not isinstance(result, CritiqueResult)] == []
    assert {len(result.orders) for result in results if isinstance(result, CritiqueResult)} == {2}


def test_two_policies_at_once(policy: Any) -> None:
    from sima_ray.runtime.serving import remove, swap_user_config

    first, second = policy("arm-a"), policy("arm-b")
    swap_user_config({"model": "tuned", "version": "tuned"}, "arm-b", 60)
    assert version_of(first) == "base" and version_of(second) == "tuned"
    remove("arm-b")
    assert version_of(first) == "base"
