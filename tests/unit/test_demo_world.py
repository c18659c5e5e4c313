"""The demo world: deterministic, split without overlap, and in COCO's formats."""

import hashlib
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sima_ray.demo.language import CATEGORIES, parse_caption, write_caption
from sima_ray.demo.scenes import SIDE, render, scenes, split_of
from sima_ray.demo.world import World, build_world

TEXTS = "fe09ef8ed0acff579051d1cf96cd417af53de75909d0acb6c896ffd39e094657"
PIXELS = "76d539f67c38f82096cb0ea259f57c1065235b33eecd9b25ffc517a37c13528d"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"), "validation", 40)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _texts(world: World) -> list[Path]:
    return [world.prompts, world.instances, world.captions, *world.pope.values()]


def test_the_bytes_are_pinned(world: World) -> None:
    texts = hashlib.sha256(b"".join(path.read_bytes() for path in _texts(world)))
    assert texts.hexdigest() == TEXTS
    pixels = hashlib.sha256()
    for path in sorted(world.images.iterdir()):
        pixels.update(np.asarray(Image.open(path)).tobytes())
    assert pixels.hexdigest() == PIXELS


def test_building_twice_gives_the_same_files(world: World, tmp_path: Path) -> None:
    again = build_world(tmp_path, "validation", 40)
    for path in [*_texts(world), *world.images.iterdir()]:
        assert (again.folder / path.relative_to(world.folder)).read_bytes() == path.read_bytes()


def test_no_scene_is_in_two_splits() -> None:
    seen = {
        split: {write_caption(scene.truth) for scene in islice(scenes(split), 500)}
        for split in ("train", "validation", "test")
    }
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    assert all(split_of(s.truth) == "test" for s in islice(scenes("test", seed=5), 50))


def test_prompts_name_images_and_describe_them(world: World) -> None:
    prompts = _lines(world.prompts)
    assert len(prompts) == 40
    assert len({prompt["id"] for prompt in prompts}) == 40
    for prompt, scene in zip(prompts, scenes("validation"), strict=False):
        assert set(prompt) == {"id", "image", "text", "ground_truth"}
        assert Image.open(world.images / prompt["image"]).size == (SIDE, SIDE)
        assert parse_caption(prompt["ground_truth"]) == scene.truth


def test_instances_are_coco_annotations(world: World) -> None:
    instances = json.loads(world.instances.read_text())
    assert {c["name"]: c["id"] for c in instances["categories"]} == CATEGORIES
    names = {number: name for name, number in CATEGORIES.items()}
    named: dict[int, list[str]] = {}
    for annotation in instances["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert 0 <= x <= SIDE - width and 0 <= y <= SIDE - height
        named.setdefault(annotation["image_id"], []).append(names[annotation["category_id"]])
    for image, prompt in zip(instances["images"], _lines(world.prompts), strict=True):
        truth = parse_caption(prompt["ground_truth"])
        assert named[image["id"]] == [entry.name for entry in truth.entries]
    captions = json.loads(world.captions.read_text())
    assert {c["image_id"] for c in captions["annotations"]} == set(named)


@pytest.mark.parametrize("kind", ["random", "popular", "adversarial"])
def test_pope_is_balanced_and_true(world: World, kind: str) -> None:
    truths = {p["image"]: p["ground_truth"] for p in _lines(world.prompts)}
    questions = _lines(world.pope[kind])
    assert sum(q["label"] == "yes" for q in questions) * 2 == len(questions)
    for question in questions:
        name = question["text"].removeprefix("Is there a").removesuffix(" in the image?")
        name = name.removeprefix("n ").strip()
        present = name in {e.name for e in parse_caption(truths[question["image"]]).entries}
        assert present == (question["label"] == "yes")


def test_objects_stay_in_their_cells() -> None:
    for scene in islice(scenes("train"), 100):
        for entry, (x, y, width, height) in zip(scene.truth.entries, scene.boxes(), strict=True):
            row, column = divmod(entry.place, 3)
            assert column * 32 <= x and x + width <= (column + 1) * 32
            assert row * 32 <= y and y + height <= (row + 1) * 32
        assert render(scene).mode == "RGB"
