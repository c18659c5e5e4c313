"""The guard on real Serve with two replicas: quotas over both, clients that go away, deadlines, revoked tokens."""

import asyncio
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sima_ray.config import CriticConfig, ServiceConfig
from sima_ray.ports import Policy

PER_MINUTE, AT_ONCE, DEADLINE_S = 30, 3, 15.0
NAMES = ("rate", "places", "other", "keeper", "replica", "gone", "late", "every", "batch")


class SlowPolicy(Policy):
    """Waits as long as the question says, and counts the requests that were cancelled meanwhile."""

    def __init__(self) -> None:
        self.begun = self.cancelled = 0

    async def complete(self, request: Any) -> Any:
        text = "".join(part.get("text", "") for part in request["content"])
        wait = re.search(r"please wait (\d+)", text)
        self.begun += 1
        try:
            await asyncio.sleep(int(wait[1]) if wait else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return {"text": "Choice: [[1]]", "tokens": 1, "model_version": "slow"}

    async def counts(self) -> tuple[int, int]:
        return self.begun, self.cancelled


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text("\n".join(NAMES))
    return file


@pytest.fixture(scope="module")
def url(ray_cluster: None, tokens: Path) -> Iterator[str]:
    from ray import cloudpickle, serve

    from sima_ray.runtime.serving import deploy_critic, start_serve

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    start_serve(port=0)
    slow: Any = serve.deployment(
        SlowPolicy, name="Policy", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=50
    )
    serve.run(slow.bind(), name="policy", route_prefix=None)
    service = ServiceConfig(
        min_replicas=2,
        max_replicas=2,
        requests_per_minute=PER_MINUTE,
        concurrent_per_token=AT_ONCE,
        request_timeout_s=DEADLINE_S,
        token_file=str(tokens),
    )
    yield deploy_critic(CriticConfig(), service)
    serve.shutdown()


def ask(url: str, token: str, question: str = "?", timeout_s: float = 30) -> httpx.Response:
    """A connection of its own each, so that Serve's proxy picks a replica anew."""
    return httpx.post(
        f"{url}/v1/critique",
        json={"question": question, "responses": ["a", "b"]},
        headers={"Authorization": f"Bearer {token}"},
        timeout=timeout_s,
    )


def at_once(url: str, token: str, count: int, question: str) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: ask(url, token, question), range(count)))


def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


def counts() -> tuple[int, int]:
    """Requests that the policy has begun, and those of them that were cancelled."""
    from ray import serve

    return serve.get_deployment_handle("Policy", "policy").counts.remote().result()


def actors(name: str) -> list[Any]:
    import ray

    found: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return [ray.get_actor(**actor) for actor in found if name in actor["name"]]


def kept(url: str) -> None:
    """Until the keeper of quotas answers and both replicas ask it: before, each goes by itself."""
    import ray

    def asked() -> bool:
        assert ask(url, "other").status_code in (200, 429)
        return bool(actors("quotas of critic"))

    until(asked)
    ray.get(actors("quotas of critic")[0].renew.remote({}))
    time.sleep(2.2)  # longer than a replica goes by itself after a failure


def test_a_minutes_requests_hold_over_both_replicas(url: str) -> None:
    kept(url)
    start = time.monotonic()
    replies = [ask(url, "rate") for _ in range(PER_MINUTE + 10)]
    passed = Counter(reply.status_code for reply in replies)
    gained = (time.monotonic() - start) * PER_MINUTE / 60
    assert set(passed) == {200, 429}
    assert PER_MINUTE <= passed[200] <= PER_MINUTE + gained + 1
    refused = ask(url, "rate")
    while refused.status_code == 200:
        refused = ask(url, "rate")
    assert refused.json()["error"]["code"] == "over_quota"
    wait = int(refused.headers["retry-after"])
    assert 1 <= wait <= 60 / PER_MINUTE + 1
    assert ask(url, "other").status_code == 200, "another token has its own"
    time.sleep(wait)
    assert ask(url, "rate").status_code == 200, "the seconds named were enough"


def test_a_batch_counts_its_cases(url: str) -> None:
    kept(url)

    def batch(count: int) -> httpx.Response:
        cases = [{"question": "?", "responses": ["a", "b"]}] * count
        headers = {"Authorization": "Bearer batch"}
        return httpx.post(
            f"{url}/v1/critique/batch", json={"cases": cases}, headers=headers, timeout=120
        )

    assert batch(PER_MINUTE + 1).status_code == 422, "could never pass"
    assert batch(PER_MINUTE - 5).status_code == 200
    over = batch(PER_MINUTE - 5)
    assert over.status_code == 429 and int(over.headers["retry-after"]) > 20


def test_places_hold_over_both_replicas(url: str) -> None:
    kept(url)
    found = Counter(reply.status_code for reply in at_once(url, "places", 8, "please wait 5"))
    assert found == {200: AT_ONCE, 429: 8 - AT_ONCE}
    assert ask(url, "places").status_code == 200, "and are given back"


def test_the_keepers_death_turns_nobody_away(url: str) -> None:
    import ray

    kept(url)
    before = actors("quotas of critic")[0]
    ray.kill(before)
    assert [ask(url, "keeper").status_code for _ in range(4)] == [200] * 4

    def held() -> bool:  # a replica that is not asked does not notice, and goes by itself at first
        found = Counter(reply.status_code for reply in at_once(url, "keeper", 8, "please wait 2"))
        return found == {200: AT_ONCE, 429: 8 - AT_ONCE}

    until(held)


def test_a_client_that_goes_away_ends_the_work(url: str) -> None:
    begun, cancelled = counts()
    with pytest.raises(httpx.ReadTimeout):
        ask(url, "gone", "please wait 60", timeout_s=3)
    assert counts()[0] == begun + 2, "both orders had begun"
    # Before the deadline would have ended them.
    until(lambda: counts()[1] == cancelled + 2, timeout_s=DEADLINE_S - 5)


def test_a_deadline_is_a_504_and_ends_the_work(url: str) -> None:
    _, cancelled = counts()
    start = time.monotonic()
    reply = ask(url, "late", "please wait 300", timeout_s=120)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert time.monotonic() - start >= DEADLINE_S  # far from the 300 s: `ask` gives up after 120
    until(lambda: counts()[1] == cancelled + 2)


def test_no_route_without_a_token(url: str, tokens: Path) -> None:
    """But for the probes. A token that is taken out of the file is void on all routes."""
    headers = {"Authorization": "Bearer every"}
    document = httpx.get(f"{url}/openapi.json", headers=headers).json()
    routes = [(m, path) for path, methods in document["paths"].items() for m in methods]
    assert ("post", "/v1/critique") in routes
    routes = [route for route in routes if route[1] not in ("/healthz", "/readyz")]
    paths = ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/", "/v1", "/nowhere")
    routes += [("get", path) for path in paths]
    routes += [(m, "/v1/critique") for m in ("get", "head", "options", "put", "delete", "trace")]

    def statuses(headers: dict[str, str]) -> set[int]:
        return {httpx.request(m, f"{url}{path}", headers=headers).status_code for m, path in routes}

    assert statuses({}) == statuses({"Authorization": "Bearer wrong"}) == {401}
    assert 401 not in statuses(headers)
    tokens.write_text("\n".join(name for name in NAMES if name != "every"))
    until(lambda: statuses(headers) == {401})  # replicas look at the file once a second
    assert {httpx.get(f"{url}{path}").status_code for path in ("/healthz", "/readyz")} == {200}
    for method, path, status in (("head", "/v1/critique", 405), ("options", "/nowhere", 404)):
        reply = httpx.request(
            method, f"{url}{path}", headers={"Authorization": "Bearer other", "Origin": "http://a"}
        )
        assert reply.status_code == status
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not any(name.startswith("access-control") for name in reply.headers)


def test_places_of_a_dead_replica_are_given_back(url: str) -> None:
    """Last: it ends a replica, and the keeper with it where the keeper was that replica's."""
    import ray

    kept(url)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = counts()[0]
        for _ in range(AT_ONCE):
            pool.submit(ask, url, "replica", "please wait 5")
        until(lambda: counts()[0] == begun + 2 * AT_ONCE)
        for replica in actors("SERVE_REPLICA::critic#"):
            ray.kill(replica)
    until(lambda: Counter(r.status_code for r in at_once(url, "replica", 3, "?")) == {200: 3}, 60)
