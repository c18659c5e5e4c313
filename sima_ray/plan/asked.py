"""What an evaluation asks the policy: each suite's questions, counted in its files, else as published."""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sima_ray.config import EvaluationConfig
from sima_ray.config.evaluation import HalBenchConfig, MMHalConfig, SuiteName
from sima_ray.data import benchmarks

YES_NO = 5
"""Tokens of an answer to a yes-or-no question, about."""

CHAIR = 500
"""Images that CHAIR is usually measured on; it publishes no list of them."""
POPE = 3000
"""Questions of one of its files."""
AMBER = {"generative": 1004, "existence": 4924, "attribute": 7628, "relation": 1664}
HALBENCH = 300
MMHAL = 96
MEMENTOS = {"dl_description": 450, "robo_description": 199, "cmc_description": 50}
"""Sequences to evaluate on, by the name of the list; a list of another name is taken for daily life's."""

JUDGED: tuple[SuiteName, ...] = ("mmhal", "mementos")
"""Suites whose every answer a judge reads."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions of a suite with answers of one length.

    Attributes:
        suite: Whose.
        count: How many.
        answer: Tokens of an ordinary answer.
        source: Where the count is from.
    """

    suite: SuiteName
    count: int
    answer: int
    source: str


def asked(settings: EvaluationConfig, response: int) -> tuple[Asked, ...]:
    """What each configured suite asks, in the order in which the suites run.

    Args:
        settings: The suites, with their limits.
        response: Tokens of an ordinary response, where a suite's `max_tokens` allows it.

    Raises:
        DataError: A file that is there and cannot be used.
    """
    return tuple(one for suite in settings.suites for one in _ASKED[suite](settings, response))


def _counted(
    suite: SuiteName,
    files: Sequence[str],
    read: Callable[[], Sized],
    otherwise: int,
    limit: int | None,
    answer: int,
    source: str = "published",
) -> Asked:
    """What `read` finds in a suite's files, where all of them are on this machine; `otherwise` is by `source`."""
    there = all(Path(file).is_file() for file in files)
    count = len(read()) if there else otherwise
    source = f"in {Path(files[0]).name}" if there else source
    return Asked(suite, count if limit is None else min(count, limit), answer, source)


def _chair(settings: EvaluationConfig, response: int) -> Iterator[Asked]:
    file, answer = settings.prompts, min(response, settings.max_tokens)
    assert file is not None, "CHAIR has prompts"
    read = partial(benchmarks.read_questions, file, "ground_truth")
    yield _counted("chair", [file], read, CHAIR, settings.limit, answer, "assumed")


def _pope(settings: EvaluationConfig, _: int) -> Iterator[Asked]:
    answer = min(YES_NO, settings.max_tokens)
    for file in settings.pope:
        read = partial(benchmarks.read_questions, file, "label")
        yield _counted("pope", [file], read, POPE, None, answer)


def _amber(settings: EvaluationConfig, response: int) -> Iterator[Asked]:
    section = settings.amber
    assert section is not None, "AMBER has a section"
    for part in section.parts:
        told = part == "generative"
        query = f"{section.data}/query/query_{'' if told else 'discriminative-'}{part}.json"
        read = partial(benchmarks.read_amber, section.data, part)
        answer = min(response if told else YES_NO, section.max_tokens)
        files = [query, f"{section.data}/annotations.json"]
        yield _counted("amber", files, read, AMBER[part], section.limit, answer)


def _halbench(settings: EvaluationConfig, response: int) -> Iterator[Asked]:
    assert settings.halbench is not None, "Object HalBench has a section"
    yield _one_file("halbench", settings.halbench, benchmarks.read_halbench, HALBENCH, response)


def _mmhal(settings: EvaluationConfig, response: int) -> Iterator[Asked]:
    assert settings.mmhal is not None, "MMHal-Bench has a section"
    yield _one_file("mmhal", settings.mmhal, benchmarks.read_mmhal, MMHAL, response)


def _one_file(
    suite: SuiteName,
    section: HalBenchConfig | MMHalConfig,
    read: Callable[[str], Sized],
    published: int,
    response: int,
) -> Asked:
    """Of a suite whose questions are one file."""
    file, answer = section.questions, min(response, section.max_tokens)
    return _counted(suite, [file], partial(read, file), published, section.limit, answer)


def _mementos(settings: EvaluationConfig, response: int) -> Iterator[Asked]:
    section = settings.mementos
    assert section is not None, "Mementos has a section"
    answer = min(response, section.max_tokens)
    for file in section.descriptions:
        published = MEMENTOS.get(Path(file).stem, MEMENTOS["dl_description"])
        read = partial(benchmarks.read_mementos, file)
        yield _counted("mementos", [file], read, published, section.limit, answer)


_ASKED: dict[SuiteName, Callable[[EvaluationConfig, int], Iterator[Asked]]] = {
    "chair": _chair,
    "pope": _pope,
    "amber": _amber,
    "halbench": _halbench,
    "mmhal": _mmhal,
    "mementos": _mementos,
}
