"""The critic's application in a process of its own, with a policy that answers at once.

The policy decodes images as the engine does. `python -m benchmarks.hostile.server` prints its port.
"""

import asyncio
import socket
from typing import Any

import uvicorn

from benchmarks.hostile.attacks import ALLOWED, TOKEN
from serve_apps.critic import CriticApp, make_app
from sima_ray.config import ServiceConfig
from sima_ray.images import ImageProblem, decode_image
from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.runtime.critic_token import token_hash

SERVICE = ServiceConfig(
    max_body_bytes=1_000_000,
    image_origins=[f"https://{ALLOWED}"],
    max_image_pixels=1_000_000,
    max_text_chars=20_000,
    body_timeout_s=3.0,
    request_timeout_s=20.0,
)


class AnsweringPolicy(Policy):
    """Prefers the first response shown; refuses what the engine would refuse."""

    async def complete(self, request: CompletionRequest) -> Completion:
        for part in request["content"]:
            if part["type"] == "image":
                try:
                    await asyncio.to_thread(decode_image, part["image"], SERVICE.max_image_pixels)
                except ImageProblem as problem:
                    return {"error": f"image: {problem}"}
            else:
                part["text"].encode()  # the engine would fail here
        return {"text": "Because.\nChoice: [[1]]", "tokens": 5, "model_version": "none"}


def main() -> None:
    """Serve until ended."""
    settings = CriticApp.model_validate({"service": SERVICE, "token_hashes": [token_hash(TOKEN)]})
    app: Any = make_app(settings, AnsweringPolicy())
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app, access_log=False, log_level="critical", lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
