"""A case as a form with an image file (`curl -F image=@cat.jpg …`), turned into the JSON that the route takes."""

import base64
import json
from collections.abc import AsyncGenerator, Collection
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serve_apps.critic_models import invalid
from serve_apps.guard import App, Receive, Scope, Send, is_form, replay, route_path

FIELDS = 64
"""More are refused."""


class _Parser(MultiPartParser):
    # Nothing of a caller's touches the disk: the guard has bounded the whole body.
    spool_max_size = 2**40


class Uploads:
    """An ASGI middleware inside the guard: a form on one of the routes `paths` becomes JSON, all else passes."""

    def __init__(self, app: App, paths: Collection[str]) -> None:
        self._app, self._paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) not in self._paths:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if not is_form(headers.get("content-type", "")):
            return await self._app(scope, receive, send)
        body = json.dumps(await case_of_form(headers, await _whole(receive))).encode()
        kept = [
            (k, v) for k, v in scope["headers"] if k not in (b"content-type", b"content-length")
        ]
        kept += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._app({**scope, "headers": kept}, replay(body, receive), send)


async def case_of_form(headers: Headers, body: bytes) -> dict[str, Any]:
    """The fields of a request as JSON has them: `responses` as often as there are, all others once.

    Raises:
        ApiError: 422.
    """

    async def stream() -> AsyncGenerator[bytes]:
        yield body
        yield b""

    parser = _Parser(
        headers, stream(), max_files=1, max_fields=FIELDS, max_part_size=max(1, len(body))
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, KeyError, ValueError) as problem:
        raise invalid("the form cannot be read: see multipart/form-data") from problem
    case: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise invalid(f"{name[:100]}: only the image may be a file")
            value = f"data:image/png;base64,{base64.b64encode(await value.read()).decode()}"
        if name == "responses":
            case.setdefault(name, []).append(value)
        elif name in case:
            raise invalid(f"{name[:100]}: more than once")
        else:
            case[name] = value
    return case


async def _whole(receive: Receive) -> bytes:
    """The body, which the guard hands on in one message."""
    return (await receive()).get("body", b"")
