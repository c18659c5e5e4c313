"""Where the critic is and which token opens it: an argument, else the environment, else what `sima serve` left."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from sima_ray.client.errors import CriticUnavailable, TokenRefused
from sima_ray.errors import ConfigError
from sima_ray.runtime.critic_token import token_path

DEFAULT_URL = "http://127.0.0.1:8000"
ROUTE = "/v1/critique"

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A critic's address.

    Attributes:
        url: Without a slash at its end, and without the route.
        token: None: ask without one.
        source: Where the token is from, for messages.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    source: str = "no token"

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, where no proxy is to be asked."""
        return urlsplit(self.url).hostname in _LOOPBACK


def find_endpoint(
    url: str | None = None,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
) -> Endpoint:
    """The critic that was named, or else $SIMA_CRITIC_URL, or else the one `sima serve` puts up here.

    The token: `token`, or else the first of `token_file`, or else $SIMA_CRITIC_TOKEN, or else the file that
    `sima serve` wrote; without any of these none is sent.

    Raises:
        ConfigError: A URL that is none.
        TokenRefused: A token file that cannot be read, or holds no token.
    """
    base = _checked_url(url or os.environ.get("SIMA_CRITIC_URL") or DEFAULT_URL)
    if token is not None:
        return Endpoint(base, _checked_token(token, "the token given"), "the token given")
    if token_file is not None:
        return Endpoint(base, *_from_file(Path(token_file).expanduser()))
    if given := os.environ.get("SIMA_CRITIC_TOKEN"):
        return Endpoint(base, _checked_token(given, "$SIMA_CRITIC_TOKEN"), "$SIMA_CRITIC_TOKEN")
    if (left := token_path()).exists():
        return Endpoint(base, *_from_file(left))
    return Endpoint(base)


def find_in_cluster(address: str | None = None, timeout_s: float = 10.0) -> str:
    """The critic's URL, asked of a Ray cluster's dashboard.

    Args:
        address: The dashboard's URL; None: $RAY_API_SERVER_ADDRESS, or the cluster of `sima up`.
        timeout_s: For the answer.

    Raises:
        ConfigError: An address that is no dashboard's.
        ClusterError: No cluster.
        TokenRefused: The cluster needs a token that we do not have.
        CriticUnavailable: The cluster does not answer, or has no critic.
    """
    from sima_ray.runtime.submission import find_cluster

    target = find_cluster(address)
    token = target.token or _ray_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(
            timeout=timeout_s, trust_env=not Endpoint(target.address).is_local
        ) as http:
            reply = http.get(f"{target.address}/api/serve/applications/", headers=headers)
        if reply.status_code in (401, 403):
            raise TokenRefused(
                f"{target.address}: the cluster refuses us: give its token in $RAY_AUTH_TOKEN",
                reply.status_code,
                "unauthorized",
            )
        reply.raise_for_status()
        found: dict[str, Any] = reply.json()
    except TokenRefused:
        raise
    except (httpx.HTTPError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CriticUnavailable(
            f"{target.address}: the cluster does not say what it serves: {words}",
            code="unreachable",
        ) from error
    app = (found.get("applications") or {}).get("critic")
    listens = found.get("http_options")
    if app is None or listens is None or app.get("route_prefix") is None:
        raise CriticUnavailable(
            f"{target.address}: no critic is served there: sima serve CONFIG deploys one",
            code="not_deployed",
        )
    host = "127.0.0.1" if listens["host"] == "0.0.0.0" else listens["host"]
    return f"http://{host}:{listens['port']}{app['route_prefix']}".rstrip("/")


def _ray_token() -> str | None:
    """The token of a cluster that is not ours, from where Ray's own clients take it."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _checked_url(url: str) -> str:
    """The base of a URL; `…/v1/critique`, as `sima serve` shows it, is as good."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        sound, parts = False, urlsplit("")
    if not sound or parts.query or parts.fragment:
        raise ConfigError(f"{url}: not a critic's URL: give it as in http://HOST:8000")
    if parts.username or parts.password:
        raise ConfigError("the critic's URL holds a user or password: give the token apart from it")
    return url.rstrip("/").removesuffix(ROUTE)


def _from_file(file: Path) -> tuple[str, str]:
    """The first token of a file (one a line, `#` comments), and the file's name."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or "not text"
        raise TokenRefused(
            f"{file}: the critic's token cannot be read: {words}", code="no_token"
        ) from error
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not tokens:
        raise TokenRefused(f"{file}: holds no token: put the critic's token there", code="no_token")
    return _checked_token(tokens[0], str(file)), str(file)


def _checked_token(token: str, source: str) -> str:
    """A token that can stand in a header."""
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise TokenRefused(f"{source}: not a token: one word of ASCII is needed", code="no_token")
    return token


__all__ = ["DEFAULT_URL", "ROUTE", "Endpoint", "find_endpoint", "find_in_cluster"]
