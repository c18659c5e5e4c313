"""Sends attacks over HTTP and looks at every answer: its status, its shape, and what it tells of the inside."""

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.hostile.attacks import TOKEN, Attack, as_json, case

INSIDE = re.compile(
    r"""Traceback|File\ "|\.py\b|site-packages|\bpid\b|0x[0-9a-f]{6,}|/(tmp|home|usr|etc|work|root|proc)/
    |\b(sima_ray|serve_apps|pydantic|pydantic_core|fastapi|starlette|uvicorn|asyncio|json\.decoder|PIL)\b
    |(?<!sima-)\bray\b
    |\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b|Exception|secret""",
    re.VERBOSE,
)
"""What no answer may hold. The sound requests here hold none of it either."""


BEFORE_THE_APPLICATION = "Invalid HTTP request received."
"""What the HTTP server itself answers to what it cannot read as HTTP."""


@dataclass
class Findings:
    """What came back: counts, and the first answers that must not have come."""

    statuses: Counter[int] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: list[tuple[float, str]] = field(default_factory=list)

    def see(self, family: str, status: int, text: str, refused: bool = False) -> None:
        """Count an answer, and note what is wrong with it."""
        self.statuses[status] += 1
        self.families[family] += 1
        wrong = None
        if status >= 500 and status != 503:
            wrong = "a server error"
        elif found := INSIDE.search(text):
            wrong = f"tells of the inside: {found[0]!r}"
        elif refused and status < 400:
            wrong = "not refused"
        elif status >= 400 and text not in ("", BEFORE_THE_APPLICATION) and not _our_shape(text):
            wrong = "another shape"
        if wrong:
            self.problems.append(f"{family}: {status}, {wrong}: {text[:300]}")

    def report(self) -> dict[str, Any]:
        """The figures."""
        times = sorted(self.seconds)
        return {
            "requests": self.statuses.total(),
            "server_errors_but_503": sum(
                n for status, n in self.statuses.items() if status >= 500 and status != 503
            ),
            "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
            "families": dict(sorted(self.families.items())),
            "problems": len(self.problems),
            "first_problems": self.problems[:20],
            "seconds_median": round(times[len(times) // 2][0], 4) if times else None,
            "longest": [f"{family}: {seconds:.2f} s" for seconds, family in times[-3:]],
        }


def _our_shape(text: str) -> bool:
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return set(error) == {"code", "message", "request_id"}


async def send_all(url: str, attacks: Iterable[Attack], findings: Findings, at_once: int) -> None:
    """Send attacks, so many at once, over ordinary HTTP connections."""
    waiting = iter(attacks)

    async def worker(client: httpx.AsyncClient) -> None:
        for attack in waiting:
            await _send(client, attack, findings)

    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(at_once):
            group.create_task(worker(client))


async def _send(client: httpx.AsyncClient, attack: Attack, findings: Findings) -> None:
    headers = [(name.encode(), value.encode()) for name, value in attack.headers]
    if attack.token is not None:
        headers.append((b"Authorization", f"Bearer {attack.token}".strip().encode()))
    if attack.content_type is not None:
        headers.append((b"Content-Type", attack.content_type.encode()))
    body = attack.body if isinstance(attack.body, bytes) else _chunks(attack.body)
    start = time.perf_counter()
    try:
        reply = await client.request(attack.method, attack.path, headers=headers, content=body)
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        # A flood is cut while it is being sent: the answer may be lost with the connection.
        findings.statuses[0] += 1
        findings.families[attack.family] += 1
        if attack.family != "flood":
            findings.problems.append(f"{attack.family}: the connection was closed")
        return
    findings.seconds.append((time.perf_counter() - start, attack.family))
    findings.see(attack.family, reply.status_code, reply.text, attack.refused)


async def _chunks(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def wire_attacks() -> Iterator[tuple[str, bytes]]:
    """Bytes that are hardly HTTP."""
    body = as_json(case())
    post = (
        b"POST /v1/critique HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    )
    yield "length below body", post + b"Content-Length: 5\r\n\r\n" + body
    yield "length negative", post + b"Content-Length: -5\r\n\r\n" + body
    yield "length no number", post + b"Content-Length: 0x10\r\n\r\n" + body
    yield "two lengths", post + b"Content-Length: 5\r\nContent-Length: 9\r\n\r\n" + body
    yield (
        "length and chunks",
        post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + body,
    )
    yield "chunk of no size", post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n"
    yield (
        "chunk of any size",
        post + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nab\r\n",
    )
    yield "header of a megabyte", post + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n"
    yield "a thousand headers", post + b"".join(b"X%d: y\r\n" % i for i in range(1000)) + b"\r\n"
    yield "header with a zero", post + b"X: \0\r\nContent-Length: 2\r\n\r\n{}"
    yield "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256))
    yield "HTTP 9", b"GET /healthz HTTP/9.9\r\nHost: a\r\n\r\n"
    yield "no host", b"GET /v1/critique HTTP/1.1\r\n\r\n"
    yield (
        "a whole address",
        b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
    )
    yield "CONNECT", b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a\r\n\r\n"
    yield (
        "websocket",
        b"GET /v1/critique HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    )
    yield "half a body", post + b"Content-Length: 500\r\n\r\n{"


async def send_wire(port: int, rounds: int, findings: Findings, limit_s: float = 20.0) -> None:
    """Send each of `wire_attacks`, and end the sending side: the server may answer or hang up, no more."""
    for _ in range(rounds):
        for name, raw in wire_attacks():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            got = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(limit_s):
                    writer.write(raw)
                    await writer.drain()
                    if writer.can_write_eof():
                        writer.write_eof()
                    got = await reader.read(100_000)
            writer.close()
            first = re.match(rb"HTTP/1\.1 (\d{3})", got)
            status = int(first[1]) if first else 0
            findings.statuses[status] += 1
            findings.families["wire"] += 1
            text = got.decode("latin-1")
            told = INSIDE.search(text.partition("\r\n\r\n")[2])
            if (status >= 500 and status != 503) or told:
                findings.problems.append(f"wire, {name}: {text[:300]}")


@contextlib.asynccontextmanager
async def slow_clients(port: int, count: int) -> AsyncIterator[list[bytes]]:
    """Connections that send one header, or one byte of a body, at a time; yields what they are answered."""
    answers: list[bytes] = []

    async def one(i: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = b"POST /v1/critique HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        start += b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
        if i % 2:
            start += b"Content-Length: 900\r\n\r\n"
        reading = asyncio.create_task(reader.read(10_000))
        with contextlib.suppress(ConnectionError):
            writer.write(start)
            while not reading.done():
                writer.write(b" " if i % 2 else b"X-A: b\r\n")
                await writer.drain()
                await asyncio.wait([reading], timeout=0.5)
            answers.append(await reading)
        writer.close()

    tasks = [asyncio.create_task(one(i)) for i in range(count)]
    try:
        yield answers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Canary:
    """A server that nothing should ever ask."""

    def __init__(self) -> None:
        self.asked = 0

    async def __aenter__(self) -> str:
        async def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.asked += 1
            writer.close()

        self._server = await asyncio.start_server(count, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/image.png"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
