"""AMBER: hallucination in descriptions and in yes/no answers, without a judge (Wang et al. 2023).

Generative: the nouns of a description that AMBER's lists know are held against the annotated objects
of the image (`truth`) and against objects that people would expect there and that are not (`hallu`).

- CHAIR: share of the known nouns that name nothing annotated.
- Cover: share of the annotated objects that are named.
- Hal: share of the descriptions with a hallucinated noun.
- Cog: share of the expected but absent objects that are named.

Discriminative: accuracy, and precision, recall and F1 of the answer *no*, AMBER's positive class.

What differs from the reference implementation, which tags words with NLTK and takes two words for
one where spaCy's large vectors have a cosine above 0.8:

- Words are one where they are equal in the singular, or listed in AMBER's associations. The known
  words are a closed list, so their similar pairs are a finite table: given one (`similar`), they
  count as in the reference.
- Nouns are told from verbs by a few rules, and only for words that are often both ("watch").
- Case is ignored, and plurals that NLTK's lemmatizer leaves ("men", "sunglasses") are found.
- An answer is read by its first sentence; the reference takes exactly "Yes" and "No".
- Figures are exact: the reference adds 0.001 to denominators and rounds before it computes F1.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import yaml

from sima_ray.errors import DataError
from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.pope import yes_no_ratios
from sima_ray.metrics.words import singular, tokenize

PARTS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
"""The figures that a question of each annotated type counts in, beside those of all questions."""

_NOUNS = Path(__file__).parent / "amber_nouns.yaml"


@dataclass(frozen=True)
class AmberWords:
    """AMBER's lists of words.

    Attributes:
        associations: For each object the words that may stand for it.
        known: Every word of the associations: nouns that are not among them are not counted.
        safe: Words that are never a hallucination.
        similar: For a word those that count as equal to it.
    """

    associations: Mapping[str, tuple[str, ...]]
    known: frozenset[str]
    safe: frozenset[str]
    similar: Mapping[str, frozenset[str]]

    @classmethod
    def of(
        cls,
        associations: Mapping[str, Sequence[str]],
        safe: Iterable[str] = (),
        similar: Mapping[str, Sequence[str]] | None = None,
    ) -> Self:
        """The lists as `relation.json`, `safe_words.txt` and a table of similar words have them."""
        lists = {
            word.lower(): tuple(other.lower() for other in others)
            for word, others in associations.items()
        }
        pairs: dict[str, set[str]] = {}
        for word, others in (similar or {}).items():
            for other in others:  # similarity has no direction
                pairs.setdefault(word.lower(), set()).add(other.lower())
                pairs.setdefault(other.lower(), set()).add(word.lower())
        return cls(
            associations=lists,
            known=frozenset(lists).union(*lists.values()),
            safe=frozenset(word.strip().lower() for word in safe) - {""},
            similar={word: frozenset(others) for word, others in pairs.items()},
        )

    def nouns(self, text: str) -> list[str]:
        """Every mention of a known word that is used as a noun, in the order of the text."""
        tokens = tokenize(text)
        found: list[str] = []
        for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
            word = token if token in self.known else singular(token)
            if word in self.known and _is_noun(token, word, before, after):
                found.append(word)
        return found

    def score(self, text: str, truth: Sequence[str], expected: Sequence[str]) -> "DescriptionScore":
        """Hold a description against its image.

        Args:
            text: The description.
            truth: The annotated objects ("truth").
            expected: Objects that are absent and likely to be made up ("hallu").

        Raises:
            DataError: An object that the associations do not have.
        """
        if unknown := {*truth, *expected} - self.associations.keys():
            raise DataError(f"AMBER's associations have no {', '.join(sorted(unknown))}")
        nouns = self.nouns(text)
        covered, made_up = set[int](), set[int]()
        hallucinated: list[str] = []
        for noun in nouns:
            if noun in self.safe:
                continue
            equal = _first(self._names(truth), {noun})
            if equal:
                covered |= equal
                continue
            near = {noun, *self.similar.get(noun, ())}
            made_up |= _first(self._names(expected), {noun}) | _first(self._names(expected), near)
            alike = _first(self._names(truth), near)
            covered |= alike
            if not alike:
                hallucinated.append(noun)
        return DescriptionScore(
            nouns=tuple(nouns),
            hallucinated=tuple(hallucinated),
            covered=len(covered),
            truth=len(truth),
            made_up=len(made_up),
            expected=len(expected),
            words=len(text.split()),
        )

    def _names(self, objects: Sequence[str]) -> list[tuple[str, int]]:
        """Each word that stands for one of the objects with the object's place: associations first, as
        in the reference, where "ground" is named for grass before it is for a ground."""
        associated = [
            (word, place) for place, name in enumerate(objects) for word in self.associations[name]
        ]
        return associated + [(name, place) for place, name in enumerate(objects)]


@dataclass(frozen=True, slots=True)
class DescriptionScore:
    """What one description names.

    Attributes:
        nouns: Every known noun.
        hallucinated: Those of them that name nothing annotated.
        covered, truth: Annotated objects that are named, and all of them.
        made_up, expected: Expected but absent objects that are named, and all of them.
        words: Length of the description.
    """

    nouns: tuple[str, ...]
    hallucinated: tuple[str, ...]
    covered: int
    truth: int
    made_up: int
    expected: int
    words: int


def generative_ratios(scores: Sequence[DescriptionScore]) -> dict[str, Ratio]:
    """The columns, a row a description, of chair, cover, hal, cog and length."""
    wrong = [len(score.hallucinated) for score in scores]
    return {
        "chair": Ratio.of(wrong, [len(score.nouns) for score in scores]),
        "cover": Ratio.of([s.covered for s in scores], [s.truth for s in scores]),
        "hal": Ratio.mean([float(count > 0) for count in wrong]),
        "cog": Ratio.of([s.made_up for s in scores], [s.expected for s in scores]),
        "length": Ratio.mean([score.words for score in scores]),
    }


def discriminative_ratios(
    kinds: Sequence[str], said: Sequence[bool | None], truth: Sequence[bool]
) -> dict[str, Ratio]:
    """The columns of accuracy, precision, recall, f1 and yes_share, of all questions and of each part.

    Args:
        kinds: The annotated type of each question, a key of `PARTS`.
        said: What each answer says; None is neither yes nor no.
        truth: Whether yes is right.

    Returns:
        Ratios by "all.f1", "existence.f1", "state.f1" …; a part's are over its own questions.

    Raises:
        DataError: A type that AMBER does not have.
    """
    if unknown := set(kinds) - PARTS.keys():
        raise DataError(f"AMBER has no questions of the type {', '.join(sorted(unknown))}")
    rows = list(zip(kinds, said, truth, strict=True))
    names = dict.fromkeys(["all", *(part for kind in PARTS for part in PARTS[kind])])
    ratios: dict[str, Ratio] = {}
    for name in names:
        part = [row for row in rows if name == "all" or name in PARTS[row[0]]]
        if part:
            columns = yes_no_ratios(
                [answer for _, answer, _ in part], [right for *_, right in part], positive=False
            )
            ratios |= {f"{name}.{figure}": ratio for figure, ratio in columns.items()}
    return ratios


def _first(names: Sequence[tuple[str, int]], words: Collection[str]) -> set[int]:
    """The place of the first name that is one of the words; one at most, as in the reference."""
    return set([place for name, place in names if name in words][:1])


@cache
def _neighbours() -> dict[str, frozenset[str]]:
    lists: dict[str, list[str]] = yaml.safe_load(_NOUNS.read_text(encoding="utf-8"))
    return {name: frozenset(words) for name, words in lists.items()}


def _is_noun(token: str, word: str, before: str, after: str) -> bool:
    """Whether a known word is used as a noun, by itself and its neighbours."""
    lists = _neighbours()
    if word == "hot":  # in AMBER's lists, yet an adjective wherever it is met
        return False
    determined = before in lists["determiners"]
    if token == "can":
        return before in lists["before_can"] or (determined and before not in ("that", "some"))
    if word not in lists["often_verbs"] or determined:
        return True
    return before not in lists["before_verbs"] and after not in lists["after_verbs"]
