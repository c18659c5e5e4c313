"""Readers of benchmark files, on small files of the published formats, and what they refuse."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from sima_ray.data.benchmarks import (
    MementosItem,
    mmhal_images,
    read_halbench,
    read_mementos,
    read_mmhal,
    read_questions,
)
from sima_ray.errors import DataError
from sima_ray.metrics.mmhal import MMHalItem

MMHAL: dict[str, Any] = {
    "question_type": "counting",
    "question_topic": "outdoor",
    "image_id": "2c0e54cb2dcad01d",
    "image_src": "https://c6.staticflickr.com/8/7618/16875241476_3b79e5d79b_o.jpg",
    "image_content": ["Traffic light", "Tree"],
    "question": "How many traffic lights are there?",
    "gt_answer": "There are four.",
    "model_answer": "",
}


def test_mmhal(tmp_path: Path) -> None:
    file = tmp_path / "response_template.json"
    file.write_text(json.dumps([MMHAL], indent=2))
    (item,) = read_mmhal(str(file))
    assert item == MMHalItem(
        image_id="2c0e54cb2dcad01d",
        image_src=MMHAL["image_src"],
        question="How many traffic lights are there?",
        answer="There are four.",
        contents=("Traffic light", "Tree"),
        kind="counting",
    )
    assert mmhal_images(item)[:2] == ["16875241476_3b79e5d79b_o.jpg", "2c0e54cb2dcad01d.jpg"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_type": "colour"}, "question_type 'colour' is none of"),
        ({"gt_answer": None}, "None is no text"),
        ({"image_content": "Tree"}, "is no list"),
    ],
)
def test_mmhal_names_what_is_wrong(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps([MMHAL, MMHAL | change]))
    with pytest.raises(DataError, match=rf"t\.json:2: not a question: .*{words}"):
        read_mmhal(str(file))


def test_halbench(tmp_path: Path) -> None:
    file = tmp_path / "obj_halbench_300_with_image.jsonl"
    rows = [
        {
            "org_idx": 7,
            "image_id": 276731,
            "question": "Provide a thorough description.",
            "image": base64.b64encode(b"jpeg").decode(),
        },
        {"image_id": "42", "question": "What is this photo about?"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_halbench(str(file))
    assert (first.image, first.decoded()) == ("000000276731.jpg", b"jpeg")
    assert (second.coco_id, second.image) == (42, "000000000042.jpg")
    with pytest.raises(DataError, match="image 42: not in the file of questions"):
        second.decoded()
    file.write_text('{"image_id": 1, "question": "?", "image": "%"}\n{"image_id": 2}\n')
    with pytest.raises(DataError, match=r"jsonl:2: not a question"):
        read_halbench(str(file))


def test_mementos_lists_have_two_headers(tmp_path: Path) -> None:
    daily, robots = tmp_path / "dl_description.csv", tmp_path / "robo_description.csv"
    daily.write_text('image_name,description\nrw_1.png,"Two men, fencing,\nlunge."\n')
    robots.write_text("image,description\nrb_1.png,A robotic arm opens a drawer.\n")
    assert read_mementos(str(daily)) == [
        MementosItem("rw_1.png", "Two men, fencing,\nlunge.", "dl")
    ]
    assert read_mementos(str(robots))[0].domain == "robo"
    robots.write_text("image,description\nrb_1.png,\n")
    with pytest.raises(DataError, match=r"csv:2: not a question: .*is no text"):
        read_mementos(str(robots))
    robots.write_text("picture,description\nrb_1.png,A.\n")
    with pytest.raises(DataError, match=r"csv:2: not a question: KeyError\('image'\)"):
        read_mementos(str(robots))


def test_pope_as_published(tmp_path: Path) -> None:
    """One JSON object a line; a separator of lines that is none in JSON stays inside its line."""
    file = tmp_path / "coco_pope_random.json"
    rows = [
        {
            "question_id": 1,
            "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a snowboard in the image?",
            "label": "yes",
        },
        {"question_id": 2, "image": "a.jpg", "text": "a\u2028b", "label": "no"},
    ]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    first, second = read_questions(str(file), "label")
    assert (first.row_id, first.expected) == ("1", "yes")
    assert second.text == "a\u2028b"


def test_empty_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text("[]")
    with pytest.raises(DataError, match="holds no questions"):
        read_mmhal(str(file))
    file.write_text("{}")
    with pytest.raises(DataError, match="must hold a JSON array"):
        read_mmhal(str(file))
