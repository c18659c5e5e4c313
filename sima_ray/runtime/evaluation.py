"""CHAIR through the served policy: captions of held-out images against COCO annotations."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from sima_ray.config import EvaluationConfig, RunConfig
from sima_ray.data.benchmarks import Question, image_key, read_json, read_questions, read_text
from sima_ray.data.locations import load_image
from sima_ray.errors import ConfigError, DataError
from sima_ray.metrics.bootstrap import Estimate
from sima_ray.metrics.chair import (
    CaptionScore,
    ChairVocabulary,
    default_vocabulary,
    score_caption,
    truth_from_coco,
)
from sima_ray.metrics.summary import ratios, summarise
from sima_ray.ports import JsonDict, Policy
from sima_ray.runtime.asking import ask
from sima_ray.runtime.progress import Stage


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
    failed: list[str] = field(default_factory=list)

    def figures(self) -> JsonDict:
        """The figures as JSON values."""
        return {
            **{name: estimate.to_json() for name, estimate in self.estimates.items()},
            "captions": len(self.captions),
            "failed": self.failed,
        }

    def captions_jsonl(self) -> str:
        """Every caption with its score, a JSON object a line."""
        return "".join(json.dumps(asdict(caption)) + "\n" for caption in self.captions)


def evaluate(
    settings: EvaluationConfig, run: RunConfig, connect: Callable[[], Policy], stage: Stage
) -> Evaluation:
    """Ask the served policy for a greedy caption of each held-out image.

    Raises:
        DataError: Annotations or prompts that cannot be read, or images without annotations.
        ServiceError: More than one answer in a hundred failed.
    """
    assert settings.prompts and settings.images and settings.instances, "CHAIR's files go together"
    questions = read_questions(settings.prompts, "ground_truth")[: settings.limit]
    vocabulary = read_vocabulary(settings.chair_synonyms)
    truth = read_truth(settings.instances, settings.captions, vocabulary)
    check_annotated([q.image for q in questions], truth, settings.instances)
    count = error_counter(settings.error_counter)
    answers = ask(
        questions,
        image_loader(settings.images, run),
        connect,
        stage,
        max_tokens=settings.max_tokens,
        concurrency=run.generation.in_flight,
    )
    captions = [
        Caption(
            row_id=question.row_id,
            image=question.image,
            text=question.text,
            response=answer,
            score=score_caption(answer, truth[image_key(question.image)], vocabulary),
            errors=count(answer, question.expected) if count else None,
        )
        for question, answer in zip(questions, answers, strict=True)
        if answer is not None
    ]
    return Evaluation(
        captions=captions,
        estimates=estimates(captions, settings, run.seed),
        failed=[q.row_id for q, a in zip(questions, answers, strict=True) if a is None],
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


def read_vocabulary(synonyms: str | None) -> ChairVocabulary:
    """The names of COCO's categories from a file at any location; None: our own.

    Raises:
        DataError: It cannot be read, or is in no known format.
    """
    if synonyms is None:
        return default_vocabulary()
    return ChairVocabulary.parse(read_text(synonyms), synonyms)


def read_truth(
    instances: str, captions: str | None, vocabulary: ChairVocabulary
) -> dict[str, frozenset[str]]:
    """The true objects of each image of the instances file, by `image_key`.

    An image that the captions file alone has is left out: people do not name all that there is.

    Raises:
        DataError: Annotations that cannot be read.
    """
    annotated, named = read_json(instances), read_json(captions) if captions else None
    truth = {
        image_key(name): objects
        for name, objects in truth_from_coco(annotated, named, vocabulary).items()
    }
    # Captions may call an image by another release's name.
    return {
        key: truth[key]
        for image in annotated["images"]
        if (key := image_key(image["file_name"])) in truth
    }


def check_annotated(
    images: Sequence[str], truth: dict[str, frozenset[str]], instances: str
) -> None:
    """Raise `DataError` where an image has no annotations."""
    if unknown := [name for name in images if image_key(name) not in truth]:
        raise DataError(f"{instances}: has no image {unknown[0]} ({len(unknown)} missing)")


def image_loader(root: str, run: RunConfig) -> Callable[[Question], bytes]:
    """Loads and checks the image that a question names, below a root."""
    return partial(_load, root, run.data.max_image_pixels)


def _load(root: str, max_pixels: int, question: Question) -> bytes:
    return load_image(root, question.image, max_pixels)


def _errors(captions: Sequence[Caption]) -> list[int] | None:
    counts = [caption.errors for caption in captions if caption.errors is not None]
    return counts if counts else None
