"""What a tuning run writes while it lasts, and how the process that started it follows.

The worker of rank 0 writes small files into the output folder, which every node reaches; nothing else connects
it to the process that waits, so that either may be on any node, and may be started again.
"""

import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sima_ray.runtime.run import RunFolder
from sima_ray.runtime.training_events import Events

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"
SET_ASIDE = "set_aside.jsonl"
STATE = "train.json"
_POLL_S = 0.5
_WRITE_S = 0.5


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a run is.

    Attributes:
        stage: "reference" counts pairs, "train" counts steps.
        step, steps: Done and in all, of that stage.
        metrics: The last step's (`sima_ray.tuning.step.StepMetrics`), empty before the first.
        seconds_left: Of the stage, its evaluations included, as far as one can tell; None in the reference stage.
        warnings: What a person should look at.
    """

    stage: Literal["reference", "train"]
    step: int
    steps: int
    metrics: dict[str, Any]
    seconds_left: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Of the last step; NaN before the first."""
        return self.metrics.get("loss", math.nan)

    @property
    def accuracy(self) -> float:
        """Of the last step; NaN before the first."""
        return self.metrics.get("accuracy", math.nan)

    @property
    def text(self) -> str:
        """For a progress line."""
        if self.stage == "reference":
            return f"reference {self.step}/{self.steps} pairs"
        left = "" if self.seconds_left is None else f" · {self.seconds_left:.0f} s left"
        return (
            f"step {self.step}/{self.steps} · loss {self.loss:.3f} · accuracy {self.accuracy:.2f}"
            f" · {self.metrics['tokens_per_s']:,.0f} tok/s{left}"
        )


class TrainingLog:
    """What rank 0 writes into the output folder while a run lasts; the other workers' write nothing."""

    def __init__(self, folder: RunFolder, active: bool, nats: float) -> None:
        """Args:
        folder: The output folder.
        active: Whether this worker is the one that writes.
        nats: Fall of the chosen responses' log-probability to warn of.
        """
        self._folder = folder
        self.active = active
        self._events = Events(folder, active)
        self._fall = ChosenFall(nats)
        self._lines: list[str] = []
        self._warnings: list[str] = []
        self._total = 0
        self._work: Callable[[int], float] = float
        self._began: tuple[float, int] | None = None
        self._written = float("-inf")

    def reference(self, done: int, total: int) -> None:
        """So many pairs have their reference."""
        self._write_progress(TrainProgress("reference", done, total, {}))

    def warn(self, warning: str) -> None:
        """Something that a person should look at."""
        self._warnings = [*self._warnings, warning]

    def begin(self, start: int, total: int, work: Callable[[int], float]) -> None:
        """The first step to take is `start`: forget what an interrupted run did after it.

        Args:
            start: Steps taken before.
            total: Steps in all.
            work: What the steps before one cost, in any unit.
        """
        self._total, self._work = total, work
        self._began = (time.monotonic(), start)
        lines = _text(self._folder, METRICS).splitlines() if self.active else []
        self._lines = [line for line in lines if json.loads(line)["step"] <= start]
        for line in self._lines:
            self._watch(json.loads(line))
        self._events.begin(start)
        self.flush()

    def step(self, metrics: dict[str, Any]) -> None:
        """A step was taken."""
        assert self._began is not None
        self._lines.append(json.dumps(metrics))
        self._events.step(metrics)
        self._watch(metrics)
        done, (began, start) = metrics["step"], self._began
        cost = self._work(done) - self._work(start)
        left = (time.monotonic() - began) / cost * (self._work(self._total) - self._work(done))
        progress = TrainProgress(
            "train", done, self._total, metrics, round(left, 1), self._warnings
        )
        if self._write_progress(progress, always=done == self._total):
            self.flush()

    def failed(self, error: str) -> None:
        """The run must not go on."""
        self.flush()
        self._write_state({"status": "failed", "error": error})

    def finished(self, tuner: Any) -> None:
        """The adapter is written."""
        self.flush()
        aside = tuner.set_aside
        rows = [{"row_id": r.row_id, "reason": r.set_aside, "detail": r.detail} for r in aside]
        if self.active:
            self._folder.write_text("".join(f"{json.dumps(r)}\n" for r in rows), SET_ASIDE)
        self._write_state(
            {
                "status": "done",
                "steps": tuner.steps,
                "pairs": len(tuner.pairs),
                "held_out": len(tuner.held_out),
                "set_aside": dict(Counter(str(r.set_aside) for r in aside)),
                "attention": tuner.attention,
                "forward_note": tuner.forward_note,
                "reference_note": tuner.reference_note,
                "references": tuner.references,
                "warnings": self._warnings,
                "metrics": json.loads(self._lines[-1]),
            }
        )

    def _watch(self, metrics: dict[str, Any]) -> None:
        if warning := self._fall.step(metrics):
            self.warn(warning)

    def _write_state(self, state: dict[str, Any]) -> None:
        if self.active:
            update_state(self._folder, state)

    def _write_progress(self, progress: TrainProgress, always: bool = False) -> bool:
        if not self.active or (time.monotonic() - self._written < _WRITE_S and not always):
            return False
        self._written = time.monotonic()
        self._folder.write_json(asdict(progress), PROGRESS)
        return True

    def flush(self) -> None:
        """Write the lines of all steps so far; before a checkpoint, so that no step is ever without its line."""
        if self.active:
            self._folder.write_text("".join(f"{line}\n" for line in self._lines), METRICS)
            self._events.flush()


class ChosenFall:
    """Tells once that the chosen responses lose probability while the loss falls.

    The loss asks for a distance alone: it falls, too, where both responses become unlikely and the rejected one
    faster; what such a policy then writes is neither. Both ends of the run so far are averaged over a few steps.
    """

    STEPS = 5

    def __init__(self, nats: float) -> None:
        self._nats = nats
        self._first: list[float] = []
        self._last: deque[tuple[float, float]] = deque(maxlen=self.STEPS)
        self._told = False

    def step(self, metrics: dict[str, Any]) -> str | None:
        """The warning, at the step that gives rise to it."""
        if len(self._first) < self.STEPS:
            self._first.append(metrics["loss"])
            return None
        self._last.append((metrics["loss"], metrics["chosen_change"]))
        if self._told or len(self._last) < self.STEPS:
            return None
        loss, change = (sum(values) / self.STEPS for values in zip(*self._last, strict=True))
        if change >= -self._nats or loss >= sum(self._first) / self.STEPS:
            return None
        self._told = True
        return (
            f"step {metrics['step']}: the loss falls, but chosen responses have lost {-change:.0f} nats of "
            "log-probability each: the policy may forget how to write them. Set loss.sft_weight (1 is usual), "
            "raise beta, or lower learning_rate or epochs"
        )


class Watch:
    """Reads `progress.json` in a thread and tells about every change."""

    def __init__(
        self, folder: RunFolder, on_progress: Callable[[TrainProgress], None] | None
    ) -> None:
        self._folder = folder
        self._tell = on_progress
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="training-progress", daemon=True)
        self._last: dict[str, Any] = {}

    def __enter__(self) -> None:
        if self._tell is not None:
            self._folder.write_json({}, PROGRESS)
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_POLL_S):
            self._look()
        self._look()

    def _look(self) -> None:
        now = self._folder.read_json(PROGRESS)
        if now and now != self._last and self._tell is not None:
            self._last = now
            self._tell(TrainProgress(**now))


def read_state(folder: RunFolder) -> dict[str, Any]:
    """Settings, status and counts of the run in a folder; empty where there is none."""
    return json.loads(_text(folder, STATE) or "{}")


def update_state(folder: RunFolder, values: dict[str, Any]) -> dict[str, Any]:
    """Change some of the state's values and return the whole."""
    state = read_state(folder) | values
    folder.write_json(state, STATE)
    return state


def _text(folder: RunFolder, name: str) -> str:
    try:
        return folder.read_text(name)
    except FileNotFoundError:
        return ""
