"""OpenAI's chat routes over the policy, when a run asks for them: Ray's ingress behind our guard."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.ingress.ingress import (
    DEFAULT_ENDPOINTS,
    OpenAiIngress,
    make_fastapi_ingress,
)
from ray.llm._internal.serve.core.ingress.middleware import add_exception_handling_middleware
from ray.serve import Application

from serve_apps.guard import Guard, Limits, Tokens
from serve_apps.shared_quota import shared_quota
from sima_ray.config import PolicyConfig
from sima_ray.runtime.deployment import ingress_options

ROUTES = ("models", "model_data", "chat")


def with_openai_routes(policy: Application, llm_config: Any, config: PolicyConfig) -> Application:
    """The policy with `/v1/models` and `/v1/chat/completions` before it.

    No CORS: Ray's own application would answer any origin, with credentials. Without a token file the routes
    are closed to everybody.
    """
    service = config.service
    api = FastAPI(title="sima-ray policy", docs_url=None, redoc_url=None)
    add_exception_handling_middleware(api)
    api.add_middleware(
        Guard,  # type: ignore[arg-type]
        tokens=Tokens(file=service.token_file),
        limits=Limits.of(service),
        quota=shared_quota(service),
    )
    ingress = make_fastapi_ingress(
        OpenAiIngress, endpoint_map={route: DEFAULT_ENDPOINTS[route] for route in ROUTES}, app=api
    )
    deployment: Any = serve.deployment(
        ingress,
        name="OpenAi",
        ray_actor_options={"num_cpus": 0.1},
        **ingress_options(service),
    )
    return deployment.bind(
        llm_deployments={llm_config.model_id: policy},
        model_cards={llm_config.model_id: to_model_metadata(llm_config.model_id, llm_config)},
    )
