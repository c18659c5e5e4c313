"""References that came with the pairs: believed where a sample of them holds, computed where it does not."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs

from sima_ray.policy.checkpoint import load_policy, load_processor
from sima_ray.records import PreferencePair
from sima_ray.tuning.choice import TOLERANCES
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, SetAside, UnusablePair
from sima_ray.tuning.forward import PairLogps, concatenated
from sima_ray.tuning.generated import SAMPLE, Believed, Taken, believe, kind_of, sample
from sima_ray.tuning.reference import Reference, ReferenceFile, reference_pass

COUNT = 24


class Counting:
    """Scores plainly, and keeps the ids of what it scored; some pairs it cannot."""

    def __init__(self, *unusable: str) -> None:
        self.scored: list[str] = []
        self._unusable = unusable

    def __call__(self, model: Any, pairs: Sequence[EncodedPair]) -> PairLogps:
        for pair in pairs:
            if pair.pair.row_id in self._unusable:
                raise UnusablePair(pair.pair.row_id, SetAside.IMAGE_TOKENS, "odd")
        self.scored += [pair.pair.row_id for pair in pairs]
        return concatenated(model, pairs)


class Gather:
    """What two threads hand in, joined in the order of their ranks, as `gather_lists` does for processes."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Any]] = {}
        self._meet = Barrier(2, timeout=60)

    def of(self, rank: int) -> Any:
        def gather(values: list[Any]) -> list[Any]:
            self._parts[rank] = values
            self._meet.wait()
            joined = [value for part in (0, 1) for value in self._parts[part]]
            self._meet.wait()
            return joined

        return gather


@pytest.fixture(scope="module")
def policy(tiny_llava: Path) -> tuple[Any, Any]:
    return load_policy(tiny_llava, "float32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def model(policy: tuple[Any, Any]) -> Any:
    return policy[0]


@pytest.fixture(scope="module")
def encoder(policy: tuple[Any, Any], images: Path) -> PairEncoder:
    return PairEncoder(policy[1], str(images), 512)


@pytest.fixture(scope="module")
def plain(images: Path) -> list[PreferencePair]:
    return easy_pairs(images, COUNT)


@pytest.fixture(scope="module")
def computed(
    model: Any,
    encoder: PairEncoder,
    plain: list[PreferencePair],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Reference]:
    file = ReferenceFile(str(tmp_path_factory.mktemp("computed") / "reference.parquet"), "")
    return reference_pass(model, concatenated, encoder, plain, file, batch_size=4)


@pytest.fixture(scope="module")
def pairs(
    encoder: PairEncoder, plain: list[PreferencePair], computed: dict[str, Reference]
) -> list[PreferencePair]:
    """As generation leaves them, each a little off what tuning computes."""
    return [
        replace(
            pair,
            chosen_logp=(computed[pair.row_id].chosen_logp or 0.0) + 1e-4,
            rejected_logp=computed[pair.row_id].rejected_logp,
            chosen_tokens=len(encoder.encode(pair).chosen_C),
            rejected_tokens=len(encoder.encode(pair).rejected_R),
        )
        for pair in plain
    ]


def found(
    believed: Believed,
    model: Any,
    forward: Any,
    encoder: PairEncoder,
    pairs: list[PreferencePair],
    path: Path,
) -> dict[str, Reference]:
    """The reference pass after the sample."""
    file = ReferenceFile(str(path / "reference.parquet"), "")
    return reference_pass(model, forward, encoder, pairs, file, batch_size=4, given=believed.given)


def test_what_came_with_the_pairs_is_taken_and_only_a_sample_computed(
    model: Any, encoder: PairEncoder, pairs: list[Any], computed: dict[str, Any], tmp_path: Path
) -> None:
    forward = Counting()
    believed = believe(model, forward, encoder, pairs, seed=1, beta=0.1, batch_size=4)
    assert (believed.given, believed.note) == (
        Taken(frozenset({kind_of(encoder.encode(pairs[0]))})),
        None,
    )
    assert forward.scored == [pair.row_id for pair in sample(pairs, 1)[:SAMPLE]]
    assert len(set(forward.scored)) == SAMPLE
    references = found(believed, model, forward, encoder, pairs, tmp_path)
    assert len(forward.scored) == SAMPLE
    for pair in pairs:
        expected = replace(
            computed[pair.row_id], chosen_logp=pair.chosen_logp, generated=True
        )  # widths and image digests among the rest
        assert references[pair.row_id] == expected
    # Taken up again without belief, what is in the file is not believed either.
    assert found(Believed(), model, forward, encoder, pairs, tmp_path) == computed


def test_pairs_without_or_of_other_tokens_are_computed(
    model: Any, encoder: PairEncoder, pairs: list[Any], computed: dict[str, Any], tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {"chosen_logp": None},
        {"rejected_logp": None},
        {"chosen_tokens": None},
        {"rejected_tokens": pairs[4].rejected_tokens + 1},
        {"chosen_logp": float("nan")},
        {"rejected_logp": float("-inf")},
    ]
    mixed = [replace(pair, **change) for pair, change in zip(pairs, changes, strict=False)]
    odd = [pair.row_id for pair in mixed]
    mixed += pairs[len(changes) :]
    mixed.append(replace(pairs[-1], row_id="r900", chosen=" "))
    forward = Counting()
    believed = believe(model, Counting(), encoder, mixed, seed=2, beta=0.1, batch_size=4)
    references = found(believed, model, forward, encoder, mixed, tmp_path)
    assert forward.scored == odd
    assert {i: references[i] for i in odd} == {i: computed[i] for i in odd}
    assert references["r900"].set_aside == SetAside.EMPTY_RESPONSE
    assert sum(r.generated for r in references.values()) == COUNT - len(odd)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_one_of_the_sample_that_is_too_far_off_refuses_all(
    model: Any, encoder: PairEncoder, pairs: list[Any], computed: dict[str, Any], side: str
) -> None:
    far = sample(pairs, 1)[5].row_id
    (tolerance,) = {TOLERANCES[p.dtype] for p in model.parameters()}

    def off(times: float) -> Believed:
        changed = [
            replace(p, **{f"{side}_logp": getattr(computed[far], f"{side}_logp") - apart})
            if p.row_id == far
            else p
            for p in pairs
            for apart in [times * tolerance * getattr(p, f"{side}_tokens")]
        ]
        return believe(model, concatenated, encoder, changed, seed=1, beta=0.1, batch_size=4)

    assert isinstance(off(0.9).given, Taken)
    refused = off(1.1)
    assert refused.given is None
    assert f"pair {far}: generated and computed" in (refused.note or "")
    assert "0.0011 a token, over 1e-03" in (refused.note or "")
    assert "torch.float32" in (refused.note or "")


def test_a_small_bias_that_moves_every_margin_refuses_all(
    model: Any, encoder: PairEncoder, pairs: list[Any]
) -> None:
    """Each response within the tolerance of its tokens, as a policy that is a little older gives."""
    (tolerance,) = {TOLERANCES[p.dtype] for p in model.parameters()}
    shifted = [
        replace(
            p,
            chosen_logp=p.chosen_logp - 0.9 * tolerance * p.chosen_tokens,
            rejected_logp=p.rejected_logp + 0.9 * tolerance * p.rejected_tokens,
        )
        for p in pairs
    ]
    assert believe(model, concatenated, encoder, shifted, seed=1, beta=0.1, batch_size=4).given
    refused = believe(model, concatenated, encoder, shifted, seed=1, beta=10.0, batch_size=4)
    assert refused.given is None and "move the margins by" in (refused.note or "")


def test_the_sample_is_of_pairs_that_fit(
    model: Any, encoder: PairEncoder, pairs: list[Any]
) -> None:
    """Pairs of other token counts are passed over, and one that is off behind them is found."""
    order = [pair.row_id for pair in sample(pairs, 1)]
    unfit, off = set(order[:8]), order[SAMPLE + 3]
    mixed = [
        replace(p, chosen_tokens=p.chosen_tokens + (p.row_id in unfit))
        if p.row_id != off
        else replace(p, chosen_logp=-999.0)
        for p in pairs
    ]
    refused = believe(model, concatenated, encoder, mixed, seed=1, beta=0.1, batch_size=4)
    assert refused.given is None and f"pair {off}" in (refused.note or "")


def test_an_image_of_a_kind_that_was_not_computed_is(
    encoder: PairEncoder, pairs: list[Any]
) -> None:
    pair = encoder.encode(pairs[0])
    assert Taken(frozenset({kind_of(pair)}))(pair) == (pairs[0].chosen_logp, pairs[0].rejected_logp)
    larger = replace(pair, image_inputs={"pixel_values": torch.zeros(1, 3, 99, 99)})
    assert Taken(frozenset({kind_of(pair)}))(larger) is None


def test_a_sample_that_cannot_be_scored_refuses_all(
    model: Any, encoder: PairEncoder, pairs: list[Any]
) -> None:
    odd = Counting(sample(pairs, 1)[0].row_id)
    assert "inf a token" in (
        believe(model, odd, encoder, pairs, seed=1, beta=0.1, batch_size=4).note or ""
    )


def test_nothing_to_hold_the_rest_to_is_a_reason_too(
    model: Any, encoder: PairEncoder, plain: list[Any], pairs: list[Any]
) -> None:
    forward = Counting()
    none = believe(model, forward, encoder, plain, seed=1, beta=0.1, batch_size=4)
    assert none == Believed(note="no pair came with the log-probabilities of its responses")
    longer = [replace(pair, chosen_tokens=pair.chosen_tokens + 1) for pair in pairs]
    other = believe(model, forward, encoder, longer, seed=1, beta=0.1, batch_size=4)
    assert other.given is None and f"none of {COUNT} sampled pairs" in (other.note or "")
    assert forward.scored == []


def test_the_sample_is_the_seeds_and_the_ids_alone(plain: list[Any], pairs: list[Any]) -> None:
    drawn = sample(pairs, 1)
    assert sample(pairs[::-1], 1) == drawn
    assert sample([*pairs, replace(pairs[0], chosen="another")], 1) == drawn  # a second r000
    assert sample(pairs, 2) != drawn
    assert sample([*plain[:20], *pairs[20:]], 1) == sample(pairs[20:], 1)


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_two_workers_come_to_the_same(
    tiny_llava: Path, images: Path, model: Any, pairs: list[Any], tmp_path: Path, off: float
) -> None:
    """The one pair that is off is in the share of rank 1; rank 0 refuses all the same."""
    far = sample(pairs, 1)[1].row_id
    pairs = [replace(p, chosen_logp=p.chosen_logp + off) if p.row_id == far else p for p in pairs]
    gather = Gather()
    encoders = [PairEncoder(load_processor(tiny_llava), str(images), 512) for _ in range(2)]
    forwards = [Counting(), Counting()]
    results: dict[int, Any] = {}

    def work(rank: int) -> None:
        how: dict[str, Any] = {"rank": rank, "world": 2, "gather": gather.of(rank), "batch_size": 4}
        believed = believe(model, forwards[rank], encoders[rank], pairs, seed=1, beta=0.1, **how)
        file = ReferenceFile(str(tmp_path / f"{off}.parquet"), "")
        references = reference_pass(
            model, forwards[rank], encoders[rank], pairs, file, given=believed.given, **how
        )
        results[rank] = believed, references

    threads = [Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    alone = believe(model, concatenated, encoders[0], pairs, seed=1, beta=0.1, batch_size=4)
    believed, references = results[0]
    assert believed == alone and (believed.note is None) == (off == 0.0)
    assert {r.generated for r in references.values()} == {off == 0.0}
    drawn = [pair.row_id for pair in sample(pairs, 1)[:SAMPLE]]
    assert [forward.scored[: SAMPLE // 2] for forward in forwards] == [drawn[::2], drawn[1::2]]
