"""The last job of a run, kept in its folder: what it was to do, and how it ended.

A cluster forgets its jobs when it goes, and a spot-priced one goes at any time. The run's own `job.json` is what
`sima resume` and `sima runs` go by then. A job that was killed leaves the state RUNNING there: nobody was left
to write another.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sima_ray.errors import DataError, SimaError, last_line, why

if TYPE_CHECKING:
    from sima_ray.runtime.run import RunFolder

FILE = "job.json"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A job's work on a run.

    Attributes:
        stage: What was submitted.
        round: For which round; of no meaning to the pipeline and the report.
        job: Its id on the cluster; None where it was not started by `sima submit`.
        began: ISO time.
        state: As Ray calls it; RUNNING also when the job was killed.
        ended: ISO time.
        error: Why it failed, in one line.
        arguments: What else its command line had, beside the round: "--suites", "mmhal".
    """

    stage: str
    round: int
    job: str | None
    began: str
    state: Literal["RUNNING", "SUCCEEDED", "FAILED", "STOPPED"] = "RUNNING"
    ended: str | None = None
    error: str | None = None
    arguments: tuple[str, ...] = ()


@contextmanager
def recorded(
    folder: "RunFolder", stage: str, number: int, arguments: Sequence[str] = ()
) -> Iterator[None]:
    """Keep in the run's folder that the block began, by which arguments, and how it ended."""
    job = os.environ.get("SIMA_JOB")
    attempt = Attempt(stage, number, job, _now(), arguments=tuple(arguments))
    folder.write_json(asdict(attempt), FILE)
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a remote task raised
        why = str(cause) if isinstance(cause, SimaError) else last_line(error)
        folder.write_json(asdict(replace(attempt, state="FAILED", ended=_now(), error=why)), FILE)
        raise
    except BaseException:  # Ctrl-C, or the exit that SIGTERM becomes
        folder.write_json(asdict(replace(attempt, state="STOPPED", ended=_now())), FILE)
        raise
    folder.write_json(asdict(replace(attempt, state="SUCCEEDED", ended=_now())), FILE)


def last_attempt(folder: Path) -> Attempt | None:
    """The last job of the run in a folder; None for a run that has none on record.

    Raises:
        DataError: The record cannot be read.
    """
    file = folder / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Attempt(**values | {"arguments": tuple(values.get("arguments", ()))})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read: {why(error)}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
