"""Does a run that is killed in every stage end like one that is not? Two rounds of the demo, small.

    python -m benchmarks.kills [--scenes 80] [--seed N] [--json FILE]

One run goes through. The other has its driver killed (SIGKILL) once in each stage, at a random moment of it, and
is submitted again each time. Held against each other: every round's pairs and ledger, the adapters' weights, and
the figures before and after. The engine computes in float32: in bfloat16 a text may depend on what else was in its
batch.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from sima_ray.config import RunConfig
from sima_ray.demo.world import build_world
from sima_ray.errors import JobFailed
from sima_ray.ports import JsonDict
from sima_ray.runtime import cluster, submission

ROUNDS = 2
POLL_S = 0.05


@dataclass
class Interrupted:
    """A run that is killed once in each stage.

    Attributes:
        config: The run.
        target: Where.
        seconds: What each stage takes, in their order.
        draw: The moments.
        kills: Where it was killed: the stage that was due, and how far into it, of its seconds.
    """

    config: RunConfig
    target: submission.Target
    seconds: dict[str, float]
    draw: random.Random
    kills: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])

    def run(self) -> int:
        """To the end; how many jobs that took."""
        jobs = 0
        while True:
            jobs += 1
            job = submission.submit("pipeline", self.config, self.target)
            stage = self._next()
            if stage is None:
                submission.follow(job, self.target, lambda line: None)
                return jobs
            if not self._kill_in(stage, job):
                return jobs

    def _next(self) -> str | None:
        """The first stage that is neither finished nor was killed before."""
        been = {stage for stage, _ in self.kills}
        left = (stage for stage in self.seconds if stage not in been and not self._done(stage))
        return next(left, None)

    def _done(self, stage: str) -> bool:
        return (Path(self.config.runs) / self.config.name / "stages" / f"{stage}.json").exists()

    def _kill_in(self, stage: str, job: str) -> bool:
        """Wait until the stages before are finished, then for a part of its own time; whether there was a kill."""
        client: Any = submission.connect(self.target)
        names = list(self.seconds)
        before = names[: names.index(stage)]
        while not all(self._done(name) for name in before) or self._driver(client, job) is None:
            if client.get_job_info(job).status.is_terminal():
                raise JobFailed(f"{job} ended before {stage}:\n{client.get_job_logs(job)[-3000:]}")
            time.sleep(POLL_S)
        part = self.draw.random()
        time.sleep(part * self.seconds[stage])
        pid = self._driver(client, job)
        if pid is None or client.get_job_info(job).status.is_terminal():
            return False
        os.kill(pid, signal.SIGKILL)
        self.kills.append((stage, part))
        late = " (finished just before)" if self._done(stage) else ""
        print(f"killed {part:4.0%} into {stage}{late}", flush=True)
        while not client.get_job_info(job).status.is_terminal():
            time.sleep(POLL_S)
        return True

    def _driver(self, client: Any, job: str) -> int | None:
        info = client.get_job_info(job).driver_info
        return None if info is None or not info.pid else int(info.pid)


def measure(folder: Path, scenes: int, seed: int) -> JsonDict:
    """Both runs, on a cluster of their own."""
    running = cluster.start(cpus=4, gpus=0)
    try:
        target = submission.Target.of(running)
        port = cluster.free_port()  # one Serve for both
        whole, pieces = (_config(folder, name, scenes, port) for name in ("whole", "pieces"))
        begun = time.monotonic()
        job = submission.submit("pipeline", whole, target)
        lines: list[str] = []
        try:
            submission.follow(job, target, lines.append)
        except JobFailed:
            print("\n".join(lines[-60:]), file=sys.stderr)
            raise
        middle = time.monotonic()
        print(f"uninterrupted: {middle - begun:.0f} s", flush=True)
        seconds = _stages(Path(whole.runs) / whole.name)
        interrupted = Interrupted(pieces, target, seconds, random.Random(seed))
        jobs = interrupted.run()
        ended = time.monotonic()
    finally:
        cluster.stop(running)
    tables = [table(Path(config.runs) / config.name) for config in (whole, pieces)]
    differing = [name for name in tables[0] if tables[0][name] != tables[1].get(name)]
    return {
        "stages": list(seconds),
        "kills": interrupted.kills,
        "jobs": jobs,
        "seconds": [middle - begun, ended - middle],
        "seed": seed,
        "scenes": scenes,
        "same": not differing and tables[0].keys() == tables[1].keys(),
        "differing": differing,
        "table": tables[0],
        "other_table": {name: tables[1].get(name) for name in differing},
    }


def _config(folder: Path, name: str, scenes: int, port: int) -> RunConfig:
    world = build_world(folder / "train", "train", scenes)
    build_world(folder / "test", "test", 24)
    text = Path("configs/demo.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text.replace("runs/demo-world", str(folder)))
    assert values["data"]["prompts"] == str(world.prompts)
    values |= {"name": name, "runs": str(folder / "runs"), "rounds": ROUNDS}
    values["policy"]["engine"]["dtype"] = "float32"
    values["policy"]["service"]["port"] = port
    values["training"] |= {"epochs": 1, "batch_size": 8, "micro_batch_size": 8}
    values["training"] |= {"dtype": "float32"}
    return RunConfig.parse(values)


def _stages(folder: Path) -> dict[str, float]:
    """The seconds of each stage, in the order in which they ended."""
    found = [
        (values["at"], file.stem, values["seconds"])
        for file in (folder / "stages").glob("*.json")
        for values in [json.loads(file.read_text(encoding="utf-8"))]
    ]
    return {name: seconds for _, name, seconds in sorted(found)}


def table(folder: Path) -> JsonDict:
    """What a run ended with: figures, ledgers, and hashes of pairs and adapters."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found: JsonDict = {
        "before": _values(summary["before"]),
        "after": _values(summary["after"]),
        "ledger": summary["ledger"],
    }
    for number in range(1, ROUNDS + 1):
        part = folder / f"round-{number}"
        rows = pq.read_table(part / "pairs.parquet").to_pylist()
        found[f"pairs of round {number}"] = _hash(json.dumps(rows).encode())
        (adapter,) = part.glob("train/adapter/adapter_model.safetensors")
        found[f"adapter of round {number}"] = _hash(adapter.read_bytes())
    return found


def _values(side: JsonDict) -> JsonDict:
    return {
        name: figure["value"]
        for name, figure in side.items()
        if isinstance(figure, dict) and "value" in figure
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """Run both, print, and write where asked; 1 when they differ."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kills-", ignore_cleanup_errors=True) as folder:
        found = measure(Path(folder), options.scenes, options.seed)
    print(
        f"{len(found['kills'])} kills in {len(found['stages'])} stages, {found['jobs']} jobs,"
        f" {found['seconds'][1]:.0f} s: "
        + ("the same" if found["same"] else f"differs in {', '.join(found['differing'])}")
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if found["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
