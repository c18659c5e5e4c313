"""Run folders as `sima runs` and `sima resume` see them: read from their files alone, whatever made them."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from sima_ray.config import RunConfig
from sima_ray.errors import ConfigError, DataError, SimaError, why
from sima_ray.ports import JsonDict
from sima_ray.runtime.attempt import Attempt, last_attempt
from sima_ray.runtime.columns import columns
from sima_ray.runtime.jobs import Job, since

_OF_ALL_ROUNDS = ("pipeline", "report")
"""What is submitted for the whole run; the other stages are for a round."""

MAKE_PAIRS = ("preferences", "pairs")
"""The stages that leave a round's pairs and its ledger: one asks and judges, one takes given pairs."""

_IN_TURN = ("pairs", "prompts", "candidates", "preferences", "train", "merge", "evaluate")
"""The stages of a round, where two ended in the same second."""

_ROUND_KEY = re.compile(r"round-(?P<round>\d+)-(?P<stage>.+)")
_HEADLINES = ("chair_s", "recall")
"""CHAIR never stands without recall: a shorter caption scores better for nothing."""


@dataclass(frozen=True, slots=True)
class FinishedStage:
    """A stage that a run has behind it, as its marker in `stages/` says.

    Attributes:
        key: The marker's name, "round-1-train".
        seconds: Its wall time.
        at: When it ended, ISO time.
        result: What it left for others to read.
    """

    key: str
    seconds: float
    at: str
    result: JsonDict

    @property
    def round(self) -> int | None:
        """The round it belongs to; None for what is done once a run."""
        found = _ROUND_KEY.fullmatch(self.key)
        return int(found["round"]) if found else None

    @property
    def stage(self) -> str:
        """What was done."""
        found = _ROUND_KEY.fullmatch(self.key)
        return found["stage"] if found else self.key

    @property
    def title(self) -> str:
        """Stage and round, for people."""
        return self.stage if self.round is None else f"round {self.round} {self.stage}"


@dataclass(frozen=True, slots=True)
class RunView:
    """What a run folder tells without a cluster.

    Attributes:
        folder: Where it is.
        name: As its config has it.
        rounds: How many it is to have.
        done: The stages behind it, in the order in which they ended.
        attempt: Its last job, where there is a record of one.
        summary: What its report says; None where it has none.
        started: ISO time; None where it was never opened.
    """

    folder: Path
    name: str
    rounds: int
    done: tuple[FinishedStage, ...]
    attempt: Attempt | None
    summary: JsonDict | None
    started: str | None

    @property
    def rounds_done(self) -> int:
        """Rounds whose policy is there."""
        return sum(stage.stage == "merge" for stage in self.done)

    def state(self, live: Collection[str] = ()) -> str:
        """running, done, failed, stopped, or unfinished.

        Args:
            live: Ids of jobs, and folders of runs with a job, that go on. A job that was killed could not say so:
                its run is unfinished unless it is among these.
        """
        attempt = self.attempt
        if str(self.folder) in live or (attempt and attempt.job in live):
            return "running"
        if attempt and attempt.state in ("FAILED", "STOPPED"):
            return attempt.state.lower()
        killed = attempt is not None and attempt.state == "RUNNING"
        return "done" if self.summary is not None and not killed else "unfinished"

    def figures(self) -> dict[str, tuple[float, float] | None]:
        """The headline figures before and after: the report's, or the last round's as long as there is none."""
        scored = {
            stage.round: stage.result
            for stage in self.done
            if stage.stage == "evaluate" and stage.round is not None
        }
        before, after = (scored[min(scored)], scored[max(scored)]) if len(scored) > 1 else ({}, {})
        if self.summary and self.summary.get("before"):
            before, after = self.summary["before"], self.summary["after"]
        return {
            name: (before[name]["value"], after[name]["value"]) if name in before else None
            for name in _HEADLINES
        }

    @property
    def pairs(self) -> int:
        """Preference pairs of all rounds."""
        made = (stage.result for stage in self.done if stage.stage in MAKE_PAIRS)
        return sum(result["ledger"]["pairs"] for result in made)

    def to_json(self, live: Collection[str] = ()) -> JsonDict:
        """The run as plain values."""
        figures = {
            name: {"before": values[0], "after": values[1]} if values else None
            for name, values in self.figures().items()
        }
        return {
            "name": self.name,
            "folder": str(self.folder),
            "rounds": self.rounds,
            "rounds_done": self.rounds_done,
            "stage": self.done[-1].key if self.done else None,
            "state": self.state(live),
            "job": self.attempt and self.attempt.job,
            "error": self.attempt and self.attempt.error,
            "started": self.started,
            "pairs": self.pairs,
            **figures,
        }


def view(folder: Path) -> RunView:
    """Read a run folder.

    Raises:
        DataError: A file of it that cannot be read; says which.
    """
    folder = folder.absolute()
    config = _read(folder / "run.yaml", yaml.safe_load)
    stages = [
        FinishedStage(file.stem, marker["seconds"], marker["at"], marker["result"])
        for file in (folder / "stages").glob("*.json")
        if (marker := _read(file))
    ]
    return RunView(
        folder=folder,
        name=str(config.get("name", folder.name)),
        rounds=int(config.get("rounds", 1)),
        done=tuple(sorted(stages, key=_order)),
        attempt=last_attempt(folder),
        summary=_read_if_there(folder / "summary.json"),
        started=(_read_if_there(folder / "provenance.json") or {}).get("started"),
    )


def find_run(name: str, root: Path) -> Path:
    """The folder of a run that was named by its path, or by its name below `root`.

    Raises:
        DataError: There is no run.
    """
    for folder in (Path(name).expanduser(), root / name):
        if (folder / "run.yaml").is_file():
            return folder.absolute()
    raise DataError(f"{name}: no run there, nor in {root}/: `sima runs` lists them")


def list_runs(root: Path) -> list[RunView | SimaError]:
    """The runs below a folder, the newest last; in place of one that cannot be read, why.

    Raises:
        DataError: No such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name another with --runs")
    found: list[RunView | SimaError] = []
    for folder in sorted(file.parent for file in root.glob("*/run.yaml")):
        try:
            found.append(view(folder))
        except SimaError as error:
            found.append(error)
    return sorted(found, key=lambda run: run.started or "" if isinstance(run, RunView) else "")


def live_names(jobs: Sequence[Job]) -> set[str]:
    """What `RunView.state` knows running runs by."""
    going = [job for job in jobs if not job.over]
    return {job.id for job in going} | {job.run for job in going if job.run}


def table(runs: Sequence[RunView], live: Collection[str] = ()) -> str:
    """Runs below one another, with their headline figures before and after."""
    rows = [
        (
            run.name,
            f"{run.rounds_done}/{run.rounds}",
            run.done[-1].title if run.done else "-",
            run.state(live),
            since(datetime.fromisoformat(run.started)) if run.started else "-",
            f"{run.pairs:,}",
            *(f"{v[0]:.3f} → {v[1]:.3f}" if v else "-" for v in run.figures().values()),
        )
        for run in runs
    ]
    header = ("NAME", "ROUNDS", "STAGE", "STATE", "STARTED", "PAIRS", "CHAIR_s", "RECALL")
    return columns(header, rows, right="PAIRS")


@dataclass(frozen=True, slots=True)
class Resumption:
    """What there is to take up in a run.

    Attributes:
        run: The run.
        config: Its own settings.
        stage: What to submit again; None where nothing was interrupted.
        arguments: Of the stage's job.
    """

    run: RunView
    config: RunConfig
    stage: str | None
    arguments: tuple[str, ...] = ()


def resumption(name: str, root: Path) -> Resumption:
    """Find what was interrupted in a run that is named as in `find_run`, or by the config it was made from.

    Raises:
        SimaError: No such run, or a config that cannot be read.
    """
    file = Path(name).expanduser()
    if file.is_file():
        config = RunConfig.load(file)
        folder = Path(config.runs) / config.name
        if not (folder / "run.yaml").exists():
            raise DataError(
                f"{folder}: nothing to resume, the run has not begun: `sima submit pipeline {name}`"
            )
    else:
        folder = find_run(name, root)
    run, config = view(folder), RunConfig.load(folder / "run.yaml")
    if config.name != folder.name:
        raise ConfigError(
            f"{folder}/run.yaml belongs to the run {config.name}: a copied folder cannot be resumed"
        )
    if run.attempt is None:  # begun by an older version, or killed before it could say what it was
        stage = "pipeline" if run.summary is None else None
        return Resumption(run, config, stage)
    if run.attempt.state == "SUCCEEDED":
        return Resumption(run, config, None)
    stage, number = run.attempt.stage, run.attempt.round
    of_round = () if stage in _OF_ALL_ROUNDS else ("--round", str(number))
    return Resumption(run, config, stage, (*of_round, *run.attempt.arguments))


def given_words(given: JsonDict) -> str:
    """A run's given pairs, and what they were made of where that is known."""
    origin = given["origin"]
    made_of = ", ".join(source["location"] for source in origin["sources"]) if origin else ""
    return given["pairs"] + (f", made of {made_of}" if made_of else "")


def done_line(run: RunView) -> str:
    """What a run has behind it: "prepare · round 0: evaluate · round 1: preferences, train"."""
    by_round: dict[int | None, list[str]] = {}
    for stage in run.done:
        by_round.setdefault(stage.round, []).append(stage.stage)
    parts = [
        ", ".join(stages) if number is None else f"round {number}: {', '.join(stages)}"
        for number, stages in sorted(
            by_round.items(), key=lambda item: -1 if item[0] is None else item[0]
        )
    ]
    return " · ".join(parts) or "nothing yet"


def _order(stage: FinishedStage) -> tuple[str, int, int]:
    place = _IN_TURN.index(stage.stage) if stage.stage in _IN_TURN else -1
    return stage.at, -1 if stage.round is None else stage.round, place


def _read_if_there(file: Path) -> JsonDict | None:
    return _read(file) if file.exists() else None


def _read(file: Path, parse: Any = json.loads) -> Any:
    try:
        value = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file}: cannot be read: {why(error)}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: must hold a mapping")
    return value
