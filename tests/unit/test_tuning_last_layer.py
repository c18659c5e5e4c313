"""The last layer where its states are read: the same numbers, and less work."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuned import distances, loss_and_gradients, random_pair, stirred

from sima_ray.policy.checkpoint import load_policy
from sima_ray.tuning.forward import base_of, concatenated
from sima_ray.tuning.last_layer import last_layer_at
from sima_ray.tuning.shared import share_rows, shared


@pytest.fixture
def model(tiny_llava: Path) -> Any:
    return stirred(load_policy(tiny_llava, "float64")[0])


def tokens_through(module: nn.Module) -> list[int]:
    """Filled with how many tokens each call of a module takes."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    return seen


def test_only_what_is_read_passes_the_last_layer(model):
    pair = random_pair(30, 5, 7, 0)
    *_, before, last = base_of(model).get_decoder().layers
    shared(base_of(model), [pair])  # restricts the modules, before the watchers
    all_tokens, read = tokens_through(before.mlp), tokens_through(last.mlp)
    keys, queries = (tokens_through(last.self_attn.k_proj), tokens_through(last.self_attn.q_proj))
    shared(base_of(model), [pair])
    row = len(pair.prompt_P) + 4 + 6
    assert (all_tokens, keys) == ([row], [row])
    assert (read, queries) == ([1 + 4 + 6], [1 + 4 + 6])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plain_rows_after_shared_ones_compute_all(model, checkpointing):
    if checkpointing:
        base_of(model.train()).gradient_checkpointing_enable({"use_reentrant": False})
    pairs = [random_pair(9, 7, 7, 1), random_pair(1, 1, 20, 2)]
    before = concatenated(base_of(model), pairs)
    shared(base_of(model), pairs)
    after = concatenated(base_of(model), pairs)
    assert torch.equal(before.chosen_B, after.chosen_B)
    assert torch.equal(before.rejected_B, after.rejected_B)


def test_the_whole_model_after_shared_rows_computes_all(model):
    pair = random_pair(9, 7, 7, 1)
    rows = {"input_ids": pair.prompt_P[None], **pair.image_inputs}
    before = base_of(model)(**rows).logits
    shared(base_of(model), [pair])
    assert torch.equal(before, base_of(model)(**rows).logits)


def test_what_is_read_is_named_once():
    """The last of the prompt predicts the first token of both responses."""
    prompt, one, other = torch.ones(3).long(), torch.ones(2).long(), torch.ones(4).long()
    rows = share_rows([(prompt, [one, other]), (prompt[:1], [one, one])])
    assert rows.read_M.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_a_layer_of_other_modules_computes_all(model, monkeypatch):
    """Nothing to restrict by these names: the same numbers as with restricted modules."""
    pairs = [random_pair(9, 7, 7, 1), random_pair(1, 1, 20, 2)]
    restricted = loss_and_gradients(shared, model, pairs)

    def nothing(_: Any, read_M: Tensor | None) -> Any:
        assert read_M is None or read_M.unique().shape == read_M.shape
        return nullcontext()

    monkeypatch.setattr("sima_ray.tuning.forward.last_layer_at", nothing)
    loss, logps, gradients = distances(restricted, loss_and_gradients(shared, model, pairs))
    assert loss <= 1e-12
    assert logps <= 1e-10
    assert gradients <= 1e-10


def test_a_decoder_without_layers_is_left_alone():
    class Bare(nn.Module):
        def get_decoder(self) -> "Bare":
            return self

    with last_layer_at(Bare(), torch.tensor([0])):
        pass
