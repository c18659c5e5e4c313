"""The door of every HTTP route: who may ask, how much, how many at once, and what an error looks like.

An ASGI middleware that takes the whole body in before the application sees the request: bytes are counted as
they arrive, and an application that never meets a half-read body needs no rules for one. A body must be JSON that
can be read in one way only (`serve_apps.strict_json`).
"""

import asyncio
import hmac
import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

from serve_apps.quota import OverQuota
from serve_apps.strict_json import NotJson, check_json
from sima_ray.config import ServiceConfig
from sima_ray.runtime.critic_token import token_hash

logger = logging.getLogger("ray.serve")

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Answered without a token: probes have none, and learn nothing but "up"."""

SAFE_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
"""On every response: an answer is for its asker alone, and never a page. No CORS: no other site's page may ask."""

_JSON = re.compile(r'application/([\w.-]+\+)?json\s*(;\s*charset="?utf-8"?\s*)?', re.IGNORECASE)
_FORM = re.compile(r"multipart/form-data\s*;", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiError(Exception):
    """An error that is answered as `{"error": {"code", "message", "request_id"}}`."""

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


@dataclass
class Tokens:
    """The tokens that open the door.

    Attributes:
        hashes: Of tokens that never change (see `token_hash`).
        file: One token a line, `#` comments; read again when it changes, so a token can be revoked.
        anybody: Ask for none.
    """

    hashes: Sequence[str] = ()
    file: str | None = None
    anybody: bool = False
    _seen: tuple[float, int] | None = None
    _from_file: list[str] = field(default_factory=list)
    _checked: float = -1.0

    def known(self, authorization: str) -> str | None:
        """The hash of the token in an Authorization header, if it opens the door ("" where none is asked for).

        Takes the same time for any wrong one.
        """
        if self.anybody:
            return ""
        scheme, _, token = authorization.partition(" ")
        given = token_hash(token.strip())
        # A list, not a generator: every comparison is made.
        matches = [hmac.compare_digest(given, known) for known in (*self.hashes, *self._current())]
        opens = scheme.lower() == "bearer" and bool(token.strip()) and any(matches)
        return given if opens else None

    def _current(self) -> list[str]:
        """Hashes of the file's tokens, looked at again at most once a second."""
        if self.file is None or time.monotonic() - self._checked < 1:
            return self._from_file
        self._checked = time.monotonic()
        try:
            state = os.stat(self.file)
            if (state.st_mtime, state.st_size) != self._seen:
                lines = Path(self.file).read_text(encoding="utf-8").split("\n")
                tokens = [line.strip() for line in lines if line.strip() and line[0] != "#"]
                self._from_file = [token_hash(token) for token in tokens]
                self._seen = (state.st_mtime, state.st_size)
        except (OSError, UnicodeDecodeError) as error:
            logger.error("The token file cannot be read, so its tokens are void: %s", error)
            self._from_file, self._seen = [], None
        return self._from_file


@dataclass(frozen=True)
class Limits:
    """What one replica takes.

    Attributes:
        body_bytes: Of one request; above it, 413.
        at_once: Requests; above it, 503.
        read_s: For a body to arrive; then 408.
    """

    body_bytes: int
    at_once: int
    read_s: float

    @classmethod
    def of(cls, service: ServiceConfig) -> Self:
        """The limits that a service's settings name."""
        return cls(service.max_body_bytes, service.max_ongoing_requests, service.body_timeout_s)


class Quota(Protocol):
    """What each token may ask, over all replicas (`serve_apps.shared_quota`)."""

    def place(self, token: str) -> AbstractAsyncContextManager[None]:
        """A place for one request of the token with this hash.

        Raises:
            OverQuota: There is none.
        """
        ...

    async def charge(self, token: str, requests: int) -> None:
        """Count so many more requests, for one that stands for several.

        Raises:
            OverQuota: There are fewer left.
        """
        ...


class Guard:
    """The middleware (see the module). On the routes of `forms` a body may be a form, not looked into here."""

    def __init__(
        self,
        app: App,
        tokens: Tokens,
        limits: Limits,
        quota: Quota | None = None,
        forms: Collection[str] = (),
    ) -> None:
        self._app, self._tokens, self._limits, self._quota = app, tokens, limits, quota
        self._forms = forms
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value for key, value in scope["headers"]}
        given = headers.get("x-request-id", b"").decode("latin-1")
        decent = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if decent else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        # Serve's proxy gives every request an id, and puts it on the response by itself.
        answer = _Answer(send, request_id, tell=not decent)
        try:
            await self._admit(scope, headers, receive, answer)
        except ApiError as error:
            await answer.error(error)
        except Exception:
            logger.exception("Request %s failed", request_id)
            await answer.error(ApiError(500, "internal", "the service failed; see its log"))

    async def _admit(
        self, scope: Scope, headers: dict[str, bytes], receive: Receive, answer: "_Answer"
    ) -> None:
        path = route_path(scope)
        if path in OPEN_PATHS:
            # Whatever body comes along is not read: who has no token holds no memory and no place.
            await self._app(scope, replay(b"", receive), answer)
            return
        authorization = headers.get("authorization", b"").decode("latin-1")
        token = self._tokens.known(authorization)
        if token is None:
            raise ApiError(
                401,
                "unauthorized",
                "a valid bearer token is needed",
                {"WWW-Authenticate": "Bearer"},
            )
        if self._inside >= self._limits.at_once:
            raise ApiError(503, "overloaded", "too many requests at once", {"Retry-After": "1"})
        self._inside += 1
        scope["state"]["charge"] = partial(self._charge, token)
        try:
            async with self._quota.place(token) if self._quota else nullcontext():
                body = await self._read(headers, receive)
                if body:
                    _check_body(headers, body, path in self._forms)
                await self._app(scope, replay(body, receive), answer)
        except OverQuota as over:
            raise _over_quota(over) from over
        finally:
            self._inside -= 1

    async def _charge(self, token: str, requests: int) -> None:
        """For a route whose request stands for several (`request.state.charge`).

        Raises:
            ApiError: 429.
        """
        if self._quota is not None and requests > 0:
            try:
                await self._quota.charge(token, requests)
            except OverQuota as over:
                raise _over_quota(over) from over

    async def _read(self, headers: dict[str, bytes], receive: Receive) -> bytes:
        """The whole body, or 413 or 408 as soon as that is known."""
        limit = self._limits.body_bytes
        claimed = headers.get("content-length", b"0")
        if claimed.isdigit() and int(claimed[:20]) > limit:
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.read_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "disconnected", "the body ended early")
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, "timeout", "the body took too long to arrive") from error


class _Answer:
    """`send`, with our own words in place of any error's that is not ours: others tell of the inside.

    `tell`: Put the request id on the response.
    """

    def __init__(self, send: Send, request_id: str, tell: bool) -> None:
        self._send, self._request_id = send, request_id
        self._id_header = {"x-request-id": request_id} if tell else {}
        self._started = self._muted = False

    async def __call__(self, message: Message) -> None:
        if self._muted:
            return
        if message["type"] == "http.response.start":
            ours = any(key == b"x-sima-error" for key, _ in message["headers"])
            if message["status"] >= 400 and not ours:
                logger.info("Request %s was answered %s", self._request_id, message["status"])
                await self.error(_plain(message["status"]))
                self._muted = True
                return
            message["headers"] = [
                *(
                    (key, value)
                    for key, value in message["headers"]
                    if key not in (b"x-sima-error", *dict(SAFE_HEADERS))
                ),
                *((key.encode(), value.encode()) for key, value in self._id_header.items()),
                *SAFE_HEADERS,
            ]
            self._started = True
        await self._send(message)

    async def error(self, error: ApiError) -> None:
        """Answer with an error, unless a response is under way already."""
        if self._started:
            return
        self._started = True
        status, headers, body = error_response(error, self._request_id)
        headers |= self._id_header
        raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        raw += SAFE_HEADERS
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
        await self._send({"type": "http.response.body", "body": body})


def error_response(error: ApiError, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an error, in the one shape that all have."""
    shape = {"code": error.code, "message": error.message, "request_id": request_id}
    body = json.dumps({"error": shape}, ensure_ascii=False).encode("utf-8", errors="replace")
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return error.status, headers | error.headers, body


def route_path(scope: Scope) -> str:
    """A request's path as the application's routes name it: without the prefix that it is served at.

    Cut where the router itself cuts, so that both have the same route in mind.
    """
    path, prefix = scope["path"], scope.get("root_path", "")
    return path[len(prefix) :] if f"{path}/".startswith(f"{prefix}/") else path


def is_form(content_type: str) -> bool:
    """Whether a body is said to be a form that can hold a file."""
    return _FORM.match(content_type.strip()) is not None


def _check_body(headers: dict[str, bytes], body: bytes, form: bool) -> None:
    """415 for what is not said to be plain JSON in UTF-8 (or a form, where that may be), 422 for what is not."""
    if headers.get("content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "unsupported_media_type", "a compressed body is not taken")
    content_type = headers.get("content-type", b"").decode("latin-1")
    if form and is_form(content_type):
        return
    if not _JSON.fullmatch(content_type.strip()):
        raise ApiError(
            415, "unsupported_media_type", "the body must be sent as Content-Type: application/json"
        )
    try:
        check_json(body)
    except NotJson as problem:
        raise ApiError(422, "invalid_request", str(problem)) from problem


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then whatever else comes (a disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _plain(status: int) -> ApiError:
    """An error of which only the status may be told."""
    match status:
        case 503:
            return ApiError(
                503, "unavailable", "not available now; try again", {"Retry-After": "2"}
            )
        case _ if status >= 500:
            return ApiError(500, "internal", "the service failed; see its log")
        case 404:
            return ApiError(404, "not_found", "no such route or model")
        case 405:
            return ApiError(405, "method_not_allowed", "not a method of this route")
        case _:
            return ApiError(status, "invalid_request", "not a request that can be answered")


def _over_quota(over: OverQuota) -> ApiError:
    wait = str(max(1, math.ceil(over.seconds)))
    return ApiError(429, "over_quota", str(over), {"Retry-After": wait})


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "too_large", f"the request is over the {limit:,} bytes allowed")
