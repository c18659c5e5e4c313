"""The jobs of this project on a cluster: which there are, how far each is, and how it ended."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sima_ray.errors import ClusterError, one_line
from sima_ray.ports import JsonDict
from sima_ray.runtime.columns import columns
from sima_ray.runtime.progress import duration, shown
from sima_ray.runtime.submission import RUN, STAGE, Target, connect

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, slots=True)
class Job:
    """A job that `sima` submitted.

    Attributes:
        id: Its id, unique on the cluster.
        stage: What it does: a stage, the pipeline, or a command such as `serve`.
        run: The folder of the run that it works on; None for a command that belongs to no run.
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, as Ray calls them.
        began: When it was submitted.
        ended: When it ended; None while it goes on.
        exit_code: Of its process, once that has ended.
        command: What it runs.
        message: What Ray says of its state.
        metadata: What went with it: the run, the git revision, the versions.
    """

    id: str
    stage: str
    run: str | None
    state: str
    began: datetime
    ended: datetime | None = None
    exit_code: int | None = None
    command: str = ""
    message: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in _ENDED

    @property
    def name(self) -> str:
        """The run's name, or a dash."""
        return self.run.rpartition("/")[2] if self.run else "-"

    @property
    def seconds(self) -> float:
        """How long it ran, or has been there so far."""
        return max(0.0, ((self.ended or datetime.now(UTC)) - self.began).total_seconds())

    def to_json(self) -> JsonDict:
        """The job as plain values."""
        return {
            "id": self.id,
            "run": self.run,
            "stage": self.stage,
            "state": self.state,
            "since": self.began.isoformat(timespec="seconds"),
            "ended": self.ended and self.ended.isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "exit_code": self.exit_code,
            "command": self.command,
            "message": self.message,
            "metadata": self.metadata,
        }


def list_jobs(target: Target) -> list[Job]:
    """The jobs that `sima` submitted to a cluster, those of other programs left out; the newest first.

    Raises:
        ClusterError: The cluster does not answer, or refuses the token.
    """
    try:
        found = connect(target).list_jobs()
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"{target.address}: no list of jobs: {one_line(error)}") from error
    jobs = [_job(details) for details in found if STAGE in (details.metadata or {})]
    return sorted(jobs, key=lambda job: (job.began, job.id), reverse=True)


def find_job(name: str | None, target: Target) -> Job:
    """The job of that id, or of an id that ends so ("a1b2c3", "demo-a1b2c3"); without a name the newest.

    Raises:
        ClusterError: There is none, or there are several.
    """
    return choose(list_jobs(target), name, target.address)


def choose(jobs: Sequence[Job], name: str | None, address: str) -> Job:
    """The job that a user means; see `find_job`."""
    if name is None:
        if not jobs:
            raise ClusterError(f"{address}: no job of this project was submitted there")
        return jobs[0]
    found = [job for job in jobs if job.id == name]
    found = found or [job for job in jobs if job.id.endswith(f"-{name}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ClusterError(f"{name} may be {' or '.join(job.id for job in found)}: give more of it")
    raise ClusterError(f"{address}: no job {name!r} of this project: `sima status` lists them")


def log(job: Job, target: Target) -> list[str]:
    """The lines that a job has written so far.

    Raises:
        ClusterError: The node that holds them does not answer.
    """
    try:
        return str(connect(target).get_job_logs(job.id)).splitlines()
    except (RuntimeError, OSError) as error:
        raise ClusterError(f"{target.address}: no log of {job.id}: {one_line(error)}") from error


def table(jobs: Sequence[Job]) -> str:
    """Jobs below one another."""
    rows = [
        (job.id, job.name, job.stage, job.state, since(job.began), duration(job.seconds))
        for job in jobs
    ]
    return columns(("JOB", "RUN", "STAGE", "STATE", "SINCE", "TOOK"), rows, right="TOOK")


def details(job: Job, log_lines: Iterable[str]) -> str:
    """Everything about one job, a line each, with the last thing that it said."""
    said = shown(log_lines)
    lines = [
        ("job", job.id),
        ("run", job.run or "-"),
        ("stage", job.stage),
        ("state", job.state),
        ("since", f"{since(job.began)} · {duration(job.seconds)}"),
        ("exit code", "" if job.exit_code is None else str(job.exit_code)),
        ("said last", " ".join(said[-1].split()) if said else ""),
        # Of a failed job Ray's message goes on with the end of the log.
        ("message", (job.message.splitlines() or [""])[0]),
        ("command", job.command),
        *(
            (name, value)
            for name, value in sorted(job.metadata.items())
            if name not in (RUN, STAGE)
        ),
    ]
    return "\n".join(f"{name.removeprefix('sima_'):<12} {value}" for name, value in lines if value)


def since(moment: datetime) -> str:
    """A moment in the reader's time zone."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _job(details: Any) -> Job:
    metadata = dict(details.metadata)
    return Job(
        id=details.submission_id,
        stage=metadata[STAGE],
        run=metadata.get(RUN),
        state=details.status.value,
        began=_moment(details.start_time) or datetime.now(UTC),
        ended=_moment(details.end_time),
        exit_code=details.driver_exit_code,
        command=details.entrypoint,
        message=details.message or "",
        metadata={name: value for name, value in metadata.items() if name.startswith("sima_")},
    )


def _moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
