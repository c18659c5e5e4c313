"""`sima demo`: the whole loop on a Ray cluster of its own, started here and ended here."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import psutil
from rich.console import Console

from sima_ray.config import RunConfig
from sima_ray.demo.world import build_world
from sima_ray.errors import ConfigError, JobFailed
from sima_ray.runtime import cluster, submission, tables
from sima_ray.runtime.progress import Progress, Screen, duration
from sima_ray.runtime.signals import terminable, uninterrupted

SCENES = {"train": 800, "test": 500}
PROMPTS_SEED = 21  # other draws than those that the policy was made from
_SAMPLE_EVERY_S = 2.0


def run_demo(config: RunConfig, cpus: int) -> None:
    """Make the demo's world, run the pipeline on it, and show what came out.

    Raises:
        ConfigError: The config cannot be used.
        JobFailed: The pipeline failed; the message names the log.
    """
    folder = Path(config.runs) / config.name
    console = Console(highlight=False, soft_wrap=True)
    if (folder / "demo.json").exists():
        console.print(
            f"{folder} holds a finished run; remove it, or choose another --name, to run anew\n"
        )
        _show_end(folder, console)
        return
    folder.mkdir(parents=True, exist_ok=True)
    seconds, peak = _run(config, folder, cpus)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    # A run that was resumed keeps the seconds of its earlier stages; `total` is this command's own.
    summary["seconds"] |= seconds
    summary["peak_memory_mb"] = round(peak / 2**20)
    for name in ("summary.json", "demo.json"):  # a later `sima submit report` writes the first anew
        (folder / name).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print()
    _show_end(folder, console)


def _run(config: RunConfig, folder: Path, cpus: int) -> tuple[dict[str, float], int]:
    """Cluster up, world, pipeline, cluster down: seconds of each, and the peak memory in bytes."""
    started = time.monotonic()
    screen, log_file = Screen(), folder / "demo.log"
    progress = Progress(_Screened(screen))
    seconds: dict[str, float] = {}
    progress.say(f"log          {log_file}")
    with open(log_file, "a", encoding="utf-8") as log, terminable():
        with progress.stage("world") as stage:
            images = _make_world(config)
            stage.result(f"{images:,} images with prompts and COCO annotations")
        seconds["world"] = stage.seconds
        with progress.stage("cluster") as stage:
            running = cluster.start(cpus, gpus=0)
            stage.result(f"Ray at {running.address}, token required")
        try:
            seconds["cluster"] = stage.seconds
            with _peak_memory() as peak:
                _follow(config, running, log, screen, log_file)
        finally:
            progress.say("cluster      ending")
            with uninterrupted():
                cluster.stop(running)
    seconds = {key: round(value, 2) for key, value in seconds.items()}
    return seconds | {"total": round(time.monotonic() - started, 2)}, peak[0]


def _follow(
    config: RunConfig, running: cluster.LocalCluster, log: TextIO, screen: Screen, log_file: Path
) -> None:
    target = submission.Target.of(running)

    def line(text: str) -> None:
        log.write(text + "\n")
        log.flush()
        screen.line(text)

    job = submission.submit("pipeline", config, target)
    try:
        submission.follow(job, target, on_line=line)
    except JobFailed as error:
        raise JobFailed(f"{error}; the whole log: {log_file}") from error


def _make_world(config: RunConfig) -> int:
    """Build the splits that the config names, where it names them, and return the number of images."""
    if (
        config.evaluation is None
        or config.evaluation.prompts is None
        or config.data.prompts is None
    ):
        raise ConfigError(
            "the demo's config needs `data.prompts` and an `evaluation` section with prompts"
        )
    build_world(Path(config.data.prompts).parent, "train", SCENES["train"], PROMPTS_SEED)
    build_world(Path(config.evaluation.prompts).parent, "test", SCENES["test"])
    return sum(SCENES.values())


def _show_end(folder: Path, console: Console) -> None:
    summary = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    sima, run = (os.path.relpath(path) for path in (sys.argv[0], folder))
    tables.show_summary(folder)
    console.print(
        f"took     {duration(summary['seconds']['total'])}, {summary['peak_memory_mb']:,} MB at most\n"
        f"run      {run}\nreport   {run}/report.html\n\n"
        "Next, the tuned policy and its critic as a live service, and the same on your own cluster:\n"
        f"  {sima} up && {sima} serve {run}/run.yaml --round 1\n"
        f"  {sima} submit pipeline configs/llava-1.5-7b.yaml --address http://HEAD:8265"
    )


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """The most memory (bytes, shared pages counted once) that this process and all below it held."""
    peak, ended = [0], threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_EVERY_S):
            peak[0] = max(peak[0], _memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _memory() -> int:
    """The memory (bytes) of this process and all below it, shared pages by their shares."""
    total = 0
    try:
        root = psutil.Process()
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


class _Screened:
    """The write side of a `Progress` of this process, shown like a job's lines."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def write(self, text: str, /) -> int:
        self._screen.line(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""
