"""Images by URL: from a real HTTP server on the loopback interface, within limits; by default none at all."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from critic_app import SERVICE, ScoringPolicy, case, client, data_url, error_of, judge, png
from image_web import LIMIT, Web, refusal, service, serving

from serve_apps.guard import ApiError
from serve_apps.remote_images import AT_ONCE, AT_ONCE_PER_REQUEST, NOT_ALLOWED, RemoteImages


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with serving() as found:
        yield found


async def test_an_image_by_url_on_all_routes(web: Web) -> None:
    url, policy = f"{web.url}/ok.png", ScoringPolicy()
    part = {"type": "image_url", "image_url": {"url": url}}
    question = {"type": "text", "text": "Hello"}
    the_case = {"type": "text", "text": json.dumps(case(1, 2))}

    def chat(model: str, *parts: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": list(parts)}]}

    async with client(policy, image_origins=[web.url]) as http:
        report = await judge(http, case(1, 3, image=url))
        assert report["winner"] == 2 and "1 images" in report["orders"][0]["reason"]
        for body in (chat("policy", question, part), chat("critic", the_case, part)):
            reply = await http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200 and "1 images" in reply.text, reply.text
        twice = await http.post("/v1/chat/completions", json=chat("policy", question, part, part))
    assert error_of(twice)[2] == "image: one URL at most in a message"
    shown = [p["image"] for r in policy.requests for p in r["content"] if p["type"] == "image"]
    assert shown == [png()] * 5
    assert web.asked == [("/ok.png", web.url.removeprefix("http://"))] * 3


async def test_a_failure_in_a_batch_is_that_cases_and_one_image_is_fetched_once(web: Web) -> None:
    paths = ["/ok.png", "/missing", "/page", "/ok.png", "/missing", "/ok.png?2"]
    cases = [case(1, 2, image=f"{web.url}{path}") for path in paths]
    cases += [case(1, 2, image="http://127.0.0.1:1/"), case(1, 2, image=data_url(png()))]
    async with client(ScoringPolicy(), image_origins=[web.url]) as http:
        reply = await http.post("/v1/critique/batch", json={"cases": cases})
    assert "secret" not in reply.text
    found = [r.get("winner") or r["error"]["message"] for r in reply.json()["results"]]
    missing = "image: could not be fetched (404)"
    page = "image: not a readable JPEG, PNG or WebP"
    assert found == [2, missing, page, 2, missing, 2, NOT_ALLOWED, 2]
    assert sorted(path for path, _ in web.asked) == ["/missing", "/ok.png", "/ok.png?2", "/page"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "could not be fetched (404)"),
        ("/away", "could not be fetched (302: redirects are not followed)"),
        ("/part", "could not be fetched (206)"),
        ("/packed", "could not be fetched (it is sent compressed)"),
        ("/cut", "could not be fetched"),
        ("/nonsense", "could not be fetched"),
        ("/slow", "could not be fetched in time"),
        ("/endless", "over the 100,000 bytes allowed for the images of one request"),
    ],
)
async def test_a_fetch_that_fails(web: Web, path: str, words: str) -> None:
    async with serving() as canary:
        web.elsewhere = f"{canary.url}/ok.png"
        limit_s = 0.5 if words.endswith("in time") else 30
        images = RemoteImages(service(web.url, canary.url), limit_s=limit_s)
        assert await refusal(images, f"{web.url}{path}") == f"image: {words}"
    assert len(web.asked) == 1 and not canary.connections


@pytest.mark.parametrize("path", ["/page", "/lie", "/header", "/empty"])
async def test_what_is_fetched_is_held_to_the_rules_of_uploads(web: Web, path: str) -> None:
    async with client(ScoringPolicy(), image_origins=[web.url]) as http:
        reply = await http.post("/v1/critique", json=case(1, 2, image=f"{web.url}{path}"))
    words = "image: not a readable JPEG, PNG or WebP"
    assert error_of(reply) == (422, "invalid_request", words)


async def test_nobody_there() -> None:
    images = RemoteImages(service("http://127.0.0.1:1", "https://no-such-name.invalid"))
    for origin in ("http://127.0.0.1:1", "https://no-such-name.invalid"):
        assert await refusal(images, f"{origin}/a.png") == "image: could not be fetched"


async def test_the_images_of_a_request_share_its_bytes_and_a_few_places(web: Web) -> None:
    images = RemoteImages(service(web.url)).of_request()
    assert len(await images.get(f"{web.url}/large")) == LIMIT
    with pytest.raises(ApiError, match="over the 100,000 bytes"):
        await images.get(f"{web.url}/large?again")
    many = RemoteImages(service(web.url)).of_request()
    await asyncio.gather(*(many.get(f"{web.url}/ok.png?{n}") for n in range(30)))
    assert web.at_once <= AT_ONCE_PER_REQUEST


async def test_a_slow_origin_holds_up_no_other_and_no_wait_is_beyond_the_limit(web: Web) -> None:
    async with serving() as slow:
        images = RemoteImages(service(slow.url, web.url), limit_s=5.0)
        more = AT_ONCE + 3
        stuck = [asyncio.create_task(refusal(images, f"{slow.url}/slow?{n}")) for n in range(more)]
        while slow.inside < AT_ONCE:
            await asyncio.sleep(0.01)
        assert await images.of_request().get(f"{web.url}/ok.png") == png()
        assert slow.at_once == AT_ONCE and not any(task.done() for task in stuck)
        assert set(await asyncio.gather(*stuck)) == {"image: could not be fetched in time"}
        while slow.inside:  # its writes fail now
            await asyncio.sleep(0.01)


async def test_a_request_ends_in_its_own_time(web: Web) -> None:
    values = {"image_origins": [web.url], "request_timeout_s": 0.3}
    async with client(ScoringPolicy(), **values) as http:
        reply = await http.post("/v1/critique", json=case(1, 2, image=f"{web.url}/slow"))
    assert error_of(reply)[:2] == (504, "timeout")


async def test_by_default_nothing_is_fetched(web: Web) -> None:
    assert SERVICE.image_origins == []
    async with client(ScoringPolicy()) as http:
        reply = await http.post("/v1/critique", json=case(1, 2, image=f"{web.url}/ok.png"))
    assert error_of(reply) == (422, "invalid_request", NOT_ALLOWED)
    assert not web.connections


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
async def test_no_proxy_of_the_environment(
    web: Web, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as proxy:
        monkeypatch.setenv(name, proxy.url)
        assert await RemoteImages(service(web.url)).of_request().get(f"{web.url}/ok.png") == png()
    assert not proxy.connections
