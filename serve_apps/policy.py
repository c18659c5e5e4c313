"""The policy's Serve application: `serve_apps.policy:build_app`, for `serve deploy` and `deploy_policy`.

Building it imports neither Ray Serve LLM nor vLLM, which would cost a deploy one more round of their imports:
the deployment is a thin class, and loads the engine in its replica.
"""

import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application

from sima_ray.config import EngineConfig, PolicyConfig
from sima_ray.ports import Completion, JsonDict
from sima_ray.runtime.client import DEPLOYMENT
from sima_ray.runtime.deployment import bundles, deployment_options, environment

MODEL_ID = "policy"
"""The model's name on the OpenAI routes."""

STEP_TOKENS = 4096
"""That a CPU engine computes in a step, or a longest prompt's."""


class Policy:
    """One replica: see `serve_apps.engine.PolicyServer`, to which everything is handed on."""

    async def __init__(self, config: JsonDict) -> None:
        from serve_apps.engine import PolicyServer

        policy = PolicyConfig.model_validate(config)
        self._server = await PolicyServer.create(llm_config(policy), policy)

    async def complete_all(self, requests: list[JsonDict]) -> list[Completion]:
        """Answer requests that share a beginning (see `sima_ray.ports.Policy`)."""
        return await self._server.complete_all(requests)

    async def reconfigure(self, user_config: JsonDict) -> None:
        """Serve's hook: the arguments of `serve_apps.weights.Weights.swap`, in place."""
        await self._server.weights.swap(**user_config)

    async def state(self) -> JsonDict:
        """Which replica this is and what it serves."""
        replica = serve.get_replica_context().replica_id.unique_id
        return {"replica": replica, "pid": os.getpid(), **self._server.weights.state()}

    async def check_health(self) -> None:
        """Serve's hook: raises when the replica must be replaced."""
        await self._server.check_health()

    async def chat(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        """For the OpenAI routes."""
        return await self._server.chat(*args, **kwargs)

    async def llm_config(self) -> Any:
        """For the OpenAI routes."""
        return await self._server.llm_config()


def build_app(config: PolicyConfig) -> Application:
    """Build the application; with `service.openai_routes` it has HTTP routes, else handles only."""
    deployment: Any = serve.deployment(Policy, name=DEPLOYMENT, **deployment_options(config))
    policy = deployment.bind(config.model_dump(mode="json"))
    if not config.service.openai_routes:
        return policy
    from serve_apps.openai_routes import with_openai_routes

    return with_openai_routes(policy, llm_config(config), config)


def engine_arguments(engine: EngineConfig) -> JsonDict:
    """vLLM's arguments."""
    arguments: JsonDict = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "limit_mm_per_prompt": {"image": 1},
        # No image is ever fetched for a request: only data: URLs and bytes.
        "allowed_media_domains": ["nowhere.invalid"],
    }
    if engine.block_size is not None:
        arguments["block_size"] = engine.block_size
    if engine.accelerator == "cpu":
        arguments["enforce_eager"] = True
        # A prompt is read in one step: vLLM rewinds the generator of a seeded request whose prompt a step cuts,
        # and one on the CPU cannot be rewound: the engine would die.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(engine.max_model_len, STEP_TOKENS)
    else:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
        arguments["tensor_parallel_size"] = engine.tensor_parallel_size
    return arguments | engine.options


def llm_config(config: PolicyConfig) -> Any:
    """Ray Serve LLM's configuration of the engine (imports vLLM)."""
    from ray.serve.llm import LLMConfig

    engine = config.engine
    return LLMConfig.model_validate(
        {
            "model_loading_config": {"model_id": MODEL_ID, "model_source": config.model},
            "accelerator_config": {"kind": engine.accelerator},
            "placement_group_config": {"bundles": bundles(engine)},
            "engine_kwargs": engine_arguments(engine),
            "runtime_env": {"env_vars": environment(engine)},
            "callback_config": {"callback_class": "serve_apps.start.NoDownloads"},
        }
    )
