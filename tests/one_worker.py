"""This process as the only worker of tuning runs: the product's own `Tuner`, on DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sima_ray.config import TrainingConfig
from sima_ray.tuning.forward import PairForward
from sima_ray.tuning.tuner import Tuner, TuningJob


@contextmanager
def one_worker(folder: Path) -> Iterator[None]:
    """What tuning needs around it, in place of Ray Train.

    Args:
        folder: Is there, for one call alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", "0")
        if not dist.is_initialized():  # it stays so: DeepSpeed holds on to the first group
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1
            )
        yield


def tuned_by(
    job: dict[str, Any], config: dict[str, Any], forward: PairForward | None = None
) -> tuple[Tuner, list[float]]:
    """A whole run; returns the loss of every step.

    Args:
        job: `TuningJob`'s fields but the config.
        config: A `TrainingConfig`, on the CPU.
        forward: How pairs are scored; None to choose what suits the model.
    """
    settings = TrainingConfig.model_validate(config | {"accelerator": "cpu"})
    tuner = Tuner(TuningJob(**job, config=settings), forward=forward)
    return tuner, [tuner.step(step).loss for step in range(tuner.steps)]
