"""Which forward pass a model trains with: the one that shares prompts where it computes the same, and why not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned import ragged_pairs, stirred, stirred_llava

from sima_ray.errors import DataError
from sima_ray.policy.checkpoint import load_policy
from sima_ray.tuning import attention as attention_module
from sima_ray.tuning import choice as choice_module
from sima_ray.tuning import shared as shared_module
from sima_ray.tuning.attention import PARTS, attention_of
from sima_ray.tuning.choice import ForwardChoice, choose_forward, disagreement
from sima_ray.tuning.dataset import EncodedPair
from sima_ray.tuning.forward import base_of, concatenated, response_logps
from sima_ray.tuning.shared import share_rows, shared


@pytest.fixture(params=["sdpa", PARTS])
def model(tiny_llava: Path, request: pytest.FixtureRequest) -> Any:
    return stirred_llava(tiny_llava, request.param)


@pytest.fixture(scope="module")
def pairs() -> list[EncodedPair]:
    return ragged_pairs()


def test_a_tiny_llava_shares(model, pairs):
    choice = choose_forward(model, pairs)
    assert (choice.forward, choice.reason) == (shared, None)


def test_a_pair_that_is_unusable_is_no_probe(model, pairs):
    short = replace(pairs[0], prompt_P=pairs[0].prompt_P[pairs[0].prompt_P != 3])
    assert choose_forward(model, [short, pairs[1]]).forward is shared
    with pytest.raises(DataError, match="0 image tokens for 36"):
        shared(base_of(model), [short])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 64}, "sliding_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"cross_attention_layers": [1]}, "cross-attention"),
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2 takes no mask"),
        ({"alibi": True}, "cannot restart"),
    ],
)
def test_what_a_config_says_against_sharing(model, pairs, changes, reason):
    for name, value in changes.items():
        setattr(base_of(model).config.get_text_config(), name, value)
    choice = choose_forward(model, pairs, max_tokens=128)
    assert choice.forward is concatenated
    assert reason in str(choice.reason)


def test_a_recurrent_state_is_not_shared(model, pairs):
    base_of(model).get_decoder()._is_stateful = True
    choice = choose_forward(model, pairs)
    assert choice.forward is concatenated
    assert "recurrent state" in str(choice.reason)


def test_a_window_that_no_row_outgrows_is_no_window(model, pairs):
    base_of(model).config.get_text_config().sliding_window = 128
    assert choose_forward(model, pairs, max_tokens=128).reason is None


def test_what_is_measured_decides(model, pairs, monkeypatch):
    """A mask that hides nothing between the responses, and positions that go on, are found out."""
    base, pair = base_of(model), pairs[3]
    plain_N = response_logps(base, [pair])[0].detach()
    assert disagreement(base, pair, plain_N) is None

    def causal(segments_BT: torch.Tensor, attention: str, dtype: torch.dtype) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(shared_module, "attention_mask", causal)
        choice = choose_forward(model, [pair])
        assert choice.forward is concatenated
        assert "differ by" in str(choice.reason)

    def going_on(rows: Any) -> Any:
        laid_out = share_rows(rows)
        return replace(laid_out, columns_BT=torch.arange(laid_out.ids_BT.shape[1])[None])

    with monkeypatch.context() as patch:
        patch.setattr(shared_module, "share_rows", going_on)
        assert "differ by" in str(disagreement(base, pair, plain_N))


def test_a_model_that_cannot_take_such_rows_keeps_plain_ones(model, pairs, monkeypatch):
    def refuse(*_: Any) -> None:
        raise TypeError("no such\nargument")

    monkeypatch.setattr(shared_module, "attention_mask", refuse)
    choice = choose_forward(model, pairs)
    assert choice.forward is concatenated
    assert choice.reason == "TypeError: no such argument"


@pytest.fixture
def not_compiled(monkeypatch) -> None:
    """FlexAttention as CUDA would choose it, in the implementation that needs no compiler."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(
        integration, "WrappedFlexAttention", lambda training: lambda: flex_attention
    )
    monkeypatch.setattr(choice_module, "can_flex", lambda _: True)


def test_a_model_computes_the_same_with_flex_attention(model, pairs, not_compiled):
    model.requires_grad_(False)  # on a CPU it has no backward pass
    plain = concatenated(base_of(model), pairs)
    assert choose_forward(model, pairs) == ForwardChoice(shared)
    assert attention_of(base_of(model)) == "flex_attention"
    assert base_of(model).model.vision_tower.config._attn_implementation == "sdpa"
    logps = shared(base_of(model), pairs)
    assert (logps.chosen_B - plain.chosen_B).abs().max() <= 1e-10
    assert (logps.rejected_B - plain.rejected_B).abs().max() <= 1e-10


def test_where_flex_attention_fails_parts_serve_and_where_these_do_a_dense_mask(
    tiny_llava, pairs, not_compiled, monkeypatch
):
    """FlexAttention here in the backward pass, which adapters that train need."""
    model = stirred(load_policy(tiny_llava, "float64")[0])
    assert choose_forward(model, pairs) == ForwardChoice(shared)
    assert attention_of(base_of(model)) == PARTS

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr(attention_module, "sdpa_attention_forward", refuse)
    model = stirred(load_policy(tiny_llava, "float64")[0])
    assert choose_forward(model, pairs) == ForwardChoice(shared)
    assert attention_of(base_of(model)) == "sdpa"
