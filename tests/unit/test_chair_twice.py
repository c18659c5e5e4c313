"""CHAIR against two counts that were written apart from it: one by regular expression over every shipped name
and its plural, one that walks over words in pairs, as the published metric does, with a list of its format.

Neither knows how `sima_ray.metrics.words` makes a singular: both begin with singulars and make plurals.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from sima_ray.metrics.chair import (
    SYNONYMS,
    ChairVocabulary,
    chair,
    default_vocabulary,
    score_caption,
)
from sima_ray.runtime.evaluation import read_vocabulary

CAPTIONS = 600
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
FILLERS = (
    *("beside", "and", "near some red", "with a small", ", then", ". There are", "behind the", ";"),
    *("who likes", "or perhaps", "(not far from)", "'s", "; it is hot.", "while a wooden"),
)
SAME = {"people", "cattle", "sheep", "skis", "scissors", "shears", "luggage", "stemware", "bovine"}
IRREGULAR = {
    **{"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen"},
    **{"knife": "knives", "calf": "calves", "human": "humans", "waterfowl": "waterfowl"},
    **{"peafowl": "peafowl", "passerby": None, "canoe": "canoes"},
}


def plural(name: str) -> str | None:
    """A name in the plural; None for one that this test has none for."""
    *before, last = name.split(" ")
    if last in SAME:
        return None
    many = IRREGULAR.get(last, "")
    if many == "":
        if last.endswith("man"):
            many = f"{last[:-2]}en"
        elif re.search(r"[^aeiou]y$", last):
            many = f"{last[:-1]}ies"
        elif last.endswith("knife"):
            many = f"{last[:-2]}ves"
        else:
            many = last + ("es" if re.search(r"(?:s|x|z|ch|sh)$", last) else "s")
    return " ".join([*before, many]) if many else None


@dataclass(frozen=True)
class Form:
    """A name as a caption may have it, in lower case, and the category that it counts as, if any."""

    text: str
    category: str | None


def both(name: str, category: str | None) -> list[Form]:
    return [Form(text, category) for text in (name, plural(name)) if text]


def forms(synonyms: dict[str, list[str]]) -> list[Form]:
    """Every name in singular and plural, and the names that the metric has rules for."""
    found = [
        form
        for category, others in synonyms.items()
        for name in dict.fromkeys((category, *others))
        for form in both(name, category)
    ]
    rules = [
        form
        for animal in ANIMALS
        for age in ("baby", "adult")
        for form in both(f"{age} {animal}", animal)
    ]
    rules += [form for age in ("baby", "adult") for form in both(f"{age} animal", None)]
    rules += both("passenger jet", "airplane") + both("passenger train", "train")
    rules += both("train track", None) + both("home plate", None)
    rules += both("bow tie", "tie") + both("toilet seat", "toilet")
    return found + 4 * rules  # the rules more often than any one name


def caption(rng: random.Random, some: list[Form]) -> str:
    """Names between fillers; now and then hyphenated, in capitals, or with a toilet and a seat apart."""
    words = ["This is a"]
    for _ in range(rng.randint(0, 9)):
        text = rng.choice(some).text
        # A hyphen makes one word, which counts where it is a listed name; "adult-zebra" is none.
        if rng.random() < 0.1 and text.split()[0] not in ("baby", "adult", "passenger"):
            text = text.replace(" ", "-")
        words += [text, rng.choice(FILLERS)]
    if rng.random() < 0.05:
        words += ["toilet", "below a", "seat", "of wood"]
    whole = " ".join([*words, "wall."])
    return rng.choice([whole, whole, whole, whole.upper(), whole.title()])


def by_pattern(some: list[Form], texts: list[str]) -> list[list[str]]:
    """The categories of all names of each text, the longest at each place."""
    table = {form.text: form.category for form in some}
    longest = sorted(table, key=len, reverse=True)
    names = "|".join(re.escape(name).replace(r"\ ", "[ -]") for name in longest)
    pattern = re.compile(rf"(?<![\w-])(?:{names})(?![\w-])")
    counted: list[list[str]] = []
    for text in texts:
        found = [match.replace("-", " ") for match in pattern.findall(text.lower())]
        if any({"toilet", "toilets"} & set(name.split()) for name in found):
            found = [name for name in found if name not in ("seat", "seats")]
        counted.append([category for name in found if (category := table[name]) is not None])
    return counted


def held_out(rng: random.Random, categories: list[str]) -> list[frozenset[str]]:
    return [frozenset(rng.sample(categories, rng.randint(0, 12))) for _ in range(CAPTIONS)]


def check(
    texts: list[str],
    truths: list[frozenset[str]],
    counted: list[list[str]],
    vocabulary: ChairVocabulary | None,
) -> None:
    """Mentions caption by caption, then the figures over all of them from plain counts."""
    known = vocabulary or default_vocabulary()
    for text, seen in zip(texts, counted, strict=True):
        assert known.mentions(text) == seen, text
    wrong = [
        [c for c in seen if c not in truth] for seen, truth in zip(counted, truths, strict=True)
    ]
    named = sum(map(len, counted))
    found = sum(len(set(seen) & truth) for seen, truth in zip(counted, truths, strict=True))
    figures = chair(
        [score_caption(t, truth, known) for t, truth in zip(texts, truths, strict=True)]
    )
    assert figures.chair_s == pytest.approx(sum(map(bool, wrong)) / CAPTIONS, abs=1e-12)
    assert figures.chair_i == pytest.approx(sum(map(len, wrong)) / named, abs=1e-12)
    assert figures.recall == pytest.approx(found / sum(map(len, truths)), abs=1e-12)
    assert 0 < figures.chair_i < 1 and named > 4 * CAPTIONS - 600


def test_every_shipped_name_in_600_captions() -> None:
    synonyms: dict[str, list[str]] = yaml.safe_load(SYNONYMS.read_text(encoding="utf-8"))
    some, rng = forms(synonyms), random.Random(7)
    apart = [f"Here {form.text} there" for form in some]
    assert len(apart) > 1200
    for form, text in zip(some, apart, strict=True):
        assert default_vocabulary().mentions(text) == [c for c in [form.category] if c], text
    texts = [caption(rng, some) for _ in range(CAPTIONS)]
    check(texts, held_out(rng, list(synonyms)), by_pattern(some, texts), None)
    kinds = {
        "plural": r"\bsofas\b|\bbenches\b|\bpuppies\b|\bwomen\b|\bmice\b|\bgeese\b",
        "double word": r"\bhot dog|\btraffic light|\bwine glass|\bteddy bear",
        "baby or adult": r"\b(?:baby|adult) (?:bird|cat|dog|horse|sheep|cow|elephant|bear|zebra)",
        "passenger": r"\bpassenger (?:jet|train)",
        "toilet seat": r"\btoilet seat",
        "a toilet and a seat": r"\btoilets?\b(?! seat).*\bseat",
        "bow tie": r"\bbow tie",
        "no object": r"\btrain track|\bhome plate",
        "hyphen": r"\w-\w",
        "capitals": r"^THIS",
    }
    for kind, pattern in kinds.items():
        flags = 0 if kind == "capitals" else re.IGNORECASE
        assert sum(bool(re.search(pattern, text, flags)) for text in texts) >= 3, kind


# Names in the published format, a category a line; none is of more than two words, as in that list's reference.
PUBLISHED: str = """\
person, girl, boy, man, woman, child, baby, adult, passenger, policeman
bicycle, bike
airplane, jet, plane
train, locomotive
truck
traffic light, street light
bird, duck, goose
cat, kitten
dog, puppy
horse
sheep, lamb
cow, calf
elephant
bear
zebra
giraffe
tie
wine glass
cup, mug
knife
hot dog
chair, seat, stool
couch, sofa
potted plant, houseplant
dining table, table, desk
toilet, commode
mouse
teddy bear
sports ball, ball
"""


def in_pairs(text: str) -> list[str]:
    """The metric as published: words made singular, two-word names joined, then synonyms mapped."""
    rows = [line.split(", ") for line in PUBLISHED.splitlines()]
    category = {name: row[0] for row in rows for name in row}
    joined: dict[str, str] = {name: name for name in category if " " in name}
    joined |= {name: name for name in ("home plate", "train track")}
    for animal in (*ANIMALS, "animal", "cub"):
        joined |= {f"{age} {animal}": animal for age in ("baby", "adult")}
    joined |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
    joined |= {"bow tie": "tie", "toilet seat": "toilet"}
    one: dict[str, str] = {
        "track": "track",
        "plate": "plate",
        "light": "light",
        "glass": "glass",
        "plant": "plant",
    }
    one |= {word: word for name in (*category, "animal", "cub") for word in name.split()}
    for word in list(one):
        if many := plural(word):
            one[many] = word
    words: list[str] = [
        one.get(word, word) for word in map(str, re.findall(r"\w+|[^\w\s]", text.lower()))
    ]
    found: list[str] = []
    while words:
        pair = " ".join(words[:2])
        found.append(joined.get(pair, words[0]))
        del words[: 2 if pair in joined else 1]
    if "toilet" in found:
        found = [word for word in found if word != "seat"]
    return [category[word] for word in found if word in category]


def test_the_published_format_in_600_captions(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text(PUBLISHED)
    vocabulary = read_vocabulary(str(file))
    rows: list[list[str]] = [row.split(", ") for row in PUBLISHED.splitlines()]
    names = {row[0]: row[1:] for row in rows}
    some, rng = forms(names), random.Random(11)
    # Hyphens divide words here and not there, and "person" is there the plural of nothing: both are documented.
    some = [form for form in some if form.text != "people"]
    texts = [caption(rng, some).replace("-", " ") for _ in range(CAPTIONS)]
    check(texts, held_out(rng, list(names)), [in_pairs(text) for text in texts], vocabulary)


def test_our_own_list_is_read_without_a_file() -> None:
    assert read_vocabulary(None) is default_vocabulary()
