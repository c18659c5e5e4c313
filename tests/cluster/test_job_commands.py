"""`sima submit`, `status`, `logs`, `stop`, `resume` and `runs` against a cluster of `sima up`."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from constant_load import wait_for

from sima_ray import __version__, cli
from sima_ray.data.sinks import PAIR_SCHEMA
from sima_ray.ledger import Ledger
from sima_ray.records import ROW_SCHEMA
from sima_ray.runtime import cluster

CPUS = 2
SIMA = str(Path(sys.executable).parent / "sima")

TAKE_ALL = f"""
import ray
ray.init(address="auto", log_to_driver=False)
holder = ray.remote(num_cpus={CPUS})(type("Holder", (), {{"there": lambda self: True}})).remote()
print(ray.get(holder.there.remote()), flush=True)
input()
"""
"""Holds every CPU until its input ends, so that a stage which needs one waits as long as the test likes."""


@dataclass
class Done:
    code: int
    out: str
    err: str


def sima(*arguments: str) -> Done:
    """The command line in this process, which has Ray imported already."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sima", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.LocalCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMA_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("NO_COLOR", "1")
        # In a process of its own, as users start it: a cluster that is this process's child takes long to end.
        subprocess.run([SIMA, "up", f"--cpus={CPUS}", "--gpus=0"], check=True, timeout=400)
        running = cluster.running()
        assert running
        try:
            environment = {**os.environ, **running.environment, "RAY_ADDRESS": running.gcs}
            command = [sys.executable, "-c", TAKE_ALL]
            with subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as holder:
                assert holder.stdout and b"True" in holder.stdout.readline()
                yield running
        finally:
            cluster.down()


def write_config(root: Path, name: str) -> Path:
    file = root / f"{name}.yaml"
    values = {
        "name": name,
        "runs": str(root / "runs"),
        "data": {"prompts": str(root / "prompts.jsonl"), "images": str(root)},
        "policy": {"model": str(root / "model")},
    }
    file.write_text(yaml.safe_dump(values))
    return file


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def job_of(done: Done) -> str:
    line = next(line for line in done.out.splitlines() if line.startswith("job "))
    return line.split()[1]


def test_a_job_that_failed_is_taken_up_again(local: cluster.LocalCluster, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = sima("submit", "report", str(write_config(tmp_path, "told")))
    failed = job_of(done)
    assert done.code == 1 and f"{failed} ended as FAILED" in done.err
    assert "error: " in done.out and "round-1/ledger.json is missing" in done.out
    assert f"sima logs --verbose {failed}\n" in done.out

    # Later commands find the job, its words and its exit code, and the run says what became of it.
    assert failed in sima("status").out
    details = sima("status", failed).out
    for words in (
        "FAILED",
        "exit code    1",
        "said last    error: ",
        "name         told",
        "ray 2.",
    ):
        assert words in details
    assert "ledger.json is missing" in sima("logs").out
    assert sima("logs", "-f").code == 1
    [listed] = json.loads(sima("runs", "--runs", str(runs), "--json").out)
    assert (listed["state"], listed["job"]) == ("failed", failed)
    assert "ledger.json is missing" in listed["error"]

    folder = runs / "told"
    preferences = folder / "round-1" / "preferences"
    preferences.mkdir(parents=True)
    pq.write_table(ROW_SCHEMA.empty_table(), preferences / "a.parquet")
    write(folder / "round-1" / "ledger.json", Ledger(0).to_json())
    done = sima("resume", "told", "--runs", str(runs), "--verbose")
    assert done.code == 0, done
    assert "resuming     report" in done.out and "report.html" in done.out
    assert "done" in sima("runs", "--runs", str(runs)).out
    assert sima("runs", "--runs", str(runs), "show", "told").code == 0
    again = sima("resume", str(folder))
    assert again.code == 0 and "nothing was interrupted" in again.out
    done = sima("stop", failed)
    assert done.code == 1 and f"{failed} has ended already, as FAILED" in done.err


def test_a_job_that_runs_is_left_stopped_and_resumed(
    local: cluster.LocalCluster, tmp_path: Path
) -> None:
    config, folder = write_config(tmp_path, "held"), tmp_path / "runs" / "held"
    adapter = folder / "round-1" / "train" / "adapter"
    adapter.mkdir(parents=True)
    pq.write_table(PAIR_SCHEMA.empty_table(), folder / "round-1" / "pairs.parquet")
    done = sima("submit", "merge", str(config), "--round", "1", "--no-wait")
    job = job_of(done)
    assert done.code == 0 and f"sima logs -f {job}" in done.out
    wait_for(lambda: (folder / "job.json").exists())

    [listed] = json.loads(sima("runs", "--runs", str(folder.parent), "--json").out)
    assert (listed["state"], listed["job"]) == ("running", job)
    found = json.loads(sima("status", job, "--json").out)
    metadata = found["metadata"]
    assert (found["state"], found["run"], metadata["sima_name"]) == ("RUNNING", str(folder), "held")
    assert metadata["sima_version"] == __version__ and metadata["sima_revision"]
    done = sima("submit", "merge", str(config))
    assert done.code == 1 and f"sima stop {job}" in done.err

    interrupted = _interrupted_logs(job)
    assert interrupted.code == 130, interrupted
    assert "The job goes on." in interrupted.out and f"sima logs -f {job}" in interrupted.out
    assert json.loads(sima("status", job, "--json").out)["state"] == "RUNNING"

    done = sima("stop", job)
    assert done.code == 0 and f"stopped      {job}" in done.out, done
    assert f"sima resume {folder}\n" in done.out
    assert json.loads((folder / "job.json").read_text())["state"] == "STOPPED"
    assert sima("logs", "-f", job).code == 1

    done = sima("resume", str(config), "--no-wait")
    again = job_of(done)
    assert done.code == 0 and "resuming     merge --round 1" in done.out and again != job
    assert f"job          {again}" in sima("status", again.rpartition("-")[2]).out


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_nobodys_job(local: cluster.LocalCluster, command: str) -> None:
    done = sima(command, "nobody")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1 and "no job 'nobody' of this project" in done.err


def _interrupted_logs(job: str) -> Done:
    """`sima logs -f JOB`, until Ctrl-C."""
    command = [SIMA, "logs", "-f", "--verbose", job]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    first = process.stdout.readline()  # it follows now
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=400)
    return Done(process.returncode, first + out, err)
