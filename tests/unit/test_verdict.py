"""Verdicts: the last double bracket decides, and only [[1]] and [[2]] are choices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.critic.verdict import parse_verdict


@pytest.mark.parametrize(
    ("raw", "reason", "choice"),
    [
        ("Both name the dog, 2 adds a cat.\nChoice: [[1]]", "Both name the dog, 2 adds a cat.", 1),
        ("The first is right. [[2]]", "The first is right.", 2),
        ("[[2]]", "", 2),
        ("[[1]] and then words.", "", 1),
        ("At first [[1]], but no: [[2]].", "At first [[1]], but no:", 2),
        ("Fine. **Choice:** [[1]]", "Fine.", 1),
        ("Fine.\n\nchoice [[1]]", "Fine.", 1),
        ("Made by choice: [[2]]", "Made by", 2),
        ("A bad multichoice: [[2]]", "A bad multichoice:", 2),
        ("Choice: [[1]][[2]]", "Choice: [[1]]", 2),
        ("  spaces  \n[[1]]\n", "spaces", 1),
    ],
)
def test_last_verdict_decides(raw: str, reason: str, choice: int) -> None:
    assert parse_verdict(raw) == (reason, choice)


@pytest.mark.parametrize(
    "raw",
    [
        "",
        "Response 1 is better.",
        "[1]",
        "[[]]",
        "[[3]]",
        "[[12]]",
        "[[ 1 ]]",
        "[[Response 1]]",
        "[[tie]]",
        "[[1]",
        "[[1",
        "[[1]] or rather [[3]]",  # the last bracket decides, and it is no choice
        "Write [[1]] or [[2]], so: [[both]]",
        "[[1]] if the first is better, [[",  # cut short while quoting the instructions
    ],
)
def test_anything_else_is_unparseable(raw: str) -> None:
    assert parse_verdict(raw) == (raw.strip(), None)


texts = st.text(st.sampled_from("ab12 \n.:é\u2003]"))
bracketed = st.text(st.sampled_from("12[] x"))


@given(texts, st.sampled_from([1, 2]))
def test_reason_and_choice_come_back(reason: str, choice: int) -> None:
    found, parsed = parse_verdict(f"{reason}\nChoice: [[{choice}]]")
    assert parsed == choice
    assert found == reason.strip()


@given(bracketed, st.sampled_from([1, 2]))
def test_swapping_the_numbers_swaps_the_choice(text: str, choice: int) -> None:
    raw = f"{text} [[{choice}]]"
    assert parse_verdict(raw)[1] == choice
    assert parse_verdict(f"{text} [[{3 - choice}]]")[1] == 3 - choice
