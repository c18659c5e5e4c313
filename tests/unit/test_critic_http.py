"""The critic's client, sync and async, against a real HTTP server that resets, drips, and asks to wait."""

import time
from email.utils import formatdate
from typing import Any

import pytest
from fake_critic import PNG, TOKEN, FakeCritic, drips, problem, resets, says

from sima_ray.client import AsyncCriticClient, CriticClient, CriticUnavailable, Retry, TokenRefused
from sima_ray.runtime.cluster import free_port

pytestmark = pytest.mark.usefixtures("home")

QUICK = Retry(attempts=3, first_wait_s=0.01)
PAIR = ["score=1", "score=2"]


def test_a_reset_connection_is_tried_again(server: FakeCritic) -> None:
    server.script = [resets, resets]
    with CriticClient(server.url, TOKEN, retry=QUICK) as client:
        assert client.critique(PNG, "?", PAIR).winner == 2
    assert len(server.requests) == 3


async def test_a_reset_connection_is_tried_again_async(server: FakeCritic) -> None:
    server.script = [resets, resets]
    async with AsyncCriticClient(server.url, TOKEN, retry=QUICK) as client:
        assert (await client.critique(PNG, "?", PAIR)).winner == 2
        server.script = [resets] * 3
        with pytest.raises(CriticUnavailable, match=r"the connection broke .*3 tries") as caught:
            await client.critique(None, "?", PAIR)
    assert (caught.value.status, caught.value.code) == (None, "unreachable")


@pytest.mark.parametrize("as_date", [False, True])
async def test_retry_after_is_waited_for(server: FakeCritic, as_date: bool) -> None:
    def busy() -> Any:
        value = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
        return says(503, problem("overloaded", "busy"), Retry_After=value)

    server.script = [busy()]
    with CriticClient(server.url, TOKEN, retry=QUICK) as client:
        assert client.critique(None, "?", PAIR).winner == 2
    server.script = [busy()]
    async with AsyncCriticClient(server.url, TOKEN, retry=QUICK) as client:
        assert (await client.critique(None, "?", PAIR)).winner == 2
    first, second, third, fourth = server.times
    least = 0.9  # a date has whole seconds
    assert second - first >= least and fourth - third >= least


async def test_an_answer_that_never_ends_is_given_up_in_time(server: FakeCritic) -> None:
    server.script = [drips, drips]
    start = time.monotonic()
    with (
        CriticClient(server.url, TOKEN) as client,
        pytest.raises(CriticUnavailable, match="no answer in time"),
    ):
        client.critique(None, "?", PAIR, timeout=0.3)
    async with AsyncCriticClient(server.url, TOKEN, timeout=0.3) as client:
        with pytest.raises(CriticUnavailable, match="no answer in time") as caught:
            await client.critique(None, "?", PAIR)
    assert caught.value.code == "timeout"
    assert time.monotonic() - start < 10


async def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    words = "connection refused; 3 tries in .*is it up"
    with (
        CriticClient(url, retry=QUICK) as client,
        pytest.raises(CriticUnavailable, match=words),
    ):
        client.critique(None, "?", PAIR)
    async with AsyncCriticClient(url, retry=QUICK) as client:
        with pytest.raises(CriticUnavailable, match=words):
            await client.critique(None, "?", PAIR)


def test_a_wrong_token_is_not_tried_again(server: FakeCritic) -> None:
    with CriticClient(server.url, "wrong", retry=QUICK) as client:
        with pytest.raises(TokenRefused) as caught:
            client.critique(None, "?", PAIR)
        assert caught.value.status == 401
        server.tokens.add("wrong")
        assert client.critique(None, "?", PAIR).winner == 2
    assert len(server.requests) == 1
