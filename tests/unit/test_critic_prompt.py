"""What the critic reads: golden renders of both layouts, and text that stays literal."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.critic.prompt import CriticPrompt, Layout, in_order, load_examples
from sima_ray.errors import ConfigError
from sima_ray.ports import Part

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = load_examples()
CASE = ("What is on the grass?", "A brown dog.", "A brown dog lies there.", "Two cats play.")
HOSTILE = "{{ first }} {% if x %} {# gone #} </s> <image> & <b> \\n [[1]] {0} %s"


def shown(parts: list[Part]) -> str:
    """A message as text, with the place of the image marked."""
    return "".join(part.get("text", "<the image>\n") for part in parts)


def text_of(parts: list[Part]) -> str:
    return "".join(part["text"] for part in parts if "text" in part)


@pytest.mark.parametrize("layout", list(Layout))
def test_golden(layout: Layout) -> None:
    """The files are the prompts in full; a change of wording must show in a diff of them."""
    content = CriticPrompt(layout, EXAMPLES).content(b"image", *CASE)
    golden = (GOLDEN / f"critic_{layout}.txt").read_text(encoding="utf-8")
    assert shown(content) + "\n" == golden


def test_golden_without_ground_truth_or_image() -> None:
    question, _, first, second = CASE
    content = CriticPrompt(Layout.IMAGE_FIRST, EXAMPLES).content(
        None, question, None, first, second
    )
    full = (GOLDEN / "critic_image_first.txt").read_text(encoding="utf-8")
    expected = full.removeprefix("<the image>\n").replace("Ground truth: A brown dog.\n", "")
    assert shown(content) + "\n" == expected


def test_layouts_hold_the_same_pieces() -> None:
    first, second = (CriticPrompt(layout, EXAMPLES).content(b"image", *CASE) for layout in Layout)
    assert text_of(first) == text_of(second)
    for content in (first, second):
        assert [part["image"] for part in content if "image" in part] == [b"image"]
    assert [part["type"] for part in first] == ["image", "text"]
    assert [part["type"] for part in second] == ["text", "image", "text"]


def test_examples_first_begins_alike_for_all_rows() -> None:
    # What a prefix cache can keep: everything before the image.
    prompt = CriticPrompt(Layout.EXAMPLES_FIRST, EXAMPLES)
    assert prompt.content(b"a", *CASE)[0] == prompt.content(b"b", "q", None, "x", "y")[0]


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("place", range(4))
def test_template_syntax_in_texts_stays_literal(layout: Layout, place: int) -> None:
    prompt = CriticPrompt(layout, EXAMPLES)
    marked = [*CASE[:place], "MARK", *CASE[place + 1 :]]
    hostile = [*CASE[:place], HOSTILE, *CASE[place + 1 :]]
    expected = text_of(prompt.content(b"", *marked)).replace("MARK", HOSTILE)
    assert text_of(prompt.content(b"", *hostile)) == expected


@given(st.text(st.sampled_from("{}%#[]12 \n&<é'\"\\")))
def test_any_response_is_shown_as_it_is(text: str) -> None:
    prompt = CriticPrompt(Layout.IMAGE_FIRST, EXAMPLES)
    rendered = text_of(prompt.content(b"", "q", "g", text, "second"))
    assert rendered.endswith(f"\nResponse 1: {text}\nResponse 2: second\nReason:")


def test_syntax_in_examples_stays_literal() -> None:
    examples = (replace(EXAMPLES[0], reason=HOSTILE), EXAMPLES[1])
    rendered = text_of(CriticPrompt(Layout.IMAGE_FIRST, examples).content(b"", *CASE))
    assert f"Reason: {HOSTILE}\nChoice: [[1]]" in rendered


def test_version_names_what_shapes_the_prompt() -> None:
    prompt = CriticPrompt(Layout.IMAGE_FIRST, EXAMPLES)
    changed = [
        CriticPrompt(Layout.EXAMPLES_FIRST, EXAMPLES),
        CriticPrompt(Layout.IMAGE_FIRST, EXAMPLES[::-1]),
        CriticPrompt(Layout.IMAGE_FIRST, (replace(EXAMPLES[0], reason="x"), EXAMPLES[1])),
    ]
    versions = [prompt.version, *(other.version for other in changed)]
    assert len(set(versions)) == 4
    assert all(len(version) == 12 for version in versions)
    assert prompt.version == CriticPrompt(Layout.IMAGE_FIRST, load_examples()).version


def test_order() -> None:
    assert in_order("12", ["a", "b"]) == ("a", "b")
    assert in_order("21", ["a", "b"]) == ("b", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("- question: q\n", "cannot be read"),
        ("[]", "one with choice 1 and one with choice 2"),
    ],
)
def test_bad_examples_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "examples.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_examples(path)
    with pytest.raises(ConfigError, match=r"missing\.yaml: .* cannot be read: No such file or"):
        load_examples(tmp_path / "missing.yaml")
