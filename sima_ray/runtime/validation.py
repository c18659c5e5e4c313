"""`sima validate`: what a run would set aside, before anything is rented."""

import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sima_ray.config import RunConfig
from sima_ray.data.given import given_rows, take_given
from sima_ray.data.prompts import check_images, check_rows, describe, index_prompts, problem_lines
from sima_ray.errors import SimaError
from sima_ray.ports import JsonDict

_SHOWN = 20


def validate_run(config: RunConfig, *, images: bool) -> bool:
    """Check prompts or pairs, images, the model folder and the benchmarks, and say what was found.

    True when nothing was found.

    Raises:
        DataError: The prompts or the pairs cannot be read at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        if config.data.pairs is None:
            rows, good, problems = _prompts(config, folder, images)
        else:
            rows, good, problems = _pairs(config, folder, images)
    model = _model_problem(config)
    suites, suites_good = _suites(config, images=images)
    for line in [*problems[:_SHOWN], *([model] if model else [])]:
        print(line)
    if len(problems) > _SHOWN:
        print(f"… and {len(problems) - _SHOWN:,} more")
    what = "prompts" if config.data.pairs is None else "pairs"
    print(f"{rows:,} {what}: {good:,} good, {rows - good:,} set aside")
    for line in suites:
        print(line)
    return not problems and not model and suites_good


def _suites(config: RunConfig, *, images: bool) -> tuple[list[str], bool]:
    """A line for each benchmark of the config, and whether all of them can be used."""
    from sima_ray.runtime.suites import open_suite

    settings, lines, good = config.evaluation, list[str](), True
    for name in settings.suites if settings else ():
        if settings is None or name == "chair":
            continue
        try:
            suite = open_suite(name, settings, config)
            for question in {q.image: q for q in suite.questions}.values() if images else ():
                suite.load(question)
            lines.append(f"{name}: {len(suite.questions):,} questions")
        except SimaError as error:
            lines.append(f"{name}: {error}")
            good = False
    return lines, good


def _prompts(config: RunConfig, folder: str, images: bool) -> tuple[int, int, list[str]]:
    """Prompts, the good ones among them, and a line for each other."""
    index = str(Path(folder) / "prompts.parquet")
    counts = index_prompts(config.data, index)
    problems = list(problem_lines(index))
    if images:
        problems += map(describe, check_images(config.data, index))
    return counts.rows, counts.rows - len(problems), problems


def _pairs(config: RunConfig, folder: str, images: bool) -> tuple[int, int, list[str]]:
    """Given pairs, the good ones among them, and a line for each that cannot be used.

    Identical responses, and what the length policy leaves out, are no problem of the data: they have no line.
    """
    pairs, quarantine = (str(Path(folder) / name) for name in ("pairs.parquet", "aside.jsonl"))
    ledger = take_given(config.data, config.pairs, config.seed, pairs, quarantine)
    aside = {row["source"]: row for row in _quarantined(quarantine)}
    broken: list[JsonDict] = []
    if images:
        assert config.data.pairs is not None
        kept = {row["row_id"] for row in given_rows(pairs)}
        rows = (
            row
            for row in islice(given_rows(config.data.pairs), config.data.limit)
            if row["source"] not in aside and row["row_id"] in kept
        )
        broken = list(check_rows(config.data, rows))
    return ledger.rows, ledger.pairs - len(broken), [*map(describe, [*aside.values(), *broken])]


def _quarantined(file: str) -> Iterator[JsonDict]:
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row | {"quarantine": row["reason"]}


def _model_problem(config: RunConfig) -> str | None:
    try:
        from sima_ray.policy.checkpoint import check_policy

        check_policy(config.policy.model)
    except SimaError as error:
        return str(error)
    return None
