"""POPE: reading answers, and figures by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.errors import DataError
from sima_ray.metrics.pope import PopeFigures, parse_yes_no, pope


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *[("Yes", True), ("yes.", True), ("Yes, there is no doubt.", True), ("**Yes**", True)],
        *[("No", False), ("No, there is a cat. Yes.", False), ("no, yes", False)],
        *[("There is no dog. Yes it is so.", False), ("There isn't a dog in the image.", False)],
        *[("There isn’t one.", False), ("The image does not show a dog.", False)],
        *[("None of them is a dog.", False), ("I don't see a dog", False)],
        *[("There is nothing like a dog.", False), ("There are zero dogs.", False)],
        *[("There is a dog in the image.", True), ("I can see a dog", True)],
        *[("The image shows a dog", True), ("\n\n Yes", True)],
        *[("I am not sure.", None), ("I don't know", None), ("It is not clear", None)],
        *[("I cannot tell.", None), ("No, I am not sure it is one", False)],
        *[("", None), ("...", None), ("A dog", None), ("Yesterday", None), ("Nowhere near", None)],
    ],
)
def test_answers(answer: str, said: bool | None) -> None:
    assert parse_yes_no(answer) is said


def test_figures_by_hand() -> None:
    # 3 yes (2 right), 2 no (1 right), 1 neither; 4 of 6 labels are yes.
    answers = ["Yes", "yes", "Yes", "No", "No", "A dog"]
    labels = ["yes", "yes", "no", "no", "yes", "Yes"]
    assert pope(answers, labels) == PopeFigures(
        questions=6,
        accuracy=3 / 6,
        precision=2 / 3,
        recall=2 / 4,
        f1=4 / 7,
        yes_share=3 / 6,
        unparsed=1,
    )


@pytest.mark.parametrize("label", ["yes", "no"])
def test_a_constant_answer(label: str) -> None:
    figures = pope(["no"] * 4, [label] * 4)
    assert figures.accuracy == float(label == "no")
    assert (figures.precision, figures.recall, figures.f1, figures.yes_share) == (0, 0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from(["Yes", "No", "?"]), st.booleans()), min_size=1))
def test_f1_is_the_harmonic_mean(rows: list[tuple[str, bool]]) -> None:
    figures = pope([said for said, _ in rows], ["yes" if label else "no" for _, label in rows])
    both = figures.precision + figures.recall
    expected = 2 * figures.precision * figures.recall / both if both else 0
    assert figures.f1 == pytest.approx(expected)
    assert figures.accuracy * len(rows) + figures.unparsed <= len(rows) + 1e-9


@pytest.mark.parametrize(
    ("answers", "labels", "message"),
    [
        (["yes"], [], "1 answers, 0 labels"),
        ([], [], "no questions"),
        (["yes"], ["maybe"], "'maybe'"),
    ],
)
def test_bad_input_is_refused(answers: list[str], labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pope(answers, labels)
