"""Scenes of the demo world: what stands where, and the picture of it."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal

from PIL import Image

from sima_ray.demo.language import BACKGROUNDS, COLORS, NAMES, Caption, Entry, write_caption

Split = Literal["train", "validation", "test"]

SPRITES = Path(__file__).parent / "assets" / "sprites"
SIDE = 96  # pixels of a scene, and of a cell:
CELL = SIDE // 3
LARGE, SMALL = 28, 18  # pixels of a sprite
FADED_ALPHA = 110  # of 255
OBJECT_COUNTS = (1, 2, 3)
OBJECT_WEIGHTS = (0.2, 0.4, 0.4)


@dataclass(frozen=True, slots=True)
class Scene:
    """A description that is exact, and the corner of each object's square in pixels."""

    truth: Caption
    corners: tuple[tuple[int, int], ...]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """(x, y, width, height) of each object, in pixels."""
        sides = [SMALL if entry.small else LARGE for entry in self.truth.entries]
        return [(x, y, side, side) for (x, y), side in zip(self.corners, sides, strict=True)]


def scenes(split: Split, seed: int = 0) -> Iterator[Scene]:
    """Scenes of one split without end, the same ones every time.

    Every description belongs to exactly one split (`split_of`): no scene is in two of them.
    """
    for index in count():
        rng = random.Random(f"scene/{split}/{seed}/{index}")
        scene = _sample(rng, rng.choices(OBJECT_COUNTS, OBJECT_WEIGHTS)[0])
        if split_of(scene.truth) == split:
            yield scene


def crowded_scenes(seed: int = 0) -> Iterator[Scene]:
    """Training scenes with up to nine objects: more to see in each image."""
    for index in count():
        rng = random.Random(f"crowded/{seed}/{index}")
        scene = _sample(rng, rng.randint(3, 9))
        if split_of(scene.truth) == "train":
            yield scene


def split_of(truth: Caption) -> Split:
    """The split that owns a description, by its hash: 80% train, 10% validation, 10% test."""
    bucket = hashlib.sha256(write_caption(truth).encode()).digest()[0] % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def _sample(rng: random.Random, objects: int) -> Scene:
    places = sorted(rng.sample(range(9), objects))
    entries = tuple(
        Entry(place, name, small=rng.random() < 0.5, faded=rng.random() < 0.25)
        for place, name in zip(places, rng.sample(NAMES, objects), strict=True)
    )
    corners = tuple(_corner(entry, rng) for entry in entries)
    return Scene(Caption(rng.choice(COLORS), entries), corners)


def _corner(entry: Entry, rng: random.Random) -> tuple[int, int]:
    """Anywhere in its cell: the sprite never crosses a cell's edge."""
    room = CELL - (SMALL if entry.small else LARGE)
    row, column = divmod(entry.place, 3)
    return column * CELL + rng.randint(0, room), row * CELL + rng.randint(0, room)


def render(scene: Scene) -> Image.Image:
    """The picture: RGB, `SIDE` × `SIDE` pixels."""
    image = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.truth.background or COLORS[0]])
    for entry, corner in zip(scene.truth.entries, scene.corners, strict=True):
        sprite = _sprite(entry.name, entry.small, entry.faded)
        image.paste(sprite, corner, sprite)
    return image


@cache
def _sprite(name: str, small: bool, faded: bool) -> Image.Image:
    sprite = Image.open(SPRITES / f"{name.replace(' ', '_')}.png").convert("RGBA")
    if small:
        sprite = sprite.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
    if faded:
        sprite.putalpha(sprite.getchannel("A").point([a * FADED_ALPHA // 255 for a in range(256)]))
    return sprite
