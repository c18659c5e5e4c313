"""Hostile requests: a small run of `python -m benchmarks.hostile`, and some through real Serve."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.hostile import server
from benchmarks.hostile.__main__ import run
from benchmarks.hostile.attacks import TOKEN, attacks
from benchmarks.hostile.run import Canary, Findings, send_all, send_wire
from sima_ray.config import CriticConfig


def test_hostile_requests_find_nothing() -> None:
    """Over HTTP, on the application in a process of its own."""
    figures = run(300, seed=1)
    assert figures["first_problems"] == []
    assert figures["server_errors_but_503"] == figures["images_fetched"] == 0
    assert figures["requests"] >= 300 and len(figures["families"]) == 19
    # So few requests warm the server up, no more: the growth of its memory is for a longer run.
    assert figures["server_memory_growth"] < 0.2


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    """The critic on Serve, with a policy that answers at once."""
    from ray import cloudpickle, serve

    from sima_ray.runtime.critic_token import token_hash
    from sima_ray.runtime.serving import deploy_critic, start_serve

    cloudpickle.register_pickle_by_value(server)
    start_serve(port=0)
    policy: Any = serve.deployment(
        server.AnsweringPolicy, name="Policy", ray_actor_options={"num_cpus": 0.1}
    )
    serve.run(policy.bind(), name="policy", route_prefix=None)
    yield deploy_critic(CriticConfig(), server.SERVICE, token_hashes=[token_hash(TOKEN)])
    serve.shutdown()


def test_hostile_requests_through_serve(url: str) -> None:
    """Serve's own proxy comes before the application here."""
    findings = Findings()

    async def send() -> int:
        canary = Canary()
        async with canary as fetch_url:
            own = attacks(2, 200, server.SERVICE.max_body_bytes, fetch_url)
            await send_all(url, own, findings, at_once=8)
            await send_wire(int(url.rsplit(":", 1)[1]), 1, findings)
        return canary.asked

    assert asyncio.run(send()) == 0
    assert findings.problems == [] and findings.statuses.total() == 200 + 17
