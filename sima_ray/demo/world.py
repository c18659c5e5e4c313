"""Writes a demo world to disk: images, prompts, COCO annotations and POPE questions.

The same arguments give the same bytes every time.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sima_ray.demo.language import (
    CATEGORIES,
    NAMES,
    QUESTIONS,
    phrase,
    presence_question,
    write_caption,
)
from sima_ray.demo.noise import HABITS
from sima_ray.demo.scenes import SIDE, Scene, Split, render, scenes

POPE_KINDS = ("random", "popular", "adversarial")
POPE_QUESTIONS = 3  # yes and as many no questions an image, at most
FIRST_ID: dict[str, int] = {"train": 1, "validation": 1_000_001, "test": 2_000_001}


@dataclass(frozen=True, slots=True)
class World:
    """Where the files of a world lie.

    Attributes:
        folder: The world's folder.
        images: The image root: image names in all files are relative to it.
        prompts: jsonl of {"id", "image", "text", "ground_truth"}.
        instances, captions: Annotations in COCO's formats, with COCO's category ids.
        pope: jsonl of {"question_id", "image", "text", "label"} for each of `POPE_KINDS`.
    """

    folder: Path
    images: Path
    prompts: Path
    instances: Path
    captions: Path
    pope: Mapping[str, Path]


def world_at(folder: Path) -> World:
    """The paths of a world, whether or not it has been built."""
    return World(
        folder=folder,
        images=folder / "images",
        prompts=folder / "prompts.jsonl",
        instances=folder / "instances.json",
        captions=folder / "captions.json",
        pope={kind: folder / f"pope_{kind}.jsonl" for kind in POPE_KINDS},
    )


def build_world(folder: Path, split: Split, scenes: int, seed: int = 0) -> World:
    """Write the first `scenes` scenes of a split.

    Args:
        folder: Made if missing; files of the same names are overwritten.
        split: "train", "validation" or "test"; no scene is in two of them.
        scenes: How many.
        seed: Another seed gives other scenes of the same split.
    """
    world = world_at(folder)
    world.images.mkdir(parents=True, exist_ok=True)
    numbered = _numbered(split, scenes, seed)
    for number, scene in numbered.items():
        render(scene).save(world.images / image_name(number))
    rng = random.Random(f"questions/{split}/{seed}")
    _write_lines(world.prompts, [_prompt(n, s, rng) for n, s in numbered.items()])
    images = [
        {"id": n, "file_name": image_name(n), "width": SIDE, "height": SIDE} for n in numbered
    ]
    _write(world.instances, {"images": images, **_instances(numbered)})
    _write(world.captions, {"images": images, "annotations": _captions(numbered)})
    for kind, path in world.pope.items():
        _write_lines(path, pope_questions(numbered, kind, seed=f"{split}/{seed}"))
    return world


def image_name(number: int) -> str:
    """The file name of an image id, as COCO pads it."""
    return f"{number:012d}.png"


def _numbered(split: Split, count: int, seed: int) -> dict[int, Scene]:
    return dict(enumerate(islice(scenes(split, seed), count), FIRST_ID[split]))


def _prompt(number: int, scene: Scene, rng: random.Random) -> dict[str, Any]:
    return {
        "id": f"{number:012d}",
        "image": image_name(number),
        "text": rng.choice(QUESTIONS),
        "ground_truth": write_caption(scene.truth),
    }


def _instances(numbered: Mapping[int, Scene]) -> dict[str, Any]:
    annotations = [
        {
            "image_id": number,
            "category_id": CATEGORIES[entry.name],
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [_corners(*box)],
        }
        for number, scene in numbered.items()
        for entry, box in zip(scene.truth.entries, scene.boxes(), strict=True)
    ]
    return {
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name} for name, i in CATEGORIES.items()],
    }


def _corners(x: int, y: int, width: int, height: int) -> list[int]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _captions(numbered: Mapping[int, Scene]) -> list[dict[str, Any]]:
    texts = []
    for number, scene in numbered.items():
        listed = " and ".join(phrase(entry) for entry in scene.truth.entries)
        texts.append((number, write_caption(scene.truth)))
        texts.append((number, f"A picture of {listed} before a {scene.truth.background} wall."))
    return [{"id": i, "image_id": n, "caption": text} for i, (n, text) in enumerate(texts, 1)]


def pope_questions(numbered: Mapping[int, Scene], kind: str, seed: str) -> list[dict[str, Any]]:
    """As many "no" as "yes" questions, the absent objects chosen as POPE does (Li et al. 2023).

    Args:
        numbered: The scenes by image id; they alone are counted.
        kind: One of `POPE_KINDS`. random: any; popular: those in most images; adversarial: those
            that captions add to what is present, or name instead of it (`noise.HABITS`). Objects
            of this world stand together by chance, as often one as the other: only the captions
            know what goes with what, and "popular" is hardly more than chance.
        seed: Breaks ties and draws the random ones.
    """
    rng = random.Random(f"pope/{kind}/{seed}")
    present = {n: {entry.name for entry in s.truth.entries} for n, s in numbered.items()}
    often = Counter(name for names in present.values() for name in sorted(names))
    questions = []
    for number, names in present.items():
        absent = [name for name in NAMES if name not in names]
        rng.shuffle(absent)
        if kind == "popular":
            absent.sort(key=lambda name: -often[name])
        elif kind == "adversarial":
            absent.sort(key=lambda name, here=names: -sum(HABITS[h].other == name for h in here))
        for yes, no in zip(sorted(names)[:POPE_QUESTIONS], absent, strict=False):
            questions += [(number, yes, "yes"), (number, no, "no")]
    return [
        {"question_id": i, "image": image_name(n), "text": presence_question(name), "label": label}
        for i, (n, name, label) in enumerate(questions, 1)
    ]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
