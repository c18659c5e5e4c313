"""The ledger adds up, or says what does not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.errors import LedgerError
from sima_ray.ledger import Ledger
from sima_ray.records import Outcome, Quarantine

reasons = st.sampled_from(list(Quarantine))
rows = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([o for o in Outcome if o != Outcome.QUARANTINED]), st.none()),
        st.tuples(st.just(Outcome.QUARANTINED), reasons),
    )
)


def ledger_of(rows: list[tuple[Outcome, Quarantine | None]]) -> Ledger:
    return Ledger.count([o for o, _ in rows], [reason for _, reason in rows if reason])


@given(rows)
def test_counted_rows_add_up_and_survive_json(
    rows: list[tuple[Outcome, Quarantine | None]],
) -> None:
    ledger = ledger_of(rows)
    ledger.check()
    values = json.loads(json.dumps(ledger.to_json()))
    assert Ledger.from_json(values) == ledger
    assert values["rows"] == len(rows)
    assert set(values["outcomes"]) == set(Outcome)
    assert set(values["quarantine_reasons"]) == set(Quarantine)
    top = {name: value for name, value in values.items() if isinstance(value, int)}
    assert top.pop("rows") == sum(top.values())
    assert values["quarantined"] == sum(values["quarantine_reasons"].values())


@given(rows, rows)
def test_parts_add_up_to_the_whole(
    first: list[tuple[Outcome, Quarantine | None]],
    second: list[tuple[Outcome, Quarantine | None]],
) -> None:
    assert ledger_of(first) + ledger_of(second) == ledger_of(first + second)


def test_json_names() -> None:
    ledger = Ledger.count(
        ["preferred_first", "preferred_second", "inconsistent", "quarantined"], ["broken_image"]
    )
    values = ledger.to_json()
    assert ledger.pairs == values["pairs"] == 2
    assert values["inconsistent"] == values["quarantined"] == 1
    assert values["unparseable"] == values["identical"] == values["length_policy"] == 0
    assert values["quarantine_reasons"]["broken_image"] == 1
    assert "broken_image" not in values  # it is part of quarantined, which the sum has already


def test_a_kept_inconsistent_row_is_a_pair() -> None:
    ledger = Ledger.count(["preferred_first", "inconsistent_kept", "inconsistent_kept"])
    ledger.check()
    values = ledger.to_json()
    assert values["pairs"] == 3 and values["outcomes"]["inconsistent_kept"] == 2
    assert values["inconsistent"] == 0 and "inconsistent_kept" not in values
    # A ledger of before there was such an outcome.
    del values["outcomes"]["inconsistent_kept"]
    assert Ledger.from_json({**values, "rows": 1}) == Ledger.count(["preferred_first"])


def test_a_lost_row_is_named() -> None:
    ledger = Ledger.count(["identical", "inconsistent"], rows=3)
    with pytest.raises(
        LedgerError, match=r"3 rows read but 2 accounted for \(inconsistent 1, identical 1\)"
    ):
        ledger.check()


def test_a_quarantine_without_reason_is_named() -> None:
    ledger = Ledger.count(["quarantined", "quarantined"], ["missing_image"])
    with pytest.raises(
        LedgerError, match=r"2 rows quarantined but 1 with a reason \(missing_image 1\)"
    ):
        ledger.check()


def test_negative_counts_do_not_cancel() -> None:
    ledger = Ledger(0, {Outcome.IDENTICAL: 1, Outcome.INCONSISTENT: -1})
    with pytest.raises(LedgerError, match="inconsistent is -1"):
        ledger.check()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rows": 1, "outcomes": {"lost": 1}, "quarantine_reasons": {}},
        {"rows": 1, "outcomes": [], "quarantine_reasons": {}},
        {"rows": None, "outcomes": {}, "quarantine_reasons": {}},
    ],
)
def test_other_json_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger.from_json(values)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="dropped"):
        Ledger.count(["dropped"])
