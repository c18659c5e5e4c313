"""From LLaVA-Instruct's own format to pairs, by the commands and stages that a run uses; images stay in shards."""

import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_policy import SharedBook, ask, fake
from PIL import Image
from typer.testing import CliRunner, Result

from sima_ray.cli import app
from sima_ray.config import CriticConfig, DataConfig, GenerationConfig, PairsConfig
from sima_ray.data.export import export_trl
from sima_ray.data.prompts import index_prompts
from sima_ray.data.sinks import read_pairs, write_pairs, write_preferences
from sima_ray.data.stages import critique, generate, outcome, read_prompts
from sima_ray.records import Quarantine

pytestmark = pytest.mark.usefixtures("ray_cluster")

WAYS = ["plain", "same", "tie", "mumble"]


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 24), 40).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def test_from_llava_instruct_to_pairs_with_the_images_in_shards(tmp_path: Path) -> None:
    """`sima data prompts`, `sima validate`, then the stages: no image is ever unpacked."""
    (tmp_path / "shards").mkdir()
    prompts, image = str(tmp_path / "prompts.jsonl"), jpeg()
    for shard in range(2):
        with zipfile.ZipFile(tmp_path / "shards" / f"train2017-{shard}.zip", "w") as archive:
            for number in range(shard, 30, 2):
                spoilt = image[:-20] if number == 7 else image
                archive.writestr(f"train2017/{number:012}.jpg", spoilt)
    records = [
        {
            "id": f"{number:012}",
            "image": f"coco/train2017/{number:012}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{ask(number, WAYS[number % 4])}"},
                {"from": "gpt", "value": "The truth."},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "No more."},
            ],
        }
        for number in range(32)  # two whose images are in no shard
    ]
    (tmp_path / "detail_23k.json").write_text(json.dumps([*records, records[0]]))
    drawn = sima("data", "prompts", str(tmp_path / "detail_23k.json"), "-o", prompts)
    assert (
        drawn.exit_code == 0 and "33 records, 32 prompts, 1 set aside (duplicate 1)" in drawn.stdout
    )
    data = DataConfig(prompts=prompts, images=str(tmp_path / "shards"))
    checked = sima("validate", prompts, "--images", data.images)
    expected = Counter({Quarantine.MISSING_IMAGE: 2, Quarantine.BROKEN_IMAGE: 1})
    counts = ", ".join(f"{reason} {n}" for reason, n in expected.most_common())
    assert f"32 prompts: 29 good, 3 set aside ({counts})" in checked.stdout

    index, folder = str(tmp_path / "prompts.parquet"), str(tmp_path / "preferences")
    index_prompts(data, index)
    how: Any = {"data": data, "generation": GenerationConfig(), "connect": fake(SharedBook())}
    rows = generate(read_prompts(index, done=folder), seed=7, **how)
    write_preferences(outcome(critique(rows, critic=CriticConfig(), **how)), folder)
    ledger = write_pairs(folder, str(tmp_path / "round-1"), PairsConfig(), 7, rows=32)
    assert +Counter(ledger.quarantined) == expected
    ledger.check()
    assert (ledger.rows, ledger.pairs) == (32, 8)
    pairs = read_pairs(str(tmp_path / "round-1" / "pairs.parquet"))
    assert export_trl(pairs, str(tmp_path / "trl.parquet"), images=data.images) == 8
    images = pq.read_table(tmp_path / "trl.parquet")["images"].to_pylist()
    assert all(row[0]["bytes"] == image for row in images)


def sima(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)
