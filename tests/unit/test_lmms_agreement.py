"""POPE and CHAIR against lmms-eval's own functions, on the same answers.

They run in lmms-eval's environment, in a process of their own. Its CHAIR takes words and base forms from
NLTK, whose data no package index has: it gets our words in place of NLTK's, and does all the rest itself.
"""

import json
import random
import subprocess
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from lmms_task import PYTHON, needs_lmms_eval

from sima_ray.metrics.chair import ChairVocabulary, chair, score_caption
from sima_ray.metrics.pope import parse_yes_no, pope
from sima_ray.metrics.words import singular, tokenize

pytestmark = needs_lmms_eval

PROGRAM = """
import importlib.util, json, sys, types

def words(text):
    return text.split("\\x1f") if text else []

nltk = types.ModuleType("nltk")
corpus, stem = types.ModuleType("nltk.corpus"), types.ModuleType("nltk.stem")
nltk.word_tokenize = words
nltk.pos_tag = lambda tokens: [(token, "NN") for token in tokens]
corpus.wordnet = types.SimpleNamespace(ADJ="a", VERB="v", NOUN="n", ADV="r")
stem.WordNetLemmatizer = lambda: types.SimpleNamespace(lemmatize=lambda word, pos: word)
sys.modules |= {"nltk": nltk, "nltk.corpus": corpus, "nltk.stem": stem}

def load(task):
    root = importlib.util.find_spec("lmms_eval").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(task, f"{root}/tasks/{task}/utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

asked = json.load(sys.stdin)
theirs, found = load("pope"), {}
for name, rows in asked["pope"].items():
    done = [
        theirs.pope_process_results({"question_id": n, "answer": label}, [answer])
        for n, (answer, label) in enumerate(rows)
    ]
    found[name] = {
        key: getattr(theirs, f"pope_aggregate_{key}")([row[f"pope_{key}"] for row in done])
        for key in ("accuracy", "precision", "recall", "f1_score")
    }
theirs = load("coco_cap_chair")
rows = [
    theirs.coco_cap_chair_process_result({"question_id": n, "gt_object": truth}, [text])
    for n, (text, truth) in enumerate(asked["chair"])
]
figures = {
    key: getattr(theirs, f"coco_cap_chair_aggregate_results_{key}")(
        [row[f"coco_cap_{key}"] for row in rows]
    )
    for key in (("chair_s", "chair_i", "recall") if rows else ())
}
json.dump(
    {
        "pope": found,
        "chair": figures,
        "mentions": [row["coco_cap_chair_s"]["pred"] for row in rows],
        "synonyms": theirs.INVERSE_SYNONYM_DICT,
    },
    sys.stdout,
)
"""


def in_lmms_eval(asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [PYTHON, "-I", "-c", PROGRAM],
        input=json.dumps({"pope": {}, "chair": []} | asked),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


PLAIN = ["Yes", "No", "yes", "no", " Yes ", "NO\n"]
ODD = [
    *["Yes.", "No.", "no, there is", "No, there is no dog in the image.", "Yes, there is a dog."],
    *["not sure", "I am not sure.", "", " ", "...", "A dog", "There is a dog.", "There isn't one."],
    *["Yes and no", "yes no", "Yes!", "**Yes**", "Nope", "Yep", "Y", "n", "The answer is yes"],
    *["The image does not show a dog.", "I see no dog. Yes.", "Yesterday", "None"],
]


def drawn(words: Sequence[str], count: int) -> list[tuple[str, str]]:
    draw = random.Random(7)
    return [(draw.choice(words), draw.choice(["yes", "no"])) for _ in range(count)]


@cache
def their_pope() -> dict[str, Any]:
    return in_lmms_eval({"pope": {"plain": drawn(PLAIN, 600), "odd": drawn(PLAIN + ODD, 1200)}})[
        "pope"
    ]


@pytest.mark.parametrize("rule", ["first_sentence", "published", "exact"])
def test_pope_is_theirs_where_the_answer_is_the_word(rule: Any) -> None:
    answers, labels = zip(*drawn([word for word in PLAIN if word != "NO\n"], 600), strict=True)
    rows = list(zip(answers, labels, strict=True))
    theirs = in_lmms_eval({"pope": {"words": rows}})["pope"]["words"]
    ours = pope(answers, labels, rule)
    assert ours.unparsed == 0
    for key in ("accuracy", "precision", "recall", "f1_score"):
        assert getattr(ours, key.removesuffix("_score")) == pytest.approx(theirs[key]), key


def test_pope_is_theirs_on_odd_answers_by_their_rule() -> None:
    theirs = their_pope()
    for name, words in (("plain", PLAIN), ("odd", PLAIN + ODD)):
        rows = drawn(words, {"plain": 600, "odd": 1200}[name])
        answers, labels = zip(*rows, strict=True)
        ours = pope(answers, labels, "exact")
        assert ours.accuracy == pytest.approx(theirs[name]["accuracy"])
        assert ours.precision == pytest.approx(theirs[name]["precision"])
        # Their recall leaves out questions whose answer is neither yes nor no; ours counts them as missed.
        said = [(parse_yes_no(answer, "exact"), label) for answer, label in rows]
        hits, missed = said.count((True, "yes")), said.count((False, "yes"))
        assert theirs[name]["recall"] == pytest.approx(hits / (hits + missed))
        positives = sum(label == "yes" for _, label in rows)
        assert ours.recall == pytest.approx(hits / positives)
        assert (ours.recall == pytest.approx(theirs[name]["recall"])) == (name == "plain")


ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"]
TEMPLATES = [
    *["A {0} next to two {1}s.", "The {0} and a {1} on the {2}.", "{0}s, {1} and {2}: no {3}."],
    *["A passenger {0} behind the {1}.", "A passenger train, a passenger jet and a passenger."],
    *["The seat of the toilet, a {0}.", "A {0} seat and a bow tie.", "A toilet seat, {1} and {0}."],
    *["A baby {4} near an adult {5}, a baby and a {0}.", "A baby animal and an adult cub.", ""],
    *["{0}. {0}! {1}? A train track to the home plate.", "It is hot. Dogs sleep; a {1} does not."],
]
TRUTHS = [["person", "dog"], ["toilet", "tie"], ["train"], ["bird", "cat", "chair", "bowl"]]

NOT_FOUND_BY_THEM = {" motor bike", " cheesecake", "iPhone", "scissors"}
"""Names that lmms-eval's list has with a blank before them or a capital, which no word of a caption has; and
one whose base form is another word to our singulariser."""
COUNTED_TWICE_BY_THEM = {"stove top oven"}
"""They join two words, never three."""


def as_words(caption: str) -> str:
    return "\x1f".join(singular(token) for token in tokenize(caption))


@cache
def their_synonyms() -> ChairVocabulary:
    categories: dict[str, list[str]] = {}
    for name, category in in_lmms_eval({})["synonyms"].items():
        categories.setdefault(category, []).append(name)
    return ChairVocabulary.of(categories)


def test_chair_is_theirs_with_their_synonyms() -> None:
    vocabulary, draw = their_synonyms(), random.Random(3)
    left_out = {*NOT_FOUND_BY_THEM, *COUNTED_TWICE_BY_THEM}
    names = sorted(set(in_lmms_eval({})["synonyms"]) - left_out)
    captions = [
        draw.choice(TEMPLATES).format(*draw.sample(names, 4), *draw.sample(ANIMALS, 2))
        for _ in range(1500)
    ]
    truths = [draw.choice(TRUTHS) for _ in captions]
    rows = [[as_words(caption), truth] for caption, truth in zip(captions, truths, strict=True)]
    theirs = in_lmms_eval({"chair": rows})
    for caption, mentions in zip(captions, theirs["mentions"], strict=True):
        assert vocabulary.mentions(caption) == mentions, caption
    ours = chair(
        [
            score_caption(caption, frozenset(truth), vocabulary)
            for caption, truth in zip(captions, truths, strict=True)
        ]
    )
    for name, figure in theirs["chair"].items():  # in percent
        assert 100 * getattr(ours, name) == pytest.approx(figure), name
    assert len(set(captions)) > 1000 and 10 < theirs["chair"]["chair_s"] < 90


@pytest.mark.parametrize(
    ("caption", "ours", "theirs"),
    [
        # "baby" and "adult" say more of any animal to us, of the ten category names to them.
        ("A baby kitten.", ["cat"], ["person", "cat"]),
        ("A baby kitten and a baby cat.", ["cat", "cat"], ["person", "cat", "cat"]),
        ("A stove top oven.", ["oven"], ["oven", "oven"]),
        ("An iPhone on a motor bike.", ["cell phone", "motorcycle"], []),
        ("A cheesecake and scissors.", ["cake", "scissors"], []),
    ],
)
def test_where_chair_differs(caption: str, ours: list[str], theirs: list[str]) -> None:
    found = in_lmms_eval({"chair": [[as_words(caption), ["tv"]], ["dog", ["dog"]]]})["mentions"][0]
    assert (their_synonyms().mentions(caption), found) == (ours, theirs)
