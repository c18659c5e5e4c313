"""MMHal-Bench, Mementos and Object HalBench: verdicts read, figures counted by hand, golden prompts."""

from pathlib import Path

import pytest

from sima_ray.metrics.chair import score_caption
from sima_ray.metrics.halbench import halbench_ratios
from sima_ray.metrics.mementos import Keywords, mementos_prompt, mementos_ratios, read_keywords
from sima_ray.metrics.mmhal import MMHalItem, mmhal_prompt, mmhal_ratios, read_rating

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("It is right.\nRating: 5", 5),
        ("**Rating:** 0", 0),
        ("Rating: **3**, not informative", 3),
        ("rating = 2.", 2),
        ("I lean to Rating: 4.\n\nRating: 4", 4),
        ("Rating: 6/6", 6),
        ("Rating: 2 or rating: 3", None),
        ("Rating: 7", None),
        ("Rating: -1", None),
        ("Rating: 3.5", None),
        ("Rating: 16", None),
        ("Rating: high", None),
        ("The answer deserves a 5.", None),
        ("Underrating: 5", None),
        ("", None),
    ],
)
def test_ratings(text: str, rating: int | None) -> None:
    assert read_rating(text) == rating


@pytest.mark.parametrize("text", ["Rating: 3-4", "Rating: 3 or 4", "Rating: 0 - 2", "Rating: 4½"])
def test_an_undecided_judge_gave_no_rating(text: str) -> None:
    assert read_rating(text) is None


def test_mmhal_by_hand() -> None:
    kinds = ["counting", "other", "counting", "holistic"]
    figures = {name: r.value for name, r in mmhal_ratios(kinds, [0, 3, 5, 2]).items()}
    assert figures == pytest.approx(
        {
            "score": 10 / 4,
            "hallucination": 2 / 4,
            "score.counting": 5 / 2,
            "score.holistic": 2,
            "score.other": 3,
        }
    )
    assert list(figures)[2:] == ["score.counting", "score.holistic", "score.other"]


def lists(*words: str) -> str:
    names = ("reference_objects", "reference_behaviours", "response_objects")
    values = dict(zip((*names, "response_behaviours"), (w.split() for w in words), strict=True))
    return str(values).replace("'", '"')


def test_keywords_are_found_in_whatever_stands_around_them() -> None:
    text = lists("boy Ball ball", "kick", "boy", "kick run")
    expected = Keywords(("boy", "ball"), ("kick",), ("boy",), ("kick", "run"))
    assert read_keywords(text) == expected
    assert read_keywords(f"Sure! {{here}}\n```json\n{text}\n```\nDone.") == expected
    assert read_keywords(lists("a", "b", "c", "d") + text) == expected  # the last one counts
    assert read_keywords(text + '{"note": 1}') == expected


@pytest.mark.parametrize(
    "text",
    [
        *["", "nonsense", "{", "[]", "{}", '{"reference_objects": ["a"]}'],
        lists("a", "b", "c", "d").replace('["a"]', '"a"'),
        lists("a", "b", "c", "d").replace('["a"]', "[1]"),
        lists("a", "b", "c", "d")[:-2],
        "{" * 20_000,
    ],
)
def test_other_answers_have_no_keywords(text: str) -> None:
    assert read_keywords(text) is None


def test_mementos_by_hand() -> None:
    rows = [
        Keywords(("dog", "toy", "house"), ("bark", "stop"), ("dog", "toy"), ("play",)),
        Keywords(("man",), ("run", "jump"), ("man", "hat"), ("run", "jump")),
        Keywords(("man",), ("run",), (), ()),
    ]
    figures = {name: r.value for name, r in mementos_ratios(rows).items()}
    assert figures == pytest.approx(
        {
            "object.recall": (2 / 3 + 1 + 0) / 3,
            "object.precision": (1 + 1 / 2 + 0) / 3,
            "object.f1": (4 / 5 + 2 / 3 + 0) / 3,
            "behaviour.recall": (0 + 1 + 0) / 3,
            "behaviour.precision": (0 + 1 + 0) / 3,
            "behaviour.f1": (0 + 1 + 0) / 3,
        }
    )


def test_halbench_by_hand() -> None:
    truth = frozenset(["person", "dog"])
    scores = [
        score_caption("A man with a dog and two cats, one cat asleep.", truth),  # 2 of 4 wrong
        score_caption("A dog.", truth),
        score_caption("It is a calm morning.", truth),  # no object: not in the response figure
    ]
    figures = {name: r.value for name, r in halbench_ratios(scores).items()}
    assert figures == pytest.approx(
        {
            "response": 1 / 2,
            "mention": 2 / 5,
            "recall": 3 / 6,
            "objects": 5 / 3,
            "length": (11 + 2 + 5) / 3,
        }
    )


ITEM = MMHalItem(
    image_id="1",
    image_src="",
    question='How many "cups" are there?',
    answer="Two & a half.",
    contents=("Cup", "Table"),
    kind="counting",
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("judge_mmhal", mmhal_prompt(ITEM, "There are {{ three }} <cups>.")),
        ("judge_mementos", mementos_prompt("A dog barks.", "A {{ dog }} & a toy.")),
    ],
)
def test_prompts_are_as_committed(name: str, text: str) -> None:
    assert text == (GOLDEN / f"{name}.txt").read_text().rstrip("\n")
