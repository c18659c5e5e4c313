"""The oracle counts each kind of error, and the critic's reasons say what the oracle says."""

import random
from itertools import islice

import pytest

from sima_ray.demo.critique import write_critique, write_reason
from sima_ray.demo.curriculum import Pair, draw_pair, relation, right_choice
from sima_ray.demo.language import write_caption
from sima_ray.demo.noise import habitual, perturbed
from sima_ray.demo.oracle import caption_errors, count_errors
from sima_ray.demo.scenes import scenes

TRUTH = "On a blue background: at the top left a large dog, in the center a small cat."


@pytest.mark.parametrize(
    ("response", "errors"),
    [
        (TRUTH, 0),
        ("On a pink background: at the top left a large dog, in the center a small cat.", 1),
        ("On a blue background: at the top left a large dog.", 1),
        ("On a blue background: at the top left a small dog, in the center a small cat.", 1),
        ("On a blue background: at the top left a large faded dog, in the center a small cat.", 1),
        ("On a blue background: at the top left a large bus, in the center a small cat.", 2),
        ("On a blue background: at the top a large dog, in the center a small cat.", 2),
        (TRUTH[:-1] + ", on the right a large bus.", 1),
        (TRUTH[:-1] + ", in the center a large bus.", 1),
        ("On a blue background: nothing.", 2),
        ("", 3),
    ],
)
def test_each_kind_of_error_counts(response: str, errors: int) -> None:
    assert count_errors(response, TRUTH) == errors


def test_a_reason_quotes_both_sides() -> None:
    response = "On a blue background: at the top left a small dog, on the right a large bus."
    assert write_critique(TRUTH, TRUTH, response, 1) == (
        "on a blue background: Response 1 blue, right; Response 2 blue, right."
        " at the top left a large dog: Response 1 a large dog, right;"
        " Response 2 a small dog, 1 error."
        " in the center a small cat: Response 1 a small cat, right; Response 2 nothing, 1 error."
        " on the right nothing: Response 1 nothing, right; Response 2 a large bus, 1 error."
        " In all 0 against 3.\nChoice: [[1]]"
    )


def test_training_pairs_are_balanced_and_swap() -> None:
    rng = random.Random(0)
    kinds = {"shorter": 0, "longer": 0, "equal": 0, "tie": 0}
    for scene in islice(scenes("train"), 600):
        pair = draw_pair(scene.truth, rng)
        kind = relation(scene.truth, pair)
        swapped = Pair(pair.second, pair.first)
        assert relation(scene.truth, swapped) == kind
        if kind == "tie":
            assert right_choice(scene.truth, pair) == right_choice(scene.truth, swapped) == 1
        else:
            assert {right_choice(scene.truth, p) for p in (pair, swapped)} == {1, 2}
        kinds[kind] += 1
    assert all(150 <= kinds[kind] <= 240 for kind in ("shorter", "longer", "equal"))


def test_noise_errs_as_told() -> None:
    rng = random.Random(0)
    for scene in islice(scenes("train"), 200):
        assert habitual(scene.truth, rng, strength=0.0) == scene.truth
        assert caption_errors(perturbed(scene.truth, 1, rng), scene.truth) in (1, 2, 3, 4)
        noisy = write_caption(habitual(scene.truth, rng, strength=1.0))
        total = write_reason(write_caption(scene.truth), noisy, noisy).split(" In all ")[1]
        errors = count_errors(noisy, write_caption(scene.truth))
        assert total == f"{errors} against {errors}."
