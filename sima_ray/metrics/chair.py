"""CHAIR: which objects a caption names that its image does not have (Rohrbach et al. 2018).

Objects are COCO's 80 categories with their synonyms. A caption's words are lower-cased, made
singular, and joined into names of several words; then every mention counts, in numerators and
denominators alike. CHAIR alone rewards brevity, so recall, mentions and words are computed beside
it.

Figures depend on the list of synonyms: compare only what one list counted. `ChairVocabulary.load`
also reads the published format (a category a line: its name, then its synonyms, divided by commas).
With the published list these differences to the reference implementation remain: names of three
words are found ("stove top oven"; the reference joins two at most), hyphens divide words, a
"baby" or "adult" is dropped before every name of an animal ("baby puppy"; the reference, before the
names of ten categories, "animal" and "cub"), and plurals follow our own rules.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import yaml

from sima_ray.errors import DataError, why
from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.words import singular, tokenize

SYNONYMS = Path(__file__).parent / "coco_synonyms.yaml"

# The rules of the metric that a list of synonyms cannot say.
_SAME_AS = {"bow tie": "tie", "toilet seat": "toilet"}
_NO_OBJECT = ("home plate", "train track")
_ANIMALS = frozenset(
    ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"]
)
_ANIMAL_WORDS = frozenset(["animal", "cub"])
_AGES = frozenset(["baby", "adult"])
_PASSENGER_VEHICLES = frozenset(["jet", "train"])


@dataclass(frozen=True)
class ChairVocabulary:
    """Names of objects, and how to find them in a text.

    Attributes:
        categories: The categories, in the file's order.
        names: Category of each name, by its singular words divided by one space; None for a name
            that holds the name of an object but is none ("home plate").
        longest: Words of the longest name.
    """

    categories: tuple[str, ...]
    names: Mapping[str, str | None]
    longest: int

    @classmethod
    def load(cls, path: Path | str | None = None) -> Self:
        """Read synonyms: YAML (category: [synonyms]), or text with a category a line, divided by
        commas.

        Args:
            path: None reads the list that this package ships.

        Raises:
            DataError: The file cannot be read, or is in neither format.
        """
        path = Path(path) if path is not None else SYNONYMS
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: synonyms cannot be read: {why(error)}") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, file: str) -> Self:
        """Synonyms that were read already, from a file of that name.

        Raises:
            DataError: As `load`.
        """
        if file.endswith((".yaml", ".yml")):
            return cls.of(_from_yaml(text, file))
        lines = [[name.strip() for name in line.split(",")] for line in text.splitlines()]
        synonyms = {names[0]: [name for name in names[1:] if name] for names in lines if names[0]}
        if not any(synonyms.values()):
            raise DataError(f"{file}: synonyms need lines of: category, synonym, synonym, …")
        return cls.of(synonyms)

    @classmethod
    def of(cls, synonyms: Mapping[str, Sequence[str]]) -> Self:
        """A vocabulary of categories with synonyms; a name given twice is the last category's."""
        names: dict[str, str | None] = dict.fromkeys(_NO_OBJECT)
        for category, others in synonyms.items():
            names.update((_key(tokenize(name)), category) for name in (category, *others))
        names.update(
            (name, names[same]) for name, same in _SAME_AS.items() if names.get(same) is not None
        )
        return cls(tuple(synonyms), names, max(name.count(" ") + 1 for name in names))

    def mentions(self, text: str) -> list[str]:
        """The category of every mention of an object, in the order of the text."""
        found = self._split(tokenize(text))
        toilet = any("toilet" in name.split() for name in found)
        kept = [
            name
            for name, following in zip_longest(found, found[1:], fillvalue="")
            if not self._only_modifies(name, following) and not (toilet and name == "seat")
        ]
        categories = (self.names.get(name) for name in kept)
        return [category for category in categories if category is not None]

    def _split(self, tokens: Sequence[str]) -> list[str]:
        """The text as names of objects, the longest at each place, and the words between them."""
        words = [singular(token) for token in tokens]
        found: list[str] = []
        start = 0
        while start < len(words):
            for size in range(min(self.longest, len(words) - start), 0, -1):
                name = _key(words[start : start + size])
                if size == 1 or name in self.names:
                    found.append(name)
                    start += size
                    break
        return found

    def _only_modifies(self, name: str, following: str) -> bool:
        """Whether a word for a person only says more of the next name: "adult elephant"."""
        if name in _AGES:
            return following in _ANIMAL_WORDS or self.names.get(following) in _ANIMALS
        return name == "passenger" and following in _PASSENGER_VEHICLES


@cache
def default_vocabulary() -> ChairVocabulary:
    """The vocabulary that this package ships."""
    return ChairVocabulary.load()


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """What one caption names, held against the truth of its image.

    Attributes:
        mentions: The category of every mention.
        hallucinated: Those of the mentions that the image does not have.
        recalled: True objects that are mentioned at least once.
        truth: True objects of the image.
        words: Length of the caption.
    """

    mentions: tuple[str, ...]
    hallucinated: tuple[str, ...]
    recalled: int
    truth: int
    words: int


@dataclass(frozen=True, slots=True)
class ChairFigures:
    """CHAIR over captions, with the figures that it must not be read without.

    Attributes:
        chair_s: Share of the captions with a hallucinated mention.
        chair_i: Share of the mentions that are hallucinated.
        recall: Share of the true objects that are mentioned, over all images together.
        objects: Mean number of mentions a caption.
        length: Mean number of words a caption.
    """

    chair_s: float
    chair_i: float
    recall: float
    objects: float
    length: float

    def to_json(self) -> dict[str, float]:
        """The figures as plain values."""
        return asdict(self)


def truth_from_coco(
    instances: Mapping[str, Any],
    captions: Mapping[str, Any] | None = None,
    vocabulary: ChairVocabulary | None = None,
) -> dict[str, frozenset[str]]:
    """The true objects of each image: its instance categories, and what its human captions name.

    Args:
        instances: COCO instances, as read from JSON (`images`, `annotations`, `categories`).
        captions: COCO captions (`images`, `annotations`); None takes instances alone.
        vocabulary: None takes the shipped one.

    Returns:
        Categories by the image's `file_name`, for every image that either file lists.

    Raises:
        DataError: A key is missing, an annotation is of no listed image or category, or a category
            is not in the vocabulary.
    """
    vocabulary = vocabulary or default_vocabulary()
    objects: defaultdict[int, set[str]] = defaultdict(set)
    files: dict[int, str] = {}
    try:
        names = {category["id"]: str(category["name"]) for category in instances["categories"]}
        for part in (instances, captions or {"images": []}):
            files.update((image["id"], image["file_name"]) for image in part["images"])
        for annotation in instances["annotations"]:
            objects[annotation["image_id"]].add(names[annotation["category_id"]])
        for annotation in captions["annotations"] if captions else ():
            objects[annotation["image_id"]].update(vocabulary.mentions(annotation["caption"]))
    except (KeyError, TypeError) as error:
        raise DataError(f"not COCO annotations: {error!r} is missing or of a wrong type") from error
    if lost := objects.keys() - files.keys():
        raise DataError(f"COCO annotations of images that are not listed, such as {min(lost)}")
    if unknown := set(names.values()).difference(vocabulary.categories):
        raise DataError(
            f"COCO categories that the synonyms do not have: {', '.join(sorted(unknown))}"
        )
    return {name: frozenset(objects[image]) for image, name in files.items()}


def score_caption(
    text: str, truth: frozenset[str], vocabulary: ChairVocabulary | None = None
) -> CaptionScore:
    """Hold one caption against the true objects of its image; None takes the shipped vocabulary."""
    mentions = (vocabulary or default_vocabulary()).mentions(text)
    return CaptionScore(
        mentions=tuple(mentions),
        hallucinated=tuple(name for name in mentions if name not in truth),
        recalled=len(truth.intersection(mentions)),
        truth=len(truth),
        words=len(text.split()),
    )


def chair_ratios(scores: Sequence[CaptionScore]) -> dict[str, Ratio]:
    """The columns, a row a caption, of the five figures of `ChairFigures`."""
    named = [len(score.mentions) for score in scores]
    wrong = [len(score.hallucinated) for score in scores]
    return {
        "chair_s": Ratio.mean([float(count > 0) for count in wrong]),
        "chair_i": Ratio.of(wrong, named),
        "recall": Ratio.of([score.recalled for score in scores], [score.truth for score in scores]),
        "objects": Ratio.mean(named),
        "length": Ratio.mean([score.words for score in scores]),
    }


def chair(scores: Sequence[CaptionScore]) -> ChairFigures:
    """CHAIR over captions. A figure with nothing below its line (no captions, no mentions) is 0."""
    return ChairFigures(**{name: ratio.value for name, ratio in chair_ratios(scores).items()})


def _key(words: Iterable[str]) -> str:
    """A name as it is looked up: singular words, hyphens as spaces."""
    return " ".join(singular(word) for word in words).replace("-", " ")


def _from_yaml(text: str, file: str) -> dict[str, list[str]]:
    try:
        values = yaml.safe_load(text)
        return {str(category): [str(name) for name in names] for category, names in values.items()}
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise DataError(f"{file}: synonyms need a mapping of category to names: {error}") from error
