"""Images by URL: from a real HTTP server on the loopback interface, and everything that must not be fetched."""

import asyncio
import contextlib
import datetime
import gzip
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from critic_app import SERVICE, ScoringPolicy, case, client, data_url, error_of, judge, png

from serve_apps.guard import ApiError
from serve_apps.remote_images import (
    AT_ONCE,
    AT_ONCE_PER_REQUEST,
    NOT_ALLOWED,
    RemoteImages,
    is_public,
)
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


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with serving() as found:
        yield found


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
        images = RemoteImages(service(web.url, canary.url), limit_s=0.5)
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
        images = RemoteImages(service(slow.url, web.url), limit_s=1.0)
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


TRICKS = [
    *("http://127.0.0.1:PORT@evil.example/a", "http://evil.example@127.0.0.1:PORT/a"),
    *("http://:@127.0.0.1:PORT/a", "http://127.0.0.1:PORT:80/a", "http://127.0.0.1:PORT.evil/a"),
    *("http://127.0.0.1.evil.example:PORT/a", "http://127.0.0.1:0PORT/a", "http://127.0.0.1/a"),
    *("http:\\\\127.0.0.1:PORT\\a", "http://127.0.0.1:PORT\\@evil/a", "http:/\\127.0.0.1:PORT/a"),
    *("//127.0.0.1:PORT/a", "127.0.0.1:PORT/a", "http:127.0.0.1:PORT/a", "http:///127.0.0.1:PORT"),
    *("https://127.0.0.1:PORT/a", "HTTPS://127.0.0.1:PORT/a", "HTTP://LOCALHOST:PORT/a"),
    *("ftp://127.0.0.1:PORT/a", "gopher://127.0.0.1:PORT/_GET", "file:///etc/passwd", "ws://a/"),
    *("http://localhost:PORT/a", "http://127.1:PORT/a", "http://2130706433:PORT/a"),
    *("http://0x7f000001:PORT/a", "http://0x7f.0.0.1:PORT/a", "http://0177.0.0.1:PORT/a"),
    *("http://127.0.0.01:PORT/a", "http://127.0.0.1.:PORT/a", "http://0.0.0.0:PORT/a"),
    *("http://[::1]:PORT/a", "http://[::ffff:127.0.0.1]:PORT/a", "http://[::127.0.0.1]:PORT/a"),
    *("http://[::ffff:7f00:1]:PORT/a", "http://[fe80::1%25lo]:PORT/a", "http://127.0.0.2:PORT/a"),
    *("http://127。0。0。1:PORT/a", "http://①②⑦.0.0.1:PORT/a", "http://１２７.0.0.1:PORT/a"),
    *("http://127.0.0.1:PORT\t/a", "ht\ntp://127.0.0.1:PORT/a", " http://127.0.0.1:PORT/a"),
    *("http://127.0.0.1:PORT/a\n", "http://127.0.0.1:PORT/\r\nX: y", "http://127.0.0.1:PORT/\0"),
    *("http://127.0.0.1:PORT/ HTTP/1.1", "http://127.0.0.1:PORT?a", "http://127.0.0.1%3aPORT/a"),
    *("http://127.0.0.1:PORT#@evil/a", "http://%31%32%37.0.0.1:PORT/a", "http://127.0.0.1:/a"),
    *("url:http://127.0.0.1:PORT/a", "<http://127.0.0.1:PORT/a>", "http://169.254.169.254/a"),
    *("https://images.example.org.evil.example/a", "https://evil-images.example.org/a"),
    *("https://images.example.org@evil.example/a", "https://images.example.org./a", ""),
    *("https://ımages.example.org/a", "https://images.example.org:8443/a", "http://[::1]/a"),
    *("http://images.example.org/a", "https://www.images.example.org/a", "javascript:alert(1)"),
    *("blob:http://127.0.0.1:PORT/a", "http://127.0.0.1:65536/a", "http://example.org:PORT/a"),
]


async def test_no_trick_reaches_anybody(web: Web) -> None:
    resolve, names = resolving([PUBLIC])
    images = RemoteImages(service(web.url, NAME), resolve)
    urls = [trick.replace("PORT", web.url.rpartition(":")[2]) for trick in TRICKS]
    for url in urls:
        assert await refusal(images, url) == NOT_ALLOWED, url
    assert not names
    cases = [case(1, 2, image=url) for url in urls]
    origins = [web.url, NAME]
    async with client(ScoringPolicy(), image_origins=origins, max_cases=512) as http:
        reply = await http.post("/v1/critique/batch", json={"cases": cases})
    found = [result["error"]["message"] for result in reply.json()["results"]]
    assert found == [NOT_ALLOWED] * len(urls)
    assert not web.connections


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


@pytest.mark.parametrize(
    "ip",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192"),
        *("224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fec0::1", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1"),
        *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1"),
    ],
)
async def test_a_name_for_an_address_inside(ip: str) -> None:
    assert not is_public(ip)

    def transport() -> httpx.AsyncBaseTransport:
        raise AssertionError("was asked")

    for found in ([ip], [PUBLIC, ip], [ip, PUBLIC]):
        resolve, _ = resolving(found)
        images = RemoteImages(service(NAME), resolve, transport)
        assert await refusal(images, f"{NAME}/a.png") == "image: could not be fetched"


def test_addresses_of_the_internet() -> None:
    public = [PUBLIC, "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
    assert all(is_public(ip) for ip in public)


async def test_a_literal_address_is_no_name() -> None:
    """Who allows an address means it, and no resolver is asked."""
    resolve, names = resolving(["127.0.0.1"])
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(png()))

    images = RemoteImages(
        service("https://[fd00::5]:8443", "http://10.0.0.5"),
        resolve,
        lambda: httpx.MockTransport(answer),
    )
    for url in ("https://[fd00:0::5]:8443/a", "http://10.0.0.5:80/a?b"):
        assert await images.of_request().get(url) == png()
    assert [str(r.url) for r in seen] == ["https://[fd00::5]:8443/a", "http://10.0.0.5/a?b"]
    assert [r.headers["host"] for r in seen] == ["[fd00::5]:8443", "10.0.0.5"] and not names


class Detour(httpx.AsyncHTTPTransport):
    """The network, in which one public address is this machine's."""

    def __init__(self, web: Web, hosts: list[str], tls: ssl.SSLContext) -> None:
        super().__init__(verify=tls, trust_env=False)
        self._web, self._hosts = httpx.URL(web.url), hosts

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._hosts.append(request.url.host)
        if request.url.host != PUBLIC:
            raise httpx.ConnectError("unreachable")
        request.url = request.url.copy_with(host=self._web.host, port=self._web.port)
        return await super().handle_async_request(request)


def certificates(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server that is this name, and of a client that trusts it."""
    pytest.importorskip("cryptography", reason="makes the test's certificate")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    made = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    file = folder / "both.pem"
    file.write_bytes(key.private_bytes(pem, form, plain) + made.public_bytes(pem))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=str(file))


@pytest.mark.parametrize("name", ["images.example.org", "other.example.org"])
async def test_tls_holds_the_server_to_the_name_and_not_to_the_address(
    name: str, tmp_path: Path
) -> None:
    server_tls, client_tls = certificates(tmp_path, name)
    # The first address cannot be reached, the second can.
    resolve, _ = resolving(["2606:4700::1111", PUBLIC])
    hosts: list[str] = []
    async with serving(server_tls) as web:
        images = RemoteImages(service(NAME), resolve, lambda: Detour(web, hosts, client_tls))
        if name == "images.example.org":
            assert await images.of_request().get(f"{NAME}/ok.png") == png()
            assert web.asked == [("/ok.png", "images.example.org")]
        else:
            assert await refusal(images, f"{NAME}/ok.png") == "image: could not be fetched"
            assert not web.asked
    assert hosts == ["2606:4700::1111", PUBLIC]


async def test_a_name_that_changes_its_mind_never_leads_inside(web: Web) -> None:
    """DNS rebinding: public when it is checked, this machine when it is looked up again."""
    port = web.url.rpartition(":")[2]
    origin = f"http://images.example.org:{port}"
    resolve, names = resolving([PUBLIC], ["127.0.0.1"])
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.host)
        return httpx.Response(200, stream=httpx.ByteStream(png()))

    images = RemoteImages(service(origin), resolve, lambda: httpx.MockTransport(answer))
    assert await images.of_request().get(f"{origin}/ok.png") == png()
    assert (names, seen) == (["images.example.org"], [PUBLIC])
    assert await refusal(images, f"{origin}/ok.png") == "image: could not be fetched"
    assert (len(names), seen) == (2, [PUBLIC]) and not web.connections
