"""Exports load where they are meant to be read, and say the same as the pairs."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Image as ImageFeature
from datasets import List, load_dataset
from PIL import Image

from sima_ray.data.export import export_llava, export_trl
from sima_ray.data.prompts import PLACEHOLDER
from sima_ray.images import ImageProblem
from sima_ray.records import PreferencePair


@pytest.fixture
def pairs(tmp_path: Path) -> list[PreferencePair]:
    """A hundred pairs on two images, with characters that formats like to break."""
    (tmp_path / "images").mkdir()
    for name, size in (("a.jpg", (20, 10)), ("b.png", (10, 30))):
        Image.new("RGB", size, "red").save(tmp_path / "images" / name)
    return [
        PreferencePair(
            row_id=f"r{n}",
            image="ab"[n % 2] + (".jpg", ".png")[n % 2],
            prompt=f"What is “{n}”?\nSay it.",
            chosen=f'A "cat" \\ № {n} 🐈',
            rejected=f"A dog {n}",
            chosen_from="greedy",
            rejected_from="sampled",
        )
        for n in range(100)
    ]


def test_llava_json(pairs: list[PreferencePair], tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    assert export_llava(iter(pairs), str(path)) == 100
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["id"] for row in rows] == [pair.row_id for pair in pairs]
    for row, pair in zip(rows, pairs, strict=True):
        assert set(row) == {"id", "image", "conversations", "rejected_conversations"}
        assert row["image"] == pair.image
        question = {"from": "human", "value": f"<image>\n{pair.prompt}"}
        assert row["conversations"] == [question, {"from": "gpt", "value": pair.chosen}]
        assert row["rejected_conversations"] == [question, {"from": "gpt", "value": pair.rejected}]
        assert PLACEHOLDER.sub("", row["conversations"][0]["value"]) == pair.prompt


def test_trl_parquet_as_pyarrow_reads_it(pairs: list[PreferencePair], tmp_path: Path) -> None:
    path = tmp_path / "pairs.trl.parquet"
    assert export_trl(iter(pairs), str(path), images=str(tmp_path / "images")) == 100
    table = pq.read_table(path)
    assert table.column_names == ["images", "prompt", "chosen", "rejected"]
    assert table["images"][1][0]["bytes"].as_py() == (tmp_path / "images" / "b.png").read_bytes()


def test_trl_parquet_as_datasets_reads_it(pairs: list[PreferencePair], tmp_path: Path) -> None:
    """Features are found without being told, and images come decoded."""
    path = tmp_path / "pairs.trl.parquet"
    export_trl(pairs, str(path), images=str(tmp_path / "images"))
    cache = str(tmp_path / "cache")
    rows: Any = load_dataset("parquet", data_files=str(path), cache_dir=cache, split="train")
    assert rows.num_rows == 100
    assert isinstance(rows.features["images"], List)
    assert isinstance(rows.features["images"].feature, ImageFeature)
    row, pair = rows[1], pairs[1]
    (image,) = row["images"]
    assert isinstance(image, Image.Image) and image.size == (10, 30)
    (message,) = row["prompt"]
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"] == pair.prompt
    for column, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        assert row[column] == [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def test_no_pairs(tmp_path: Path) -> None:
    assert export_llava([], str(tmp_path / "empty.json")) == 0
    assert json.loads((tmp_path / "empty.json").read_text()) == []
    assert export_trl([], str(tmp_path / "empty.parquet"), images=str(tmp_path)) == 0
    assert pq.read_table(tmp_path / "empty.parquet").num_rows == 0


def test_an_image_that_is_gone(pairs: list[PreferencePair], tmp_path: Path) -> None:
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(ImageProblem, match=r"b\.png"):
        export_trl(pairs, str(tmp_path / "x.parquet"), images=str(tmp_path / "images"))


def test_the_image_bytes_decode(pairs: list[PreferencePair], tmp_path: Path) -> None:
    path = tmp_path / "pairs.trl.parquet"
    export_trl(pairs[:1], str(path), images=str(tmp_path / "images"))
    data = pq.read_table(path)["images"][0][0]["bytes"].as_py()
    assert Image.open(io.BytesIO(data)).size == (20, 10)
