"""The policy's Serve application: `serve_apps.policy:build_app`, for `serve deploy` and `deploy_policy`.

Building it imports neither Ray Serve LLM nor vLLM, which would cost a deploy one more round of their imports:
the deployment is a thin class, and loads the engine in its replica.
"""

import math
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve import Application

from sima_ray.config import EngineConfig, PolicyConfig, ServiceConfig
from sima_ray.errors import ModelError
from sima_ray.ports import Completion, JsonDict
from sima_ray.runtime.client import DEPLOYMENT

MODEL_ID = "policy"
"""The model's name on the OpenAI routes."""

MODEL_FILES = ("config.json", "tokenizer_config.json")


class Policy:
    """One replica: see `serve_apps.engine.PolicyServer`, to which everything is handed on."""

    async def __init__(self, config: JsonDict) -> None:
        from serve_apps.engine import PolicyServer

        policy = PolicyConfig.model_validate(config)
        self._server = await PolicyServer.create(llm_config(policy), policy)

    async def complete(self, request: JsonDict) -> Completion:
        """Answer one request (see `sima_ray.ports`)."""
        return await self._server.complete(request)

    async def reconfigure(self, user_config: JsonDict) -> None:
        """Serve's hook: `{"model": folder, "version": name}`; other weights are swapped in place."""
        await self._server.swap(user_config["model"], user_config["version"])

    async def state(self) -> JsonDict:
        """Which replica this is and what it serves."""
        replica = serve.get_replica_context().replica_id.unique_id
        return {"replica": replica, "pid": os.getpid(), **self._server.state()}

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


def deployment_options(config: PolicyConfig) -> JsonDict:
    """Serve's options for the deployment, each set on purpose."""
    engine = config.engine
    return {
        **scaling_options(config.service),
        "user_config": {"model": config.model, "version": "base"},
        "ray_actor_options": {
            "num_cpus": engine.cpus,
            "runtime_env": {"env_vars": environment(engine)},
        },
        "placement_group_bundles": bundles(engine),
        "placement_group_strategy": "PACK",
        "max_constructor_retry_count": 2,  # a model that does not load won't the 20th time either
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 60,
    }


def scaling_options(service: ServiceConfig) -> JsonDict:
    """Replicas and queues. Ray Serve LLM's own builder would set 10⁹ for both limits."""
    return {
        "max_ongoing_requests": service.max_ongoing_requests,
        "max_queued_requests": service.max_queued_requests,
        "autoscaling_config": {
            "min_replicas": service.min_replicas,
            "max_replicas": service.max_replicas,
            "initial_replicas": max(service.min_replicas, 1),
            "target_ongoing_requests": service.target_ongoing_requests,
            "upscale_delay_s": service.upscale_delay_s,
            "downscale_delay_s": service.downscale_delay_s,
        },
    }


def bundles(engine: EngineConfig) -> list[dict[str, float]]:
    """What a replica reserves: the actor's CPUs in the first bundle, a GPU in each."""
    if engine.accelerator == "cpu":
        return [{"CPU": engine.cpus}]
    rest = [{"GPU": 1.0}] * (engine.tensor_parallel_size - 1)
    return [{"CPU": engine.cpus, "GPU": 1.0}, *rest]


def environment(engine: EngineConfig) -> dict[str, str]:
    """Environment variables of a replica and the engine's processes."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if engine.accelerator == "cpu":
        threads = str(max(1, int(engine.cpus)))
        variables |= {
            "TORCHDYNAMO_DISABLE": "1",  # Inductor compiles for 15 s at the first sampled request
            "OMP_NUM_THREADS": threads,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto": all engines of a machine on one core
            "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(engine.cpu_kv_cache_gb)),
        }
    return variables


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


def check_model(folder: str) -> None:
    """Check that a local model folder has what the engine needs.

    Raises:
        ModelError: Names what is missing.
    """
    if "://" in folder:
        return
    if not os.path.isdir(folder):
        raise ModelError(f"model folder {folder} does not exist")
    names = os.listdir(folder)
    missing = [name for name in MODEL_FILES if name not in names]
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        missing.append("*.safetensors")
    if not {"processor_config.json", "preprocessor_config.json"} & set(names):
        missing.append("processor_config.json")
    if missing:
        raise ModelError(f"model folder {folder} lacks {', '.join(missing)}")
