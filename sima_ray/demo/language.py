"""The language of the demo world: one plain sentence describes a scene, and a parser reads it back.

    On a blue background: at the top left a large dog, in the center a small faded cat.

A caption names the background, then every object in reading order: place, size, fading, name.
"""

import re
from dataclasses import dataclass

CATEGORIES: dict[str, int] = {
    "bicycle": 2,
    "car": 3,
    "airplane": 5,
    "bus": 6,
    "train": 7,
    "boat": 9,
    "traffic light": 10,
    "bird": 16,
    "cat": 17,
    "dog": 18,
    "horse": 19,
    "elephant": 22,
    "zebra": 24,
    "giraffe": 25,
    "umbrella": 28,
    "kite": 38,
    "wine glass": 46,
    "banana": 52,
    "apple": 53,
    "broccoli": 56,
    "pizza": 59,
    "chair": 62,
    "clock": 85,
    "teddy bear": 88,
}
"""The objects of the world, with their ids in COCO."""

NAMES = tuple(CATEGORIES)

PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
"""The cells of the 3×3 grid, in reading order."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "black": (35, 35, 40),
    "blue": (120, 170, 235),
    "green": (140, 200, 130),
    "yellow": (240, 225, 120),
    "pink": (245, 180, 200),
    "purple": (165, 130, 205),
}
"""Background colours, as RGB."""

COLORS = tuple(BACKGROUNDS)

QUESTIONS = (
    "Describe the image.",
    "What is in the image, and where?",
    "Give a description of this picture.",
    "What do you see in this picture?",
)
"""The ways in which the world asks for a description."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a caption.

    Attributes:
        place: Index into `PLACES`.
        name: A key of `CATEGORIES`.
        small, faded: Its attributes.
    """

    place: int
    name: str
    small: bool = False
    faded: bool = False


@dataclass(frozen=True, slots=True)
class Caption:
    """What a sentence says: the background (None when it names none) and the objects in order."""

    background: str | None
    entries: tuple[Entry, ...]


def attributes(entry: Entry) -> str:
    """The words before the object's name: "a large", "a small faded", …"""
    return ("a small" if entry.small else "a large") + (" faded" if entry.faded else "")


def phrase(entry: Entry) -> str:
    """The object without its place: "a large dog"."""
    return f"{attributes(entry)} {entry.name}"


def write_caption(caption: Caption) -> str:
    """The sentence for a caption; `parse_caption` reads it back exactly."""
    listed = ", ".join(f"{PLACES[e.place]} {phrase(e)}" for e in caption.entries)
    return f"On a {caption.background or 'plain'} background: {listed or 'nothing'}."


def presence_question(name: str) -> str:
    """The yes/no question on an object's presence, worded as POPE words it."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def _alternatives(words: tuple[str, ...]) -> str:
    # The longest first, so that "at the top left" is not read as "at the top".
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_BACKGROUND = re.compile(rf"\b({_alternatives(COLORS)})\s+background\b")
_ENTRY = re.compile(
    rf"\b({_alternatives(PLACES)}),?\s+(?:is\s+|there\s+is\s+)?"
    rf"an?\s+(large\s+|small\s+)?(faded\s+)?({_alternatives(NAMES)})\b"
)


def parse_caption(text: str) -> Caption:
    """What a text says, in its own order; anything that is not of the language is passed over."""
    lower = text.lower()
    background = _BACKGROUND.search(lower)
    entries = tuple(
        Entry(
            place=PLACES.index(place),
            name=name,
            small=size.strip() == "small",
            faded=bool(faded),
        )
        for place, size, faded, name in _ENTRY.findall(lower)
    )
    return Caption(background[1] if background else None, entries)
