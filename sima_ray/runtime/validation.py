"""`sima validate`: what a run would set aside, before anything is rented."""

import tempfile
from pathlib import Path

from sima_ray.config import RunConfig
from sima_ray.data.prompts import check_images, describe, index_prompts, problem_lines
from sima_ray.errors import SimaError

_SHOWN = 20


def validate_run(config: RunConfig, *, images: bool) -> bool:
    """Check prompts, images, the model folder and the benchmarks, and say what was found; True when nothing was.

    Raises:
        DataError: The prompts file cannot be read at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "prompts.parquet")
        counts = index_prompts(config.data, index)
        problems = list(problem_lines(index))
        if images:
            problems += map(describe, check_images(config.data, index))
    model = _model_problem(config)
    suites, suites_good = _suites(config, images=images)
    for line in [*problems[:_SHOWN], *([model] if model else [])]:
        print(line)
    if len(problems) > _SHOWN:
        print(f"… and {len(problems) - _SHOWN:,} more")
    print(
        f"{counts.rows:,} prompts: {counts.rows - len(problems):,} good, {len(problems):,} set aside"
    )
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


def _model_problem(config: RunConfig) -> str | None:
    try:
        from sima_ray.policy.checkpoint import check_policy

        check_policy(config.policy.model)
    except SimaError as error:
        return str(error)
    return None
