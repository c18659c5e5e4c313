"""Scoring on all workers together, for a model whose weights they share.

The weights of a module are gathered from all workers when it computes. So all must make equally many passes: one
that has no batch left takes a pair of another's, and what it finds is dropped. And none may leave a pass at an
image that does not fit its prompt: that is found before, by the vision tower alone, once for each kind of image.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sima_ray.tuning.dataset import EncodedPair, Kind, UnusablePair, kind_of
from sima_ray.tuning.forward import PairForward, PairScorer, feature_counts, image_problem
from sima_ray.tuning.reference import Reference, aside, scored

Gather = Callable[[list[Any]], list[Any]]


class LockstepScores:
    """Scores batches on all workers, each its own; a `Scores`."""

    def __init__(self, scorer: PairScorer, gather: Gather) -> None:
        """Args:
        scorer: Within it the weights are gathered.
        gather: The lists of all workers, joined.
        """
        self._scorer, self._gather = scorer, gather
        self._features: dict[Kind, int | None] = {}

    def __call__(
        self, model: Any, forward: PairForward, batches: Iterator[list[EncodedPair]]
    ) -> Iterator[Reference]:
        """The references of this worker's batches; every worker must take all that there are."""
        while True:
            batch = next(batches, [])
            kinds = {kind_of(pair): pair for pair in batch}
            new = [pair for kind, pair in kinds.items() if kind not in self._features]
            flags = self._gather([(bool(batch), bool(new))])
            if not any(has for has, _ in flags):
                return
            if any(unseen for _, unseen in flags):
                self._look(new)
            good: list[EncodedPair] = []
            for pair in batch:
                if problem := self._problem(model, pair):
                    yield aside(problem)
                else:
                    good.append(pair)
            if pairs := even_out(good, self._gather):
                logps = forward(model, pairs)
                if good:
                    yield from scored(good, logps)

    def _look(self, new: list[EncodedPair]) -> None:
        """Count the features of these kinds of images."""
        pairs = even_out(new, self._gather)
        with torch.no_grad():
            counts = self._scorer(pairs, feature_counts)[0].tolist()
        for at, pair in enumerate(new):
            self._features[kind_of(pair)] = counts[at] if counts else None

    def _problem(self, model: Any, pair: EncodedPair) -> UnusablePair | None:
        features = self._features[kind_of(pair)]
        if features is None:
            return None
        return image_problem(pair, features, model.config.image_token_id)


def even_out(batch: Sequence[EncodedPair], gather: Gather) -> Sequence[EncodedPair]:
    """This worker's pairs; where it has none one of another's; none where nobody has one."""
    empty = gather([not batch])
    if all(empty) or not any(empty):
        return batch
    others = gather(list(batch[:1]))
    return batch or others[:1]


def of_rank_0(values: Iterator[Any], rank: int, gather: Gather) -> Iterator[Any]:
    """The first worker's values, on all of them; all must take equally many."""
    while sent := gather([next(values, None)] if rank == 0 else []):
        if sent[0] is None:
            return
        yield sent[0]
