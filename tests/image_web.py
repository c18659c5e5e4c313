"""A web server on the loopback interface that answers by path, and what tests of images by URL share."""

import asyncio
import contextlib
import gzip
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from critic_app import png

from serve_apps.guard import ApiError
from serve_apps.remote_images import RemoteImages
from sima_ray.config import ServiceConfig

NAME = "https://images.example.org"
PUBLIC = "93.184.215.14"
LIMIT = 100_000


@dataclass
class Web:
    """A server that answers by path; `asked` has each request's path and Host, `at_once` the most together."""

    url: str = ""
    connections: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    inside: int = 0
    at_once: int = 0
    elsewhere: str = "http://127.0.0.1:9/"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.inside += 1
        self.at_once = max(self.at_once, self.inside)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path, host = head.split()[1], head.lower().split("host:")[1].split()[0]
            self.asked.append((path, host))
            await self._write(path, writer)
        self.inside -= 1
        writer.close()

    async def _write(self, path: str, writer: asyncio.StreamWriter) -> None:
        def send(status: str, body: bytes, *headers: str, length: int | None = None) -> None:
            size = len(body) if length is None else length
            lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}", *headers, "", ""]
            writer.write("\r\n".join(lines).encode() + body)

        match path.partition("?")[0]:
            case "/ok.png":
                await asyncio.sleep(0.02)  # so that those that may overlap do
                send("200 OK", png())
            case "/away":
                send("302 Found", b"", f"Location: {self.elsewhere}")
            case "/endless" | "/slow" as kind:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                size, wait_s = (0x4000, 0.0) if kind == "/endless" else (1, 0.05)
                while True:
                    writer.write(f"{size:x}\r\n".encode() + b"x" * size + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(wait_s)
            case "/page":
                send("200 OK", b"<html>secret</html>", "Content-Type: text/html")
            case "/lie":
                send("200 OK", b"GIF89a", "Content-Type: image/png")
            case "/cut":
                send("200 OK", png()[:40], length=len(png()))
            case "/header":
                send("200 OK", png()[:20])
            case "/packed":
                send("200 OK", gzip.compress(bytes(10_000_000)), "Content-Encoding: gzip")
            case "/large":
                send("200 OK", b"x" * LIMIT)
            case "/part":
                send("206 Partial Content", png())
            case "/nonsense":
                writer.write(b"\x16\x03\x01 not HTTP\r\n\r\n")
            case "/empty":
                send("200 OK", b"")
            case _:
                send("404 Not Found", b"secret")
        await writer.drain()


@contextlib.asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Web]:
    web = Web()
    server = await asyncio.start_server(web.answer, "127.0.0.1", 0, ssl=tls)
    web.url = f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield web
    finally:
        server.close()


def service(*origins: str, **more: Any) -> ServiceConfig:
    return ServiceConfig(image_origins=list(origins), max_body_bytes=LIMIT, **more)


def resolving(*answers: list[str]) -> tuple[Callable[[str], Any], list[str]]:
    """A resolver that gives one answer after the other, and the names it was asked for."""
    names: list[str] = []

    async def resolve(host: str) -> list[str]:
        names.append(host)
        return answers[min(len(names), len(answers)) - 1]

    return resolve, names


async def refusal(images: RemoteImages, url: str) -> str:
    with pytest.raises(ApiError) as refused:
        await images.of_request().get(url)
    assert (refused.value.status, refused.value.code) == (422, "invalid_request")
    return refused.value.message
