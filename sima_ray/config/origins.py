"""Web addresses, read in one way only.

Allow-lists are passed by addresses that two readers understand differently, so nothing here is lenient: an address
is plain ASCII of one form, or it is none.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated

from pydantic import AfterValidator

_PORTS = {"http": 80, "https": 443}

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(:(?P<port>[1-9][0-9]{0,4}))?"
    r"((?P<target>/[a-z0-9._~!$&'()*+,;=:@%/?-]{0,4000})(#[!-~]{0,4000})?)?",
    re.ASCII | re.IGNORECASE,  # without ASCII, case folding lets in letters such as the Kelvin sign
)
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class WebAddress:
    """An http or https URL in its parts.

    Attributes:
        scheme: "http" or "https".
        host: A name in lower case, or an IP address; IPv6 is short and without brackets.
        port: Given, or the scheme's own.
        target: Path and query, as they were given.
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def ip(self) -> IPv4Address | IPv6Address | None:
        """The host, if it is no name."""
        return _ip(self.host)

    @property
    def authority(self) -> str:
        """Host and port as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """Scheme, host and port, in the one way to write them."""
        return f"{self.scheme}://{self.authority}"


def read_url(text: str) -> WebAddress:
    """Read a URL.

    Raises:
        ValueError: It is not of the form that is read here.
    """
    found = _URL.fullmatch(text)
    if found is None:
        raise ValueError("not a plain http or https URL")
    scheme = found["scheme"].lower()
    port = int(found["port"] or _PORTS[scheme])
    if port > 65535:
        raise ValueError("no such port")
    return WebAddress(scheme, _host(found["host"].lower()), port, found["target"] or "/")


def _host(text: str) -> str:
    if text.startswith("["):
        return str(IPv6Address(text[1:-1]))
    labels = text.split(".")
    if _NUMBER.fullmatch(
        labels[-1]
    ):  # resolvers read 127.1, 0x7f.1 and 2130706433 as addresses too
        return str(IPv4Address(text))
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("not a host name")
    return text


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    if ":" in host:
        return IPv6Address(host)
    return IPv4Address(host) if _NUMBER.fullmatch(host.rpartition(".")[2]) else None


def _origin(text: str) -> str:
    try:
        address = read_url(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is no origin ({error}): write https://images.example.org, or with a port "
            "https://images.example.org:8443; a name that is not ASCII in its xn-- form"
        ) from error
    if text.count("/") > 2:
        raise ValueError(f"{text!r} is more than an origin: write {address.origin}, without a path")
    return address.origin


Origin = Annotated[str, AfterValidator(_origin)]
"""Scheme, host and port of a web server, such as `https://images.example.org`."""
