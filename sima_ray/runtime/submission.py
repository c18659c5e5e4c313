"""Submit a stage as a Ray job, follow its log, and return its status.

The job gets this checkout's code and the resolved config as its working folder, so that a cluster whose nodes
have the packages, but not this project, runs exactly what the user has here.
"""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sima_ray
from sima_ray.config import RunConfig
from sima_ray.errors import ClusterError, ConfigError, JobFailed, SimaError, one_line
from sima_ray.runtime import cluster, versions

STAGES = ("preferences", "train", "merge", "evaluate", "report", "pipeline")
"""What `sima submit` takes; each is a job, `python -m jobs.STAGE CONFIG`. `jobs.serve`, `scale`, `promote`
and `unserve` are commands of `sima` with the same names."""

STAGE, RUN = "sima_stage", "sima_run"
"""Metadata of every job of ours: what it does, and the folder of the run that it works on, if any."""

_PACKAGES = ("sima_ray", "serve_apps", "jobs")
_JUNK = (".*", "__pycache__", "*.pyc", "runs", "sprites", "*.safetensors")
"""What a job has no use for, or finds on a volume that the nodes mount."""

_SUBMIT_TIMEOUT_S = 60.0
_STOP_GRACE_S = 30
"""What a job that is stopped has to take its replicas down, before it is killed; Ray's own 3 s are too few."""

_STOP_TIMEOUT_S = _STOP_GRACE_S + 30.0
_ASK_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster to submit to: its dashboard's URL, and its token where we know it.

    Without a token here, Ray's client takes the one of the environment (RAY_AUTH_MODE, RAY_AUTH_TOKEN…).
    """

    address: str
    token: str | None = None

    @classmethod
    def of(cls, local: cluster.LocalCluster) -> "Target":
        """A local cluster of ours."""
        return cls(local.address, Path(local.token_file).read_text(encoding="utf-8"))


def find_cluster(address: str | None) -> Target:
    """The cluster that was named, or else the one in the environment, or else the local one.

    HEAD:8265 means http://HEAD:8265, as in Ray's own commands.

    Raises:
        ConfigError: An address that is no dashboard's.
        ClusterError: None of the three.
    """
    named = f"--address {address}"
    if address is None and (address := os.environ.get("RAY_API_SERVER_ADDRESS")) is not None:
        named = f"RAY_API_SERVER_ADDRESS={address}"
    if address is not None:
        url = (address if "://" in address else f"http://{address}").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{named}: give the dashboard's URL, as in http://HEAD:8265")
        local = cluster.running()
        return Target.of(local) if local and local.address == url else Target(url)
    if local := cluster.running():
        return Target.of(local)
    raise ClusterError(
        "no cluster: start a local one with `sima up`, or name one with --address http://HEAD:8265"
    )


def submit(
    stage: str,
    config: RunConfig,
    target: Target,
    arguments: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
) -> str:
    """Submit one stage and return the job's id.

    Args:
        stage: One of `STAGES`, or another module of `jobs` that takes a run's config.
        config: The run's settings.
        target: The cluster.
        arguments: Further arguments of the entry point.
        environment: Further variables of the job; the dashboard shows them, so no secrets.
        files: Further files of its working folder, name to text.

    Raises:
        ClusterError: The cluster cannot be reached, refuses the token, or takes no jobs; or a job of this run
            still runs there, and two would write the same files.
    """
    client = connect(target)
    if (other := _running_job(client, config)) is not None:
        raise ClusterError(
            f"job {other} of the run {config.name} still runs: wait for it with "
            f"`sima logs -f {other}{option(target)}`, or end it with `sima stop {other}{option(target)}`"
        )
    return _submit(
        client,
        target,
        job_id=f"sima-{stage}-{config.name}-{secrets.token_hex(3)}",
        command=(f"jobs.{stage}", "run.yaml", *arguments),
        files={"run.yaml": config.dump(), **(files or {})},
        environment=environment or {},
        metadata={STAGE: stage, RUN: _identity(config), "sima_name": config.name},
    )


def submit_command(command: str, target: Target, arguments: tuple[str, ...]) -> str:
    """Submit a job that belongs to no run, `python -m jobs.COMMAND ARGUMENTS`, and return its id.

    Raises:
        ClusterError: The cluster cannot be reached, refuses the token, or takes no jobs.
    """
    return _submit(
        connect(target),
        target,
        job_id=f"sima-{command}-{secrets.token_hex(3)}",
        command=(f"jobs.{command}", *arguments),
        files={},
        environment={},
        metadata={STAGE: command},
    )


def _submit(
    client: Any,
    target: Target,
    *,
    job_id: str,
    command: tuple[str, ...],
    files: dict[str, str],
    environment: dict[str, str],
    metadata: dict[str, str],
) -> str:
    """Submit `python -m COMMAND` with this checkout's code and these files as its working folder."""
    with tempfile.TemporaryDirectory(prefix="sima-job-") as folder:
        _stage_folder(Path(folder), files)
        deadline = time.monotonic() + _SUBMIT_TIMEOUT_S
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint=shlex.join(("python", "-m", *command)),
                        submission_id=job_id,
                        runtime_env={
                            "working_dir": folder,
                            "env_vars": _job_environment() | {"SIMA_JOB": job_id} | environment,
                        },
                        metadata=metadata
                        | {
                            "sima_version": sima_ray.__version__,
                            "sima_revision": revision() or "unknown",
                            "sima_versions": versions.one_line(),
                        },
                    )
                )
            except (RuntimeError, OSError) as error:
                # A head node that has only just started has no agent yet to run the job.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise ClusterError(
                        f"{target.address}: job refused: {one_line(error)}"
                    ) from error
                time.sleep(0.5)


def follow(job_id: str, target: Target, on_line: Callable[[str], None]) -> None:
    """Stream a job's log until the job ends.

    Raises:
        JobFailed: The job failed or was stopped.
    """
    client = connect(target)

    async def tail() -> None:
        rest = ""
        async for chunk in client.tail_job_logs(job_id):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                on_line(line)
        if rest:
            on_line(rest)

    try:
        asyncio.run(tail())
        while not (job := client.get_job_info(job_id)).status.is_terminal():
            time.sleep(0.2)
    except (RuntimeError, OSError) as error:
        raise ClusterError(
            f"{target.address}: connection lost, the job may go on, and "
            f"`sima logs -f {job_id}{option(target)}` follows it again: {one_line(error)}"
        ) from error
    if job.status.value != "SUCCEEDED":
        failure = JobFailed(f"job {job_id} ended as {job.status.value}")
        code = job.driver_exit_code or JobFailed.exit_code
        failure.exit_code = code if code > 0 else 128 - code  # killed by a signal: as shells say it
        raise failure


def stop(job_id: str, target: Target) -> str:
    """Stop a job, wait until it has ended, and return the state in which it did.

    Raises:
        ClusterError: The cluster does not answer, or the job goes on for a minute.
    """
    client = connect(target)
    deadline, asked = time.monotonic() + _STOP_TIMEOUT_S, float("-inf")
    try:
        while not (status := client.get_job_status(job_id)).is_terminal():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{target.address}: {job_id} was asked to stop and has not ended in "
                    f"{_STOP_TIMEOUT_S:.0f} s: `sima status {job_id}{option(target)}` says how it goes on"
                )
            # More than once: a job that only just starts has nobody yet to hear it.
            if time.monotonic() - asked > _ASK_AGAIN_S:
                asked = time.monotonic()
                client.stop_job(job_id)
            time.sleep(0.2)
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"{target.address}: {job_id}: {one_line(error)}") from error
    return str(status.value)


def revision() -> str | None:
    """The git revision of this checkout, "-dirty" added where it has changes; None outside of one."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(sima_ray.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def option(target: Target) -> str:
    """What to add to a command of `sima` so that it finds this cluster: nothing, where it does so by itself."""
    try:
        found = find_cluster(None).address == target.address
    except SimaError:
        found = False
    return "" if found else f" --address {target.address}"


def connect(target: Target) -> Any:
    """Ray's own client of the cluster's jobs.

    Raises:
        ClusterError: No cluster answers there, or it refuses the token.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        headers = {"Authorization": f"Bearer {target.token}"} if target.token else None
        client = JobSubmissionClient(target.address, headers=headers)
        # Uploads and closed sockets are no news. These modules set their own level when imported.
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        return client
    except Exception as error:
        if "Unauthorized" in str(error):
            raise ClusterError(
                f"{target.address}: the cluster wants its token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                "(or RAY_AUTH_TOKEN_PATH, a file with it)"
            ) from error
        raise ClusterError(
            f"{target.address}: no Ray cluster answers: {one_line(error)}"
        ) from error


def _running_job(client: Any, config: RunConfig) -> str | None:
    """The id of a job of this run that has not ended; serving does not write to the run."""
    for job in client.list_jobs():
        metadata = job.metadata or {}
        mine = metadata.get(RUN) == _identity(config)
        if mine and metadata.get(STAGE) != "serve" and not job.status.is_terminal():
            return str(job.submission_id)
    return None


def _identity(config: RunConfig) -> str:
    return f"{config.runs}/{config.name}"


def _stage_folder(folder: Path, files: dict[str, str]) -> None:
    """Put the code and these files into the folder that travels with the job."""
    root = Path(sima_ray.__file__).parent.parent
    junk = shutil.ignore_patterns(*_JUNK)
    for package in _PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=junk)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _job_environment() -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_GRACE_S),
        "RAY_TRAIN_V2_ENABLED": "1",
        "SIMA_REVISION": revision() or "unknown",
        "TOKENIZERS_PARALLELISM": "false",
    }
