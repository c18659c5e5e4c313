"""What a tuning run leaves behind: states to resume from, the same for any number of workers, and the adapter."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sima_ray.errors import TrainingError, why
from sima_ray.tuning.engine import Engine
from sima_ray.tuning.lora import save_adapter, trainable
from sima_ray.tuning.moments import MOMENTS, OptimizerState, read_optimizer, write_optimizer

STATE_FILE = "state.safetensors"
_PARTS = ("weights", *MOMENTS)


def whole_weights(engine: Engine, module: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole on the CPU; every worker must call this."""
    import deepspeed

    parameters = trainable(module)
    with deepspeed.zero.GatheredParameters(
        list(parameters.values()), enabled=engine.zero_optimization_partition_weights()
    ):
        return {name: p.detach().cpu().clone() for name, p in parameters.items()}


def save_state(
    engine: Engine, module: nn.Module, folder: Path, position: dict[str, Any], rank: int
) -> None:
    """Save weights, optimizer and position, by rank 0; every worker must call this.

    The file holds float32 tensors `weights/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, whole, whatever the ZeRO
    stage and the number of workers: any engine over the same parameters takes it up.

    Args:
        engine: It has made an update.
        module: Holds the trained parameters.
        folder: There already.
        position: Where the run is, as JSON.
        rank: This worker.
    """
    state = read_optimizer(engine, trainable(module))
    if rank:
        return
    tensors = {f"{p}/{name}": t for p in _PARTS for name, t in getattr(state, p).items()}
    metadata = {"updates": str(state.updates), "position": json.dumps(position)}
    save_file(tensors, folder / STATE_FILE, metadata=metadata)


def load_state(engine: Engine, module: nn.Module, folder: Path) -> dict[str, Any]:
    """Take up a saved state and return its position; every worker must call this.

    Raises:
        TrainingError: The folder holds no state, a damaged one, or one of other parameters.
    """
    parameters = trainable(module)
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder}: holds no checkpoint: {why(error)}") from error
    wanted = {f"{part}/{name}" for part in _PARTS for name in parameters}
    if odd := sorted(wanted ^ tensors.keys()):
        raise TrainingError(f"{folder}: holds a checkpoint of other parameters: {odd[0]}, …")
    parts = {part: {name: tensors[f"{part}/{name}"] for name in parameters} for part in _PARTS}
    write_optimizer(engine, parameters, OptimizerState(**parts, updates=int(metadata["updates"])))
    return dict(json.loads(metadata["position"]))


def write_adapter(engine: Engine, model: PeftModel, folder: Path, rank: int) -> None:
    """Write the adapter as a PEFT folder, by rank 0; every worker must call this."""
    weights = whole_weights(engine, model)
    if rank == 0:
        save_adapter(model, weights, folder)
