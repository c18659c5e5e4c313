"""MMHal-Bench: open questions whose answers a judge rates from 0 to 6 (Sun et al. 2023).

3 to 6: no hallucination, from uninformative to informative with good reasoning. 0 to 2: a
hallucination, from uninformative to very informative. The score is the mean rating; the
hallucination rate is the share of ratings below 3. An answer of the judge without one clear rating is
no rating: the reference counts it as 0, here it is left out and counted as failed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.judging import render

TYPES = (
    "attribute",
    "adversarial",
    "comparison",
    "counting",
    "relation",
    "environment",
    "holistic",
    "other",
)
"""The types of questions, in the order of the published tables."""

CLEAN = 3
"""The lowest rating without a hallucination."""

_RATING = re.compile(
    r"\brating\b[\s*_`]*[:=][\s*_`]*(?P<value>[+-]?\d++(?:[.,]\d++)?+)"
    r"(?!\w|½|\s*(?:[-–—]|or\b|to\b)\s*\d)",  # a range is no rating
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class MMHalItem:
    """One question.

    Attributes:
        image_id: OpenImages' id of the image.
        image_src: Its URL.
        question, answer: What is asked, and a person's answer.
        contents: Objects that the image is annotated with.
        kind: One of `TYPES`.
    """

    image_id: str
    image_src: str
    question: str
    answer: str
    contents: tuple[str, ...]
    kind: str


def mmhal_prompt(item: MMHalItem, response: str) -> str:
    """What the judge is asked about a response."""
    return render("mmhal", item=item, response=response)


def read_rating(text: str) -> int | None:
    """The rating that a judge gave, 0 to 6; None where there is none, or more than one."""
    found = {match["value"] for match in _RATING.finditer(text)}
    value = found.pop() if len(found) == 1 else ""
    return int(value) if re.fullmatch(r"[0-6]", value) else None


def mmhal_ratios(kinds: Sequence[str], ratings: Sequence[int]) -> dict[str, Ratio]:
    """The columns, a row a rated response, of score, hallucination and the score of each type."""
    rows = list(zip(kinds, ratings, strict=True))
    ratios = {
        "score": Ratio.mean(ratings),
        "hallucination": Ratio.mean([float(rating < CLEAN) for rating in ratings]),
    }
    for kind in TYPES:
        if kind in kinds:
            ratios[f"score.{kind}"] = Ratio.of(
                [rating * float(name == kind) for name, rating in rows],
                [float(name == kind) for name in kinds],
            )
    return ratios
