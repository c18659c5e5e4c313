"""One run of one trainer in a process of its own: `python -m benchmarks.tuning.trial TRAINER FOLDER`.

Prints one line of JSON, a `Trial`, as its last.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tuning.shapes import Work

TRAINERS = ("ours", "trl", "released")


@dataclass(frozen=True, slots=True)
class Lap:
    """CPU-seconds of all threads, and seconds."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What one run cost.

    Attributes:
        trainer: Which.
        adapters: Names the adapters' first weights.
        reference: Of a pass of its own over all pairs; None where the steps compute the reference.
        epochs: Of each epoch.
        ready_bytes: In use when model, data and optimizer were ready; in ours after its reference pass, which may
            have left some memory that is not in use but not given back.
        peak_bytes: At most: resident on a CPU, allocated on a GPU.
    """

    trainer: str
    adapters: str
    reference: Lap | None
    epochs: list[Lap]
    ready_bytes: int
    peak_bytes: int


@dataclass(slots=True)
class Clock:
    """Measures a run; a trainer tells it when it is ready, and what each lap is."""

    device: str
    adapters: str = ""
    ready_bytes: int = 0
    laps: dict[str, list[Lap]] = field(default_factory=dict)
    _begun: tuple[float, float] = (0.0, 0.0)

    def ready(self, model: Any) -> None:
        """Everything is loaded, and no weight has moved."""
        self.adapters = digest(model)
        self.ready_bytes = memory(self.device)[0]

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Measure what happens within."""
        self.begin()
        yield
        self.end(name)

    def begin(self) -> None:
        """For a trainer that only calls back."""
        self._begun = self._now()

    def end(self, name: str) -> None:
        """Ends what `begin` began."""
        spent = [now - then for now, then in zip(self._now(), self._begun, strict=True)]
        self.laps.setdefault(name, []).append(Lap(*spent))

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()


def digest(model: Any) -> str:
    """Names the values of all trained parameters, by their names, in float32."""
    state = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            state.update(name.encode())
            state.update(parameter.detach().float().cpu().numpy().tobytes())
    return state.hexdigest()


def memory(device: str) -> tuple[int, int]:
    """Bytes in use now, and at most so far: allocated on a GPU, or resident."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    # Not getrusage: that counts the parent's memory in, from before this program began.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    sizes = dict(re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE))
    return 1024 * int(sizes["VmRSS"]), 1024 * int(sizes["VmHWM"])


def run(trainer: str, work: Work) -> Trial:
    """Run a trainer in this process."""
    clock = Clock(work.device)
    if trainer == "ours":
        from benchmarks.tuning.by_ours import train
    elif trainer == "trl":
        from benchmarks.tuning.by_trl import train
    else:
        from benchmarks.tuning.by_released import train
    train(work, clock)
    return Trial(
        trainer=trainer,
        adapters=clock.adapters,
        reference=next(iter(clock.laps.get("reference", [])), None),
        epochs=clock.laps["epoch"],
        ready_bytes=clock.ready_bytes,
        peak_bytes=memory(work.device)[1],
    )


if __name__ == "__main__":
    print(json.dumps(asdict(run(sys.argv[1], Work.read(Path(sys.argv[2]))))))
