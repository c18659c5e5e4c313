"""The demo's language: what is written is read back, and no text breaks the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.demo.language import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    NAMES,
    PLACES,
    Caption,
    Entry,
    parse_caption,
    presence_question,
    write_caption,
)

ENTRIES = st.builds(
    Entry,
    place=st.integers(0, len(PLACES) - 1),
    name=st.sampled_from(NAMES),
    small=st.booleans(),
    faded=st.booleans(),
)
CAPTIONS = st.builds(
    Caption, st.sampled_from(COLORS), st.lists(ENTRIES, max_size=5).map(lambda e: tuple(e))
)


@given(CAPTIONS)
def test_a_written_caption_is_read_back(caption: Caption) -> None:
    assert parse_caption(write_caption(caption)) == caption


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    parse_caption(text)


def test_a_caption_reads_as_a_description() -> None:
    dog, cat = Entry(0, "dog"), Entry(4, "cat", small=True, faded=True)
    assert write_caption(Caption("blue", (dog, cat))) == (
        "On a blue background: at the top left a large dog, in the center a small faded cat."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Caption(None, ())),
        ("On a pink background: nothing.", Caption("pink", ())),
        ("There is a dog. AT THE TOP is a Small Dog!", Caption(None, (Entry(1, "dog", True),))),
        ("at the top right a dog", Caption(None, (Entry(2, "dog"),))),
        ("at the moon a large dog", Caption(None, ())),
    ],
)
def test_free_text(text: str, expected: Caption) -> None:
    assert parse_caption(text) == expected


def test_the_objects_are_coco_categories() -> None:
    assert len(CATEGORIES) == 24
    assert len(set(CATEGORIES.values())) == 24
    assert CATEGORIES["dog"] == 18 and CATEGORIES["teddy bear"] == 88
    # No colour may be read as an object ("orange").
    assert not set(BACKGROUNDS) & set(NAMES)


def test_questions_have_their_article() -> None:
    assert presence_question("apple") == "Is there an apple in the image?"
    assert presence_question("dog") == "Is there a dog in the image?"
