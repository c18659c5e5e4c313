"""The smallest change of a config that makes it fit, found by trying."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

from sima_ray.config import RunConfig
from sima_ray.config.overrides import apply_overrides
from sima_ray.errors import ConfigError

_AT_ONCE = 3
"""Settings that a proposal changes at most."""


def smallest_change(config: RunConfig, fits: Callable[[RunConfig], bool]) -> list[str] | None:
    """Settings, as `--set` takes them, with which a config fits; None where none of those that are tried does.

    Few changes come before many, and what costs little before what costs much.
    """
    changes = list(_changes(config))
    for count in range(1, _AT_ONCE + 1):
        for chosen in combinations(changes, count):
            settings = [setting for change in chosen for setting in change]
            if len({setting.partition("=")[0] for setting in settings}) < len(settings):
                continue
            changed = with_settings(config, settings)
            if changed is not None and fits(changed):
                return settings
    return None


def with_settings(config: RunConfig, settings: Sequence[str]) -> RunConfig | None:
    """The config with these settings; None where they contradict each other."""
    values: dict[str, Any] = config.model_dump(mode="json")
    try:
        return RunConfig.parse(apply_overrides(values, settings, RunConfig))
    except ConfigError:
        return None


def _changes(config: RunConfig) -> Iterator[list[str]]:
    """Single changes, the cheapest first."""
    engine, service, training = config.policy.engine, config.policy.service, config.training
    gpus = config.hardware.gpus
    if not training.gradient_checkpointing:
        yield ["training.gradient_checkpointing=true"]
    if training.tokens_per_micro_batch is not None:
        yield ["training.tokens_per_micro_batch=null"]
    if training.micro_batch_size > 1:
        yield ["training.micro_batch_size=1"]
    if not service.release_for_training:
        yield ["policy.service.release_for_training=true"]
    if training.workers > gpus:
        yield [f"training.workers={gpus}"]
    if service.min_replicas * engine.tensor_parallel_size > gpus:
        yield [f"policy.service.min_replicas={max(1, gpus // engine.tensor_parallel_size)}"]
    if engine.gpu_memory_utilization < 0.95:
        yield ["policy.engine.gpu_memory_utilization=0.95"]
    if training.zero_stage < 2:
        yield ["training.zero_stage=2"]
    for parallel in (2, 4, 8):
        if engine.tensor_parallel_size < parallel <= gpus:
            yield [
                f"policy.engine.tensor_parallel_size={parallel}",
                *_replicas(config, gpus // parallel),
            ]
    for tokens in (3072, 4096, 6144, 8192):
        if tokens > training.max_tokens:
            yield [f"training.max_tokens={tokens}"]
        if tokens > engine.max_model_len:
            yield [f"policy.engine.max_model_len={tokens}"]
    if training.offload == "none":
        yield ["training.offload=optimizer"]
    for workers in (2, 4, 8):
        if training.workers < workers <= gpus:
            yield [f"training.workers={workers}"]
    if training.zero_stage < 3:
        yield ["training.zero_stage=3"]
        yield ["training.zero_stage=3", "training.offload=parameters"]
    for tokens in (3072, 2048):
        if tokens < engine.max_model_len:
            yield [f"policy.engine.max_model_len={tokens}"]
    for r in (64, 32, 16):
        if r < training.lora.r:
            yield [f"training.lora.r={r}", f"training.lora.alpha={2 * r}"]
    for memory in (24, 32, 40, 48, 80, 141):
        if memory > config.hardware.gpu_memory_gb:
            yield [f"hardware.gpu_memory_gb={memory}"]


def _replicas(config: RunConfig, room: int) -> list[str]:
    """What goes with GPUs that are taken together: no more replicas than have room."""
    service = config.policy.service
    found: list[str] = []
    for name, count in (
        ("min_replicas", service.min_replicas),
        ("max_replicas", service.max_replicas),
    ):
        if count > room:
            found.append(f"policy.service.{name}={room}")
    return found
