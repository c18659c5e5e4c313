"""Prompts files, good and bad: every line is one row, every bad one has its reason."""

import io
import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sima_ray.config import DataConfig
from sima_ray.data.locations import load_image, open_location, resolve_image
from sima_ray.data.prompts import (
    _max_line_bytes,
    check_images,
    describe,
    index_prompts,
    problem_lines,
    read_index,
)
from sima_ray.errors import DataError
from sima_ray.images import ImageProblem
from sima_ray.records import ROW_SCHEMA, Quarantine


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """A whole PNG of side × side black pixels, in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    packer = zlib.compressobj()
    row = b"\0" + bytes(side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def prompt(**values: Any) -> dict[str, Any]:
    return {"image": "a.jpg", "text": "What is it?", "ground_truth": "A cat.", **values}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg())
    return folder


def config(images: Path, lines: list[Any] | bytes, **values: Any) -> DataConfig:
    file = images.parent / "prompts.jsonl"
    if isinstance(lines, bytes):
        file.write_bytes(lines)
    else:
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return DataConfig(prompts=str(file), images=str(images), **values)


def index(data: DataConfig) -> list[dict[str, Any]]:
    """Index a prompts file; the rows, of which the counts must agree."""
    destination = Path(data.images).parent / "run" / "prompts.parquet"
    counts = index_prompts(data, str(destination))
    table = pq.read_table(destination)
    assert table.schema.equals(ROW_SCHEMA)
    rows = table.to_pylist()
    assert counts.rows == len(rows) == len({row["row_id"] for row in rows})
    assert counts.good == sum(row["quarantine"] is None for row in rows)
    assert counts.problems == Counter(row["quarantine"] for row in rows if row["quarantine"])
    return rows


def test_each_bad_row_has_one_clear_line_and_the_good_ones_stay(images: Path) -> None:
    (images / "cut.jpg").write_bytes(jpeg((640, 480))[:9000])
    (images / "huge.png").write_bytes(huge_png(10_000))
    (images / "note.jpg").write_text("not an image")
    good = json.dumps(prompt(id="one")).encode()
    missing_field = {"image": "a.jpg", "text": "What?", "id": "two"}
    lines = [
        good,
        json.dumps(missing_field).encode(),
        json.dumps(prompt(id="three", image="nowhere.jpg")).encode(),
        json.dumps(prompt(id="four", image="cut.jpg")).encode(),
        json.dumps(prompt(id="five", image="huge.png")).encode(),
        good,
        json.dumps(prompt(id="seven", ground_truth=" \n")).encode(),
        json.dumps(prompt(id="eight", text=["What?"])).encode(),
        b'{"image": "a.jpg", "text": "\xff\xfe", "ground_truth": "x"}',
        json.dumps(prompt(id="ten", image="note.jpg")).encode(),
        json.dumps(prompt(id="eleven", image="../secret.jpg")).encode(),
        b"[1, 2]",
        json.dumps(prompt(id="thirteen", text="long " * 10_000)).encode(),
        json.dumps(prompt(id="fourteen")).encode(),
        good[:40],
    ]
    data = config(images, b"\n".join(lines))
    rows = index(data)
    bad = {int(row["source"].rpartition(":")[2]): row for row in rows if row["quarantine"]}
    for row in check_images(data, str(images.parent / "run" / "prompts.parquet")):
        bad[int(row["source"].rpartition(":")[2])] = row
    assert {number: row["quarantine"] for number, row in bad.items()} == {
        2: "missing_field",
        3: "missing_image",
        4: "broken_image",
        5: "image_too_large",
        6: "duplicate_id",
        7: "empty_field",
        8: "malformed_line",
        9: "malformed_line",
        10: "broken_image",
        11: "missing_image",
        12: "malformed_line",
        13: "field_too_long",
        15: "malformed_line",
    }
    for number, row in bad.items():
        line = describe(row)
        assert "\n" not in line and len(line) < 500
        assert line.startswith(f"{data.prompts}:{number}: {row['quarantine']}: ")
        assert row["row_id"] in line
    assert "two" in describe(bad[2]) and "'ground_truth' is missing" in describe(bad[2])
    assert "outside the image folder" in describe(bad[11])
    assert "may have been cut" in describe(bad[15])
    assert "10000 × 10000" in describe(bad[5])
    assert len(list(problem_lines(str(images.parent / "run" / "prompts.parquet")))) == 8
    assert [row["row_id"] for row in rows if row["source"].endswith((":1", ":14"))] == [
        "one",
        "fourteen",
    ]


def test_ids_are_the_inputs_own_or_a_hash_of_what_it_says(images: Path) -> None:
    rows = index(
        config(
            images,
            [
                prompt(id=7),
                prompt(),
                prompt(text="<image>\nWhat is it?"),
                prompt(text="Another?\n<image>"),
                prompt(id=None, text="A <image> in the middle"),
            ],
        )
    )
    assert rows[0]["row_id"] == "7"
    assert len(rows[1]["row_id"]) == 20
    assert rows[2]["quarantine"] == "duplicate_id"
    assert rows[3]["text"] == "Another?"
    assert rows[4]["text"] == "A in the middle"
    again = index(config(images, [prompt()]))
    assert again[0]["row_id"] == rows[1]["row_id"]


def test_a_bad_line_does_not_take_an_id_away_from_a_good_one(images: Path) -> None:
    rows = index(
        config(
            images, [prompt(id="x", text=""), prompt(id="x"), prompt(id="x@line-1"), prompt(id="x")]
        )
    )
    assert [row["quarantine"] for row in rows] == [
        "empty_field",
        None,
        "duplicate_id",
        "duplicate_id",
    ]


def test_blank_lines_are_skipped_and_lines_keep_their_numbers(images: Path) -> None:
    lines = "\n\n" + json.dumps(prompt(id="a")) + "\r\n  \n" + json.dumps(prompt(id="b"))
    rows = index(config(images, lines.encode()))
    assert [row["source"].rpartition(":")[2] for row in rows] == ["3", "5"]


def test_limit_takes_the_first(images: Path) -> None:
    rows = index(config(images, [prompt(id=n) for n in range(5)], limit=3))
    assert [row["row_id"] for row in rows] == ["0", "1", "2"]


def test_byte_order_mark_and_half_a_surrogate_pair(images: Path) -> None:
    first = b"\xef\xbb\xbf" + json.dumps(prompt()).encode() + b"\n"
    second = b'{"image": "a.jpg", "text": "\\ud83d", "ground_truth": "x"}\n'
    rows = index(config(images, first + second))
    assert [row["quarantine"] for row in rows] == [None, "malformed_line"]


def test_a_line_of_many_megabytes_is_never_held(images: Path) -> None:
    """Ten times the chunk size; the lines around it are read as ever."""
    lines = [json.dumps(prompt(id="a")).encode(), b'"' + b"x" * 10_000_000, b"{}"]
    rows = index(config(images, b"\n".join(lines)))
    assert [row["quarantine"] for row in rows] == [None, "field_too_long", "missing_field"]
    assert rows[1]["text"] is None


def test_a_line_of_fields_at_their_limits_is_read(images: Path) -> None:
    data = config(images, [prompt(text="\N{GRINNING FACE}" * 100, ground_truth="x" * 100)])
    data = data.model_copy(update={"max_text_chars": 100})
    longest = json.dumps(prompt(text="\N{GRINNING FACE}" * 100))
    assert len(longest) < _max_line_bytes(data)
    assert index(data)[0]["quarantine"] is None


def test_compressed_prompts(images: Path) -> None:
    import gzip

    file = images.parent / "prompts.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(prompt(id="z")).encode()))
    rows = index(DataConfig(prompts=str(file), images=str(images)))
    assert rows[0]["row_id"] == "z"


def test_what_cannot_be_indexed_at_all(images: Path) -> None:
    destination = str(images.parent / "out.parquet")
    empty = config(images, b"\n\n")
    with pytest.raises(DataError, match="holds no prompts"):
        index_prompts(empty, destination)
    with pytest.raises(
        DataError, match=r"^/nowhere\.jsonl: cannot be read: No such file or directory$"
    ):
        index_prompts(empty.model_copy(update={"prompts": "/nowhere.jsonl"}), destination)
    with pytest.raises(DataError, match="no such image folder"):
        index_prompts(empty.model_copy(update={"images": "/nowhere"}), destination)
    with pytest.raises(DataError, match="cannot be opened"):
        index_prompts(empty.model_copy(update={"images": "ftp2://x/y"}), destination)
    with pytest.raises(
        DataError, match=r"out\.parquet: cannot be read: No such file or directory$"
    ):
        list(read_index(destination))
    assert list(images.parent.glob("out*")) == []


@given(
    st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)), max_size=12)
)
def test_every_line_that_is_not_blank_is_one_row(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any") / "images"
    folder.mkdir()
    content = b"\n".join([*lines, json.dumps(prompt()).encode()])
    expected = [n for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    rows = index(config(folder, content))
    assert [int(row["source"].rpartition(":")[2]) for row in rows] == expected
    assert rows[-1]["quarantine"] in (None, "duplicate_id")


def test_coco_layouts_find_the_same_image(tmp_path: Path) -> None:
    leaf = "000000401804.jpg"
    names = [
        leaf,
        f"train2017/{leaf}",
        f"coco/train2017/{leaf}",
        f"COCO_train2014_{leaf}",
        f"train2014/COCO_train2014_{leaf}",
    ]
    for place in names:
        root = tmp_path / place.replace("/", "-")
        (root / place).parent.mkdir(parents=True)
        (root / place).write_bytes(b"x")
        for name in names:
            assert resolve_image(str(root), name).path == str(root / place)
        with pytest.raises(ImageProblem, match="is not in"):
            resolve_image(str(root), f"gqa/{leaf}")


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "x/../../a.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "s3://b/a.jpg",
        "a\0.jpg",
        "..",
        "//a.jpg",
    ],
)
def test_no_image_name_leaves_the_root(images: Path, name: str) -> None:
    (images.parent / "a.jpg").write_bytes(jpeg())
    with pytest.raises(ImageProblem) as problem:
        resolve_image(str(images), name)
    assert problem.value.reason is Quarantine.MISSING_IMAGE
    assert repr(name) in str(problem.value)


def test_absolute_names_and_uris_within_the_root(images: Path) -> None:
    path = str(images / "a.jpg")
    assert resolve_image(str(images), path).path == path
    assert resolve_image(f"file://{images}", f"file://{path}").path == path
    assert resolve_image(f"file://{images}/", "./a.jpg").path == path
    assert open_location(f"file://{images}")[1] == str(images)
    assert load_image(str(images), "a.jpg", 10_000) == (images / "a.jpg").read_bytes()
    with pytest.raises(ImageProblem, match="is not in"):
        resolve_image(str(images), "")
