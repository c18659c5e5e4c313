"""The runs of the proof: made on local clusters, some at a time, and taken up where an earlier command stopped."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from sima_ray.config import RunConfig
from sima_ray.demo.scenes import Split
from sima_ray.demo.world import World, build_world, world_at
from sima_ray.errors import ConfigError, JobFailed
from sima_ray.policy.checkpoint import fingerprint
from sima_ray.runtime import cluster, submission
from sima_ray.runtime.evaluation import headline
from sima_ray.runtime.progress import MARK, duration
from sima_ray.runtime.signals import uninterrupted

CPUS = 4
"""Logical CPUs of a cluster: a run reserves one for its replica, one to train or merge, tenths for its data."""

_STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "evaluate": ("stages/round-0-evaluate.json", ("--round", "0")),
    "preferences": ("stages/round-1-preferences.json", ("--round", "1")),
    "pipeline": ("summary.json", ()),
}
"""Jobs that runs consist of: the file that tells that one has finished, and its arguments."""


@dataclass(frozen=True)
class Task:
    """A run and the jobs that it consists of, in order."""

    config: RunConfig
    jobs: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.runs) / self.config.name

    def left(self) -> list[str]:
        """The jobs that have not finished.

        Raises:
            ConfigError: The folder holds a run with other settings.
        """
        file = self.folder / "run.yaml"
        if file.exists() and RunConfig.load(file) != self.config:
            raise ConfigError(
                f"{self.folder}: holds a run with other settings: remove it, or give another --work"
            )
        return [job for job in self.jobs if not (self.folder / _STAGES[job][0]).exists()]

    def result(self) -> str:
        """What its line says in the end."""
        if self.jobs[-1] == "preferences":
            ledger = marker(self.folder, "round-1-preferences")["ledger"]
            return f"{ledger['rows']:,} prompts → {ledger['pairs']:,} pairs"
        return headline(marker(self.folder, f"round-{self.config.rounds}-evaluate"))


def marker(run: Path, key: str) -> dict[str, Any]:
    """The result of a finished stage of a run."""
    return json.loads((run / "stages" / f"{key}.json").read_text(encoding="utf-8"))["result"]


def seconds(run: Path, key: str) -> float:
    """What a finished stage of a run took."""
    return json.loads((run / "stages" / f"{key}.json").read_text(encoding="utf-8"))["seconds"]


def revisions(runs: Iterable[Path]) -> list[str]:
    """The revisions of the code that the runs were made at."""
    found = {json.loads((run / "provenance.json").read_text())["revision"] for run in runs}
    return sorted(found)


def make_world(work: Path, split: Split, scenes: int, seed: int) -> World:
    """A world of that many scenes, built unless it is there."""
    folder = work / "worlds" / f"{split}-{seed}-{scenes}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        build_world(part, split, scenes, seed)
        part.rename(folder)
    return world_at(folder)


class Journal:
    """What a work folder was made with, and the wall time of all commands that worked in it."""

    def __init__(self, work: Path, config: RunConfig) -> None:
        """Take up the folder, or begin it.

        Raises:
            ConfigError: It was made with another policy or other worked examples.
        """
        self._file, self._started = work / "journal.json", time.monotonic()
        examples = Path(config.critic.examples).read_bytes() if config.critic.examples else b""
        self._made_with = {
            "policy": fingerprint(config.policy.model),
            "examples": hashlib.sha256(examples).hexdigest()[:16],
        }
        before = json.loads(self._file.read_text()) if self._file.exists() else {}
        if before and before["made_with"] != self._made_with:
            raise ConfigError(
                f"{work}: made with another policy or other worked examples: give another --work"
            )
        self._before = before.get("wall_s", 0.0)
        work.mkdir(parents=True, exist_ok=True)
        self.tick()

    @property
    def wall_s(self) -> float:
        """Wall seconds of this command and the earlier ones."""
        return self._before + time.monotonic() - self._started

    @property
    def made_with(self) -> dict[str, str]:
        """Fingerprints of the policy and of the worked examples."""
        return self._made_with

    def tick(self) -> None:
        """Keep the time that has passed."""
        kept = {"made_with": self._made_with, "wall_s": round(self.wall_s, 1)}
        self._file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


class Workers:
    """Runs tasks, as many at a time as there are clusters; a cluster is started when it is first needed.

    Each run has a cluster of its own: Serve's applications are declared all at once, which two jobs of one
    cluster would have to take turns at.

    Attributes:
        folders: Of all runs so far, those among them that an earlier command finished.
    """

    def __init__(self, parallel: int, logs: Path, on_end: Callable[[], None]) -> None:
        self._parallel, self._logs, self._on_end = parallel, logs, on_end
        self._clusters: list[cluster.LocalCluster] = []
        self.folders: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, tasks: Sequence[Task]) -> None:
        """Run what has not finished; one line for each task as it ends.

        Raises:
            ConfigError: A task's folder holds a run with other settings.
            JobFailed: A job failed; the others are ended, and go on when the command is run again.
        """
        waiting = [task for task in tasks if task.left()]
        place = count(1)
        for task in tasks:
            if task not in waiting:
                line = f"{task.config.name:<34} done before · {task.result()}"
                print(f"{next(place):>3}/{len(tasks)}  {line}", flush=True)
        while len(self._clusters) < min(self._parallel, len(waiting)):
            self._clusters.append(cluster.start(cpus=CPUS, gpus=0))
        free = SimpleQueue[submission.Target]()
        for running in self._clusters:
            free.put(submission.Target.of(running))
        with ThreadPoolExecutor(max(1, len(self._clusters))) as pool:
            futures = [pool.submit(self._one, task, free) for task in waiting]
            try:
                for future in as_completed(futures):
                    print(f"{next(place):>3}/{len(tasks)}  {future.result()}", flush=True)
                    self._on_end()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()  # ends the jobs, and with them the threads that follow them
                raise
        self.folders += [task.folder for task in tasks]

    def _one(self, task: Task, free: SimpleQueue[submission.Target]) -> str:
        target, started = free.get(), time.monotonic()
        try:
            for job in task.left():
                self._job(job, task.config, target)
        finally:
            free.put(target)
        took = duration(time.monotonic() - started)
        return f"{task.config.name:<34} {took} · {task.result()}"

    def _job(self, job: str, config: RunConfig, target: submission.Target) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        file, errors = self._logs / f"{config.name}.log", list[str]()
        with file.open("a", encoding="utf-8") as log:

            def line(text: str) -> None:
                log.write(text + "\n")
                log.flush()
                if text.startswith(f"{MARK}error:"):
                    errors.append(text.removeprefix(MARK))

            try:
                job_id = submission.submit(job, config, target, _STAGES[job][1])
                submission.follow(job_id, target, line)
            except JobFailed as error:
                raise JobFailed("; ".join((*errors, str(error), f"its log: {file}"))) from error

    def _stop(self) -> None:
        with uninterrupted():
            while self._clusters:
                cluster.stop(self._clusters.pop())
