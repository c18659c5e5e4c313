"""Two texts that differ in one token, and how likely the model found each where it wrote one of them."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Protocol


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is needed here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


class Logprob(Protocol):
    """An engine's log-probability of one token, in nats."""

    logprob: float


@lru_cache(maxsize=64)
def differing_tokens(tokenizer: Tokenizer, first: str, second: str) -> tuple[int, int] | None:
    """The one token of each text in which they differ; None when they differ in none, or in more."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (first, second)]
    if len(ids[0]) != len(ids[1]):
        return None
    differing = [pair for pair in zip(*ids, strict=True) if pair[0] != pair[1]]
    return differing[0] if len(differing) == 1 else None


def last_alternatives(
    tokens: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None],
    alternatives: tuple[int, int],
) -> list[float] | None:
    """Both alternatives' log-probabilities at the last place where one of them was generated.

    Args:
        tokens: The generated tokens.
        logprobs: For each of them, a `Logprob` of both alternatives, among others.
        alternatives: Two tokens.

    Returns:
        None when neither was generated.
    """
    for token, found in zip(reversed(tokens), reversed(logprobs), strict=True):
        if token in alternatives and found:
            return [found[alternative].logprob for alternative in alternatives]
    return None
