"""Two texts that differ in one token: which tokens those are, and where the model wrote one of them last."""

from dataclasses import dataclass

import pytest

from sima_ray.policy.alternatives import differing_tokens, last_alternatives


class Words:
    """A tokenizer whose tokens are letters, but for "12", which is one."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text.replace("12", "\0")]


@dataclass
class Said:
    logprob: float


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("[[1]]", "[[2]]", (49, 50)),
        ("[[2]]", "[[1]]", (50, 49)),
        ("12", "3", (0, 51)),
        ("[[1]]", "[[1]]", None),
        ("1a", "2b", None),
        ("1", "1a", None),
        ("", "", None),
    ],
)
def test_tokens_that_differ(first: str, second: str, expected: tuple[int, int] | None) -> None:
    assert differing_tokens(Words(), first, second) == expected


def test_the_last_place_counts_whichever_was_written() -> None:
    steps = [{n: Said(-n - place / 10) for n in range(6)} for place in range(5)]
    assert last_alternatives([1, 5, 2, 0, 5], steps, (1, 2)) == [-1.2, -2.2]
    assert last_alternatives([1, 5, 2, 0, 1], steps, (1, 2)) == [-1.4, -2.4]
    assert last_alternatives([1, 5, 2, 0, 1], steps, (2, 1)) == [-2.4, -1.4]
    assert last_alternatives([0, 5, 0, 0, 5], steps, (1, 2)) is None
    assert last_alternatives([], [], (1, 2)) is None
