"""Other families than LLaVA 1.5: what they compute, whether rows are shared, and that tuning moves them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs
from PIL import Image
from tiny_families import FAMILIES, gemma3
from torch import Tensor
from tuned import distances, loss_and_gradients, stirred

from sima_ray.loss import dpo_loss
from sima_ray.records import PreferencePair
from sima_ray.tuning import choice as choice_module
from sima_ray.tuning.choice import choose_forward
from sima_ray.tuning.dataset import EncodedPair, PairEncoder
from sima_ray.tuning.forward import PairScorer, base_of, concatenated
from sima_ray.tuning.lora import trainable
from sima_ray.tuning.shared import shared, shared_logps

SHAPES = [(40, 40), (90, 30), (24, 70), (64, 64)]
"""Of the images: families with tiles or grids make different numbers of tokens of them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def preferences(folder: Path) -> list[PreferencePair]:
    pairs = easy_pairs(folder, len(SHAPES))
    for pair, shape in zip(pairs, SHAPES, strict=True):
        with Image.open(folder / pair.image) as image:
            image.resize(shape).save(folder / pair.image)
    return pairs


Made = tuple[Any, list[EncodedPair]]


def made(family: tuple[Any, Any], folder: Path, preferences: Sequence[PreferencePair]) -> Made:
    model, processor = family
    encoder = PairEncoder(processor, str(folder), 512)
    return model.double(), [encoder.encode(pair) for pair in preferences]


@pytest.fixture(params=list(FAMILIES))
def family(request: Any, folder: Path, preferences: list[PreferencePair]) -> Made:
    return made(FAMILIES[request.param](), folder, preferences)


@pytest.fixture
def gemma(folder: Path, preferences: list[PreferencePair]) -> Made:
    return made(gemma3(), folder, preferences)


def one_by_one(model: Any, pair: EncodedPair, response: Tensor) -> Tensor:
    """Sum of log-probabilities from the whole model's whole logits, a single row, no padding."""
    ids = torch.cat([pair.prompt_P, response])[None]
    types = (ids == model.config.image_token_id).long()
    name = "token_type_ids" if model.config.model_type == "gemma3" else "mm_token_type_ids"
    known = {name: types} if "qwen" in model.config.model_type or name == "token_type_ids" else {}
    images = {
        key: value.double() if value.is_floating_point() else value
        for key, value in pair.image_inputs.items()
    }
    logps = model(input_ids=ids, **images, **known).logits[0].log_softmax(-1)
    start = len(pair.prompt_P) - 1
    return logps[start : start + len(response)].gather(1, response[:, None]).sum()


def check_plain(model: Any, pairs: list[EncodedPair]) -> None:
    logps = concatenated(model, pairs)
    for i, pair in enumerate(pairs):
        assert abs(logps.chosen_B[i] - one_by_one(model, pair, pair.chosen_C)) <= 1e-10
        assert abs(logps.rejected_B[i] - one_by_one(model, pair, pair.rejected_R)) <= 1e-10


def check_tuning(model: Any, pairs: list[EncodedPair]) -> None:
    """A few steps, the way that is chosen, lower the loss and move every adapter."""
    tuned = stirred(model)
    scorer = PairScorer(tuned, choose_forward(tuned, pairs, max_tokens=512).forward)
    with torch.no_grad():
        references = scorer(pairs)
    before = {name: p.detach().clone() for name, p in trainable(tuned).items()}
    optimizer = torch.optim.Adam(trainable(tuned).values(), lr=2e-3)
    losses: list[float] = []
    for _ in range(4):
        loss = dpo_loss(*scorer(pairs), *references, beta=0.1).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] < losses[0] - 0.01
    assert all((p - before[name]).abs().max() > 1e-4 for name, p in trainable(tuned).items())


def test_plain_rows_equal_the_whole_model(family):
    check_plain(*family)


def test_shared_rows_equal_plain_ones(family):
    model, pairs = family
    tuned = stirred(model)
    choice = choose_forward(tuned, pairs, max_tokens=512)
    assert (choice.forward, choice.reason) == (shared, None)
    one, other = (loss_and_gradients(way, tuned, pairs) for way in (shared, concatenated))
    loss, logps, gradients = distances(one, other)
    assert loss <= 1e-12
    assert logps <= 1e-10
    assert gradients <= 1e-7  # the norms of these models compute in float32


def test_three_responses_in_a_row_are_three_plain_rows(family):
    model, pairs = family
    third = torch.tensor([9, 8, 7, 6, 5])
    responses = [[p.rejected_R, third, p.chosen_C] for p in pairs]
    logps_N, response_N = shared_logps(model, pairs, responses)
    sums_R = logps_N.new_zeros(3 * len(pairs)).index_add(0, response_N, logps_N).view(-1, 3)
    plain = concatenated(model, pairs)
    other = concatenated(model, [replace(p, chosen_C=third) for p in pairs])
    expected = torch.stack([plain.rejected_B, other.chosen_B, plain.chosen_B], dim=1)
    assert (sums_R - expected).abs().max() <= 1e-10


def test_tuning_moves_them(family):
    check_tuning(*family)


def test_gemma_3_keeps_plain_rows(gemma, folder, preferences):
    model, pairs = gemma
    check_plain(model, pairs)
    assert "see each other both ways" in str(choose_forward(model, pairs, max_tokens=512).reason)
    check_tuning(model, pairs)
    narrow, _ = made(gemma3(sliding_window=16), folder, preferences)
    assert "sliding_attention" in str(choose_forward(narrow, pairs, max_tokens=512).reason)


def test_what_no_config_says_is_measured(gemma, monkeypatch):
    model, pairs = gemma
    monkeypatch.setattr(choice_module, "static_reason", lambda *_: None)
    choice = choose_forward(base_of(model), pairs)
    assert choice.forward is concatenated
    assert "shared and plain rows differ" in str(choice.reason)
