"""`sima validate`: what a run would set aside, before anything is rented."""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa

from sima_ray.config import DataConfig, EvaluationConfig, RunConfig
from sima_ray.config.evaluation import SuiteName
from sima_ray.data.benchmarks import read_questions
from sima_ray.data.given import given_rows, take_given
from sima_ray.data.locations import check_root, open_location
from sima_ray.data.prompts import (
    check_images,
    check_rows,
    describe,
    images_loaded,
    index_prompts,
    read_index,
)
from sima_ray.errors import DataError, SimaError, why
from sima_ray.ports import JsonDict
from sima_ray.records import Quarantine
from sima_ray.runtime.evaluation import check_annotated, read_truth, read_vocabulary
from sima_ray.runtime.progress import Screen, Stage

_SHOWN = 5  # of each reason


@dataclass(slots=True)
class Found:
    """What was found: `rows` = the good ones + `bad` + `left_out`.

    Attributes:
        prompts, images: What was checked; no images where they were left alone.
        rows: Of the prompts file, or of the one of given pairs.
        bad: Rows that a run sets aside, with `quarantine` and `error`, in the order of the file.
        notes: What is worth knowing and no fault.
        faults: What would stop a run, beside its prompts.
        seconds: That it took.
        what: The rows are.
        left_out: Given pairs that are no fault of the data: identical, or not by the length policy.
    """

    prompts: str
    images: str | None
    rows: int
    bad: list[JsonDict]
    notes: list[str] = field(default_factory=list[str])
    faults: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    what: str = "prompts"
    left_out: int = 0

    @property
    def good(self) -> bool:
        """Whether a run would set nothing aside."""
        return not self.bad and not self.faults

    @property
    def reasons(self) -> Counter[Quarantine]:
        """How many rows are bad, by why."""
        return Counter(Quarantine(row["quarantine"]) for row in self.bad)

    def to_json(self) -> JsonDict:
        """All of it as plain values."""
        return {
            "what": self.what,
            self.what: self.prompts,
            "images": self.images,
            "rows": self.rows,
            "good": self.rows - len(self.bad) - self.left_out,
            "left_out": self.left_out,
            "set_aside": {reason.value: n for reason, n in self.reasons.most_common()},
            "problems": [_problem(row) for row in self.bad],
            "notes": self.notes,
            "faults": self.faults,
            "seconds": round(self.seconds, 2),
        }


def check_prompts(data: DataConfig, *, images: bool = True, root: bool = True) -> Found:
    """Check a prompts file, and its images as the stages check them.

    Args:
        data: Both, and the limits.
        images: Load every image.
        root: Check that there is such an image root.

    Raises:
        DataError: The prompts file or the image root cannot be read at all.
    """
    assert data.prompts is not None
    stage = Stage("validate", Screen(sys.stderr))
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "prompts.parquet")
        counts = index_prompts(data, index, root=root)
        bad = list(read_index(index, bad=True))
        if images:
            total = f"{counts.good:,} prompts with their images"
            bad += check_images(
                data, index, on_progress=lambda done: stage.update(f"{done:,} of {total}")
            )
            stage.result(total)
    bad.sort(key=lambda row: _place(row)[1])
    if root and (shards := check_root(data.images)) is not None:
        notes.append(f"{data.images}: {shards}")
    if not counts.good and _is_array(data.prompts):
        notes.append(
            f"{data.prompts}: a JSON array, not JSON lines: `sima data prompts` makes prompts of "
            "LLaVA-Instruct's"
        )
    stage.finish()
    return Found(
        data.prompts, data.images if images else None, counts.rows, bad, notes, [], stage.seconds
    )


def check_pairs(config: RunConfig, *, images: bool = True) -> Found:
    """Check given pairs, and their images as the stages check them.

    Raises:
        DataError: The pairs cannot be read at all.
    """
    data = config.data
    assert data.pairs is not None
    shards = check_root(data.images) if images else None
    notes = [f"{data.images}: {shards}"] if shards is not None else []
    stage = Stage("validate", Screen(sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        pairs, aside = (str(Path(folder) / name) for name in ("pairs.parquet", "aside.jsonl"))
        ledger = take_given(data, config.pairs, config.seed, pairs, aside)
        bad = [
            row | {"quarantine": row["reason"]}
            for row in map(json.loads, Path(aside).read_text(encoding="utf-8").splitlines())
        ]
        left_out = ledger.rows - ledger.pairs - len(bad)
        if images:
            known, kept = {row["source"] for row in bad}, {r["row_id"] for r in given_rows(pairs)}
            rows = (
                row
                for row in islice(given_rows(data.pairs), data.limit)
                if row["source"] not in known and row["row_id"] in kept
            )
            total = f"{len(kept):,} pairs with their images"
            bad += check_rows(
                data, rows, on_progress=lambda done: stage.update(f"{done:,} of {total}")
            )
            stage.result(total)
    bad.sort(key=lambda row: _place(row)[1])
    stage.finish()
    return Found(
        data.pairs,
        data.images if images else None,
        ledger.rows,
        bad,
        notes,
        seconds=stage.seconds,
        what="pairs",
        left_out=left_out,
    )


def check_run(config: RunConfig, *, images: bool = True) -> Found:
    """Check a config's prompts or pairs with their images, its model folder, and its benchmarks.

    Raises:
        DataError: The prompts, the pairs or the image root cannot be read at all.
    """
    if config.data.pairs is None:
        found = check_prompts(config.data, images=images)
    else:
        found = check_pairs(config, images=images)
    if config.evaluation is not None:
        if images:
            found.faults += _evaluation_faults(config.evaluation, config.data.max_image_pixels)
        for name in config.evaluation.suites:
            line, good = _suite(name, config.evaluation, config, images=images)
            (found.notes if good else found.faults).append(line)
    try:
        from sima_ray.policy.checkpoint import check_policy

        check_policy(config.policy.model)
    except SimaError as error:
        found.faults.append(str(error))
    return found


def show(found: Found, out: TextIO) -> None:
    """Examples of each reason with file, line and id, then what stops a run, then the counts."""
    reasons = found.reasons
    for reason, number in reasons.most_common():
        rows = (row for row in found.bad if row["quarantine"] == reason)
        print(*map(describe, islice(rows, _SHOWN)), sep="\n", file=out)
        if number > _SHOWN:
            print(f"… and {number - _SHOWN:,} more: {reason}", file=out)
    for line in chain(found.notes, found.faults):
        print(line, file=out)
    counts = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common())
    if found.left_out:
        counts = ", ".join(part for part in (counts, f"left out {found.left_out:,}") if part)
    aside = len(found.bad) + found.left_out
    print(
        f"{found.rows:,} {found.what}: {found.rows - aside:,} good, {aside:,} set aside"
        + (f" ({counts})" if counts else ""),
        file=out,
    )


def write(found: Found, target: str) -> None:
    """Write what was found as JSON to a location, or to standard output for `-`.

    Raises:
        DataError: It cannot be written.
    """
    text = json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        print(text, end="")
        return
    filesystem, path = open_location(target)
    try:
        with filesystem.open_output_stream(path, compression=None) as stream:
            stream.write(text.encode())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{target}: cannot be written: {why(error)}") from error


def _place(row: JsonDict) -> tuple[str, int]:
    file, _, line = row["source"].rpartition(":")
    return file, int(line)


def _problem(row: JsonDict) -> JsonDict:
    file, line = _place(row)
    return {
        "file": file,
        "line": line,
        "id": row["row_id"],
        "reason": row["quarantine"],
        "error": row["error"],
    }


def _evaluation_faults(settings: EvaluationConfig, max_pixels: int) -> Iterator[str]:
    """An evaluation sets nothing aside: one image that cannot be used ends it."""
    if settings.images is None:  # only benchmarks that bring their own
        return
    files = [(file, "label") for file in settings.pope]
    if settings.prompts is not None:
        files.insert(0, (settings.prompts, "ground_truth"))
    try:
        check_root(settings.images)
        for location, expected in files:
            questions = read_questions(location, expected)
            if location == settings.prompts:
                questions = questions[: settings.limit]
            rows: Iterator[JsonDict] = ({"image": q.image, "id": q.row_id} for q in questions)
            lines = [
                f"{location}: {problem.reason}: {problem} (id {row['id']})"
                for row, problem in images_loaded(settings.images, rows, max_pixels)
                if problem is not None
            ]
            yield from lines[:_SHOWN]
            if len(lines) > _SHOWN:
                yield f"… and {len(lines) - _SHOWN:,} more images of {location}"
    except DataError as error:
        yield str(error)


def _suite(
    name: SuiteName, settings: EvaluationConfig, config: RunConfig, *, images: bool
) -> tuple[str, bool]:
    """A line on a benchmark, and whether it can be used; the images of two were checked above."""
    from sima_ray.runtime.suites import open_suite

    try:
        if name == "chair":
            assert settings.prompts is not None
            questions = read_questions(settings.prompts, "ground_truth")[: settings.limit]
            assert settings.instances is not None
            names = read_vocabulary(settings.chair_synonyms)
            truth = read_truth(settings.instances, settings.captions, names)
            check_annotated([question.image for question in questions], truth, settings.instances)
            return f"chair: {len(questions):,} questions", True
        suite = open_suite(name, settings, config)
        distinct = {question.image: question for question in suite.questions}.values()
        for question in distinct if images and name != "pope" else ():
            suite.load(question)
    except SimaError as error:
        return f"{name}: {error}", False
    return f"{name}: {len(suite.questions):,} questions", True


def _is_array(prompts: str) -> bool:
    filesystem, path = open_location(prompts)
    with filesystem.open_input_stream(path) as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")
