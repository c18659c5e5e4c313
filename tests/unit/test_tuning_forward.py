"""Log-probabilities of pairs, adapters on the language model only, the reference pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs
from torch import Tensor

from sima_ray.config import LoraSettings
from sima_ray.errors import ModelError
from sima_ray.loss import dpo_loss
from sima_ray.policy.checkpoint import load_policy
from sima_ray.tuning.dataset import EncodedPair, PairEncoder, SetAside, UnusablePair
from sima_ray.tuning.forward import PairScorer, base_of, concatenated
from sima_ray.tuning.lora import add_lora, language_model_pattern, trainable
from sima_ray.tuning.reference import ReferenceFile, reference_pass, set_aside, usable

LORA = LoraSettings(r=4, alpha=8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def encoder(tiny_llava: Path, images: Path) -> PairEncoder:
    from sima_ray.policy.checkpoint import load_processor

    return PairEncoder(load_processor(tiny_llava), str(images), 512)


@pytest.fixture(scope="module")
def encoded(encoder: PairEncoder, images: Path) -> list[EncodedPair]:
    return [encoder.encode(pair) for pair in easy_pairs(images, 5)]


@pytest.fixture
def model(tiny_llava: Path) -> Any:
    return load_policy(tiny_llava, "float64")[0]


def stirred(model: Any) -> Any:
    """The model with adapters that are no longer zero."""
    tuned = add_lora(model, LORA, seed=1)
    with torch.no_grad():
        for parameter in trainable(tuned).values():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.1)
    return tuned


def one_by_one(model: Any, pair: EncodedPair, response: Tensor) -> Tensor:
    """Sum of log-probabilities from the whole model's whole logits, a single row, no padding."""
    ids = torch.cat([pair.prompt_P, response])[None]
    pixels = pair.image_inputs["pixel_values"].double()
    logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    logps = logits.log_softmax(-1)
    start = len(pair.prompt_P)
    terms = [logps[start + i - 1, token] for i, token in enumerate(response.tolist())]
    return torch.stack(terms).sum()


def test_log_probabilities_equal_those_of_full_logits(model, encoded):
    torch.manual_seed(0)
    tuned = stirred(model)
    logps = concatenated(base_of(tuned), encoded)
    for i, pair in enumerate(encoded):
        assert abs(logps.chosen_B[i] - one_by_one(tuned, pair, pair.chosen_C)) < 1e-10
        assert abs(logps.rejected_B[i] - one_by_one(tuned, pair, pair.rejected_R)) < 1e-10


def test_gradients_equal_those_of_full_logits(model, encoded):
    torch.manual_seed(0)
    tuned = stirred(model)
    parameters = list(trainable(tuned).values())
    logps = concatenated(base_of(tuned), encoded[:3])
    ours = torch.autograd.grad((logps.chosen_B - logps.rejected_B).sum(), parameters)
    plain = [
        one_by_one(tuned, p, p.chosen_C) - one_by_one(tuned, p, p.rejected_R) for p in encoded[:3]
    ]
    theirs = torch.autograd.grad(torch.stack(plain).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-8


def test_neither_padding_nor_neighbours_nor_order_matter(model, encoded):
    together = concatenated(model, encoded)
    backwards = concatenated(model, encoded[::-1])
    torch.testing.assert_close(together.chosen_B, backwards.chosen_B.flip(0), rtol=0, atol=1e-10)
    for i, pair in enumerate(encoded):
        alone = concatenated(model, [pair])
        assert abs(alone.chosen_B[0] - together.chosen_B[i]) < 1e-10
        assert abs(alone.rejected_B[0] - together.rejected_B[i]) < 1e-10


def test_only_the_language_model_is_trained(model):
    tuned = add_lora(model, LORA, seed=0)
    names = list(trainable(tuned))
    assert len(names) == 2 * 7 * 2  # two layers of seven linears, A and B each
    assert all(".language_model.layers." in name and ".lora_" in name for name in names)
    assert not any("vision" in name or "projector" in name for name in names)


def test_a_target_that_no_layer_has_is_an_error(model):
    with pytest.raises(ModelError, match="fc1"):  # the vision tower has one
        language_model_pattern(model, ["fc1"])


def test_the_loss_starts_at_log_2(model, encoded):
    tuned = add_lora(model, LORA, seed=0)
    chosen_B, rejected_B = PairScorer(tuned, concatenated)(encoded)
    with torch.no_grad(), tuned.disable_adapter():
        reference = concatenated(base_of(tuned), encoded)
    result = dpo_loss(chosen_B, rejected_B, reference.chosen_B, reference.rejected_B, beta=0.1)
    assert abs(result.loss.item() - torch.tensor(2.0).log().item()) < 1e-7


def test_too_few_image_tokens_are_found_before_the_model_runs(model, encoded):
    short = replace(encoded[0], prompt_P=encoded[0].prompt_P[encoded[0].prompt_P != 3])
    with pytest.raises(UnusablePair, match=r"r000.*0 image tokens for 36") as caught:
        concatenated(model, [encoded[1], short])
    assert caught.value.reason is SetAside.IMAGE_TOKENS


def test_references_are_computed_once_and_without_adapters(model, encoder, images, tmp_path):
    pairs = easy_pairs(images, 5)
    pairs.append(replace(pairs[0], chosen="another"))  # a second r000
    pairs.append(replace(pairs[0], row_id="r900", chosen=""))
    expected = concatenated(model, [encoder.encode(pair) for pair in pairs[:5]])
    tuned = stirred(model)
    file = ReferenceFile(str(tmp_path / "reference.parquet"), "this model")
    calls: list[int] = []

    def counting(model: Any, batch: Any):
        calls.append(len(batch))
        return concatenated(model, batch)

    known = reference_pass(tuned, counting, encoder, pairs, file, batch_size=2)
    assert reference_pass(tuned, counting, encoder, pairs, file, batch_size=2) == known
    assert calls == [2, 2, 1]
    found = [known[pair.row_id].chosen_logp for pair in pairs[:5]]
    torch.testing.assert_close(torch.tensor(found), expected.chosen_B.float(), rtol=0, atol=1e-4)
    assert usable(pairs, known) == pairs[:5]
    assert [(r.row_id, r.set_aside) for r in set_aside(pairs, known)] == [
        ("r000", SetAside.DUPLICATE_ID),
        ("r900", SetAside.EMPTY_RESPONSE),
    ]
    assert ReferenceFile(str(tmp_path / "reference.parquet"), "another model").read() == {}


def test_a_pair_that_spoils_a_batch_is_set_aside_alone(model, encoder, images, tmp_path):
    pairs = easy_pairs(images, 3)

    def picky(model: Any, batch: Any):
        for pair in batch:
            if pair.pair.row_id == "r001":
                raise UnusablePair("r001", SetAside.IMAGE_TOKENS, "odd")
        return concatenated(model, batch)

    file = ReferenceFile(str(tmp_path / "reference.parquet"), "x")
    known = reference_pass(model, picky, encoder, pairs, file, batch_size=3)
    assert [known[pair.row_id].set_aside for pair in pairs] == [None, SetAside.IMAGE_TOKENS, None]
