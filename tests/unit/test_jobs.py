"""Jobs as `sima status` and its kin show them, and what travels with one; without a cluster."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sima_ray.errors import ClusterError
from sima_ray.runtime.jobs import Job, choose, details, table
from sima_ray.runtime.progress import MARK, shown
from sima_ray.runtime.submission import _stage_folder

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def job(name: str, state: str = "SUCCEEDED", run: str | None = "/runs/demo") -> Job:
    metadata = {"sima_stage": "train", "sima_revision": "abc123"}
    ended = BEGAN + timedelta(seconds=90)
    return Job(name, "train", run, state, BEGAN, ended, 0, "python -m jobs.train", "", metadata)


JOBS = [job("sima-train-demo-b2"), job("sima-train-demo-a1"), job("sima-scale-a1", run=None)]


def test_columns() -> None:
    header, first, _, third = table(JOBS).splitlines()
    assert header.split() == ["JOB", "RUN", "STAGE", "STATE", "SINCE", "TOOK"]
    assert first.startswith("sima-train-demo-b2  demo  train  SUCCEEDED  ")
    assert first.endswith("90 s") and third.split()[1] == "-"


@pytest.mark.parametrize(
    ("name", "found"),
    [(None, 0), ("b2", 0), ("demo-a1", 1), ("sima-train-demo-a1", 1), ("scale-a1", 2)],
)
def test_a_job_is_found_by_the_end_of_its_id(name: str | None, found: int) -> None:
    assert choose(JOBS, name, "http://head") is JOBS[found]


@pytest.mark.parametrize(
    ("jobs", "name", "words"),
    [
        (JOBS, "a1", "sima-train-demo-a1 or sima-scale-a1: give more"),
        (JOBS, "2", "no job '2' of this project: `sima status`"),
        ([], None, "no job of this project was submitted there"),
    ],
)
def test_a_job_that_is_not_found(jobs: list[Job], name: str | None, words: str) -> None:
    with pytest.raises(ClusterError, match=words):
        choose(jobs, name, "http://head")


def test_details_end_with_the_metadata() -> None:
    text = details(
        JOBS[0], [f"{MARK}train        … step 1/9", "noise", f"{MARK}train        … step 2/9"]
    )
    assert "said last    train … step 2/9" in text
    assert "exit code    0" in text
    assert text.endswith("revision     abc123")


def test_a_log_read_at_once_keeps_only_the_last_update() -> None:
    log = ["noise", f"{MARK}train        … 1", f"{MARK}train        9 s", f"{MARK}merge        … 2"]
    assert shown(log) == ["train        9 s", "merge        … 2"]
    assert shown(["noise"]) == []


def test_no_junk_travels_with_a_job(tmp_path: Path) -> None:
    _stage_folder(tmp_path, {"run.yaml": "name: r\n"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "jobs",
        "run.yaml",
        "serve_apps",
        "sima_ray",
    ]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".py", ".yaml", ".j2", ".jinja", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) < 2_000_000
    names = {part for path in files for part in path.relative_to(tmp_path).parts}
    assert not [name for name in names if name.startswith(".") or name in ("__pycache__", "runs")]
