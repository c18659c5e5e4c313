"""A critic over real HTTP on a free port, in a thread: it follows its script, then judges by `score=N`."""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "a-token-of-the-tests"
PNG = b"\x89PNG\r\n\x1a\n and whatever follows"
JPEG = b"\xff\xd8\xff and whatever follows"
WEBP = b"RIFF\x00\x00\x00\x00WEBP and whatever follows"


def report(winner: int | None = 2, **more: Any) -> dict[str, Any]:
    """A report as the service sends it for two responses."""
    choices = {1: (1, 2), 2: (2, 1), None: (1, 1)}[winner]
    outcomes = {1: "preferred_first", 2: "preferred_second", None: "inconsistent"}
    return {
        "winner": winner,
        "consistent": winner is not None,
        "outcome": outcomes[winner],
        "orders": [
            {"order": order, "reason": f"Reason {order}.", "raw": "…", "choice": choice}
            for order, choice in zip(("12", "21"), choices, strict=True)
        ],
        "model_version": "fake-1",
        "prompt_version": "0123456789ab",
        "tokens": 18,
        "seconds": 0.01,
        **more,
    }


def ranked() -> dict[str, Any]:
    """A report on three responses."""
    pairs = [((1, 2), 2, True, 0.2), ((1, 3), None, False, 0.5), ((2, 3), 2, True, None)]
    comparisons = [
        {"responses": list(pair), "consistent": consistent, "probability": probability}
        | {key: report(None)[key] for key in ("orders",)}
        | {"winner": winner, "outcome": "preferred_first" if consistent else "inconsistent"}
        for pair, winner, consistent, probability in pairs
    ]
    more = {"ranking": [2, 1, 3], "agreement": 2 / 3, "comparisons": comparisons, "orders": []}
    return report(2, **more)


def problem(code: str, message: str) -> dict[str, Any]:
    """An error as the service sends it."""
    return {"error": {"code": code, "message": message, "request_id": "r-1"}}


def judge(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The response with the higher `score=N`."""
    if "please refuse" in request["question"]:
        return 422, problem("invalid_request", "too long: the model reads at most 7 tokens")
    scores = [int((re.findall(r"score=(\d+)", text) or ["0"])[0]) for text in request["responses"]]
    return 200, report(scores.index(max(scores)) + 1)


Answer = Callable[[BaseHTTPRequestHandler], None]


def says(status: int, answer: Any = None, **headers: str) -> Answer:
    """Answer with a status, JSON and headers (`Retry_After` is `Retry-After`)."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("x-request-id", "r-1")
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def resets(handler: BaseHTTPRequestHandler) -> None:
    """Break the connection off."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()
    handler.close_connection = True


def drips(handler: BaseHTTPRequestHandler) -> None:
    """Send a body a byte at a time, without an end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


@dataclass
class FakeCritic:
    """The server; use it as a context manager.

    Attributes:
        script: What the next requests are answered with; then `judge` decides.
        requests: The JSON of every POST so far, and when it came.
    """

    script: list[Answer] = field(default_factory=list[Answer])
    requests: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    times: list[float] = field(default_factory=list[float])
    tokens: set[str] = field(default_factory=lambda: {TOKEN})

    def __enter__(self) -> Self:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                says(200, {"status": "ready"})(self)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Authorization", "").removeprefix("Bearer ") not in fake.tokens:
                    needed = problem("unauthorized", "a valid bearer token is needed")
                    says(401, needed)(self)
                    return
                request = json.loads(body)
                fake.requests.append(request)
                fake.times.append(time.monotonic())
                (fake.script.pop(0) if fake.script else says(*judge(request)))(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"
