"""Prompts from LLaVA-Instruct: every record is a prompt or counted with its reason, and the draw is the seed's."""

import gzip
import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sima_ray.cli import app
from sima_ray.config import DataConfig
from sima_ray.data.instruct import SetAside, draw_prompts
from sima_ray.data.prompts import index_prompts
from sima_ray.errors import DataError


def record(number: int, *turns: str, **more: Any) -> dict[str, Any]:
    """As in LLaVA-Instruct-150K."""
    said = turns or (f"<image>\nWhat is number {number}?", f"It is {number}.", "And?", "No more.")
    return {
        "id": f"{number:012}",
        "image": f"{number:012}.jpg",
        "conversations": [
            {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)
        ],
        **more,
    }


def write(file: Path, records: list[Any]) -> str:
    file.write_text(json.dumps(records))
    return str(file)


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_first_question_and_its_answer(tmp_path: Path) -> None:
    records = [record(1), record(2, "How many?\n<image>", " Two. ")]
    source, output = (
        write(tmp_path / "detail_23k.json", records),
        tmp_path / "new" / "prompts.jsonl",
    )
    drawn = draw_prompts([source], str(output), count=None, seed=0)
    assert (drawn.prompts, drawn.written, drawn.problems) == (2, 2, [])
    assert sorted(read(output), key=lambda prompt: prompt["image"]) == [
        {"image": "000000000001.jpg", "text": "What is number 1?", "ground_truth": "It is 1."},
        {"image": "000000000002.jpg", "text": "How many?", "ground_truth": "Two."},
    ]


def test_bad_records_are_counted_and_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad: dict[str, list[Any]] = {
        "malformed": [
            "text",
            record(3, image=7),
            record(4, conversations="none"),
            record(5, conversations=["hm"]),
            record(6, "<image>\nWhat\ud800?", "A."),
        ],
        "no_image": [{"id": "text-only", "conversations": record(7)["conversations"]}],
        "no_question": [record(8, "<image>\n", "A."), record(9, conversations=[])],
        "no_answer": [record(10, "<image>\nWhat?"), record(11, "What?", " ")],
    }
    records = [record(1), *chain(*bad.values()), record(2), record(1)]
    source = write(tmp_path / "mix.json", records)
    drawn = draw_prompts([source], str(tmp_path / "prompts.jsonl"), count=None, seed=0)
    (found,) = drawn.sources
    wanted = {reason: len(records) for reason, records in bad.items()} | {"duplicate": 1}
    assert dict(found.set_aside) == wanted
    assert found.records == len(records) == found.prompts + found.set_aside.total()
    assert found.prompts == drawn.written == 2
    assert len(drawn.problems) == 10
    assert f"{source}: record 10 (id 000000000010): no_answer: there is no answer" in drawn.problems


def test_the_draw_is_the_seeds_whatever_the_order_and_nested(tmp_path: Path) -> None:
    records = [record(number) for number in range(400)]
    one = write(tmp_path / "one.json", records)
    random.Random(1).shuffle(records)
    two = [write(tmp_path / "a.json", records[:150]), write(tmp_path / "b.json", records[150:])]

    def draw(sources: list[str], count: int, seed: int) -> list[dict[str, str]]:
        draw_prompts(sources, str(tmp_path / "out.jsonl"), count=count, seed=seed)
        return read(tmp_path / "out.jsonl")

    drawn = draw([one], 100, 0)
    assert len(drawn) == 100
    assert draw(two, 100, 0) == drawn
    assert draw([one], 40, 0) == drawn[:40]
    assert draw([one], 100, 1) != drawn
    # Uniform: of the first and the second half about as many, 5 standard deviations wide.
    assert abs(sum(prompt["image"] < "000000000200" for prompt in drawn) - 50) < 22


def test_the_same_prompt_in_two_files_counts_once(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.json", [record(1)]) for name in ("one", "two"))
    drawn = draw_prompts([one, two], str(tmp_path / "out.jsonl"), count=None, seed=0)
    assert drawn.written == 1
    assert drawn.sources[1].set_aside == {SetAside.DUPLICATE: 1}


def test_lines_and_published_prompts_compressed_or_not(tmp_path: Path) -> None:
    prompt = {"image": "000000401804.jpg", "text": "What?", "ground_truth": "A cat."}
    lines = "\n".join([json.dumps(prompt), "", "{cut", json.dumps(record(1))])
    (tmp_path / "prompts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    output = tmp_path / "out.jsonl"
    drawn = draw_prompts([str(tmp_path / "prompts.jsonl.gz")], str(output), count=None, seed=0)
    assert drawn.sources[0].records == 3
    assert drawn.sources[0].set_aside == {SetAside.MALFORMED: 1}
    assert "line 3" in drawn.problems[0]
    assert prompt in read(output)


def test_what_is_written_is_what_a_run_reads(tmp_path: Path) -> None:
    source = write(tmp_path / "all.json", [record(number) for number in range(20)])
    output = tmp_path / "prompts.jsonl"
    draw_prompts([source], str(output), count=None, seed=0)
    index = index_prompts(
        DataConfig(prompts=str(output), images=str(tmp_path)), str(tmp_path / "index.parquet")
    )
    assert (index.rows, index.good) == (20, 20)


@pytest.mark.parametrize("text", ['[{"id": "1", "conv', "[]", ""])
def test_a_file_without_a_prompt_leaves_what_was_there(tmp_path: Path, text: str) -> None:
    (tmp_path / "cut.json").write_text(text)
    output = tmp_path / "prompts.jsonl"
    output.write_text("before")
    with pytest.raises(DataError, match=r"cut\.json"):
        draw_prompts([str(tmp_path / "cut.json")], str(output), count=None, seed=0)
    assert output.read_text() == "before"


def test_no_file_is_overwritten_by_its_own_draw(tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.jsonl", [record(1), record(2)])
    before = Path(source).read_bytes()
    with pytest.raises(DataError, match=r"prompts\.jsonl: would be overwritten"):
        draw_prompts([source], f"{tmp_path}/./prompts.jsonl", count=1, seed=0)
    assert Path(source).read_bytes() == before


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    (tmp_path / "image.json").write_bytes(b"\xff\xd8\xff")
    for name, words in (
        ("nowhere.json", r"nowhere\.json: cannot be read: No such file or directory$"),
        ("image.json", "not UTF-8 at byte 0"),
    ):
        with pytest.raises(DataError, match=words):
            draw_prompts([str(tmp_path / name)], str(tmp_path / "o.jsonl"), count=None, seed=0)


def test_the_command_says_what_it_took(tmp_path: Path) -> None:
    source = write(tmp_path / "detail_23k.json", [record(1), record(2), record(2), {"id": "x"}])
    output = tmp_path / "prompts.jsonl"
    done = CliRunner().invoke(app, ["data", "prompts", source, "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "4 records, 2 prompts, 2 set aside (duplicate 1, no_image 1)" in done.output
    assert "2 of 2 prompts, seed 0, 17,000 were asked for" in done.output
    assert "record 4 (id x): no_image" in done.output
