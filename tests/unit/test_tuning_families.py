"""Other families than LLaVA 1.5: what they compute, whether rows are shared, and that tuning moves them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from easy_pairs import easy_pairs, write_pairs
from one_worker import one_worker, tuned_by
from peft import PeftModel
from PIL import Image
from tiny_families import FAMILIES, gemma3
from torch import Tensor
from tuned import distances, loss_and_gradients, stirred

from sima_ray.loss import dpo_loss
from sima_ray.policy.checkpoint import load_policy
from sima_ray.records import PreferencePair
from sima_ray.tuning import choice as choice_module
from sima_ray.tuning.choice import choose_forward
from sima_ray.tuning.dataset import EncodedPair, PairEncoder
from sima_ray.tuning.forward import base_of, concatenated
from sima_ray.tuning.shared import shared, shared_logps
from sima_ray.tuning.tuner import Tuner

SHAPES = [(40, 40), (90, 30), (24, 70), (64, 64)]
"""Of the images: families with tiles or grids make different numbers of tokens of them."""
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-2,
    "epochs": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_tokens": 512,
    "dtype": "float32",
    "lora": {"r": 4, "alpha": 8},
    "zero_stage": 2,
}


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


class Saved:
    """A family's tiny model in a folder, as the product finds one, and what tuning it gives."""

    def __init__(self, family: tuple[Any, Any], images: Path, folder: Path) -> None:
        model, processor = family
        tokenizer = processor.tokenizer
        around = {
            n: getattr(tokenizer, n) for n in ("boi_token", "eoi_token") if n in vars(tokenizer)
        }
        if around:  # Gemma 3's; as published tokenizers name them, so that they are saved
            tokenizer._set_model_specific_special_tokens(around)
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        self.images, self.folder = images, folder

    def tune(self, pairs: str) -> tuple[Tuner, list[float]]:
        """The loss of every step; the adapter is written."""
        job = {
            "model": str(self.folder / "model"),
            "pairs": pairs,
            "images": str(self.images),
            "references": str(self.folder / "reference.parquet"),
            "seed": 3,
        }
        with one_worker(self.folder):
            tuner, losses = tuned_by(job, TRAINING)
            tuner.write_adapter(self.folder / "adapter")
        return tuner, losses

    def check(self, tuner: Tuner, losses: list[float]) -> None:
        """The loss has fallen, and what was written makes it fall for the saved model."""
        assert losses[0] == pytest.approx(0.6931, abs=1e-4)
        assert losses[-1] < losses[0] - 0.1
        assert (len(tuner.pairs), tuner.set_aside) == (len(SHAPES), [])
        model, processor = load_policy(self.folder / "model", "float32")
        tuned: Any = PeftModel.from_pretrained(model, str(self.folder / "adapter"))
        encoder = PairEncoder(processor, str(self.images), 512)
        encoded = [encoder.encode(pair) for pair in tuner.pairs]
        with torch.no_grad():
            after = concatenated(base_of(tuned), encoded)
            with tuned.disable_adapter():
                before = concatenated(base_of(tuned), encoded)
        assert dpo_loss(*logps(after), *logps(before), beta=0.1).loss < losses[0] - 0.1


def logps(of: Any) -> tuple[Tensor, Tensor]:
    return of.chosen_B, of.rejected_B


@pytest.fixture(scope="module")
def pairs_file(folder: Path, preferences: list[PreferencePair]) -> str:
    return write_pairs(preferences, folder / "pairs.parquet")


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


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_models_are_tuned_with_shared_rows(name, folder, pairs_file, tmp_path):
    saved = Saved(FAMILIES[name](), folder, tmp_path)
    tuner, losses = saved.tune(pairs_file)
    assert tuner.forward_note is None
    saved.check(tuner, losses)


def test_a_saved_gemma_3_is_tuned_with_plain_rows(folder, pairs_file, tmp_path):
    saved = Saved(gemma3(), folder, tmp_path)
    tuner, losses = saved.tune(pairs_file)
    assert tuner.forward_note == "tokens of an image or a prompt see each other both ways"
    saved.check(tuner, losses)


def test_gemma_3_keeps_plain_rows(gemma, folder, preferences):
    model, pairs = gemma
    check_plain(model, pairs)
    assert "see each other both ways" in str(choose_forward(model, pairs, max_tokens=512).reason)
    narrow, _ = made(gemma3(sliding_window=16), folder, preferences)
    assert "sliding_attention" in str(choose_forward(narrow, pairs, max_tokens=512).reason)


def test_what_no_config_says_is_measured(gemma, monkeypatch):
    model, pairs = gemma
    monkeypatch.setattr(choice_module, "static_reason", lambda *_: None)
    choice = choose_forward(base_of(model), pairs)
    assert choice.forward is concatenated
    assert "shared and plain rows differ" in str(choice.reason)
