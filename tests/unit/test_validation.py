"""`sima validate` on a prompts file and on a run config: every bad row counted, with examples, before any GPU."""

import io
import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from easy_pairs import easy_pairs, write_pairs
from PIL import Image
from typer.testing import CliRunner, Result

from sima_ray.cli import app
from sima_ray.config import DataConfig
from sima_ray.data import prompts
from sima_ray.runtime.validation import check_prompts


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 48), 40).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def prompt(**values: Any) -> dict[str, Any]:
    """As in SIMA's published prompts."""
    return {"image": "000000000001.jpg", "text": "What?", "ground_truth": "A cat.", **values}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "train2017"
    folder.mkdir()
    for number in range(1, 4):
        (folder / f"{number:012}.jpg").write_bytes(jpeg())
    (folder / "cut.jpg").write_bytes(jpeg()[:-100])
    return folder


def zipped(images: Path) -> str:
    file = images.with_suffix(".zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for image in images.iterdir():
            archive.write(image, f"train2017/{image.name}")
    return str(file)


def write(folder: Path, lines: list[Any]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(file)


def validate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["validate", *arguments])


def test_published_prompts_are_good_as_they_are(images: Path, tmp_path: Path) -> None:
    names = ["000000000001.jpg", "train2017/000000000002.jpg", "COCO_train2014_000000000003.jpg"]
    file = write(tmp_path, [prompt(image=name) for name in names])
    for root in (str(images), str(tmp_path), zipped(images)):
        done = validate(file, "--images", root)
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-1] == "3 prompts: 3 good, 0 set aside"
    assert f"{root}: 4 files in 1 shard" in done.stdout


def test_reasons_are_counted_with_examples_in_a_folder_as_in_a_zip(
    images: Path, tmp_path: Path
) -> None:
    lines = [
        prompt(id="good"),
        *(prompt(id=n, image=f"{n}.jpg") for n in range(7)),
        prompt(id="cut", image="cut.jpg"),
        prompt(id="good", image="000000000002.jpg"),
        prompt(id="empty", text=" "),
        '{"image": "0000',
        prompt(id="cut again", image="cut.jpg"),
    ]
    file, report = write(tmp_path, lines), tmp_path / "report.json"
    outputs: list[str] = []
    for root in (str(images), zipped(images)):
        done = validate(file, "--images", root, "--json", str(report))
        assert done.exit_code == 1
        shown = done.stdout.replace(root, "ROOT").splitlines()
        outputs.append("\n".join(line for line in shown if "in 1 shard" not in line))
    assert outputs[0] == outputs[1]
    for line in (
        f"{file}:2: missing_image: image '0.jpg' is not in ROOT (id 0)",
        "… and 2 more: missing_image",
        f"{file}:9: broken_image: image 'cut.jpg': truncated or damaged image (id cut)",
        "13 prompts: 1 good, 12 set aside (missing_image 7, broken_image 2, duplicate_id 1, "
        "empty_field 1, malformed_line 1)",
    ):
        assert line in shown
    found = json.loads(report.read_text())
    assert (found["rows"], found["good"], len(found["problems"])) == (13, 1, 12)
    assert found["set_aside"] == dict(Counter(problem["reason"] for problem in found["problems"]))
    assert [problem["line"] for problem in found["problems"]] == list(range(2, 14))
    assert found["problems"][8] == {
        "file": file,
        "line": 10,
        "id": "good@line-10",
        "reason": "duplicate_id",
        "error": "an earlier line has this id",
    }


def test_json_on_standard_output_is_all_of_it(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path, [prompt(), prompt(image="lost.jpg")])
    done = validate(file, "--images", str(images), "--json", "-")
    assert json.loads(done.stdout)["set_aside"] == {"missing_image": 1}
    assert "2 prompts: 1 good, 1 set aside" in done.stderr
    done = validate(file, "--no-images", "--json", "-")
    assert done.exit_code == 0 and json.loads(done.stdout)["images"] is None


def test_what_is_given_wrongly(images: Path, tmp_path: Path) -> None:
    file = write(tmp_path, [[prompt()]])
    assert "--images" in str(validate(file).exception)
    done = validate(file, "--images", str(images))
    assert done.exit_code == 1 and "`sima data prompts` makes prompts" in done.stdout
    assert "no such image folder" in str(validate(file, "--images", f"{images}.rar").exception)
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4 and no more")
    done = validate(file, "--images", str(tmp_path / "cut.zip"))
    assert "cut.zip: no readable zip archive" in str(done.exception)


def test_an_image_that_many_rows_name_is_loaded_once_and_rows_keep_their_order(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Counter[str] = Counter()
    load = prompts.load_image

    def counted(root: str, name: str, max_pixels: int) -> bytes:
        loaded[name] += 1
        return load(root, name, max_pixels)

    monkeypatch.setattr(prompts, "load_image", counted)
    names = ["000000000001.jpg", "cut.jpg", "lost.jpg"]
    file = write(tmp_path, [prompt(id=n, image=names[n % 3]) for n in range(600)])
    found = check_prompts(DataConfig(prompts=file, images=str(images)))
    assert loaded == dict.fromkeys(names, 1)
    assert [row["row_id"] for row in found.bad] == [str(n) for n in range(600) if n % 3]


def test_pairs_are_told_from_prompts_and_who_takes_them_is_said(images: Path) -> None:
    pairs = write_pairs(easy_pairs(images, 2), images / "pairs.parquet")
    words = r"pairs\.parquet: preference pairs, not .* data\.pairs .*`sima validate CONFIG`"
    assert re.search(words, str(validate(pairs, "--images", str(images)).exception))
    other = images / "other.parquet"
    pq.write_table(pa.table({"image": ["a.png"]}), other)
    done = validate(str(other), "--no-images")
    assert "other.parquet: Parquet, not JSON lines: a prompt is a line" in str(done.exception)
    assert done.exit_code == 1


def test_a_config_is_checked_with_its_evaluation(images: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(
        "\n".join(json.dumps(prompt(id=n, image=f"{n}.jpg")) for n in range(8))
    )
    values = {
        "name": "r",
        "data": {"prompts": write(tmp_path, [prompt()]), "images": str(tmp_path / "elsewhere")},
        "policy": {"model": str(tmp_path / "model")},
        "evaluation": {
            "prompts": str(tmp_path / "test.jsonl"),
            "images": zipped(images),
            "instances": str(tmp_path / "instances.json"),
        },
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    done = validate(str(config), "--images", str(images))
    assert done.exit_code == 1
    shown = done.stdout
    assert f"test.jsonl: missing_image: image '0.jpg' is not in {zipped(images)} (id 0)" in shown
    assert "… and 3 more images of" in shown
    assert str(tmp_path / "model") in shown
    assert "1 prompts: 1 good, 0 set aside" in shown
    assert "image folder" in str(validate(str(config)).exception)
