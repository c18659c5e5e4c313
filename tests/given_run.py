"""A run that begins with given pairs, for tests without a cluster and with one."""

import io
from pathlib import Path
from typing import Any

from sima_ray.config import RunConfig
from sima_ray.runtime import stages
from sima_ray.runtime.progress import Progress
from sima_ray.runtime.run import Run


def given_config(folder: Path, pairs: str, images: str, **changes: Any) -> RunConfig:
    """Its config, for the CPU."""
    values: dict[str, Any] = {
        "name": "given",
        "runs": str(folder / "runs"),
        "data": {"pairs": pairs, "images": images},
        "policy": {"model": "model", "engine": {"accelerator": "cpu"}},
        "training": {"accelerator": "cpu"},
    }
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
    return RunConfig.parse(values)


def opened(config: RunConfig) -> Run:
    """The run, which speaks into a buffer: see `said`."""
    return Run.open(config, Progress(io.StringIO()))


def said(run: Run) -> str:
    """All that it said."""
    out: Any = run.progress._out
    return out.getvalue()


class NoService(stages.PolicyService):
    """A policy service that nobody may ask for."""

    def ensure(self, number: int) -> None:
        raise AssertionError(f"the policy of round {number} was asked for")

    def release(self) -> None:
        pass
