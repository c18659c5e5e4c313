"""CHAIR: mentions counted by hand, figures against a count written separately, and files."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.errors import DataError
from sima_ray.metrics.chair import (
    SYNONYMS,
    CaptionScore,
    ChairFigures,
    ChairVocabulary,
    chair,
    default_vocabulary,
    score_caption,
    truth_from_coco,
)
from sima_ray.metrics.words import singular, tokenize

# The caption, and its mentions by category, counted by hand.
COUNTED: list[tuple[str, dict[str, int]]] = [
    ("", {}),
    ("A quiet street at night.", {}),
    ("A dog.", {"dog": 1}),
    ("Two dogs and a puppy chase three cats.", {"dog": 2, "cat": 1}),
    ("A DOG, a Dog and a dog's bone.", {"dog": 3}),
    ("A man eats a hot dog.", {"person": 1, "hot dog": 1}),
    ("Hot dogs next to a dog.", {"hot dog": 1, "dog": 1}),
    ("It is hot. Dogs sleep.", {"dog": 1}),
    ("The hot-dogs are on the dining-table.", {"hot dog": 1, "dining table": 1}),
    ("A baby elephant with an adult elephant.", {"elephant": 2}),
    ("A baby and an elephant.", {"person": 1, "elephant": 1}),
    ("Adult giraffes and a baby bear cub", {"giraffe": 1, "bear": 1}),
    ("A baby animal.", {}),
    ("A baby holds a teddy bear.", {"person": 1, "teddy bear": 1}),
    ("A baby polar bear swims.", {"bear": 1}),
    ("A passenger train and a passenger jet.", {"train": 1, "airplane": 1}),
    ("A passenger boards the bus.", {"person": 1, "bus": 1}),
    ("He wears a bow tie, she ties two neckties.", {"tie": 3}),
    ("The toilet seat is up.", {"toilet": 1}),
    ("A toilet beside the tub, its seat down, and a chair.", {"toilet": 1, "chair": 1}),
    ("A seat by the window.", {"chair": 1}),
    ("A traffic light and two stop signs.", {"traffic light": 1, "stop sign": 1}),
    ("The batter stands at home plate with a baseball bat.", {"person": 1, "baseball bat": 1}),
    ("A train track without any train.", {"train": 1}),
    (
        "Knives, forks, spoons and wine glasses.",
        {"knife": 1, "fork": 1, "spoon": 1, "wine glass": 1},
    ),
    ("Buses, benches, couches and sandwiches", {"bus": 1, "bench": 1, "couch": 1, "sandwich": 1}),
    ("Women, men, children and policemen", {"person": 4}),
    (
        "People fly kites; the geese and calves watch.",
        {"person": 1, "kite": 1, "bird": 1, "cow": 1},
    ),
    ("A pair of scissors and skis", {"scissors": 1, "skis": 1}),
    ("Stove top oven, microwave oven, oven.", {"oven": 2, "microwave": 1}),
    ("A cell phone, a mouse, a laptop computer", {"cell phone": 1, "mouse": 1, "laptop": 1}),
    ("A fire truck, a truck, a pick-up truck.", {"truck": 3}),
    ("A horse-drawn cart with a dog-like toy.", {}),
    ("A mother giraffe’s calf", {"person": 1, "giraffe": 1, "cow": 1}),
    ("TVs, skateboards, tennis rackets.", {"tv": 1, "skateboard": 1, "tennis racket": 1}),
    ("An oven. An orange orange!", {"oven": 1, "orange": 2}),
    ("Cherry pies, ties and a potted plant.", {"tie": 1, "potted plant": 1}),
]


@pytest.mark.parametrize(("text", "expected"), COUNTED)
def test_mentions_by_hand(text: str, expected: dict[str, int]) -> None:
    assert Counter(default_vocabulary().mentions(text)) == expected


def test_mentions_keep_the_order_of_the_text() -> None:
    mentions = default_vocabulary().mentions("A cat, two hot dogs, a cat and a man.")
    assert mentions == ["cat", "hot dog", "cat", "person"]


@pytest.mark.parametrize(
    ("plural", "expected"),
    [
        *[("dogs", "dog"), ("boxes", "box"), ("dishes", "dish"), ("glasses", "glass")],
        *[("puppies", "puppy"), ("cookies", "cookie"), ("potatoes", "potato"), ("shoes", "shoe")],
        *[("horses", "horse"), ("vases", "vase"), ("buses", "bus"), ("mice", "mouse")],
        *[("women", "woman"), ("snowmen", "snowman"), ("shelves", "shelf"), ("gloves", "glove")],
        *[("fire-trucks", "fire-truck"), ("geese", "goose"), ("axes", "axe"), ("tvs", "tv")],
    ],
)
def test_singular(plural: str, expected: str) -> None:
    assert singular(plural) == expected
    assert singular(expected) == expected


@pytest.mark.parametrize(
    "word", ["bus", "glass", "tennis", "gas", "cactus", "yes", "is", "specimen"]
)
def test_singular_words_stay(word: str) -> None:
    assert singular(word) == word


def test_tokens_keep_marks_apart() -> None:
    assert tokenize("A man's hot-dog, TWO.") == ["a", "man", "'", "s", "hot-dog", ",", "two", "."]


# Surface forms with their categories, for a count by regular expression: no singular, no tokens.
FORMS: dict[str, str | None] = {
    **{"man": "person", "men": "person", "lady": "person", "ladies": "person", "child": "person"},
    **{"children": "person", "people": "person", "baby": "person", "passengers": "person"},
    **{"dog": "dog", "dogs": "dog", "puppies": "dog", "hot dog": "hot dog", "hot dogs": "hot dog"},
    **{"kitten": "cat", "cats": "cat", "baby elephant": "elephant", "elephants": "elephant"},
    **{
        "adult zebras": "zebra",
        "zebra": "zebra",
        "polar bears": "bear",
        "teddy bear": "teddy bear",
    },
    **{"bus": "bus", "buses": "bus", "passenger train": "train", "trains": "train"},
    **{"train tracks": None, "home plate": None, "bow ties": "tie", "tie": "tie"},
    **{"knife": "knife", "knives": "knife", "wine glasses": "wine glass", "mugs": "cup"},
    **{
        "benches": "bench",
        "couch": "couch",
        "sofas": "couch",
        "stools": "chair",
        "desk": "dining table",
    },
    **{"traffic lights": "traffic light", "street light": "traffic light", "skis": "skis"},
    **{"scissors": "scissors", "cell phones": "cell phone", "mouse": "mouse", "mice": "mouse"},
    **{
        "geese": "bird",
        "seagull": "bird",
        "boats": "boat",
        "pickup truck": "truck",
        "trucks": "truck",
    },
}
FILLERS = [
    "beside",
    "and",
    "near some red",
    "with a small",
    ", then",
    ". There are",
    "behind the",
    ";",
]
FORM = re.compile(
    r"\b(?:" + "|".join(sorted(map(re.escape, FORMS), key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)


def generated(rng: random.Random) -> tuple[str, frozenset[str]]:
    """A caption, and the true objects of its image."""
    words = ["In this picture we see a"]
    for _ in range(rng.randint(0, 9)):
        words += [rng.choice(list(FORMS)), rng.choice(FILLERS)]
    text = " ".join([*words, "wall."])
    text = text.upper() if rng.random() < 0.1 else text
    categories = sorted({category for category in FORMS.values() if category})
    return text, frozenset(rng.sample(categories, rng.randint(0, 12)))


def test_figures_equal_a_separate_count() -> None:
    rng = random.Random(20)
    captions = [generated(rng) for _ in range(300)]
    bad_captions = bad = named = found = true = words = 0
    for text, truth in captions:
        seen = [FORMS[match.group().lower()] for match in FORM.finditer(text)]
        seen = [category for category in seen if category is not None]
        assert default_vocabulary().mentions(text) == seen
        wrong = [category for category in seen if category not in truth]
        bad_captions += 1 if wrong else 0
        bad += len(wrong)
        named += len(seen)
        found += sum(category in seen for category in truth)
        true += len(truth)
        words += len(re.findall(r"\S+", text))
    assert 0 < bad < named and bad_captions < len(captions)  # the captions say something
    figures = chair([score_caption(text, truth) for text, truth in captions])
    assert figures.chair_s == pytest.approx(bad_captions / 300, abs=1e-12)
    assert figures.chair_i == pytest.approx(bad / named, abs=1e-12)
    assert figures.recall == pytest.approx(found / true, abs=1e-12)
    assert figures.objects == pytest.approx(named / 300, abs=1e-12)
    assert figures.length == pytest.approx(words / 300, abs=1e-12)


def test_score_by_hand() -> None:
    score = score_caption("A man, a man and two dogs on a red couch.", frozenset(["person", "cat"]))
    assert score == CaptionScore(
        mentions=("person", "person", "dog", "couch"),
        hallucinated=("dog", "couch"),
        recalled=1,
        truth=2,
        words=11,
    )
    clean = score_caption("A cat.", frozenset(["cat"]))
    # 2 of 5 mentions, 1 of 2 captions, 2 of 3 true objects.
    assert chair([score, clean]).to_json() == pytest.approx(
        {"chair_s": 0.5, "chair_i": 0.4, "recall": 2 / 3, "objects": 2.5, "length": 6.5}
    )


def test_nothing_below_the_line_is_0() -> None:
    assert chair([]) == ChairFigures(0, 0, 0, 0, 0)
    assert chair([score_caption("Nothing.", frozenset())]) == ChairFigures(0, 0, 0, 0, 1)


@given(st.lists(st.sampled_from(list(FORMS)), max_size=8), st.sets(st.sampled_from(["dog", "cat"])))
def test_mentions_add_up_over_sentences(forms: list[str], truth: set[str]) -> None:
    apart = [score_caption(f"The {form}.", frozenset(truth)) for form in forms]
    together = score_caption(" ".join(f"The {form}." for form in forms), frozenset(truth))
    assert together.mentions == tuple(name for score in apart for name in score.mentions)
    assert together.hallucinated == tuple(name for score in apart for name in score.hallucinated)


def test_shipped_synonyms() -> None:
    synonyms: dict[str, list[str]] = yaml.safe_load(SYNONYMS.read_text(encoding="utf-8"))
    names = [name for category, others in synonyms.items() for name in (category, *others)]
    assert len(synonyms) == 80
    assert len(names) >= 380
    assert len(set(names)) == len(names)
    vocabulary = default_vocabulary()
    for category, others in synonyms.items():
        for name in (category, *others):
            assert vocabulary.mentions(f"the {name} here") == [category]


def test_published_synonyms_format(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("person, girl, boy\nzebra\n\nhot dog\ntie\ntoilet\nairplane, jet\n")
    vocabulary = ChairVocabulary.load(path)
    assert vocabulary.categories == ("person", "zebra", "hot dog", "tie", "toilet", "airplane")
    text = "Two girls, a woman, adult zebras, a bow tie, a toilet seat, a passenger jet, hot dogs"
    found = vocabulary.mentions(text)
    assert found == ["person", "zebra", "tie", "toilet", "airplane", "hot dog"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "no commas here\n"), ("a.txt", ""), ("a.yaml", "- dog\n"), ("a.yaml", "dog: 3")],
)
def test_bad_synonyms_are_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(str(path))):
        ChairVocabulary.load(path)
    with pytest.raises(DataError, match=r"missing\.yaml: synonyms cannot be read: No such file or"):
        ChairVocabulary.load(tmp_path / "missing.yaml")


def coco() -> tuple[dict[str, Any], dict[str, Any]]:
    """Instances of images 1 and 2, captions of images 1 and 3."""
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 18},
            {"image_id": 1, "category_id": 1},
        ],
    }
    captions = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "c.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "A woman with her puppy on a sofa."},
            {"image_id": 1, "caption": "A couch."},
            {"image_id": 3, "caption": "A hot dog."},
        ],
    }
    return instances, captions


def test_truth_is_instances_and_captions() -> None:
    instances, captions = coco()
    assert truth_from_coco(instances) == {"a.jpg": {"dog", "person"}, "b.jpg": set()}
    assert truth_from_coco(instances, captions) == {
        "a.jpg": {"dog", "person", "couch"},
        "b.jpg": set(),
        "c.jpg": {"hot dog"},
    }


def test_bad_annotations_are_refused() -> None:
    instances, captions = coco()
    with pytest.raises(DataError, match="'annotations'"):
        truth_from_coco({key: instances[key] for key in ("images", "categories")})
    with pytest.raises(DataError, match="not listed, such as 9"):
        extra = {"image_id": 9, "category_id": 1}
        truth_from_coco({**instances, "annotations": [*instances["annotations"], extra]}, captions)
    with pytest.raises(DataError, match="unicorn"):
        unicorn = {"id": 91, "name": "unicorn"}
        truth_from_coco({**instances, "categories": [*instances["categories"], unicorn]})
