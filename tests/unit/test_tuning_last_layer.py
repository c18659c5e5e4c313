"""The last layer where its states are read: the same numbers, and less work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuned import loss_and_gradients, random_pair, stirred

from sima_ray.policy.checkpoint import load_policy
from sima_ray.tuning import last_layer
from sima_ray.tuning.forward import base_of, concatenated
from sima_ray.tuning.last_layer import mark
from sima_ray.tuning.lora import trainable
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


def test_passes_know_nothing_of_each_other(model):
    """Two forward passes, then their backward passes, with the last layer computed anew in each."""
    base_of(model.train()).gradient_checkpointing_enable({"use_reentrant": False})
    one, other = [random_pair(9, 7, 7, 1)], [random_pair(1, 1, 20, 2), random_pair(3, 4, 5, 3)]
    expected = [loss_and_gradients(shared, model, pairs) for pairs in (one, other)]
    scores = [shared(base_of(model), pairs) for pairs in (one, other)]
    with torch.no_grad():
        shared(base_of(model), other)
    for logps, (_, found, _) in zip(scores, expected, strict=True):
        assert torch.equal(logps.chosen_B, found.chosen_B)
        torch.autograd.grad(logps.chosen_B.sum(), list(trainable(model).values()))


class Router(nn.Module):
    """An MLP that gives a router's scores beside the states, and may take more than these."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, states_BTD: Tensor, kinds_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if kinds_BT is not None:
            assert kinds_BT.shape == states_BTD.shape[:2]
        return self.linear(states_BTD), states_BTD.sum(-1)


def test_an_mlp_of_another_form():
    """States beside other things are spread out; one that takes more than states computes all."""
    layer, router, states = nn.Module(), Router(), torch.randn(2, 5, 4, dtype=torch.float64)
    expected, _ = router(states)
    last_layer._restrict(layer, router)
    assert torch.equal(router(states)[0], expected)
    read_M = torch.tensor([1, 4, 7])
    setattr(layer, last_layer._READ, read_M)
    found, scores = router(states)
    assert scores.shape == (1, 3)
    kept = torch.zeros(10, 1, dtype=torch.float64).index_fill(0, read_M, 1.0).view(2, 5, 1)
    torch.testing.assert_close(found, expected * kept)
    assert torch.equal(router(states, torch.ones(2, 5))[0], expected)


def test_a_decoder_without_layers_is_left_alone():
    class Bare(nn.Module):
        def get_decoder(self) -> "Bare":
            return self

    mask = torch.zeros(1)
    mark(Bare(), mask, torch.tensor([0]))
    assert not vars(mask)
