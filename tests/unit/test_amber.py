"""AMBER: figures counted by hand on small files of the published formats, and nouns told from verbs."""

import json
from pathlib import Path
from typing import Any

import pytest

from sima_ray.data.benchmarks import AmberQuestion, read_amber
from sima_ray.errors import DataError
from sima_ray.metrics.amber import AmberWords, discriminative_ratios, generative_ratios

RELATIONS: dict[str, list[str]] = {
    "sky": [],
    "grass": ["ground"],
    "ground": ["floor"],
    "person": ["people", "individual", "man", "woman", "boy", "girl"],
    "man": ["person", "people", "individual", "boy"],
    "lake": ["water", "sea", "river"],
    "bicycle": ["bike", "tire", "saddle"],
    "television": ["TV", "screen"],
    "dog": [],
    "bird": ["bill"],
    "ship": ["boat", "vessel"],
    "can": [],
    "watch": [],
    "light": [],
    "orange": ["tangerine"],
    "sunglasses": [],
    "hot": [],
    "air-conditioning": [],
}
SAFE = ["orange", "light", "individual"]
WORDS = AmberWords.of(RELATIONS, SAFE)


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("", []),
        ("A quiet afternoon.", []),
        ("Two men and a WOMAN with a dog.", ["man", "woman", "dog"]),
        ("People on boats; tires, TVs and TV sets", ["people", "boat", "tire", "tv", "tv"]),
        ("A man in sunglasses by the air-conditioning", ["man", "sunglasses", "air-conditioning"]),
        ("You can see that it can float, and a can, and soda cans", ["can", "can"]),
        ("He watches the birds, the dog watches them; a watch", ["bird", "dog", "watch"]),
        ("They watch him. Her watch. Wrist watches lie there.", ["watch", "watch"]),
        ("Candles light the room under a bright light", ["light"]),
        ("A hot dog", ["dog"]),
    ],
)
def test_nouns(text: str, nouns: list[str]) -> None:
    assert WORDS.nouns(text) == nouns


def test_a_description_by_hand() -> None:
    # Truth: person, grass, lake, ship, ship. Absent but likely: dog, bird, sky.
    text = "A man and a boy sit on the ground beside the water. A dog chases birds. An orange bike."
    score = WORDS.score(text, ["person", "grass", "lake", "ship", "ship"], ["dog", "bird", "sky"])
    assert score.nouns == ("man", "boy", "ground", "water", "dog", "bird", "orange", "bike")
    assert score.hallucinated == ("dog", "bird", "bike")  # orange is safe whatever the image has
    assert (score.covered, score.truth) == (
        3,
        5,
    )  # person twice, grass by "ground", lake by "water"
    assert (score.made_up, score.expected) == (2, 3)
    assert score.words == 19
    clean = WORDS.score("A boat under the sky.", ["sky", "ship", "ship"], ["dog"])
    assert (clean.hallucinated, clean.covered) == ((), 2)  # of two ships one is named
    figures = {name: r.value for name, r in generative_ratios([score, clean]).items()}
    assert figures == pytest.approx(
        {"chair": 3 / 10, "cover": 5 / 8, "hal": 1 / 2, "cog": 2 / 4, "length": 24 / 2}
    )


def test_an_association_names_an_object_before_its_own_name_does() -> None:
    # "ground" stands for grass first, as in the reference, though a ground is annotated too.
    assert WORDS.score("The ground.", ["ground", "grass"], []).covered == 1
    assert WORDS.score("The floor and the ground.", ["ground", "grass"], []).covered == 2


def test_similar_words_count_as_the_reference_counts_them() -> None:
    near = AmberWords.of(RELATIONS, SAFE, {"boat": ["bike"], "bird": ["dog"]})
    score = near.score("A bike and a dog.", ["ship"], ["bird", "sky"])
    assert score.hallucinated == ("dog",)  # the bike is near the boat that stands for the ship
    assert (score.covered, score.made_up) == (1, 1)  # the dog is near the bird that is not there
    far = WORDS.score("A bike and a dog.", ["ship"], ["bird", "sky"])
    assert (far.hallucinated, far.covered, far.made_up) == (("bike", "dog"), 0, 0)


def test_an_object_without_associations_is_refused() -> None:
    with pytest.raises(DataError, match="associations have no unicorn"):
        WORDS.score("", ["dog"], ["unicorn"])


def test_answers_by_hand_no_is_the_positive_class() -> None:
    asked: list[tuple[str, bool | None, bool]] = [
        ("discriminative-hallucination", False, False),  # no, rightly
        ("discriminative-hallucination", True, False),
        ("discriminative-hallucination", False, False),
        ("discriminative-attribute-state", True, True),
        ("discriminative-attribute-state", False, True),  # no, wrongly
        ("discriminative-attribute-number", None, False),  # neither: wrong, in no class
        ("discriminative-attribute-action", False, False),
        ("discriminative-relation", True, True),
        ("relation", True, False),
    ]
    kinds, said, truth = zip(*asked, strict=True)
    figures = {name: r.value for name, r in discriminative_ratios(kinds, said, truth).items()}
    # All: 5 of 9 right; "no" said 4 times, 3 rightly; "no" is right 6 times.
    assert figures["all.accuracy"] == pytest.approx(5 / 9)
    assert figures["all.precision"] == pytest.approx(3 / 4)
    assert figures["all.recall"] == pytest.approx(3 / 6)
    assert figures["all.f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert figures["all.yes_share"] == pytest.approx(4 / 9)
    assert [figures[f"existence.{f}"] for f in ("accuracy", "precision", "recall")] == (
        pytest.approx([2 / 3, 1, 2 / 3])
    )
    assert [figures[f"attribute.{f}"] for f in ("accuracy", "precision", "recall")] == (
        pytest.approx([2 / 4, 1 / 2, 1 / 2])
    )
    assert (figures["state.accuracy"], figures["number.accuracy"]) == (0.5, 0)
    assert (figures["action.f1"], figures["relation.accuracy"]) == (1, 0.5)
    with pytest.raises(DataError, match="no questions of the type colour"):
        discriminative_ratios(["colour"], [True], [True])


def write_amber(folder: Path, annotations: list[dict[str, Any]], **queries: Any) -> str:
    """AMBER's `data` folder; queries are (id, image, query) by the name of their file."""
    (folder / "query").mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps(annotations))
    for name, rows in queries.items():
        values = [dict(zip(("id", "image", "query"), row, strict=True)) for row in rows]
        file = folder / "query" / f"query_{name.replace('_', '-')}.json"
        file.write_text(json.dumps(values, indent=4))
    return str(folder)


ANNOTATIONS: list[dict[str, Any]] = [
    {"id": 1, "type": "generative", "truth": ["sky", "person"], "hallu": ["bird"]},
    {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 8633, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 13557, "type": "relation", "truth": "yes"},
]


def test_files_of_the_published_format(tmp_path: Path) -> None:
    folder = write_amber(
        tmp_path / "data",
        ANNOTATIONS,
        generative=[(1, "AMBER_1.jpg", "Describe this image.")],
        discriminative_existence=[(8633, "AMBER_1.jpg", "Is there a cloud in this image?")],
    )
    assert read_amber(folder, "generative") == [
        AmberQuestion(
            1, "AMBER_1.jpg", "Describe this image.", "generative", ("sky", "person"), ("bird",)
        )
    ]
    (existence,) = read_amber(folder, "existence")
    assert (existence.kind, existence.truth) == ("discriminative-hallucination", ("no",))
    with pytest.raises(
        DataError, match=r"relation\.json: cannot be read: No such file or directory$"
    ):
        read_amber(folder, "relation")


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ({"id": 2, "type": "generative", "truth": ["sky"]}, "KeyError"),
        ({"id": 1, "type": "discriminative-relation", "truth": "yes"}, "annotated as"),
        ({"id": 1, "type": "generative", "truth": "sky"}, "is no list"),
    ],
)
def test_an_annotation_that_does_not_fit_is_named(
    tmp_path: Path, annotation: dict[str, Any], words: str
) -> None:
    folder = write_amber(tmp_path / "data", [annotation], generative=[(1, "a.jpg", "Describe.")])
    with pytest.raises(DataError, match=rf"query_generative\.json:1: not a question: .*{words}"):
        read_amber(folder, "generative")


def test_entries_of_one_id_are_named(tmp_path: Path) -> None:
    rows = [(1, "a.jpg", "Describe."), (1, "b.jpg", "Describe.")]
    folder = write_amber(tmp_path / "asked", ANNOTATIONS, generative=rows)
    with pytest.raises(DataError, match=r"query_generative\.json:2: .*a second question 1"):
        read_amber(folder, "generative")
    folder = write_amber(tmp_path / "told", [*ANNOTATIONS, ANNOTATIONS[0]], generative=rows[:1])
    with pytest.raises(DataError, match=r"annotations\.json:5: .*a second annotation of 1"):
        read_amber(folder, "generative")
