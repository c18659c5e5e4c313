"""What the two clients share: their settings, and the exchange of one try with httpx."""

import os
from dataclasses import dataclass
from typing import Any

import httpx

from sima_ray.client import answers
from sima_ray.client.case import MAX_BODY_BYTES
from sima_ray.client.retry import BUSY, Clock, Ended, NoReply, Reply, Retry, Steps, exchange
from sima_ray.client.settings import find_endpoint

TIMEOUT_S = 600.0
"""Of a critique, all tries together: as long as the service itself takes by default."""

CONNECT_S = 10.0
READY_S = 15.0

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Call:
    """One request, as it is sent at each try."""

    method: str
    path: str
    body: bytes = b""


class BaseClient:
    """What both clients have."""

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        token_file: PathLike | None = None,
        timeout: float = TIMEOUT_S,
        retry: Retry | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._endpoint = find_endpoint(url, token, token_file)
        self._timeout, self._retry, self._max_bytes = timeout, retry or Retry(), max_body_bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        """The service's base URL."""
        return self._endpoint.url

    def _options(self, transport: Any) -> dict[str, Any]:
        return {
            "base_url": self._endpoint.url,
            "headers": self._endpoint.headers,
            "transport": transport,
            "trust_env": not self._endpoint.is_local,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
        }

    def _tries(self, timeout: float | None) -> Steps:
        return exchange(self._retry, self._timeout if timeout is None else timeout, Clock())

    def _readiness(self, timeout: float) -> Steps:
        retry = Retry(min(3, self._retry.attempts), self._retry.first_wait_s)
        return exchange(retry, timeout, Clock(), busy=BUSY - {503})

    def _is_ready(self, ended: Ended) -> bool:
        if isinstance(ended.outcome, Reply) and ended.outcome.status == 503:
            return False
        answers.json_of(ended, self._endpoint)
        return True


def check_concurrency(concurrency: int) -> None:
    """Raise `ValueError` where nothing could be sent at all."""
    if concurrency < 1:
        raise ValueError(f"concurrency={concurrency}: at least 1")


def arguments(call: Call, left_s: float) -> dict[str, Any]:
    """Of one try, for either of the library's clients."""
    left_s = max(left_s, 0.001)
    return {
        "method": call.method,
        "url": call.path,
        "content": call.body or None,
        "headers": {"Content-Type": "application/json"} if call.body else {},
        "timeout": httpx.Timeout(left_s, connect=min(CONNECT_S, left_s)),
    }


def reply(response: httpx.Response, body: bytes) -> Reply:
    """What came back, in our own words."""
    return Reply(
        response.status_code,
        {key.lower(): value for key, value in response.headers.items()},
        body,
    )


def no_reply(error: httpx.RequestError) -> NoReply:
    """What kind of silence it was."""
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout():
            kind = "refused"
        case httpx.TimeoutException():
            kind = "timeout"
        case _:
            kind = "broken"
    cause: BaseException | None = error
    while cause is not None:  # the async library has its own words for it
        if isinstance(cause, ConnectionRefusedError) or "onnection refused" in str(cause):
            return NoReply(kind, "connection refused")
        cause = cause.__cause__ or cause.__context__
    return NoReply(kind, " ".join(str(error).split()) or type(error).__name__)
