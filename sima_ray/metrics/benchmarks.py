"""Two policies on one benchmark, question by question: lmms-eval's results and samples, compared in pairs.

lmms-eval aggregates a metric in a function of its own; the samples keep what each question
contributed. A paired interval needs a statistic over questions, so the known forms are tried, and one
is only used where it gives, on both sides, the very figure that lmms-eval itself gave.

lmms-eval goes on where a request or a judge fails, and scores a failed answer as a wrong one. Here such
a task is named and not scored.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any, cast

from sima_ray.errors import DataError
from sima_ray.metrics.bootstrap import Ratio, difference

Sample = Mapping[str, Any]

REQUEST_FAILED = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED]")
"""How an answer begins that there is not."""

_NO_JUDGE = ("", "Failed Request")
"""`eval_model` of a sample that no judge has scored."""

_NOT_OF_THIS_CATEGORY = -999
_EXACT, _TENTH = 1e-6, 0.051
"""How far a form may be from lmms-eval's figure; LLaVA-Bench's are rounded to a tenth of a point."""


@dataclass(frozen=True)
class TaskResult:
    """What lmms-eval says of one policy on one task.

    Attributes:
        task: Its name.
        metrics: Each metric's aggregate.
        higher_is_better: Where lmms-eval says so.
        samples: A mapping for each question, in the order of `doc_id`.
        unscored: Answers that a judge wrote no score for, by lmms-eval's log.
    """

    task: str
    metrics: Mapping[str, float]
    higher_is_better: Mapping[str, bool]
    samples: Sequence[Sample]
    unscored: int = 0

    @classmethod
    def of(cls, task: str, results: Mapping[str, Any], samples: Sequence[Sample]) -> "TaskResult":
        """Read lmms-eval's results file and samples file of a task.

        Raises:
            DataError: The results do not have the task, or there are no samples.
        """
        try:
            figures: Mapping[str, Any] = results["results"][task]
            better: Mapping[str, Any] = results.get("higher_is_better", {}).get(task, {})
            ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{task}: not results of lmms-eval: {error!r} is missing") from error
        if not ordered:
            raise DataError(f"{task}: lmms-eval kept no samples")
        metrics = {
            name.partition(",")[0]: float(value)
            for name, value in figures.items()
            if "," in name and "_stderr" not in name and _is_number(value)
        }
        return cls(
            task=task,
            metrics=metrics,
            higher_is_better={name: bool(value) for name, value in better.items()},
            samples=ordered,
            unscored=int(results.get("unscored", 0)),
        )

    @property
    def questions(self) -> list[tuple[Any, ...]]:
        """What was asked: alike for two policies that are a pair."""
        return [(s["doc_id"], s.get("input"), s.get("target")) for s in self.samples]

    @property
    def failed_requests(self) -> int:
        """Questions without an answer."""
        return sum(any(map(_is_failure, _texts(sample))) for sample in self.samples)

    @property
    def failed_judgements(self) -> int:
        """Answers that a judge was to score, and has not."""
        seen = sum(any(map(_not_judged, sample.values())) for sample in self.samples)
        return max(seen, self.unscored)

    @property
    def problem(self) -> str | None:
        """Why the figures must not be used; None where nothing is wrong."""
        questions = len(self.samples)
        parts = [
            f"{count} of {questions} {what}"
            for count, what in (
                (self.failed_requests, "requests failed"),
                (self.failed_judgements, "judgements failed"),
            )
            if count
        ]
        return ", ".join(parts) or (None if self.metrics else "lmms-eval gave no figure")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the paired table.

    Attributes:
        task, metric: As lmms-eval calls them.
        higher_is_better: None where lmms-eval does not say.
        n: Questions.
        before, after: lmms-eval's own aggregates.
        change: after − before.
        interval: Of the change; None where the samples do not say what each question contributed.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    n: int
    before: float
    after: float
    change: float
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """The line as plain values."""
        low, high = self.interval or (None, None)
        return {
            "task": self.task,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "n": self.n,
            "before": self.before,
            "after": self.after,
            "change": {"value": self.change, "low": low, "high": high},
        }


def compare_task(
    before: TaskResult, after: TaskResult, *, samples: int, confidence: float, seed: int
) -> list[Row]:
    """Every metric that both have, a line each.

    Args:
        before, after: Of the same questions, neither with a `problem`.
        samples, confidence, seed: See `bootstrap.difference`.

    Raises:
        DataError: The two were not asked the same questions.
    """
    if before.questions != after.questions:
        raise DataError(
            f"{before.task}: the two policies were not asked the same questions "
            f"({len(before.samples)} and {len(after.samples)})"
        )
    rows: list[Row] = []
    for metric, value in before.metrics.items():
        if metric not in after.metrics:
            continue
        found = paired_columns(metric, before, after)
        interval = None
        if found is not None:
            one, other, scale = found
            change = difference(one, other, samples=samples, confidence=confidence, seed=seed)
            interval = (scale * change.low, scale * change.high)
        rows.append(
            Row(
                task=before.task,
                metric=metric,
                higher_is_better=before.higher_is_better.get(metric),
                n=sum(metric in sample for sample in before.samples) or len(before.samples),
                before=value,
                after=after.metrics[metric],
                change=after.metrics[metric] - value,
                interval=interval,
            )
        )
    return rows


def paired_columns(
    metric: str, before: TaskResult, after: TaskResult
) -> tuple[Ratio, Ratio, float] | None:
    """A metric as a ratio over the same rows on both sides, and what to multiply it by.

    None where no known form gives both of lmms-eval's figures.
    """
    if [metric in s for s in before.samples] != [metric in s for s in after.samples]:
        return None
    sides = [[s[metric] for s in side.samples if metric in s] for side in (before, after)]
    wanted = (before.metrics[metric], after.metrics[metric])
    named = [form for name, form in _NAMED.items() if metric.endswith(name)]
    for form in (*named, *_FORMS):
        try:
            ratios = [form(values) for values in sides]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # the samples are of another form
        if any(ratio.rows == 0 for ratio in ratios) or ratios[0].rows != ratios[1].rows:
            continue
        for scale in (1.0, 100.0):
            within = _TENTH if form is _relative_scores else _EXACT * max(map(abs, wanted))
            if all(
                isclose(scale * ratio.value, figure, rel_tol=0, abs_tol=within + 1e-12)
                for ratio, figure in zip(ratios, wanted, strict=True)
            ):
                return ratios[0], ratios[1], scale
    return None


def _numbers(values: Sequence[Any]) -> Ratio:
    """A number a question, and their mean."""
    if not all(_is_number(value) for value in values):
        raise TypeError("not numbers")
    return Ratio.mean([float(value) for value in values])


def _mean_score(values: Sequence[Any]) -> Ratio:
    """A mapping with a score (MM-Vet, POPE's accuracy)."""
    return _numbers([value["score"] for value in values])


def _choices(values: Sequence[Any]) -> Ratio:
    """A chosen letter and the right one (SEED)."""
    return Ratio.mean(
        [float(v["pred"].strip().lower() == v["answer"].strip().lower()) for v in values]
    )


def _relative_scores(values: Sequence[Any]) -> Ratio:
    """A judge's scores of the reference and the answer (LLaVA-Bench); the sum of the latter over the former."""
    pairs = [value["scores"] for value in values]
    counted = [(0.0, 0.0) if _NOT_OF_THIS_CATEGORY in pair else pair for pair in pairs]
    return Ratio.of([float(pair[1]) for pair in counted], [float(pair[0]) for pair in counted])


def _mme(values: Sequence[Any]) -> Ratio:
    """MME: the share of right answers of an image's two questions, and 1 more where both are right.

    A row is an image, so that its questions are drawn together. Summed over categories are their means, so
    that a category counts as much as another, however many images it has.
    """
    images: dict[tuple[str, str], list[float]] = {}
    for value in values:
        key = (str(value["category"]), str(value["question_id"]))
        images.setdefault(key, []).append(float(value["score"]))
    sizes = Counter(category for category, _ in images)
    points = {
        key: 100 * (sum(scores) / len(scores) + float(sum(scores) == 2))
        for key, scores in images.items()
    }
    return Ratio.mean([v * len(images) / sizes[category] for (category, _), v in points.items()])


def _yes_no(numerator: str, denominator: str) -> Callable[[Sequence[Any]], Ratio]:
    """POPE's shares. Each word counts a question's kind: what was said, then what is true ("yy" a hit)."""

    def ratio(values: Sequence[Any]) -> Ratio:
        kinds = [
            value["prediction"][:1] + value["ground_truth"][:1]
            if value["prediction"] in ("yes", "no")
            else "?" + value["ground_truth"][:1]
            for value in values
        ]

        def counts(words: str) -> list[float]:
            return [float(words.split().count(kind)) for kind in kinds]

        return Ratio.of(counts(numerator), counts(denominator))

    return ratio


_FORMS = (_numbers, _mean_score, _choices, _relative_scores, _mme)
_NAMED = {
    "precision": _yes_no("yy", "yy yn"),
    "recall": _yes_no("yy", "yy ny"),  # over the answers that are yes or no, as lmms-eval has it
    "f1_score": _yes_no("yy yy", "yy yy yn ny"),
}
"""Forms that only metrics of that name have."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value  # NaN is none


def _texts(sample: Sample) -> list[str]:
    answers: Any = sample.get("filtered_resps", "")
    return (
        [str(answer) for answer in cast(list[Any], answers)]
        if isinstance(answers, list)
        else [str(answers)]
    )


def _is_failure(text: str) -> bool:
    return text.startswith(REQUEST_FAILED)


def _not_judged(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    value = cast(dict[str, Any], value)
    return value.get("scores") == [-1, -1] or value.get("eval_model") in _NO_JUDGE
