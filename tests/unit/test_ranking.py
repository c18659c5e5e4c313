"""Rankings of more than two responses, from comparisons of all pairs."""

from itertools import combinations
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sima_ray.critic.ranking import Comparison, rank, undisputed


def comparisons(*results: tuple[int, int, int | None, float | None]) -> list[Comparison]:
    return [Comparison(*result) for result in results]


@pytest.mark.parametrize(
    ("results", "ranking", "winner"),
    [
        ([(0, 1, 1, 0.1), (0, 2, 2, 0.2), (1, 2, 2, 0.3)], [2, 1, 0], 2),
        ([(0, 1, 0, None), (0, 2, 0, None), (1, 2, None, None)], [0, 1, 2], 0),
        ([(0, 1, 0, 0.6), (1, 2, 1, 0.6), (0, 2, 2, 0.1)], [2, 1, 0], None),  # a circle
        ([(0, 1, None, 0.4), (0, 2, 0, 0.9), (1, 2, 1, 0.9)], [1, 0, 2], None),
        ([(0, 1, None, 0.5), (0, 2, None, 0.5), (1, 2, None, 0.5)], [0, 1, 2], None),
        ([(0, 1, None, None), (0, 2, None, 0.4), (1, 2, None, 0.6)], [1, 2, 0], None),
    ],
)
def test_rankings(
    results: list[tuple[int, int, int | None, float | None]], ranking: list[int], winner: int | None
) -> None:
    assert rank(3, comparisons(*results)) == ranking
    assert rank(3, comparisons(*results[::-1])) == ranking
    assert undisputed(3, comparisons(*results)) == winner


def test_two() -> None:
    assert rank(2, comparisons((0, 1, 1, 0.9))) == [
        1,
        0,
    ]  # the verdict counts before its probability
    assert rank(2, comparisons((0, 1, None, 0.4))) == [1, 0]
    assert rank(2, comparisons((0, 1, None, None))) == [0, 1]
    assert undisputed(2, comparisons((0, 1, 1, 0.9))) == 1


@st.composite
def contests(draw: st.DrawFn) -> list[Comparison]:
    count = draw(st.integers(2, 6))
    return [
        Comparison(
            first,
            second,
            draw(st.sampled_from([first, second, None])),
            draw(st.none() | st.integers(0, 64).map(lambda n: n / 64)),
        )
        for first, second in combinations(range(count), 2)
    ]


@given(contests(), st.randoms())
def test_permuted_responses_permute_the_ranking(found: list[Comparison], random: Random) -> None:
    count = max(c.second for c in found) + 1
    place = list(range(count))
    random.shuffle(place)
    moved: list[Comparison] = []
    for c in found:
        winner = None if c.winner is None else place[c.winner]
        first, second, p = place[c.first], place[c.second], c.probability
        if first > second:
            first, second, p = second, first, None if p is None else 1 - p
        moved.append(Comparison(first, second, winner, p))
    best = undisputed(count, found)
    assert undisputed(count, moved) == (None if best is None else place[best])
    ranking = rank(count, found)
    assert sorted(ranking) == list(range(count))
    assert best is None or ranking[0] == best
    scores = {i: _score(i, found) for i in range(count)}
    assume(len(set(scores.values())) == count)
    assert rank(count, moved) == [place[index] for index in ranking]


def _score(index: int, found: list[Comparison]) -> tuple[float, float]:
    mine = [c for c in found if index in (c.first, c.second)]
    wins = sum(1 if c.winner == index else 0.5 if c.winner is None else 0 for c in mine)
    chances = [0.5 if c.probability is None else c.probability for c in mine]
    own = [p if c.first == index else 1 - p for c, p in zip(mine, chances, strict=True)]
    return wins, sum(own)
