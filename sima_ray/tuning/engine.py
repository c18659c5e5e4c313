"""DeepSpeed under a training step: started with as little as a step needs, read and saved the same in every stage.

The learning rate is set by whoever takes the steps, as a function of the step alone.
"""

import os
import resource
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sima_ray.config import TrainingConfig
from sima_ray.tuning.limits import MOST_REDUCED
from sima_ray.tuning.lora import trainable

Engine = Any
"""A `deepspeed.DeepSpeedEngine` (the package has no types)."""


def load_deepspeed(config: TrainingConfig) -> Any:
    """The package `deepspeed`, for this accelerator and in the process group that is up."""
    if config.accelerator == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault(
        "LOCAL_RANK", "0"
    )  # a launcher, or Ray Train, has set it where it matters
    import deepspeed

    if config.accelerator == "cpu":
        # Else DeepSpeed compiles a shared-memory collective at first use; gloo does for adapters.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def start_engine(module: nn.Module, config: TrainingConfig, world: int) -> Engine:
    """Wrap a module for training; `torch.distributed` must be up.

    Args:
        module: Its trainable parameters are the ones that train.
        config: Precision, ZeRO stage, clipping, weight decay.
        world: Number of workers.
    """
    deepspeed = load_deepspeed(config)
    parameters: Any = list(trainable(module).values())  # typed as a Module there
    elements = sum(p.numel() for p in parameters)
    started: Any = deepspeed.initialize(
        model=module,
        model_parameters=parameters,
        config=deepspeed_config(config, world, elements),
        dist_init_required=False,
    )
    engine = started[0]
    if config.dtype == "bfloat16" and config.zero_stage == 0:
        # This wrapper takes a step with gradients of 0 as it starts; Adam would count it.
        engine.basic_optimizer.state.clear()
    engine.train()
    return engine


def deepspeed_config(config: TrainingConfig, world: int, elements: int) -> dict[str, Any]:
    """DeepSpeed's settings for a training config with so many trainable elements."""
    bf16 = config.dtype == "bfloat16"
    return {
        # A step says itself where its accumulation ends: it may take any number of micro batches.
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": bf16},
        # Without ZeRO, DeepSpeed accumulates in the precision of the model only.
        "data_types": {"grad_accum_dtype": "fp32"} if bf16 and config.zero_stage else {},
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": min(elements, MOST_REDUCED),
        }
        | _offload(config),
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
                "betas": [0.9, 0.999],
                "torch_adam": True,
            },
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def _offload(config: TrainingConfig) -> dict[str, Any]:
    place = {"device": "cpu", "pin_memory": config.accelerator == "gpu"}
    match config.offload:
        case "none":
            return {}
        case "optimizer":
            return {"offload_optimizer": place}
        case "parameters":
            return {"offload_optimizer": place, "offload_param": place}


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Set the rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(engine: Engine) -> float | None:
    """The norm of all gradients before clipping, where the engine will not tell: without ZeRO, in float32.

    For after the last backward pass and before the step.
    """
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has had allocated on its GPU, or resident on a CPU, at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def gather_rows(values_K: Tensor) -> Tensor:
    """The vectors of all workers as rows, in the order of their ranks, on every one of them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values_K[None]
    parts = [torch.empty_like(values_K) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values_K)
    return torch.stack(parts)


def gather_lists(values: list[Any]) -> list[Any]:
    """The lists of all workers joined, on every one of them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return values
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def device_of(config: TrainingConfig) -> torch.device:
    """Where this worker computes."""
    if config.accelerator == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
