"""The guard, in process: tokens, bytes as they arrive, requests at once, and the shape of errors."""

import asyncio
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette._utils import get_route_path

from serve_apps.guard import Guard, Limits, Tokens, route_path
from sima_ray.runtime.critic_token import token_hash

TOKEN = "t" * 43  # as long as a real one; the same in each process that collects tests
OPEN = Tokens(anybody=True)
SMALL = Limits(body_bytes=1000, at_once=2, read_s=0.2)


class Echo:
    """An application that answers with the body it got; it can wait, fail, or leak."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        self.bodies.append(message["body"])
        await self.go.wait()
        if scope["path"] == "/fail":
            raise RuntimeError("secret of the house")
        leak = re.fullmatch(r"/leak/(\d+)", scope["path"])
        status = int(leak[1]) if leak else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"secret" if leak else b"fine"})


class Reply:
    """What came back."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        (start,) = [m for m in messages if m["type"] == "http.response.start"]
        self.status: int = start["status"]
        self.headers = {k.decode(): v.decode() for k, v in start["headers"]}
        assert self.headers["x-content-type-options"] == "nosniff"
        assert self.headers["cache-control"] == "no-store"
        assert not any(name.startswith("access-control") for name in self.headers)
        self.body = b"".join(m["body"] for m in messages if m["type"] == "http.response.body")

    @property
    def error(self) -> dict[str, str]:
        body = json.loads(self.body)
        assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "request_id"}
        assert body["error"]["request_id"] == self.headers["x-request-id"]
        return body["error"]


async def ask(
    guard: Guard,
    chunks: Iterable[bytes] = (b'"hello"',),
    path: str = "/v1/critique",
    headers: dict[str, str] | None = None,
    stall: bool = False,
    prefix: str | None = None,
) -> Reply:
    """One request; each chunk is one ASGI message. `stall`: the body never ends."""
    parts = iter(chunks)
    ahead = [next(parts, b"")]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not ahead:
            await asyncio.Event().wait()
        chunk = ahead.pop()
        ahead.extend(following := [part for part in [next(parts, None)] if part is not None])
        return {"type": "http.request", "body": chunk, "more_body": bool(following) or stall}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = {"Content-Type": "application/json"} | (headers or {})
    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    mounted = {} if prefix is None else {"root_path": prefix}
    await guard({"type": "http", "path": path, "headers": raw, **mounted}, receive, send)
    return Reply(sent)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}x", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        ("Bearer ", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        (None, 401),
    ],
)
async def test_tokens(header: str | None, status: int) -> None:
    echo = Echo()
    guard = Guard(echo, Tokens(hashes=[token_hash("other"), token_hash(TOKEN)]), SMALL)
    reply = await ask(guard, headers={"Authorization": header} if header else {})
    assert reply.status == status
    if status == 401:
        assert reply.error["code"] == "unauthorized"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert not echo.bodies


async def test_without_any_token_known_nobody_enters() -> None:
    reply = await ask(Guard(Echo(), Tokens(), SMALL), headers={"Authorization": "Bearer "})
    assert reply.status == 401


async def test_a_token_file_is_read_again_and_a_lost_one_closes_the_door(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# for the team\n{TOKEN}\n\nsecond\n")
    tokens = Tokens(file=str(file))
    assert tokens.known(f"Bearer {TOKEN}") and tokens.known("Bearer second")
    assert not tokens.known("Bearer # for the team") and not tokens.known("Bearer ")

    def changed(action: Any) -> None:
        action()
        tokens._checked = -1.0  # a second later

    changed(lambda: file.write_text("third\n"))
    assert tokens.known("Bearer third") and not tokens.known(f"Bearer {TOKEN}")
    changed(lambda: os.remove(file))
    assert not tokens.known("Bearer third")


async def test_probes_need_no_token() -> None:
    guard = Guard(Echo(), Tokens(), SMALL)
    assert (await ask(guard, path="/healthz")).status == 200
    assert (await ask(guard, path="/healthz/../v1/critique")).status == 401


async def test_a_body_in_chunks_arrives_whole() -> None:
    echo = Echo()
    assert (await ask(Guard(echo, OPEN, SMALL), [b"12"] * 500)).status == 200
    assert echo.bodies == [b"12" * 500]


async def test_a_flood_ends_at_the_limit() -> None:
    """Without a Content-Length, bytes are counted as they come, and no more are taken than allowed."""
    taken = 0

    def flood() -> Iterable[bytes]:
        nonlocal taken
        while True:
            taken += 100
            yield b"x" * 100

    echo = Echo()
    reply = await ask(Guard(echo, OPEN, SMALL), flood())
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    assert taken <= SMALL.body_bytes + 300 and not echo.bodies


@pytest.mark.parametrize("claim", ["1001", "9" * 400])
async def test_a_claimed_length_is_refused_unread(claim: str) -> None:
    reply = await ask(Guard(Echo(), OPEN, SMALL), headers={"Content-Length": claim})
    assert reply.status == 413


async def test_a_body_that_never_ends_times_out() -> None:
    reply = await ask(Guard(Echo(), OPEN, SMALL), [b"x"], stall=True)
    assert (reply.status, reply.error["code"]) == (408, "timeout")


async def test_too_many_at_once_are_told_to_come_back() -> None:
    echo = Echo()
    echo.go.clear()
    guard = Guard(echo, OPEN, SMALL)
    waiting = [asyncio.create_task(ask(guard)) for _ in range(SMALL.at_once)]
    while len(echo.bodies) < SMALL.at_once:
        await asyncio.sleep(0)
    reply = await ask(guard)
    assert (reply.status, reply.error["code"]) == (503, "overloaded")
    assert reply.headers["retry-after"] == "1"
    echo.go.set()
    assert [r.status for r in await asyncio.gather(*waiting)] == [200, 200]
    assert (await ask(guard)).status == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"1", {"Content-Type": "application/json; charset=utf-8"}, 200, ""),
        (b"1", {"Content-Type": "application/problem+JSON"}, 200, ""),
        (b"", {"Content-Type": ""}, 200, ""),  # a route without a body says what it needs
        (b"1", {"Content-Type": ""}, 415, "unsupported_media_type"),
        (b"1", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"1", {"Content-Type": "application/json; charset=utf-16"}, 415, "unsupported_media_type"),
        (b"1", {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        (b"[" * 500 + b"]" * 500, {}, 422, "invalid_request"),
        (b"\xff", {}, 422, "invalid_request"),
        (b'{"a": 1, "a": 1}', {}, 422, "invalid_request"),
    ],
)
async def test_a_body_is_plain_json(
    body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    echo = Echo()
    reply = await ask(Guard(echo, OPEN, SMALL), [body], headers=headers)
    assert reply.status == status
    if status == 200:
        assert echo.bodies == [body]
    else:
        assert reply.error["code"] == code and not echo.bodies


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/fail", 500, "internal"),
        ("/leak/500", 500, "internal"),
        ("/leak/502", 500, "internal"),
        ("/leak/503", 503, "unavailable"),
        ("/leak/404", 404, "not_found"),
        ("/leak/405", 405, "method_not_allowed"),
        ("/leak/400", 400, "invalid_request"),
    ],
)
async def test_failures_are_told_in_our_words(path: str, status: int, code: str) -> None:
    reply = await ask(Guard(Echo(), OPEN, SMALL), path=path)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert b"secret" not in reply.body


async def test_request_ids_are_kept_when_decent() -> None:
    """Whoever gave one (Serve's proxy) also puts it on the response: not twice."""
    guard = Guard(Echo(), Tokens(), SMALL)
    kept = await ask(guard, headers={"X-Request-ID": "run-7.a"})
    assert json.loads(kept.body)["error"]["request_id"] == "run-7.a"
    assert "x-request-id" not in kept.headers
    made = await ask(guard, headers={"X-Request-ID": "<script>"})
    assert len(made.error["request_id"]) == 32


PREFIXES = [
    ("/healthz", None, "/healthz"),
    ("/healthz", "", "/healthz"),
    ("/critic-b/healthz", "/critic-b", "/healthz"),
    ("/critic-b/healthz", "", "/critic-b/healthz"),
    ("/critic-bx/healthz", "/critic-b", "/critic-bx/healthz"),
    ("/critic-bx", "/critic-b", "/critic-bx"),
    ("/critic-b", "/critic-b", ""),
    ("/healthz", "/critic-b", "/healthz"),
    ("/critic-b/critic-b/healthz", "/critic-b", "/critic-b/healthz"),
    ("/critic-b//healthz", "/critic-b", "//healthz"),
]


@pytest.mark.parametrize(("path", "prefix", "route"), PREFIXES)
async def test_a_prefix_is_no_part_of_the_route(path: str, prefix: str | None, route: str) -> None:
    scope = {"path": path} if prefix is None else {"path": path, "root_path": prefix}
    assert route_path(scope) == route == get_route_path(scope)  # the router's own
    reply = await ask(Guard(Echo(), Tokens(), SMALL), path=path, prefix=prefix)
    assert reply.status == (200 if route == "/healthz" else 401)


async def test_forms_are_taken_under_a_prefix() -> None:
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    guard = Guard(Echo(), OPEN, SMALL, forms=("/v1/critique",))
    for path, status in (("/critic-b/v1/critique", 200), ("/critic-b/v1/other", 415)):
        reply = await ask(guard, [b"--b--"], path=path, headers=form, prefix="/critic-b")
        assert reply.status == status
