"""Mementos: does a description of a sequence of images name its objects and behaviours? (Wang et al. 2024)

A judge lists the objects and the behaviours that a person's description and a model's have, with one
word for what means the same. Recall, precision and F1 are those of each sequence, and their means over
sequences are the figures; an empty list gives 0. The original also maps words by graphs of synonyms,
published as Python pickles: those are programs, and are not read here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.judging import render

LISTS = ("reference_objects", "reference_behaviours", "response_objects", "response_behaviours")
"""What the judge answers with: a JSON object of these lists."""


_LONGEST = 20_000
"""Characters that are looked through, from the end: far more than a judge's lists have."""


@dataclass(frozen=True, slots=True)
class Keywords:
    """What a judge found in a person's description and in a model's."""

    reference_objects: tuple[str, ...]
    reference_behaviours: tuple[str, ...]
    response_objects: tuple[str, ...]
    response_behaviours: tuple[str, ...]


def mementos_prompt(reference: str, response: str) -> str:
    """What the judge is asked about a response."""
    return render("mementos", reference=reference, response=response)


def read_keywords(text: str) -> Keywords | None:
    """The lists in a judge's answer, in lower case, each word once; None where they are not there.

    Text around the JSON object does no harm; of several objects the last one counts.
    """
    decoder, found, text = json.JSONDecoder(), None, text[-_LONGEST:]
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            found = _keywords(value) or found
        start = text.find("{", end)
    return found


def mementos_ratios(rows: Sequence[Keywords]) -> dict[str, Ratio]:
    """The columns, a row a sequence: object.recall, object.precision, object.f1, and of behaviours."""
    return {
        **_ratios("object", [(row.reference_objects, row.response_objects) for row in rows]),
        **_ratios(
            "behaviour", [(row.reference_behaviours, row.response_behaviours) for row in rows]
        ),
    }


def _ratios(
    name: str, pairs: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]
) -> dict[str, Ratio]:
    columns: dict[str, list[float]] = {"recall": [], "precision": [], "f1": []}
    for reference, response in pairs:
        wanted, said = set(reference), set(response)
        hits = len(wanted & said)
        columns["recall"].append(hits / len(wanted) if wanted else 0.0)
        columns["precision"].append(hits / len(said) if said else 0.0)
        columns["f1"].append(2 * hits / (len(wanted) + len(said)) if hits else 0.0)
    return {f"{name}.{figure}": Ratio.mean(values) for figure, values in columns.items()}


def _keywords(value: Any) -> Keywords | None:
    if not isinstance(value, dict):
        return None
    lists = [_words(cast(dict[str, Any], value).get(name)) for name in LISTS]
    found = [words for words in lists if words is not None]
    # A person's description names something: nothing at all was not read from it.
    whole = len(found) == len(LISTS) and (found[0] or found[1])
    return Keywords(*found) if whole else None


def _words(values: Any) -> tuple[str, ...] | None:
    """A list of words in lower case, each once; None for anything else."""
    if not isinstance(values, list):
        return None
    words = cast(list[Any], values)
    if not all(isinstance(word, str) for word in words):
        return None
    clean = (" ".join(word.lower().split()) for word in words)
    return tuple(dict.fromkeys(word for word in clean if word))
