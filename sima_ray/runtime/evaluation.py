"""Evaluation through the served policy: captions against COCO annotations, and POPE's questions."""

import asyncio
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sima_ray.config import EvaluationConfig, RunConfig
from sima_ray.data.locations import load_image, open_location
from sima_ray.errors import ConfigError, DataError, ServiceError
from sima_ray.images import ImageProblem
from sima_ray.metrics.bootstrap import Estimate
from sima_ray.metrics.chair import CaptionScore, score_caption, truth_from_coco
from sima_ray.metrics.pope import pope
from sima_ray.metrics.summary import ratios, summarise
from sima_ray.ports import JsonDict, Policy, image_part, text_part
from sima_ray.runtime.progress import Stage

_COCO_PREFIX = re.compile(r"^COCO_(?:train|val)2014_")


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask about one image."""

    row_id: str
    image: str
    text: str
    expected: str


@dataclass(frozen=True, slots=True)
class Caption:
    """One answer with its score; `errors` is None where the run has no error counter."""

    row_id: str
    image: str
    text: str
    response: str
    score: CaptionScore
    errors: int | None


@dataclass(frozen=True)
class Evaluation:
    """All answers of one evaluation, scored, and its figures with intervals."""

    captions: list[Caption]
    estimates: dict[str, Estimate]
    pope: dict[str, dict[str, float]]
    failed: list[str] = field(default_factory=list)

    def figures(self) -> JsonDict:
        """The figures as JSON values."""
        return {
            **{name: estimate.to_json() for name, estimate in self.estimates.items()},
            "pope": self.pope,
            "captions": len(self.captions),
            "failed": self.failed,
        }

    def captions_jsonl(self) -> str:
        """Every caption with its score, a JSON object a line."""
        return "".join(json.dumps(asdict(caption)) + "\n" for caption in self.captions)


def evaluate(
    settings: EvaluationConfig, run: RunConfig, connect: Callable[[], Policy], stage: Stage
) -> Evaluation:
    """Ask the served policy for a greedy caption of each held-out image, and POPE's questions.

    Raises:
        DataError: Annotations or prompts that cannot be read, or images without annotations.
        ServiceError: More than one answer in a hundred failed.
    """
    questions = read_questions(settings.prompts, "ground_truth")[: settings.limit]
    truth = read_truth(settings)
    if unknown := [q.image for q in questions if image_key(q.image) not in truth]:
        raise DataError(f"{settings.instances}: has no image {unknown[0]} ({len(unknown)} missing)")
    count = error_counter(settings.error_counter)
    presence = {location: read_questions(location, "label") for location in settings.pope}
    answers = asyncio.run(_ask(questions, settings, run, connect(), stage))
    captions = [
        Caption(
            row_id=question.row_id,
            image=question.image,
            text=question.text,
            response=answer,
            score=score_caption(answer, truth[image_key(question.image)]),
            errors=count(answer, question.expected) if count else None,
        )
        for question, answer in zip(questions, answers, strict=True)
        if answer is not None
    ]
    failed = [q.row_id for q, a in zip(questions, answers, strict=True) if a is None]
    _tolerate(failed, len(questions))
    return Evaluation(
        captions=captions,
        estimates=estimates(captions, settings, run.seed),
        pope=_pope(presence, settings, run, connect, stage),
        failed=failed,
    )


def estimates(
    captions: Sequence[Caption], settings: EvaluationConfig, seed: int
) -> dict[str, Estimate]:
    """Every figure of scored captions with its bootstrap interval."""
    return summarise(
        [caption.score for caption in captions],
        _errors(captions),
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        seed=seed,
    )


def columns(captions: Sequence[Caption]) -> dict[str, Any]:
    """The per-caption columns of every figure, for paired comparisons."""
    return ratios([caption.score for caption in captions], _errors(captions))


def captions_from_jsonl(text: str) -> list[Caption]:
    """The inverse of `Evaluation.captions_jsonl`."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [Caption(**{**row, "score": CaptionScore(**row["score"])}) for row in rows]


def headline(figures: JsonDict) -> str:
    """The figures that a stage's last line shows."""
    parts = [f"{figures['captions']} captions"]
    parts += [
        f"CHAIR_s {figures['chair_s']['value']:.3f}",
        f"recall {figures['recall']['value']:.3f}",
    ]
    if "errors" in figures:
        parts.append(f"errors {figures['errors']['value']:.2f}")
    return " · ".join(parts)


def error_counter(name: str | None) -> Callable[[str, str], int] | None:
    """The function that a config names as 'module:function'.

    Raises:
        ConfigError: There is no such function.
    """
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"evaluation.error_counter: no function {name!r}: {error}") from error


def read_json(location: str) -> Any:
    """The value in a JSON file at any location.

    Raises:
        DataError: It cannot be read, or is not JSON.
    """
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            return json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise DataError(f"{location}: cannot be read: {error}") from error


def read_truth(settings: EvaluationConfig) -> dict[str, frozenset[str]]:
    """The true objects of each annotated image, by `image_key`.

    Raises:
        DataError: Annotations that cannot be read.
    """
    captions = read_json(settings.captions) if settings.captions else None
    truth = truth_from_coco(read_json(settings.instances), captions)
    return {image_key(name): objects for name, objects in truth.items()}


def image_key(name: str) -> str:
    """What all of COCO's names of one image have in common: `000000000009.jpg`."""
    return _COCO_PREFIX.sub("", name.rpartition("/")[2])


def read_questions(location: str, expected: str) -> list[Question]:
    """A JSON-lines file of questions; `expected` names the field with the right answer.

    Raises:
        DataError: The file cannot be read, or a line lacks a field; names the line.
    """
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            lines = stream.read().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{location}: cannot be read: {error}") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row_id = str(row.get("id", row.get("question_id", number)))
            questions.append(Question(row_id, row["image"], row["text"], row[expected]))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{location}:{number}: not a question: {error!r}") from error
    if not questions:
        raise DataError(f"{location}: holds no questions")
    return questions


async def _ask(
    questions: Sequence[Question],
    settings: EvaluationConfig,
    run: RunConfig,
    policy: Policy,
    stage: Stage,
) -> list[str | None]:
    """One greedy answer a question, in order; None where a request failed for good."""
    slots = asyncio.Semaphore(run.generation.concurrency)
    done = 0

    async def ask(question: Question) -> str | None:
        nonlocal done
        async with slots:
            try:
                image = await asyncio.to_thread(
                    load_image, settings.images, question.image, run.data.max_image_pixels
                )
            except ImageProblem as problem:
                raise DataError(f"{settings.prompts}: {question.row_id}: {problem}") from problem
            try:
                completion = await policy.complete(
                    {
                        "content": [image_part(image), text_part(question.text)],
                        "max_tokens": settings.max_tokens,
                        "temperature": 0.0,
                    }
                )
            except ServiceError as error:  # one question must not cost the others
                completion = {"error": str(error)}
        done += 1
        stage.update(f"{done:,}/{len(questions):,} answers")
        return None if "error" in completion else completion.get("text", "")

    return await asyncio.gather(*map(ask, questions))


def _pope(
    presence: dict[str, list[Question]],
    settings: EvaluationConfig,
    run: RunConfig,
    connect: Callable[[], Policy],
    stage: Stage,
) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    for location, questions in presence.items():
        answers = asyncio.run(_ask(questions, settings, run, connect(), stage))
        _tolerate(
            [q.row_id for q, a in zip(questions, answers, strict=True) if a is None], len(answers)
        )
        name = location.rpartition("/")[2].removesuffix(".jsonl").removesuffix(".json")
        # A failed answer is no answer: it counts as unparsed, never as right.
        said = [answer or "" for answer in answers]
        labels = [question.expected for question in questions]
        figures[name] = pope(said, labels, settings.pope_rule).to_json()
    return figures


def _errors(captions: Sequence[Caption]) -> list[int] | None:
    counts = [caption.errors for caption in captions if caption.errors is not None]
    return counts if counts else None


def _tolerate(failed: Sequence[str], asked: int) -> None:
    if len(failed) * 100 > asked:
        raise ServiceError(
            f"{len(failed)} of {asked} evaluation requests failed, {failed[0]} among them: "
            "the figures would not be comparable"
        )
