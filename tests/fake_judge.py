"""A judge over real HTTP that speaks OpenAI's chat completions, and can be told to misbehave."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from fake_critic import Answer, says

KEY = "sk-test-0123456789"


def completion(text: str | None, **message: Any) -> dict[str, Any]:
    """A chat completion of that text."""
    return {
        "choices": [
            {
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


@dataclass
class FakeJudge:
    """The server; use it as a context manager.

    Attributes:
        answer: What a prompt is answered with, by default; a text is a completion of it.
        script: What the next requests are answered with; then `answer` decides.
        prompts: What was asked so far, in order.
        bodies: The requests' JSON.
        most: The most requests that were in flight at once.
    """

    answer: Callable[[str], "str | Answer"] = lambda prompt: "Rating: 4"
    script: list[Answer] = field(default_factory=list[Answer])
    prompts: list[str] = field(default_factory=list[str])
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    most: int = 0

    def __enter__(self) -> Self:
        fake, lock, flying = self, threading.Lock(), 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                nonlocal flying
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    flying += 1
                    fake.most = max(fake.most, flying)
                try:
                    self.reply(body)
                except OSError:  # the client gave up
                    self.close_connection = True
                finally:
                    with lock:
                        flying -= 1

            def reply(self, body: dict[str, Any]) -> None:
                if self.headers.get("Authorization") != f"Bearer {KEY}":
                    says(401, {"error": {"message": f"bad key {KEY}"}})(self)
                    return
                assert self.path == "/v1/chat/completions"
                prompt = body["messages"][-1]["content"]
                with lock:
                    fake.prompts.append(prompt)
                    fake.bodies.append(body)
                    scripted = fake.script.pop(0) if fake.script else None
                answer = scripted or fake.answer(prompt)
                (says(200, completion(answer)) if isinstance(answer, str) else answer)(self)

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
        """Its base URL."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"
