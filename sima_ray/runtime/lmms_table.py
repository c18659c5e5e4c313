"""The paired table of what lmms-eval found: as a page, for a terminal, as plain values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sima_ray.config.lmms import LmmsEval
from sima_ray.errors import DataError
from sima_ray.metrics.benchmarks import Row, TaskResult, compare_task
from sima_ray.ports import JsonDict
from sima_ray.runtime.columns import columns

FOLDER = "lmms-eval"
"""Of a task's files, in a round's folder."""

Asked = tuple[int, str]
"""A round and a task."""


@dataclass
class Comparison:
    """What came of it.

    Attributes:
        rows: For each round but the first, its lines against the first.
        problems: What has no figures, and why.
    """

    rows: dict[int, list[Row]] = field(default_factory=dict)
    problems: dict[Asked, str] = field(default_factory=dict)


def compare(
    settings: LmmsEval,
    sides: Mapping[Asked, Mapping[str, TaskResult]],
    failed: Mapping[Asked, str],
    seed: int,
) -> Comparison:
    """Hold each round against the first, wherever both have figures that may be used.

    Args:
        settings: Its rounds and tasks are what was asked for.
        sides: What lmms-eval says, by round and task; of a group of tasks, each by its name.
        failed: What it could not evaluate at all, and why.
        seed: Of the bootstrap.
    """
    found = Comparison(problems=dict(failed))
    for (number, _), parts in sides.items():
        for name, result in parts.items():
            if result.problem is not None:
                found.problems[number, name] = result.problem
    first, *others = settings.rounds
    for number in others:
        lines = found.rows.setdefault(number, [])
        for task in settings.tasks:
            for name, before in sides.get((first, task), {}).items():
                after = sides.get((number, task), {}).get(name)
                if after is None or not found.problems.keys().isdisjoint(
                    {(first, name), (number, name)}
                ):
                    continue
                try:
                    lines += compare_task(
                        before,
                        after,
                        samples=settings.samples,
                        confidence=settings.confidence,
                        seed=seed,
                    )
                except DataError as error:
                    found.problems[number, name] = (
                        f"{str(error).removeprefix(f'{name}: ')}: the same command asks every round anew"
                    )
    return found


def to_json(found: Comparison, settings: LmmsEval) -> JsonDict:
    """The comparison as plain values."""
    return {
        "base": settings.rounds[0],
        "rounds": {
            str(number): [row.to_json() for row in rows] for number, rows in found.rows.items()
        },
        "problems": [
            {"task": task, "round": number, "reason": reason}
            for (number, task), reason in found.problems.items()
        ],
        "settings": settings.model_dump(mode="json", exclude={"requirements", "python"}),
    }


def markdown(found: Comparison, settings: LmmsEval, name: str) -> str:
    """The comparison as a page."""
    parts = [f"# {name}: lmms-eval"]
    for number, rows in found.rows.items():
        sides = (f"round {settings.rounds[0]}", f"round {number}")
        header = ("task", "metric", "n", *sides, "change", f"{100 * settings.confidence:.0f} %")
        lines = [header, ("---",) * len(header), *map(_cells, rows)]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    if settings.limit:
        parts.append(f"Only the first {settings.limit} questions of each task: not the benchmark.")
    parts += [f"Not scored: {line}." for line in _problem_lines(found)]
    return "\n\n".join(parts) + "\n"


def plain(found: Comparison, settings: LmmsEval) -> str:
    """The comparison for a terminal."""
    parts: list[str] = []
    for number, rows in found.rows.items():
        numbers = ("N", f"ROUND-{settings.rounds[0]}", f"ROUND-{number}", "CHANGE", "INTERVAL")
        if rows:
            cells = [_cells(row) for row in rows]
            parts.append(columns(("TASK", "METRIC", *numbers), cells, " ".join(numbers)))
    return "\n".join([*parts, *(f"not scored: {line}" for line in _problem_lines(found))])


def _problem_lines(found: Comparison) -> Iterator[str]:
    for (number, task), reason in found.problems.items():
        yield f"{task}, round {number}: {reason}"


def _cells(row: Row) -> tuple[str, ...]:
    arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    digits = 1 if max(abs(row.before), abs(row.after)) > 1 else 3  # points, or a share
    between = row.interval and " … ".join(f"{end:+.{digits}f}" for end in row.interval)
    return (
        *(row.task, f"{row.metric}{arrow}", f"{row.n:,}"),
        *(f"{row.before:.{digits}f}", f"{row.after:.{digits}f}", f"{row.change:+.{digits}f}"),
        between or "–",
    )
