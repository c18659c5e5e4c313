"""What later rounds take over: every row and every pair is counted, and no pair is there twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.data.earlier import choose_unsettled, mix_pairs
from sima_ray.data.sinks import PAIR_SCHEMA, read_pairs
from sima_ray.errors import LedgerError
from sima_ray.pairs import draw_earlier
from sima_ray.records import ROW_SCHEMA, Outcome
from sima_ray.tuning import dataset

DECIDED = [outcome for outcome in Outcome if outcome is not Outcome.LENGTH_POLICY]


def decided(folder: Path, outcomes: Sequence[Outcome]) -> tuple[str, str]:
    """An index and the preferences made of it, whose files are in another order."""
    prompts = [
        {"row_id": f"r{n:02d}", "text": f"What is {n}?", "ground_truth": f"{n}."}
        for n in range(len(outcomes))
    ]
    rows = [row | {"outcome": outcomes[n].value} for n, row in enumerate(prompts)]
    (folder / "preferences").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(prompts, ROW_SCHEMA), folder / "prompts.parquet")
    for n in (0, 1):
        table = pa.Table.from_pylist(rows[::-1][n::2], ROW_SCHEMA)
        pq.write_table(table, folder / "preferences" / f"{n}.parquet")
    return str(folder / "prompts.parquet"), str(folder / "preferences")


@given(st.lists(st.sampled_from(DECIDED), max_size=12), st.booleans())
def test_unsettled_rows_are_asked_again_and_the_others_counted(
    tmp_path_factory: pytest.TempPathFactory, outcomes: list[Outcome], judged: bool
) -> None:
    folder = tmp_path_factory.mktemp("rounds")
    index, preferences = decided(folder, outcomes)
    even = (lambda row: int(row["row_id"][1:]) % 2 == 0) if judged else None
    chosen = choose_unsettled(index, preferences, str(folder / "round-2" / "next.parquet"), even)
    again = [
        f"r{n:02d}"
        for n, outcome in enumerate(outcomes)
        if outcome in (Outcome.INCONSISTENT, Outcome.UNPARSEABLE)
        or (judged and n % 2 == 0 and outcome.is_preference)
    ]
    table = pq.read_table(folder / "round-2" / "next.parquet")
    assert table.schema.equals(ROW_SCHEMA)
    assert table["row_id"].to_pylist() == again  # in the order of the prompts
    assert table["outcome"].null_count == len(again)
    values = chosen.to_json()
    assert values["rows"] == len(again) == sum(values["asked"].values())
    assert values["before"] == len(outcomes) == len(again) + sum(values["settled"].values())


def test_rows_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    index, preferences = decided(tmp_path, [Outcome.INCONSISTENT, Outcome.IDENTICAL])
    (Path(preferences) / "1.parquet").unlink()
    with pytest.raises(
        LedgerError, match=r"has 2 rows, of which 0 are unsettled, but .* has 1, of"
    ):
        choose_unsettled(index, preferences, str(tmp_path / "next.parquet"))


def pairs_file(path: Path, responses: dict[str, tuple[str, str]]) -> str:
    """Pairs of one question each: id → chosen, rejected."""
    rows: list[dict[str, Any]] = [
        {
            "row_id": row_id,
            "image": f"{row_id}.jpg",
            "prompt": "What is there?",
            "chosen": chosen,
            "rejected": rejected,
            "chosen_from": "greedy",
            "rejected_from": "sampled",
            "weight": 0.5,
            "chosen_logp": -1.5,
            "rejected_logp": -2.5,
            "chosen_tokens": 3,
            "rejected_tokens": 4,
        }
        for row_id, (chosen, rejected) in responses.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, PAIR_SCHEMA), path)
    return str(path)


def test_earlier_pairs_are_mixed_in_once_each(tmp_path: Path) -> None:
    first = pairs_file(
        tmp_path / "1.parquet",
        {"a": ("a dog", "a cat"), "b": ("two", "three"), "c": ("red", "blue"), "d": ("x", "y")},
    )
    second = pairs_file(tmp_path / "2.parquet", {"a": ("a dog", "a cat"), "b": ("two", "four")})
    own = pairs_file(tmp_path / "3.parquet", {"b": ("four", "two"), "c": ("red", "green")})
    mixed = tmp_path / "mixed.parquet"
    how: dict[str, Any] = {"share": 1.0, "seed": 7, "number": 3}
    counts = mix_pairs(own, {1: first, 2: second}, str(mixed), **how)
    assert counts == {
        "2": {"pairs": 2, "drawn": 1, "not_drawn": 0, "judged_again": 1},
        "1": {"pairs": 4, "drawn": 3, "not_drawn": 0, "judged_again": 1},
    }
    pairs = {pair.row_id: pair for pair in read_pairs(str(mixed))}
    assert list(pairs) == ["b", "c", "a@round-2", "b@round-1", "c@round-1", "d@round-1"]
    assert [pairs[row_id] for row_id in "bc"] == list(read_pairs(own))
    old = pairs["a@round-2"]
    assert (old.chosen, old.rejected, old.weight, old.image) == ("a dog", "a cat", 0.5, "a.jpg")
    # What answered is no longer the reference.
    assert (old.chosen_logp, old.rejected_logp, old.chosen_tokens) == (None, None, None)
    assert len(dataset.read_pairs(str(mixed))) == len(pairs)
    before = mixed.read_bytes()
    mix_pairs(own, {2: second, 1: first}, str(mixed), **how)
    assert mixed.read_bytes() == before


ids = st.sets(st.text(min_size=1, max_size=4), max_size=40)


@given(ids, st.floats(0, 1), st.integers(0, 3))
def test_a_share_is_drawn_whatever_the_order(found: set[str], share: float, seed: int) -> None:
    drawn = draw_earlier(sorted(found), share, seed, 1, 2)
    assert drawn <= found and len(drawn) == round(share * len(found))
    assert draw_earlier(sorted(found, reverse=True), share, seed, 1, 2) == drawn
    # A larger share holds the smaller one.
    assert drawn <= draw_earlier(found, min(1.0, share + 0.1), seed, 1, 2)


def test_each_round_draws_anew() -> None:
    rows = [f"row-{n}" for n in range(400)]
    drawn = [draw_earlier(rows, 0.5, *how) for how in ((7, 1, 2), (7, 1, 3), (7, 2, 3), (8, 1, 2))]
    for n, one in enumerate(drawn):
        for other in drawn[n + 1 :]:
            assert 70 < len(one & other) < 130
