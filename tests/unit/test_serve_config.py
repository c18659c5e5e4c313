"""The shipped Serve config file is one that Serve and our builders take; and the options that builders set."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_apps import critic, policy
from sima_ray.config import EngineConfig, PolicyConfig, ServiceConfig
from sima_ray.runtime.client import DEPLOYMENT
from sima_ray.runtime.deployment import deployment_options

FILE = Path(policy.__file__).with_name("serve.yaml")


def test_the_shipped_file_is_taken_by_serve_and_by_the_builders() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    first, second = schema.applications
    assert (first.import_path, second.import_path) == (
        "serve_apps.policy:build_app",
        "serve_apps.critic:build_app",
    )
    config = PolicyConfig.model_validate(first.args)
    (override,) = first.deployments
    assert override.name == DEPLOYMENT
    ours = deployment_options(config)
    for name in ("user_config", "request_router_config"):
        assert getattr(override, name) == ours[name], name
    settings = critic.CriticApp.model_validate(second.args)
    assert settings.policy == first.name and settings.service.token_file


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_the_policy_is_built_with_limits(accelerator: Any) -> None:
    """Ray Serve LLM's own builder sets 10⁹ for both, and then neither scales nor refuses."""
    config = PolicyConfig(
        model="/models/m",
        engine=EngineConfig(accelerator=accelerator, cpus=2, tensor_parallel_size=2),
        service=ServiceConfig(
            max_replicas=3,
            target_ongoing_requests=8,
            max_ongoing_requests=16,
            max_queued_requests=99,
        ),
    )
    deployment = policy.build_app(config)._bound_deployment
    assert deployment.name == DEPLOYMENT
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (16, 99)
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.max_replicas, scaling.target_ongoing_requests) == (3, 8)
    bundles = policy.bundles(config.engine)
    assert bundles == ([{"CPU": 2}] if accelerator == "cpu" else [{"CPU": 2, "GPU": 1}, {"GPU": 1}])


def test_an_engine_never_fetches_and_takes_further_options() -> None:
    arguments = policy.engine_arguments(EngineConfig(options={"max_num_batched_tokens": 99}))
    assert arguments["allowed_media_domains"] == ["nowhere.invalid"]
    assert arguments["max_num_batched_tokens"] == 99
    assert "TORCHDYNAMO_DISABLE" not in policy.environment(EngineConfig())
    assert policy.environment(EngineConfig(accelerator="cpu"))["VLLM_CPU_KVCACHE_SPACE"] == "1"
