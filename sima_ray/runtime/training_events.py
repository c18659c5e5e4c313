"""A run's metrics for TensorBoard, beside the JSON lines: `tensorboard --logdir OUTPUT/tensorboard`."""

from pathlib import Path
from typing import Any

from sima_ray.runtime.run import RunFolder

EVENTS = "tensorboard"


class Events:
    """Writes metrics for TensorBoard, into a local output folder; elsewhere it writes nothing."""

    def __init__(self, folder: RunFolder, active: bool) -> None:
        self._path = folder.path(EVENTS)
        self._active = active and "://" not in self._path
        self._writer: Any = None

    def begin(self, start: int) -> None:
        """TensorBoard is to drop the steps after `start`, which an interrupted run took."""
        if not self._active:
            return
        # Imported here: it takes a second, and only one worker needs it.
        from torch.utils.tensorboard import SummaryWriter

        Path(self._path).mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(self._path, purge_step=start + 1)

    def step(self, metrics: dict[str, Any]) -> None:
        """Add one step's metrics: those of evaluation under `eval/`, the others under `train/`."""
        if self._writer is None:
            return
        for name, value in metrics.items():
            if name == "step":
                continue
            tag = name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}"
            self._writer.add_scalar(tag, value, metrics["step"])

    def flush(self) -> None:
        """Put what was added on disk."""
        if self._writer is not None:
            self._writer.flush()
