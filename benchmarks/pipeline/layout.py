"""How much of some prompts a prefix cache can have at best."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine reads.

    Attributes:
        tokens: Ids; an image's as often as it has places.
        image: Names the image, which its places do not; None without one.
        image_token: The id at its places.
    """

    tokens: Sequence[int]
    image: Hashable = None
    image_token: int | None = None


@dataclass(frozen=True, slots=True)
class Best:
    """Of some prompts: all tokens, and those that a cache that never forgets has when their turn comes."""

    tokens: int
    cached: int


def best(prompts: Iterable[Prompt], block_size: int) -> Best:
    """What the prompts' layout allows, nothing cached at first.

    A block is the same only after the same blocks, and with the same image where one lies in it. Only whole blocks
    are kept. The last token is always computed, for its logits: a prompt that ends with a block has that one anew.

    Args:
        prompts: In any order: which of two that share a beginning comes first makes no difference to the sum,
            unless one is the beginning of the other.
        block_size: Tokens.
    """
    known: dict[Hashable, int] = {}
    tokens = cached = 0
    for prompt in prompts:
        tokens += len(prompt.tokens)
        parent, found = 0, True
        for start in range(0, len(prompt.tokens) - block_size + 1, block_size):
            block = tuple(prompt.tokens[start : start + block_size])
            key = (parent, block, prompt.image if prompt.image_token in block else None)
            found = found and key in known and start + block_size < len(prompt.tokens)
            cached += block_size if found else 0
            parent = known.setdefault(key, len(known) + 1)
    return Best(tokens, cached)
