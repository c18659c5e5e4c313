"""Addresses that must not be fetched: tricks with URLs, names that lead inside, servers under another name."""

import datetime
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from critic_app import ScoringPolicy, case, client, png
from image_web import NAME, PUBLIC, Web, refusal, resolving, service, serving

from serve_apps.remote_images import NOT_ALLOWED, RemoteImages, is_public


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with serving() as found:
        yield found


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
