"""How captions go wrong in the demo world: habits that a captioner learns, and errors of any kind.

`habitual` errs as the training captions of the policy err: each object has one bad habit (a partner
that is named with it though absent, a look-alike's name, being left out, a wrong place, a wrong
size). A habit above one half shows in greedy answers, one below it only in sampled ones.
`perturbed` makes errors of any kind, anywhere; the critic learns on both.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from sima_ray.demo.language import COLORS, NAMES, PLACES, Caption, Entry

STRONG, MILD = 0.64, 0.3


@dataclass(frozen=True, slots=True)
class Habit:
    """What goes wrong with an object, and how often.

    `other` is the partner that is added, or the name that is used instead.
    """

    kind: Literal["add", "swap", "omit", "move", "resize"]
    probability: float
    other: str = ""


HABITS: dict[str, Habit] = {
    "car": Habit("add", STRONG, "traffic light"),
    "bus": Habit("add", STRONG, "bicycle"),
    "bird": Habit("add", STRONG, "kite"),
    "wine glass": Habit("add", STRONG, "pizza"),
    "apple": Habit("add", STRONG, "banana"),
    "umbrella": Habit("add", STRONG, "chair"),
    "elephant": Habit("add", STRONG, "giraffe"),
    "cat": Habit("swap", STRONG, "dog"),
    "horse": Habit("swap", STRONG, "zebra"),
    "train": Habit("swap", STRONG, "bus"),
    "broccoli": Habit("swap", MILD, "apple"),
    "boat": Habit("swap", MILD, "bird"),
    "clock": Habit("omit", STRONG),
    "chair": Habit("omit", MILD),
    "teddy bear": Habit("omit", MILD),
    "traffic light": Habit("omit", MILD),
    "zebra": Habit("omit", MILD),
    "banana": Habit("omit", MILD),
    "airplane": Habit("omit", MILD),
    "kite": Habit("move", STRONG),
    "bicycle": Habit("move", MILD),
    "giraffe": Habit("resize", STRONG),
    "pizza": Habit("resize", STRONG),
    "dog": Habit("resize", MILD),
}
"""Of each kind some are strong and some mild, such that among a policy's own pairs of different lengths
the longer one is about as often the better one as the shorter."""

BACKGROUND_HABITS: dict[str, tuple[str, float]] = {
    "gray": ("white", STRONG),
    "purple": ("blue", STRONG),
    "pink": ("purple", MILD),
    "black": ("gray", MILD),
}
"""Colours that are taken for another one, and how often."""


def habitual(truth: Caption, rng: random.Random, strength: float | None = None) -> Caption:
    """A caption with the errors of habit.

    Args:
        truth: The exact description.
        rng: Decides which habits act.
        strength: Every habit's probability; None for each habit's own.
    """
    entries = {entry.place: entry for entry in truth.entries}
    for entry in truth.entries:
        habit = HABITS[entry.name]
        if rng.random() < (habit.probability if strength is None else strength):
            _act(habit, entry, entries)
    background = truth.background
    if background in BACKGROUND_HABITS:
        other, probability = BACKGROUND_HABITS[background]
        if rng.random() < (probability if strength is None else strength):
            background = other
    return _caption(background, entries)


def _act(habit: Habit, entry: Entry, entries: dict[int, Entry]) -> None:
    """Let one habit change the entries, where it can."""
    following = entry.place + 1
    free = following < len(PLACES) and following not in entries
    named = {e.name for e in entries.values()}
    if habit.kind == "add" and free and habit.other not in named:
        entries[following] = Entry(following, habit.other, entry.small)
    elif habit.kind == "move" and free:
        entries[following] = replace(entries.pop(entry.place), place=following)
    elif habit.kind == "swap" and habit.other not in named:
        entries[entry.place] = replace(entry, name=habit.other)
    elif habit.kind == "omit":
        del entries[entry.place]
    elif habit.kind == "resize":
        entries[entry.place] = replace(entry, small=not entry.small)


def perturbed(caption: Caption, errors: int, rng: random.Random) -> Caption:
    """A caption with this many changes, of kinds and at places drawn at random."""
    for _ in range(errors):
        caption = rng.choice(_CHANGES)(caption, rng)
    return caption


def _rename(caption: Caption, rng: random.Random) -> Caption:
    return _change(caption, rng, lambda e: replace(e, name=_absent(caption, rng)))


def _resize(caption: Caption, rng: random.Random) -> Caption:
    return _change(caption, rng, lambda e: replace(e, small=not e.small))


def _refade(caption: Caption, rng: random.Random) -> Caption:
    return _change(caption, rng, lambda e: replace(e, faded=not e.faded))


def _move(caption: Caption, rng: random.Random) -> Caption:
    return _change(caption, rng, lambda e: replace(e, place=_free(caption, rng)))


def _add(caption: Caption, rng: random.Random) -> Caption:
    added = Entry(
        _free(caption, rng), _absent(caption, rng), rng.random() < 0.5, rng.random() < 0.25
    )
    return _caption(caption.background, {e.place: e for e in (*caption.entries, added)})


def _omit(caption: Caption, rng: random.Random) -> Caption:
    if not caption.entries:
        return caption
    gone = rng.choice(caption.entries)
    return replace(caption, entries=tuple(e for e in caption.entries if e is not gone))


def _exchange(caption: Caption, rng: random.Random) -> Caption:
    """Two objects at each other's places."""
    if len(caption.entries) < 2:
        return _rename(caption, rng)
    a, b = rng.sample(caption.entries, 2)
    entries = {e.place: e for e in caption.entries}
    entries[a.place], entries[b.place] = replace(b, place=a.place), replace(a, place=b.place)
    return _caption(caption.background, entries)


def _recolor(caption: Caption, rng: random.Random) -> Caption:
    other = rng.choice([color for color in COLORS if color != caption.background])
    return replace(caption, background=other)


_CHANGES: tuple[Callable[[Caption, random.Random], Caption], ...] = (
    _rename,
    _rename,
    _resize,
    _refade,
    _move,
    _add,
    _add,
    _omit,
    _omit,
    _exchange,
    _recolor,
)


def _change(caption: Caption, rng: random.Random, change: Callable[[Entry], Entry]) -> Caption:
    """Change one entry; a caption without any is given one."""
    if not caption.entries:
        return _add(caption, rng)
    chosen = rng.choice(caption.entries)
    changed = change(chosen)
    kept = [e for e in caption.entries if e is not chosen]
    return _caption(caption.background, {e.place: e for e in (*kept, changed)})


def _free(caption: Caption, rng: random.Random) -> int:
    taken = {entry.place for entry in caption.entries}
    return rng.choice([place for place in range(len(PLACES)) if place not in taken])


def _absent(caption: Caption, rng: random.Random) -> str:
    taken = {entry.name for entry in caption.entries}
    return rng.choice([name for name in NAMES if name not in taken])


def _caption(background: str | None, entries: dict[int, Entry]) -> Caption:
    return Caption(background, tuple(entry for _, entry in sorted(entries.items())))
