"""Which pairs a step trains on, and in which micro batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.records import PreferencePair
from sima_ray.tuning.schedule import Schedule, hold_out, micro_batches, order, padded, share

widths_of_a_batch = st.lists(st.integers(2, 100), min_size=1, max_size=24)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert order(50, seed=1, epoch=0) == order(50, seed=1, epoch=0)
    assert sorted(order(50, 1, 0)) == list(range(50))
    assert len({tuple(order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("window", [1, 2, 5])
def test_every_pair_is_seen_once_an_epoch(window: int):
    schedule = Schedule(10, 4, epochs=2, seed=0, window=window, lengths=(3, 1, 2, 9, 4) * 2)
    assert (schedule.steps_per_epoch, schedule.steps) == (3, 6)
    assert [schedule.ends_epoch(step) for step in range(6)] == [False, False, True] * 2
    for epoch in range(2):
        rows = [row for step in range(3) for row in schedule.batch(3 * epoch + step)]
        assert sorted(rows) == list(range(10))
    assert schedule.batch(0) == Schedule(*(10, 4, 2, 0, window, (3, 1, 2, 9, 4) * 2)).batch(0)


def test_a_window_sorts_by_length_and_shuffles_its_batches():
    lengths = tuple((7 * row) % 64 for row in range(64))
    plain, sorted_ = Schedule(64, 4, 1, 5), Schedule(64, 4, 1, 5, window=8, lengths=lengths)

    def spread(schedule: Schedule) -> int:
        batches = [[lengths[row] for row in schedule.batch(step)] for step in range(16)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(sorted_) < spread(plain) / 3
    for start in (0, 8):  # a window holds the very pairs that it would have held unsorted
        parts = [{r for s in range(start, start + 8) for r in x.batch(s)} for x in (plain, sorted_)]
        assert parts[0] == parts[1]
    firsts = [min(lengths[row] for row in sorted_.batch(step)) for step in range(8)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(("world", "size"), [(1, 8), (1, 1), (2, 4), (4, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("count", [8, 7, 1])
def test_workers_share_a_batch_without_gap_or_overlap(world: int, size: int, count: int):
    widths = [5 + row for row in range(8)]
    micros = micro_batches(range(count), widths, size=size)
    shares = [share(micros, widths, rank, world) for rank in range(world)]
    assert len({len(part) for part in shares}) == 1
    rows = [row for part in shares for micro in part for row in micro]
    assert sorted(row for row in rows if row is not None) == list(range(count))
    if world == 1:
        assert shares[0] == micros


@given(widths_of_a_batch, st.integers(200, 900), st.integers(1, 5))
def test_a_budget_is_kept_by_every_forward_pass(widths: list[int], budget: int, world: int):
    rows = range(len(widths))
    micros = micro_batches(rows, widths, size=1, budget=budget)
    shares = [share(micros, widths, rank, world) for rank in range(world)]
    assert len({len(part) for part in shares}) == 1
    parts = [micro for part in shares for micro in part]
    real = [[row for row in micro if row is not None] for micro in parts if micro != [None]]
    assert sorted(row for micro in real for row in micro) == list(rows)
    assert all(padded(micro, widths) <= budget for micro in real)
    assert len(parts) - len(real) < world
    if len(parts) > len(real):  # fillers only where every pair is alone already
        assert all(len(micro) == 1 for micro in real)


def test_a_budget_makes_fewer_passes_of_less_padding():
    widths = [100, 10, 90, 12, 95, 11, 98, 10]
    plain = micro_batches(range(8), widths, size=2)
    packed = micro_batches(range(8), widths, size=2, budget=400)
    assert len(packed) == 3 < len(plain)
    cost = [sum(padded(micro, widths) for micro in micros) for micros in (plain, packed)]
    assert cost == [1532, 400 + 380 + 96]


def test_a_few_micro_batches_are_halved_for_many_workers():
    widths = [10] * 8
    micros = micro_batches(range(8), widths, size=1, budget=1000)
    assert len(micros) == 1
    shares = [share(micros, widths, rank, 4) for rank in range(4)]
    assert [[len(micro) for micro in part] for part in shares] == [[2]] * 4


def pair(row_id: str) -> PreferencePair:
    return PreferencePair(row_id, "0.png", "?", "yes", "no", "greedy", "sampled")


def test_held_out_rows_depend_on_their_id_and_the_seed_alone():
    pairs = [pair(f"r{i}") for i in range(2000)]
    train, held = hold_out(pairs, 0.2, seed=1)
    assert len(train) + len(held) == 2000
    assert 320 < len(held) < 480
    few = pairs[:100]
    assert hold_out(few, 0.2, seed=1)[1] == [p for p in held if p in few]
    assert hold_out(pairs, 0.2, seed=2)[1] != held
    assert hold_out(pairs, 0.0, seed=1) == (pairs, [])
