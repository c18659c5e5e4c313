"""The run folder: where a run's config, data, adapters, figures and ledger live, local or at any URI.

runs/NAME/run.yaml            the resolved config
          provenance.json     versions, git revision, seed
          job.json            the last job of the run: what it was to do, and how it ended
          prompts.parquet     one row for each line of the prompts file, bad ones included
          ledger.json, summary.json, report.html, lmms-eval.md, lmms-eval.json
          round-K/            preferences/, pairs.parquet, quarantine.jsonl, train/, policy/, captions.jsonl,
                              evaluation/, lmms-eval/
          judge/              the answers of the benchmarks' judge, by what was asked
          stages/             a marker for each finished stage: what makes a run resume
"""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml
from pyarrow import fs

from sima_ray.config import RunConfig
from sima_ray.data.locations import open_location
from sima_ray.errors import ConfigError
from sima_ray.runtime.progress import Progress, Stage, duration
from sima_ray.runtime.versions import versions


class RunFolder:
    """Reads and writes small files below one folder, through pyarrow, whatever holds the folder."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._fs, self._base = open_location(self.root)

    def path(self, *parts: str) -> str:
        """The path or URI of something in the folder."""
        return "/".join((self.root, *parts))

    def exists(self, *parts: str) -> bool:
        """Whether there is a file or folder of that name."""
        info = self._fs.get_file_info("/".join((self._base, *parts)))
        return info.type is not fs.FileType.NotFound

    def read_text(self, *parts: str) -> str:
        """The text of a file.

        Raises:
            FileNotFoundError: There is none.
        """
        with self._fs.open_input_stream("/".join((self._base, *parts))) as stream:
            return stream.read().decode("utf-8")

    def write_text(self, text: str, *parts: str) -> str:
        """Write a file, its folders made as needed, and return its path."""
        name = "/".join((self._base, *parts))
        self._fs.create_dir(name.rpartition("/")[0], recursive=True)
        # Written beside and renamed, so that a reader (or a resumed run) never sees half a file.
        with self._fs.open_output_stream(f"{name}.part") as stream:
            stream.write(text.encode("utf-8"))
        self._fs.move(f"{name}.part", name)
        return self.path(*parts)

    def read_json(self, *parts: str) -> Any:
        """The value in a JSON file."""
        return json.loads(self.read_text(*parts))

    def write_json(self, value: Any, *parts: str) -> str:
        """Write a value as JSON and return the file's path."""
        return self.write_text(json.dumps(value, indent=2) + "\n", *parts)


@dataclass(frozen=True)
class Run:
    """A run: its config, its folder, and where its progress is shown."""

    config: RunConfig
    folder: RunFolder
    progress: Progress

    @classmethod
    def open(cls, config: RunConfig, progress: Progress | None = None) -> "Run":
        """Make the run's folder, or take up the one that is there.

        Raises:
            ConfigError: The folder belongs to a run with other settings.
        """
        folder = RunFolder(f"{config.runs}/{config.name}")
        run = cls(config, folder, progress or Progress())
        if folder.exists("run.yaml"):
            _check_same(config, yaml.safe_load(folder.read_text("run.yaml")), folder.root)
        folder.write_text(config.dump(), "run.yaml")
        if not folder.exists("provenance.json"):
            folder.write_json(provenance(config), "provenance.json")
        return run

    def round_path(self, number: int, *parts: str) -> str:
        """The path or URI of something in a round's folder."""
        return self.folder.path(f"round-{number}", *parts)

    def policy(self, number: int) -> str:
        """The model folder after that many rounds; 0 is the model that the run began with."""
        return self.config.policy.model if number == 0 else self.round_path(number, "policy")

    def version(self, number: int) -> str:
        """The name under which the service answers with that model."""
        return "base" if number == 0 else f"{self.config.name}-round-{number}"

    def done(self, key: str) -> dict[str, Any] | None:
        """The result of a finished stage; None where it has not finished."""
        if not self.folder.exists("stages", f"{key}.json"):
            return None
        return self.folder.read_json("stages", f"{key}.json")

    def done_of(self, key: str, of: str | None) -> dict[str, Any] | None:
        """As `done`, for a stage that can be run again: None also where its result is of something else."""
        found = self.done(key)
        return found if found is not None and found.get("of") == of else None

    def once(
        self,
        key: str,
        title: str,
        work: Callable[[Stage], tuple[dict[str, Any], str]],
        of: str | None = None,
    ) -> dict[str, Any]:
        """Run a stage, unless it finished before; its result and wall time are kept.

        Args:
            key: The stage's name in the run folder.
            title: Its name in progress lines.
            work: Does it; returns the result (JSON) and what the stage's last line says.
            of: What the result depends on: a result of something else is made anew.
        """
        if (before := self.done_of(key, of)) is not None:
            self.progress.say(f"{title:<12} done before ({duration(before['seconds'])})")
            return before["result"]
        with self.progress.stage(title) as stage:
            result, line = work(stage)
            stage.result(line)
            kept = {"result": result, "seconds": round(stage.seconds, 2), "at": _now()}
            if of is not None:
                kept["of"] = of
            self.folder.write_json(kept, "stages", f"{key}.json")
        return result


def provenance(config: RunConfig) -> dict[str, Any]:
    """What made a run: versions, revision, seed, time."""
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "revision": os.environ.get("SIMA_REVISION", "unknown"),
        "seed": config.seed,
        "started": _now(),
    }


_MAY_CHANGE = (
    "runs",
    "policy.service.",
    "policy.engine.cpus",
    "policy.engine.cpu_kv_cache_gb",
    "policy.engine.gpu_memory_utilization",
    "policy.engine.max_num_seqs",
    "policy.engine.tensor_parallel_size",
    "generation.concurrency",
    "generation.workers",
    "generation.retries",
    "generation.timeout_s",
    "training.cpus_per_worker",
    "training.max_failures",
    *(f"evaluation.{name}" for name in ("pope", "amber", "halbench", "mmhal", "mementos")),
    "evaluation.judge",
    "evaluation.every_round",
    "hardware.",
)
"""Settings that say how a run is done, not what it computes: a resumed run may have others. A suite whose
settings are others is run again; CHAIR's stay, for rounds may end by them."""


def _check_same(config: RunConfig, before: dict[str, Any], root: str) -> None:
    # Parsed, so that a field that is newer than the run has its default there.
    old = _flat(RunConfig.parse(before, origin=f"{root}/run.yaml").model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    changed = sorted(
        key
        for key in now.keys() | old.keys()
        if now.get(key) != old.get(key) and not key.startswith(_MAY_CHANGE)
    )
    if not old.get("evaluation.instances") and not now.get("evaluation.error_counter"):
        # Nothing was decided by figures that there were none of.
        changed = [key for key in changed if not key.startswith("evaluation")]
    if changed:
        raise ConfigError(
            f"{root}: holds a run with other settings ({', '.join(changed)}): "
            "give this run another name, or remove the folder"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
