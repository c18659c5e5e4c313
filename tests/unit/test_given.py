"""A run that begins with given pairs, up to its training: checked, counted, kept, told."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from easy_pairs import easy_pairs, write_pairs
from foreign_data import rlaif_v
from given_run import given_config

from sima_ray.config import DataConfig, PairsConfig
from sima_ray.data.foreign import take_pairs
from sima_ray.data.given import given_rows, take_given
from sima_ray.data.sinks import read_pairs
from sima_ray.errors import DataError
from sima_ray.ledger import Ledger
from sima_ray.records import PAIR_SCHEMA, Outcome, PreferencePair, Quarantine
from sima_ray.runtime.validation import check_run, show


@pytest.fixture
def pairs(tmp_path: Path) -> list[PreferencePair]:
    """Six good pairs, as a run of another policy left them, and each kind of bad one."""
    good = easy_pairs(tmp_path / "images", 6)
    good = [replace(pair, chosen_logp=-1.0, chosen_tokens=3) for pair in good]
    bad: list[dict[str, Any]] = [
        {"row_id": "no-image", "image": None},
        {"row_id": "empty", "chosen": " "},
        {"row_id": "long", "rejected": "n" * 101},
        {"row_id": "r000"},
        {"row_id": "same", "chosen": "no", "rejected": "no"},
    ]
    return [*good[:3], *(replace(good[0], **values) for values in bad), *good[3:]]


def take(pairs: list[PreferencePair], folder: Path, **changes: Any) -> Ledger:
    data = DataConfig(
        pairs=write_pairs(pairs, folder / "given.parquet"),
        images=str(folder / "images"),
        max_text_chars=100,
        limit=changes.pop("limit", None),
    )
    files = [str(folder / "round-1" / name) for name in ("pairs.parquet", "quarantine.jsonl")]
    return take_given(data, PairsConfig(**changes), 0, *files)


def test_every_row_is_a_pair_or_counted(pairs: list[PreferencePair], tmp_path: Path) -> None:
    ledger = take(pairs, tmp_path)
    ledger.check()
    assert (ledger.rows, ledger.pairs) == (11, 6)
    assert ledger.outcomes[Outcome.IDENTICAL] == 1
    assert {reason for reason, n in ledger.quarantined.items() if n} == {
        *(Quarantine.MISSING_FIELD, Quarantine.EMPTY_FIELD, Quarantine.FIELD_TOO_LONG),
        Quarantine.DUPLICATE_ID,
    }
    assert ledger.equation() == "11 given pairs = 6 pairs + 1 identical + 4 quarantined"
    assert Ledger.from_json(ledger.to_json()) == ledger
    kept = list(read_pairs(str(tmp_path / "round-1" / "pairs.parquet")))
    # Log-probabilities are another policy's, and stay behind.
    wanted = [replace(p, chosen_logp=None, chosen_tokens=None) for p in pairs[:3] + pairs[-3:]]
    assert kept == wanted
    lines = (tmp_path / "round-1" / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["source"].rpartition(":")[2] for row in rows] == ["4", "5", "6", "7"]
    assert rows[1] == {
        "source": f"{tmp_path}/given.parquet:5",
        "row_id": "empty",
        "reason": "empty_field",
        "error": "'chosen' is empty",
    }


def test_the_length_policy_and_the_limit_hold_for_them_too(
    pairs: list[PreferencePair], tmp_path: Path
) -> None:
    ledger = take(pairs, tmp_path, max_length_ratio=2.5)
    assert ledger.outcomes[Outcome.LENGTH_POLICY] == 1  # "yes yes yes" against "no"
    assert ledger.pairs == pq.read_metadata(tmp_path / "round-1" / "pairs.parquet").num_rows == 5
    assert take(pairs, tmp_path, limit=3).rows == 3


def test_a_file_with_the_needed_columns_alone(tmp_path: Path) -> None:
    rows = [asdict(pair) for pair in easy_pairs(tmp_path / "images", 2)]
    names = ["row_id", "image", "prompt", "chosen", "rejected"]
    table = pa.Table.from_pylist(rows).select(names)
    pq.write_table(table, tmp_path / "few.parquet")
    data = DataConfig(pairs=str(tmp_path / "few.parquet"), images=str(tmp_path))
    files = [str(tmp_path / name) for name in ("pairs.parquet", "quarantine.jsonl")]
    assert take_given(data, PairsConfig(), 0, *files).pairs == 2
    kept = pq.read_table(tmp_path / "pairs.parquet")
    assert kept.schema.equals(PAIR_SCHEMA)
    assert kept["weight"].to_pylist() == [1.0, 1.0] and kept["chosen_from"].to_pylist() == ["", ""]


def test_what_is_no_pairs_file_is_told_from_what_could_be_made_one(tmp_path: Path) -> None:
    source = rlaif_v(easy_pairs(tmp_path, 1), tmp_path, tmp_path / "rlaif.parquet")
    with pytest.raises(DataError, match=f"no column row_id, prompt: .*`sima data pairs {source}"):
        list(given_rows(source))
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(DataError, match=r"cannot be read as Parquet.*`sima data pairs`"):
        list(given_rows(str(tmp_path / "pairs.json")))
    words = r"none\.parquet: cannot be read as Parquet: No such file or directory; make"
    with pytest.raises(DataError, match=words):
        list(given_rows(str(tmp_path / "none.parquet")))


def test_no_usable_pair_says_why(pairs: list[PreferencePair], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 1 pairs can be used: 'chosen' is empty"):
        take(pairs[4:5], tmp_path)
    assert not (tmp_path / "round-1").exists()


def test_validate_names_bad_pairs_and_images(
    tiny_llava: Path,
    pairs: list[PreferencePair],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "images" / "2.png").unlink()
    config = given_config(
        tmp_path,
        write_pairs(pairs, tmp_path / "given.parquet"),
        str(tmp_path / "images"),
        policy={"model": str(tiny_llava)},
    )
    found = check_run(config)
    assert not found.good
    show(found, sys.stdout)
    out = capsys.readouterr().out
    assert f"{tmp_path}/given.parquet:3: missing_image: image '2.png' is not in" in out
    assert f"{tmp_path}/given.parquet:5: empty_field: 'chosen' is empty (id empty)" in out
    assert "11 pairs: 6 good, 5 set aside (" in out and "left out 1" in out
    assert "given.parquet:8" not in out  # identical: no fault of the file


def test_what_is_made_of_other_data_passes(
    tiny_llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = rlaif_v(easy_pairs(tmp_path / "a", 4), tmp_path / "a", tmp_path / "rlaif.parquet")
    output, images = str(tmp_path / "pairs.parquet"), str(tmp_path / "images")
    take_pairs([source], output, images=images, max_pixels=10**6, max_chars=100)
    config = given_config(tmp_path, output, images, policy={"model": str(tiny_llava)})
    found = check_run(config)
    assert found.good
    show(found, sys.stdout)
    assert capsys.readouterr().out == "4 pairs: 4 good, 0 set aside\n"
