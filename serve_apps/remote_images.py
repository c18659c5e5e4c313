"""Images that a request names by URL: fetched from the origins that the config allows, and from nowhere else.

A caller has this service ask others, so everything is bounded. An address is read in one way
(`sima_ray.config.origins`), its origin must be on the list to the letter, and redirects are not followed. A name
is resolved here, once, and the connection goes to an address that was checked: what the name says a moment later
(DNS rebinding) makes no difference. Bytes, seconds and fetches at once have limits.
"""

import asyncio
import logging
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpx

from serve_apps.guard import ApiError
from sima_ray.config import ServiceConfig
from sima_ray.config.origins import WebAddress, read_url

logger = logging.getLogger("ray.serve")

AT_ONCE = 16
"""Fetches of one replica from one origin: a slow origin must not hold up the others."""

AT_ONCE_PER_REQUEST = 8
"""A batch of slow addresses must not take all of them."""

CONNECT_S = 3.0
"""For each of a name's addresses, of which not all need be reachable."""

NOT_ALLOWED = "image: only data: URLs, or https URLs of the origins that the service allows"

_UNICAST_6, _TO_4, _NAT64 = (ip_network(n) for n in ("2000::/3", "2002::/16", "64:ff9b::/96"))
_METADATA = (IPv4Address("168.63.129.16"), IPv4Address("192.0.0.192"))
"""Of Azure's and Oracle's clouds: public by their numbers, alone among the addresses of metadata services."""

Resolve = Callable[[str], Awaitable[list[str]]]
Transport = Callable[[], httpx.AsyncBaseTransport]


async def resolve_name(host: str) -> list[str]:
    """The addresses of a name, in the system's order of preference."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class RemoteImages:
    """What one replica fetches.

    Args:
        service: Its origins, and its limit of bytes.
        resolve: In place of the system's resolver.
        transport: In place of the network, made for each fetch.
        limit_s: For one image, from the wait for its turn to the last byte.
    """

    def __init__(
        self,
        service: ServiceConfig,
        resolve: Resolve = resolve_name,
        transport: Transport | None = None,
        limit_s: float = 10.0,
    ) -> None:
        self._allowed = frozenset(service.image_origins)
        self._max_bytes = service.max_body_bytes
        self._resolve, self._transport, self._limit_s = resolve, transport, limit_s
        self._slots = {origin: asyncio.Semaphore(AT_ONCE) for origin in self._allowed}
        # Made once, since it reads all authorities; $SSL_CERT_FILE names others.
        self._tls = httpx.create_ssl_context() if self._allowed else True

    def of_request(self) -> "RequestImages":
        """For one request, a batch included."""
        return RequestImages(self, self._max_bytes)

    def allowed(self, url: str) -> WebAddress:
        """The address, if it may be fetched.

        Raises:
            ApiError: 422.
        """
        address = None
        with suppress(ValueError):
            address = read_url(url)
        if address is None or address.origin not in self._allowed:
            raise _invalid(NOT_ALLOWED)
        return address

    async def fetch(self, address: WebAddress, take: Callable[[int], None]) -> bytes:
        """What an allowed address holds.

        Args:
            address: From `allowed`.
            take: Told of all bytes as they arrive; raises when there are too many.

        Raises:
            ApiError: 422. Of the network it tells nothing: a caller must not map it by these errors.
        """
        try:
            async with asyncio.timeout(self._limit_s), self._slots[address.origin]:
                return await self._fetch(address, await self._addresses(address), take)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _invalid("image: could not be fetched in time") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise _invalid("image: could not be fetched") from error

    async def _addresses(self, address: WebAddress) -> list[str]:
        """Where to connect to: all the name's addresses, if all are public."""
        if address.ip is not None:
            # Whoever wrote an IP address into the config meant that very machine, be it private. A name is another
            # matter: where it leads is up to whoever runs its DNS, and must not be the inside of this network.
            return [str(address.ip)]
        found = await self._resolve(address.host)
        inside = [ip for ip in found if not is_public(ip)]
        if inside:
            logger.warning("%s is at %s, not public: not asked", address.origin, inside[0])
            raise _invalid("image: could not be fetched")
        return found

    async def _fetch(
        self, address: WebAddress, ips: list[str], take: Callable[[int], None]
    ) -> bytes:
        headers = {
            "Host": address.authority,
            "User-Agent": "sima-ray",
            "Accept": "image/jpeg, image/png, image/webp",
            "Accept-Encoding": "identity",
        }
        # The name that the certificate must have, as the URL below does not hold it.
        tls = {} if address.ip else {"sni_hostname": address.host}
        refused: httpx.TransportError = httpx.ConnectError("the name has no address")
        # A client for each: one that is shared would keep connections by IP address, and serve one name over a
        # connection that was verified for another.
        async with httpx.AsyncClient(
            verify=self._tls,
            trust_env=False,  # no proxies, no .netrc
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            transport=self._transport() if self._transport else None,
        ) as http:
            for ip in ips:
                host = f"[{ip}]" if ":" in ip else ip
                url = f"{address.scheme}://{host}:{address.port}{address.target}"
                try:
                    async with http.stream("GET", url, headers=headers, extensions=tls) as reply:
                        return await _body(reply, take)
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    refused = error
        raise refused


class RequestImages:
    """The images of one request: each address is fetched once, and all are as large as a body may be, together."""

    def __init__(self, remote: RemoteImages, max_bytes: int) -> None:
        self._remote, self._max_bytes, self._left = remote, max_bytes, max_bytes
        self._slots = asyncio.Semaphore(AT_ONCE_PER_REQUEST)
        self._locks: defaultdict[WebAddress, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._found: dict[WebAddress, bytes | ApiError] = {}

    async def get(self, url: str) -> bytes:
        """The bytes that a URL leads to; they need not be an image.

        Raises:
            ApiError: 422.
        """
        address = self._remote.allowed(url)
        async with self._locks[address]:
            if address not in self._found:
                async with self._slots:
                    self._found[address] = await self._fetch(address)
        found = self._found[address]
        if isinstance(found, ApiError):
            raise found
        return found

    async def _fetch(self, address: WebAddress) -> bytes | ApiError:
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            taken += count
            self._take(count)

        try:
            return await self._remote.fetch(address, take)
        except ApiError as error:
            self._left += taken  # nothing of it is kept: it must not cost the other cases of a batch their images
            return error

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _invalid(
                f"image: over the {self._max_bytes:,} bytes allowed for the images of one request"
            )


def is_public(text: str) -> bool:
    """Whether an IP address is one of the internet's, and not of this machine, its network or its cloud."""
    ip = ip_address(text)
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:  # the way to an IPv4 address, on networks without IPv4
            ip = IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in _UNICAST_6 or ip in _TO_4:
            return False
    special = ip.is_multicast or ip.is_reserved or ip in _METADATA
    return ip.is_global and not special


async def _body(reply: httpx.Response, take: Callable[[int], None]) -> bytes:
    if reply.status_code != 200:
        words = ": redirects are not followed" if reply.is_redirect else ""
        raise _invalid(f"image: could not be fetched ({reply.status_code}{words})")
    # Unpacked it could be a thousand times what was counted.
    if reply.headers.get("content-encoding", "identity").lower() != "identity":
        raise _invalid("image: could not be fetched (it is sent compressed)")
    chunks: list[bytes] = []
    async for chunk in reply.aiter_raw():
        take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


def _invalid(message: str) -> ApiError:
    return ApiError(422, "invalid_request", message)
