"""What a tuning run leaves behind: states to resume from, shared over the workers, and the adapter."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from sima_ray.errors import TrainingError
from sima_ray.tuning.engine import Engine
from sima_ray.tuning.lora import save_adapter, trainable

TAG = "state"


def whole_weights(engine: Engine, module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole on the CPU; every worker must call this."""
    import deepspeed

    parameters = trainable(module)
    with deepspeed.zero.GatheredParameters(
        list(parameters.values()), enabled=engine.zero_optimization_partition_weights()
    ):
        return {name: p.detach().cpu().clone() for name, p in parameters.items()}


def save_state(engine: Engine, folder: Path, position: dict[str, Any]) -> None:
    """Save this worker's share of weights, optimizer and position; every worker must call this."""
    engine.save_checkpoint(
        str(folder), tag=TAG, client_state=position, exclude_frozen_parameters=True
    )


def load_state(engine: Engine, folder: Path) -> dict[str, Any]:
    """Take up a saved state and return its position; every worker must call this.

    Raises:
        TrainingError: The folder holds no state that fits.
    """
    path, position = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    if path is None:
        raise TrainingError(f"{folder}: holds no checkpoint of this run")
    return dict(position)


def write_adapter(engine: Engine, model: PeftModel, folder: Path, rank: int) -> None:
    """Write the adapter as a PEFT folder, by rank 0; every worker must call this."""
    weights = whole_weights(engine, model)
    if rank == 0:
        save_adapter(model, weights, folder)
