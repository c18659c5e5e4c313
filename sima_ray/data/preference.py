"""One record of another project's preference data as what all of them mean: an image, a question, two responses.

Three forms are known, by their keys:

    LLaVA/POVID  image, conversations, rejected_conversations: turns {"from": "human" | "gpt", "value"}
    RLAIF-V      image, question, chosen, rejected; RLHF-V's the same three texts as JSON in `text`
    TRL          images or image, prompt, chosen, rejected, each a text or messages {"role", "content"} whose
                 content is a text or parts {"type": "text" | "image", …}; without `prompt` it is what the two
                 conversations begin with alike

An image is embedded (bytes, or a struct of bytes and path, as `datasets` keeps it) or a name.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sima_ray.data.prompts import MAX_NAME_CHARS, PLACEHOLDER, BadLine, checked_text
from sima_ray.ports import JsonDict
from sima_ray.records import Quarantine

_IDS = ("id", "row_id", "idx")
_ROLES = {"human": "user", "gpt": "assistant"}

COLUMNS = {
    *("image", "images", "prompt", "chosen", "rejected", "question", "text"),
    *("conversations", "rejected_conversations", *_IDS),
}
"""All that is read of a record."""


class Form(StrEnum):
    """Whose form a record has."""

    LLAVA = "LLaVA/POVID"
    RLAIF_V = "RLAIF-V"
    TRL = "TRL"


class SetAside(StrEnum):
    """Why a record became no pair."""

    MALFORMED = "malformed"  # no preference in a form that is known, or a field of a wrong type
    NO_IMAGE = "no_image"
    SEVERAL_IMAGES = "several_images"
    SEVERAL_TURNS = "several_turns"  # a conversation; pairs have one question
    SYSTEM_MESSAGE = "system_message"  # the policy is asked without one
    EMPTY = "empty_field"
    TOO_LONG = "field_too_long"
    IDENTICAL = "identical"  # chosen and rejected say the same
    DUPLICATE = "duplicate"  # image, question and responses are those of an earlier record
    MISSING_IMAGE = "missing_image"
    BROKEN_IMAGE = "broken_image"
    IMAGE_TOO_LARGE = "image_too_large"


class NoPair(Exception):
    """A record that is no usable pair."""

    def __init__(self, reason: SetAside, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Preference:
    """What a record says.

    Attributes:
        form: Whose form it has.
        image: Its name, or the encoded image itself.
        prompt: The question, without image placeholders.
        chosen, rejected: The responses.
        given_id: The record's own id, if it has one.
    """

    form: Form
    image: str | bytes
    prompt: str
    chosen: str
    rejected: str
    given_id: str | None


@dataclass(frozen=True, slots=True)
class _Turn:
    """What one side said: its role, its words, its places for images, and images that lie in these."""

    role: str
    text: str
    places: int = 0
    images: tuple[Any, ...] = ()


def to_preference(record: Any, max_chars: int) -> Preference:
    """Read a record of any known form.

    Args:
        record: As JSON or Arrow has it.
        max_chars: Longer questions or responses are set aside.

    Raises:
        NoPair: It is no usable pair; says why.
    """
    if not isinstance(record, dict):
        raise NoPair(SetAside.MALFORMED, "must be a JSON object")
    form, prompt, chosen, rejected = _sides(record)
    question = _question(prompt)
    answers = [_answer(turns, side) for turns, side in ((chosen, "chosen"), (rejected, "rejected"))]
    image = _image(record, question)
    text = PLACEHOLDER.sub(" ", question.text)
    texts = [
        _text(name, value, max_chars)
        for name, value in zip(("question", "chosen", "rejected"), (text, *answers), strict=True)
    ]
    if texts[1] == texts[2]:
        raise NoPair(SetAside.IDENTICAL, "chosen and rejected say the same")
    return Preference(form, image, *texts, given_id=record_id(record))


def record_id(record: Any) -> str | None:
    """A record's own id: the first field of a usual name that has one."""
    for name in _IDS if isinstance(record, dict) else ():
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool):
            text = str(value).strip()
            if text and len(text) <= MAX_NAME_CHARS and text.isprintable():
                return text
    return None


def _sides(record: JsonDict) -> tuple[Form, list[_Turn], list[_Turn], list[_Turn]]:
    """The form, and the turns of the prompt and of both responses."""
    present = {name for name, value in record.items() if value is not None}
    if {"conversations", "rejected_conversations"} <= present:
        chosen, rejected = (
            _turns(record[name], name) for name in ("conversations", "rejected_conversations")
        )
        return Form.LLAVA, *_parted(chosen, rejected)
    if isinstance(record.get("text"), str) and not {"chosen", "rejected"} <= present:
        record = _texts_in(record["text"])
        present = set(record)
    if not {"chosen", "rejected"} <= present:
        raise NoPair(
            SetAside.MALFORMED,
            f"no preference: it has {', '.join(sorted(present)) or 'no field'}, and lacks chosen and rejected "
            "or conversations and rejected_conversations",
        )
    chosen, rejected = (_turns(record[name], name, "assistant") for name in ("chosen", "rejected"))
    if "question" in present:
        return Form.RLAIF_V, _turns(record["question"], "question", "user"), chosen, rejected
    if "prompt" not in present:
        return Form.TRL, *_parted(chosen, rejected)
    prompt = _turns(record["prompt"], "prompt", "user")
    # Some data sets have a prompt, and whole conversations beside it.
    chosen, rejected = (
        t[len(prompt) :] if t[: len(prompt)] == prompt else t for t in (chosen, rejected)
    )
    return Form.TRL, prompt, chosen, rejected


def _parted(
    chosen: list[_Turn], rejected: list[_Turn]
) -> tuple[list[_Turn], list[_Turn], list[_Turn]]:
    """Two whole conversations as what they begin with alike, up to the last question, and what follows."""
    shared = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b or (a.role == "assistant" and shared + 1 == min(len(chosen), len(rejected))):
            break
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _texts_in(text: str) -> JsonDict:
    try:
        inner = json.loads(text)
    except (ValueError, RecursionError):
        inner = None
    return inner if isinstance(inner, dict) else {"text": text}


def _turns(value: Any, name: str, role: str | None = None) -> list[_Turn]:
    """A text, which `role` said, or a list of turns."""
    if isinstance(value, str) and role is not None:
        return [_Turn(role, value, len(PLACEHOLDER.findall(value)))]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        allowed = "a list of turns" if role is None else "a text or a list of messages"
        raise NoPair(SetAside.MALFORMED, f"{name} must be {allowed}")
    return [_turn(turn, name) for turn in value]


def _turn(turn: JsonDict, name: str) -> _Turn:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    role = _ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ("system", "user", "assistant"):
        raise NoPair(
            SetAside.MALFORMED, f"{name}: a turn of {turn.get('role', turn.get('from'))!r}"
        )
    if isinstance(content, str):
        return _Turn(role, content, len(PLACEHOLDER.findall(content)))
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise NoPair(SetAside.MALFORMED, f"{name}: content must be a text or a list of parts")
    parts = list(_parts(content, name))
    text = "\n".join(part for part in parts if isinstance(part, str))
    pictures = [part for part in parts if not isinstance(part, str)]
    places = max(len(pictures), len(PLACEHOLDER.findall(text)))
    held = tuple(image for picture in pictures for image in picture)
    return _Turn(role, text, places, held)


def _parts(content: list[JsonDict], name: str) -> Iterator[str | tuple[Any, ...]]:
    """Each part: its text, or the image that lies in a place for one, if any does."""
    for part in content:
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str):
            yield text
        elif kind == "image":
            yield () if part.get("image") is None else (part["image"],)
        else:
            raise NoPair(SetAside.MALFORMED, f"{name}: a part of type {kind!r}")


def _question(prompt: list[_Turn]) -> _Turn:
    said = [turn for turn in prompt if turn.role != "system" or turn.text.strip()]
    if any(turn.role == "system" for turn in said):
        raise NoPair(
            SetAside.SYSTEM_MESSAGE, "a system message, and the policy is asked without one"
        )
    if len(said) > 1:
        raise NoPair(SetAside.SEVERAL_TURNS, f"{len(said)} turns before the response")
    if not said or said[0].role != "user":
        raise NoPair(SetAside.MALFORMED, "there is no question that both responses answer")
    return said[0]


def _answer(turns: list[_Turn], side: str) -> str:
    if len(turns) > 1:
        raise NoPair(SetAside.SEVERAL_TURNS, f"{side} has {len(turns)} turns")
    if not turns:
        raise NoPair(SetAside.EMPTY, f"{side} is empty")
    if turns[0].role != "assistant" or turns[0].images:
        raise NoPair(SetAside.MALFORMED, f"{side} is no response in words")
    return turns[0].text


def _image(record: JsonDict, question: _Turn) -> str | bytes:
    """The one image of a record."""
    images = record.get("images")
    if images is None:
        single = record.get("image")
        images = list(question.images) if single is None else [single]
    if not isinstance(images, list):
        images = [images]
    images = [image for image in map(_encoded, images) if image]
    if not images:
        raise NoPair(SetAside.NO_IMAGE, "there is no image")
    if len(images) > 1 or question.places > 1:
        count = max(len(images), question.places)
        raise NoPair(SetAside.SEVERAL_IMAGES, f"{count} images, and a pair has one")
    return images[0]


def _encoded(image: Any) -> str | bytes | None:
    """An image's bytes, or else its name."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None or isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise NoPair(SetAside.MALFORMED, "the image is neither a name nor encoded")
    return _text("image", image, MAX_NAME_CHARS) if image.strip() else None


def _text(name: str, value: str, limit: int) -> str:
    try:
        return checked_text(name, value, limit)
    except BadLine as bad:
        malformed = bad.reason is Quarantine.MALFORMED_LINE
        reason = SetAside.MALFORMED if malformed else SetAside(bad.reason.value)
        raise NoPair(reason, str(bad)) from None
