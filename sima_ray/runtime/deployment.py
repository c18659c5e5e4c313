"""Serve's options for the policy's deployment, each set on purpose: what a replica reserves, needs and queues."""

import math

from sima_ray.config import EngineConfig, PolicyConfig, ServiceConfig
from sima_ray.ports import JsonDict

METRICS_INTERVAL_S = 1.0
LOOK_BACK_S = 5.0
IMAGE_ROUTER = "serve_apps.routing:ImageRouter"

DOOR_ROOM = 1024
"""Requests of an HTTP replica beyond its guard's limit, and on their way to it. Refusing one takes the guard a
millisecond; what finds no place here, Serve refuses itself, in words of its own."""


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
        "request_router_config": router_options(service),
        "max_ongoing_requests": service.max_ongoing_requests,
        "max_queued_requests": service.max_queued_requests,
        "autoscaling_config": {
            "min_replicas": service.min_replicas,
            "max_replicas": service.max_replicas,
            "initial_replicas": max(service.min_replicas, 1),
            "target_ongoing_requests": service.target_ongoing_requests,
            "upscale_delay_s": service.upscale_delay_s,
            "downscale_delay_s": service.downscale_delay_s,
            # Load is looked at every second over the last few: Serve's own 10 s and 30 s would come before
            # `upscale_delay_s`, and a stage sends all its requests at once.
            "metrics_interval_s": METRICS_INTERVAL_S,
            "look_back_period_s": LOOK_BACK_S,
        },
    }


def ingress_options(service: ServiceConfig) -> JsonDict:
    """Of a guarded HTTP deployment: never at zero, for its door must answer; and with room beyond the guard's
    own limit, so that it is the guard that says 503, in our words.
    """
    room = {
        "min_replicas": max(1, service.min_replicas),
        "max_ongoing_requests": service.max_ongoing_requests + DOOR_ROOM,
        "routing": "load",
    }
    if service.max_queued_requests >= 0:  # Serve counts those that are on their way as queued
        room["max_queued_requests"] = service.max_queued_requests + DOOR_ROOM
    options = scaling_options(service.model_copy(update=room))
    return options | {"backpressure_config": {"retry_after_s": 1}}


def router_options(service: ServiceConfig) -> JsonDict:
    """Serve's `request_router_config`; empty is its own router. A declaration states it too: what the code has
    there, Serve's controller would import anew.
    """
    if service.routing == "load":
        return {}
    slack = max(2, service.target_ongoing_requests // 4)
    return {"request_router_class": IMAGE_ROUTER, "request_router_kwargs": {"slack": slack}}


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
            # One loop for Serve and the engine: on few cores, a thread each costs more than it gives.
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        }
    return variables
