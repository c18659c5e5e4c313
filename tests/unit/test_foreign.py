"""Other projects' preference data as pairs: three forms that say the same, and every record a pair or counted."""

import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from easy_pairs import easy_pairs
from foreign_data import IMAGE, encoded, messages, povid, rlaif_v, trl
from PIL import Image
from typer.testing import CliRunner

from sima_ray.cli import app
from sima_ray.data.export import export_llava, export_trl
from sima_ray.data.foreign import Taken, origin_of, take_pairs
from sima_ray.data.locations import load_image
from sima_ray.data.preference import Form, NoPair, SetAside, to_preference
from sima_ray.data.record_files import read_records
from sima_ray.errors import DataError
from sima_ray.records import PreferencePair


@pytest.fixture
def pairs(tmp_path: Path) -> list[PreferencePair]:
    """Ten pairs; two share an image."""
    made = easy_pairs(tmp_path / "source", 10)
    (tmp_path / "source" / "9.png").write_bytes((tmp_path / "source" / "8.png").read_bytes())
    return made


def take(sources: list[str], folder: Path, images: Path | None = None) -> Taken:
    return take_pairs(
        sources,
        str(folder / "pairs.parquet"),
        images=str(images or folder / "images"),
        max_pixels=1_000_000,
        max_chars=2_000,
    )


def read(folder: Path) -> list[PreferencePair]:
    return [PreferencePair(**row) for row in pq.read_table(folder / "pairs.parquet").to_pylist()]


def said(pair: PreferencePair, images: Path) -> tuple[bytes, ...]:
    """All that a pair means: what its image holds, and its texts."""
    texts = (pair.prompt, pair.chosen, pair.rejected)
    return load_image(str(images), pair.image, 10**6), *(text.encode() for text in texts)


def test_three_forms_say_the_same(pairs: list[PreferencePair], tmp_path: Path) -> None:
    source = tmp_path / "source"
    wanted = [said(pair, source) for pair in pairs]
    made: dict[Form, Callable[[], str]] = {
        Form.RLAIF_V: lambda: rlaif_v(pairs, source, tmp_path / "rlaif.parquet"),
        Form.TRL: lambda: trl(pairs, source, tmp_path / "saved"),
        Form.LLAVA: lambda: povid(pairs, tmp_path / "povid.json"),
    }
    for form, make in made.items():
        folder = tmp_path / form.name
        images = source if form is Form.LLAVA else folder / "images"
        taken = take([make()], folder, images)
        (found,) = taken.sources
        assert (found.records, found.pairs, dict(found.forms)) == (10, 10, {form: 10})
        rows = read(folder)
        assert [said(row, images) for row in rows] == wanted
        assert {row.chosen_from for row in rows} == {"given"}
        if form is not Form.TRL:  # its records have no id
            assert [row.row_id for row in rows] == [pair.row_id for pair in pairs]
        if form is not Form.LLAVA:
            assert (taken.written, taken.there) == (9, 0)
            assert len([file for file in images.rglob("*") if file.is_file()]) == 9


def test_what_a_run_exports_comes_back(pairs: list[PreferencePair], tmp_path: Path) -> None:
    source = tmp_path / "source"
    export_trl(pairs, str(tmp_path / "pairs.trl.parquet"), images=str(source))
    export_llava(pairs, str(tmp_path / "pairs.llava.json"))
    wanted = [said(pair, source) for pair in pairs]
    take([str(tmp_path / "pairs.trl.parquet")], tmp_path / "a")
    assert [said(row, tmp_path / "a" / "images") for row in read(tmp_path / "a")] == wanted
    take([str(tmp_path / "pairs.llava.json")], tmp_path / "b", source)
    assert [said(row, source) for row in read(tmp_path / "b")] == wanted


QUESTION = messages("user", "Is it so?", image=True)
BASE = {"image": "0.png", "prompt": "Is it so?", "chosen": "Yes.", "rejected": "No."}
TURN = {"from": "human", "value": "<image>\nIs it so?"}


@pytest.mark.parametrize(
    "record",
    [
        BASE,
        BASE | {"prompt": "<image>Is it so?", "chosen": " Yes.\n"},
        {"images": ["0.png"], **BASE, "image": None, "prompt": QUESTION},
        BASE | {"prompt": QUESTION, "chosen": messages("assistant", "Yes.")},
        # The prompt is in the two conversations alone, or in them too.
        {
            "images": ["0.png"],
            "chosen": QUESTION + messages("assistant", "Yes."),
            "rejected": QUESTION + messages("assistant", "No."),
        },
        BASE | {"prompt": QUESTION, "chosen": QUESTION + messages("assistant", "Yes.")},
        BASE | {"prompt": [{"role": "system", "content": ""}, *QUESTION]},
        BASE | {"prompt": [{"role": "user", "content": [
            {"type": "image", "image": "0.png"}, {"type": "text", "text": "Is it so?"}]}], "image": None},
        {"image": {"bytes": None, "path": "0.png"}, "question": "Is it so?", "chosen": "Yes.", "rejected": "No."},
        {"image": "0.png", "text": json.dumps({"question": "Is it so?", "chosen": "Yes.", "rejected": "No."})},
        {
            "image": "0.png",
            "conversations": [TURN, {"from": "gpt", "value": "Yes."}],
            "rejected_conversations": [TURN, {"from": "gpt", "value": "No."}],
        },
    ],
)  # fmt: skip
def test_ways_to_say_one_pair(record: dict[str, Any]) -> None:
    found = to_preference(record, 100)
    texts = (found.image, found.prompt, found.chosen, found.rejected)
    assert texts == ("0.png", "Is it so?", "Yes.", "No.")


ANSWER = messages("assistant", "Yes.")
BAD: list[tuple[SetAside, Any]] = [
    (SetAside.MALFORMED, "words"),
    (SetAside.MALFORMED, None),
    (SetAside.MALFORMED, {"image": "0.png", "text": "A caption.", "label": 1}),
    (SetAside.MALFORMED, BASE | {"chosen": 7}),
    (SetAside.MALFORMED, BASE | {"image": 7}),
    (SetAside.MALFORMED, BASE | {"prompt": [{"role": "tool", "content": "?"}]}),
    (SetAside.MALFORMED, BASE | {"prompt": [{"role": "user", "content": [{"type": "video"}]}]}),
    (SetAside.MALFORMED, BASE | {"chosen": "half a pair: \ud800"}),
    (SetAside.MALFORMED, BASE | {"prompt": ANSWER}),
    (SetAside.MALFORMED, BASE | {"chosen": QUESTION}),
    (
        SetAside.MALFORMED,  # two questions
        {
            "image": "0.png",
            "conversations": [TURN, {"from": "gpt", "value": "Yes."}],
            "rejected_conversations": [TURN | {"value": "Why?"}, {"from": "gpt", "value": "No."}],
        },
    ),
    (SetAside.NO_IMAGE, BASE | {"image": None}),
    (SetAside.NO_IMAGE, BASE | {"image": {"bytes": None, "path": None}}),
    (SetAside.NO_IMAGE, BASE | {"images": []}),
    (SetAside.SEVERAL_IMAGES, BASE | {"images": ["0.png", "1.png"]}),
    (SetAside.SEVERAL_IMAGES, BASE | {"prompt": "<image> or <image>?"}),
    (SetAside.SEVERAL_TURNS, BASE | {"prompt": QUESTION + ANSWER + messages("user", "Sure?")}),
    (SetAside.SEVERAL_TURNS, BASE | {"chosen": ANSWER + messages("user", "Sure?") + ANSWER}),
    (
        SetAside.SEVERAL_TURNS,
        {
            "image": "0.png",
            "conversations": [TURN, {"from": "gpt", "value": "Yes."}] * 2,
            "rejected_conversations": [TURN, {"from": "gpt", "value": "No."}] * 2,
        },
    ),
    (SetAside.SYSTEM_MESSAGE, BASE | {"prompt": messages("system", "Be brief.") + QUESTION}),
    (SetAside.EMPTY, BASE | {"rejected": " \n"}),
    (SetAside.EMPTY, BASE | {"chosen": []}),
    (SetAside.EMPTY, BASE | {"prompt": "<image>"}),
    (SetAside.TOO_LONG, BASE | {"chosen": "y" * 101}),
    (SetAside.IDENTICAL, BASE | {"chosen": "No. "}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "record"), BAD, ids=[f"{r}-{n}" for n, (r, _) in enumerate(BAD)]
)
def test_what_is_no_pair(reason: SetAside, record: Any) -> None:
    with pytest.raises(NoPair) as caught:
        to_preference(record, 100)
    assert caught.value.reason is reason
    assert str(caught.value) and "\n" not in str(caught.value)


def test_identical_conversations_are_told_from_those_without_a_response() -> None:
    turns = [TURN, {"from": "gpt", "value": "Yes."}]
    record = {"image": "0.png", "conversations": turns, "rejected_conversations": turns}
    with pytest.raises(NoPair) as caught:
        to_preference(record, 100)
    assert caught.value.reason is SetAside.IDENTICAL


def test_bad_records_are_counted_and_named_and_the_rest_goes_on(
    pairs: list[PreferencePair], tmp_path: Path
) -> None:
    whole: bytes = encoded(pairs[0], tmp_path / "source")["bytes"]
    huge = io.BytesIO()
    Image.new("1", (2000, 2000)).save(huge, "PNG")

    def row(image: bytes | None, chosen: str = "Yes.", path: str | None = None) -> dict[str, Any]:
        struct = {"bytes": image, "path": path}
        return {
            "image": struct,
            "question": "Is it so?",
            "chosen": chosen,
            "rejected": "No.",
            "idx": "7",
        }

    rows = [
        row(whole),
        row(whole[:-20]),  # cut
        row(whole[:-20]),  # the same image again: no better the second time
        row(b"words"),
        row(huge.getvalue()),
        row(None),
        row(None, path="nowhere.png"),
        row(None, path="../../secret.png"),
        row(whole, chosen="No."),
        row(whole),
        row(whole, chosen="Surely."),
        *(row(b"%d" % n) for n in range(20)),
    ]
    texts = [(name, pa.string()) for name in ("question", "chosen", "rejected", "idx")]
    table = pa.Table.from_pylist(rows, pa.schema([("image", IMAGE), *texts]))
    pq.write_table(table, tmp_path / "bad.parquet")
    taken = take([str(tmp_path / "bad.parquet")], tmp_path / "out")
    (found,) = taken.sources
    assert dict(found.set_aside) == {
        SetAside.BROKEN_IMAGE: 23,
        SetAside.IMAGE_TOO_LARGE: 1,
        SetAside.NO_IMAGE: 1,
        SetAside.MISSING_IMAGE: 2,
        SetAside.IDENTICAL: 1,
        SetAside.DUPLICATE: 1,
    }
    assert found.records == len(rows) == found.pairs + found.set_aside.total()
    ids = [pair.row_id for pair in read(tmp_path / "out")]
    assert ids[0] == "7" and ids[1].startswith("7-") and len(ids) == 2
    assert len([line for line in taken.problems if ": broken_image: " in line]) == 5
    expected = f"{tmp_path}/bad.parquet: row 2 (id 7): broken_image: truncated or damaged image"
    assert expected in taken.problems
    assert len([file for file in (tmp_path / "out" / "images").rglob("*") if file.is_file()]) == 1


def test_the_file_says_what_it_was_made_of(pairs: list[PreferencePair], tmp_path: Path) -> None:
    location = rlaif_v(pairs + pairs[:2], tmp_path / "source", tmp_path / "rlaif.parquet")
    take([location], tmp_path / "out")
    origin = origin_of(str(tmp_path / "out" / "pairs.parquet"))
    assert origin == {
        "images": str(tmp_path / "out" / "images"),
        "sources": [
            {
                "location": location,
                "records": 12,
                "pairs": 10,
                "forms": {"RLAIF-V": 12},
                "set_aside": {"duplicate": 2},
            }
        ],
    }
    pq.write_table(pa.table({"row_id": ["a"]}), tmp_path / "other.parquet")
    assert origin_of(str(tmp_path / "other.parquet")) is None


def test_run_again_it_writes_no_image_twice(pairs: list[PreferencePair], tmp_path: Path) -> None:
    location = rlaif_v(pairs, tmp_path / "source", tmp_path / "rlaif.parquet")
    take([location], tmp_path / "out")
    (cut, *_) = (file for file in (tmp_path / "out" / "images").rglob("*.png"))
    whole = cut.read_bytes()
    cut.write_bytes(whole[:50])
    before = read(tmp_path / "out")
    again = take([location], tmp_path / "out")
    assert (again.written, again.there) == (1, 8)
    assert cut.read_bytes() == whole and read(tmp_path / "out") == before


def test_an_image_of_many_pairs_is_written_and_counted_once(tmp_path: Path) -> None:
    pair = easy_pairs(tmp_path / "source", 1)[0]
    many = [replace(pair, row_id=f"r{n}", prompt=f"What is {n}?") for n in range(200)]
    location = rlaif_v(many, tmp_path / "source", tmp_path / "rlaif.parquet")
    taken = take([location], tmp_path / "out")
    assert (taken.pairs, taken.written, taken.there) == (200, 1, 0)


def test_json_lines_compressed_with_a_line_that_is_none(tmp_path: Path) -> None:
    easy_pairs(tmp_path / "images", 2)
    other = {"images": ["1.png"], "prompt": QUESTION, "chosen": ANSWER, "rejected": "Hm."}
    lines = "\n".join([json.dumps(BASE | {"id": "a"}), "", "{cut", json.dumps(other)])
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    taken = take([str(tmp_path / "pairs.jsonl.gz")], tmp_path / "out", tmp_path / "images")
    assert taken.problems == [
        f"{tmp_path}/pairs.jsonl.gz: line 3: malformed: must be a JSON object"
    ]
    assert [row.image for row in read(tmp_path / "out")] == ["0.png", "1.png"]
    assert read(tmp_path / "out")[0].row_id == "a" and taken.pairs == 2


def test_folders_of_the_hub_and_of_datasets(pairs: list[PreferencePair], tmp_path: Path) -> None:
    source, hub = tmp_path / "source", tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("# About")
    for number, part in enumerate((pairs[:4], pairs[4:])):
        rlaif_v(part, source, hub / f"train-{number:05}-of-00002.parquet")
    taken = take([str(tmp_path / "hub")], tmp_path / "a")
    assert [row.row_id for row in read(tmp_path / "a")] == [pair.row_id for pair in pairs]
    assert [found.location for found in taken.sources] == [str(tmp_path / "hub")]
    rlaif_v(pairs[:1], source, hub / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match="holds the splits test, train: name one"):
        take([str(tmp_path / "hub")], tmp_path / "b")

    trl(pairs, source, tmp_path / "saved" / "train")
    assert take([str(tmp_path / "saved")], tmp_path / "c").pairs == 10
    trl(pairs, source, tmp_path / "saved" / "test")
    with pytest.raises(DataError, match="holds the splits test, train"):
        take([str(tmp_path / "saved")], tmp_path / "d")
    assert take([str(tmp_path / "saved" / "test")], tmp_path / "e").pairs == 10


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.parquet", None, "is not there"),
        ("cut.parquet", b"PAR1 and no footer", "cannot be read"),
        ("cut.json", b'[{"id": "1", "conv', "was its download cut off"),
        ("none.json", b"[]", "no record at all"),
        (
            "other.json",
            b'[{"id": 5, "caption": "?"}]',
            r"record 1 \(id 5\): malformed: no preference",
        ),
    ],
)
def test_a_source_without_a_pair_leaves_what_was_there(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pairs.parquet").write_text("before")
    with pytest.raises(DataError, match=words) as caught:
        take([str(tmp_path / name)], tmp_path)
    assert name in str(caught.value)
    assert (tmp_path / "pairs.parquet").read_text() == "before"


def test_a_file_of_images_is_streamed(tmp_path: Path) -> None:
    """80 MB in two row groups of small pages: neither the file nor a row group is held."""
    noise = random.Random(0).randbytes(200_000)
    rows = [{"image": {"bytes": noise + bytes([n % 256]), "path": None}} for n in range(400)]
    table = pa.Table.from_pylist(rows, pa.schema([("image", IMAGE)]))
    file = tmp_path / "big.parquet"
    plain: Any = {"use_dictionary": False, "compression": "none"}
    pq.write_table(table, file, row_group_size=200, write_batch_size=8, **plain)
    assert file.stat().st_size > 75_000_000
    del rows, table
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for _, row in read_records(str(file), {"image"}):
        most = max(most, pa.total_allocated_bytes() - before)
        count += len(row["image"]["bytes"]) == 200_001
    assert count == 400 and most < 25_000_000


def test_columns_that_say_nothing_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column that is known here; it has a, b"):
        take([str(tmp_path / "x.parquet")], tmp_path)


def test_the_command_says_what_it_took(pairs: list[PreferencePair], tmp_path: Path) -> None:
    one = rlaif_v(pairs[:6], tmp_path / "source", tmp_path / "rlaif.parquet")
    two = povid([*pairs[6:], *pairs[6:8]], tmp_path / "povid.json")
    output = tmp_path / "out" / "pairs.parquet"
    done = CliRunner().invoke(app, ["data", "pairs", one, two, "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert f"{one}: 6 records (RLAIF-V), 6 pairs\n" in done.output
    aside = "6 records (LLaVA/POVID), 0 pairs, 6 set aside (missing_image 6)"
    assert f"{two}: {aside}" in done.output
    where = f"image '6.png' is not in {tmp_path}/out/images: --images DIR says where images are"
    assert f"{two}: record 1 (id r006): missing_image: {where}\n" in done.output
    assert f"{tmp_path}/out/images: 6 images written" in done.output
    assert f"{output}: 6 pairs\n" in done.output
