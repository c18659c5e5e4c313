"""An HTTP application that reads its request and answers nothing: what Ray Serve itself takes for a request."""

from typing import Any

from ray import serve
from ray.serve import Application

from serve_apps.guard import App, Receive, Scope, Send

ROUTE = "/bare"


class Bare:
    """The deployment."""

    def __serve_build_asgi_app__(self) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            while (await receive()).get("more_body", False):
                pass
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        return app


def build_app() -> Application:
    """Build the application."""
    deployment: Any = serve.deployment(
        serve.ingress()(Bare), name="Bare", ray_actor_options={"num_cpus": 0.1}
    )
    return deployment.bind()
