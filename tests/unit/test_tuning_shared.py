"""Rows that share a prompt: the same log-probabilities, loss and gradients as rows of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from tuned import distances, loss_and_gradients, ragged_pairs, random_pair, stirred, stirred_llava

from sima_ray.loss import token_logps
from sima_ray.policy.checkpoint import load_policy
from sima_ray.tuning import shared as shared_module
from sima_ray.tuning.attention import (
    PADDING,
    PARTS,
    PROMPT,
    attend_in_parts,
    attention_mask,
    set_attention,
    visible,
)
from sima_ray.tuning.dataset import EncodedPair
from sima_ray.tuning.forward import base_of, concatenated
from sima_ray.tuning.shared import head_logps, share_rows, shared, shared_logps


@pytest.fixture(params=["sdpa", PARTS])
def model(tiny_llava: Path, request: pytest.FixtureRequest) -> Any:
    return stirred_llava(tiny_llava, request.param)


@pytest.fixture(scope="module")
def pairs() -> list[EncodedPair]:
    return ragged_pairs()


def both(model: Any, pairs: list[EncodedPair]) -> tuple[float, float, float]:
    """How far shared and plain rows are from each other in loss, log-probabilities, gradients."""
    return distances(*(loss_and_gradients(way, model, pairs) for way in (shared, concatenated)))


def test_a_row_by_hand():
    """Prompt 10 11; responses 20 21 22, 30 and 40 41: what is in the row, and what predicts what."""
    rows = share_rows(
        [
            (
                torch.tensor([10, 11]),
                [torch.tensor([20, 21, 22]), torch.tensor([30]), torch.tensor([40, 41])],
            ),
            (torch.tensor([12]), [torch.tensor([50, 51])]),
        ]
    )
    assert rows.ids_BT.tolist() == [[10, 11, 20, 21, 40], [12, 50, 0, 0, 0]]
    assert rows.segments_BT.tolist() == [[0, 0, 1, 1, 3], [0, 1, *[PADDING] * 3]]
    assert rows.columns_BT.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert rows.plain_BT.tolist() == [[0, 0, 0, 0, 2], [3, 3, 3, 3, 3]]
    assert rows.rows_N.tolist() == [0] * 6 + [1] * 2
    assert rows.columns_N.tolist() == [1, 2, 3, 1, 1, 4, 0, 1]
    assert rows.labels_N.tolist() == [20, 21, 22, 30, 40, 41, 50, 51]
    assert rows.response_N.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]


def test_the_same_as_plain_rows_in_float64(model, pairs):
    loss, logps, gradients = both(model, pairs)
    assert loss <= 1e-12
    assert logps <= 1e-10
    assert gradients <= 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_the_same_at_random_lengths(model, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    lengths = torch.randint(1, 50, (3, 3), generator=generator).tolist()
    batch = [random_pair(*each, seed=10 * seed + i) for i, each in enumerate(lengths)]
    loss, logps, gradients = both(model, batch)
    assert loss <= 1e-12
    assert logps <= 1e-10
    assert gradients <= 1e-8


def test_close_in_float32_and_in_bfloat16(tiny_llava, pairs):
    single = stirred(load_policy(tiny_llava, "float32")[0])
    assert both(single, pairs)[0] <= 2e-5
    exact, *_ = loss_and_gradients(concatenated, single, pairs)
    for attention in ("sdpa", "eager", PARTS):
        own = "sdpa" if attention == PARTS else attention
        half = stirred(load_policy(tiny_llava, "bfloat16", own)[0])
        set_attention(base_of(half), attention)
        loss, logps, gradients = loss_and_gradients(shared, half, pairs)
        assert logps.chosen_B.dtype == torch.float32
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert abs(loss - exact) < 0.05
        plain = concatenated(base_of(half), pairs)
        for ours, theirs, side in (
            (logps.chosen_B, plain.chosen_B, [len(p.chosen_C) for p in pairs]),
            (logps.rejected_B, plain.rejected_B, [len(p.rejected_R) for p in pairs]),
        ):
            assert ((ours - theirs).abs() / torch.tensor(side)).max() < 0.02


def test_the_same_with_eager_attention(tiny_llava, pairs):
    tuned = stirred(load_policy(tiny_llava, "float64", "eager")[0])
    loss, logps, gradients = both(tuned, pairs)
    assert loss <= 1e-6  # its softmax is in float32 whatever the model is in
    assert logps <= 1e-4
    assert gradients <= 1e-5


def test_the_same_with_gradient_checkpointing(model, pairs):
    model.train()
    without = loss_and_gradients(shared, model, pairs)
    base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    loss, logps, gradients = distances(without, loss_and_gradients(shared, model, pairs))
    assert (loss, logps) == (0.0, 0.0)
    assert gradients <= 1e-12


def test_one_response_cannot_see_the_other(model, pairs):
    changed = [replace(p, rejected_R=(p.rejected_R + 7) % 250) for p in pairs]
    before, after = (shared(base_of(model), batch) for batch in (pairs, changed))
    assert torch.equal(before.chosen_B, after.chosen_B)
    assert not torch.isclose(before.rejected_B, after.rejected_B).any()


def test_three_responses_in_a_row_are_three_plain_rows(model, pairs):
    responses = [[p.chosen_C, p.rejected_R, p.chosen_C.flip(0)[:5]] for p in pairs]
    logps_N, response_N = shared_logps(base_of(model), pairs, responses)
    sums_R = logps_N.new_zeros(15).index_add(0, response_N, logps_N).view(-1, 3)
    for i in range(3):
        plain = concatenated(
            base_of(model),
            [replace(p, chosen_C=r[i]) for p, r in zip(pairs, responses, strict=True)],
        )
        assert (sums_R[:, i] - plain.chosen_B).abs().max() <= 1e-10


def test_neither_padding_nor_neighbours_nor_order_matter(model, pairs):
    together = shared(base_of(model), pairs)
    backwards = shared(base_of(model), pairs[::-1])
    assert (together.chosen_B - backwards.chosen_B.flip(0)).abs().max() <= 1e-10
    for i, pair in enumerate(pairs):
        alone = shared(base_of(model), [pair])
        assert abs(alone.chosen_B[0] - together.chosen_B[i]) <= 1e-10
        assert abs(alone.rejected_B[0] - together.rejected_B[i]) <= 1e-10


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_a_token_sees_its_prompt_and_its_own_response_before_it(lengths):
    rows = share_rows(
        [
            (torch.ones(p).long(), [torch.ones(n).long() for n in responses])
            for p, responses in lengths
        ]
    )
    mask_B1TT = attention_mask(rows.segments_BT, "sdpa", torch.float64)
    count, length = rows.segments_BT.shape
    assert mask_B1TT.shape == (count, 1, length, length)
    sees = visible(rows.segments_BT)
    for row, segments in enumerate(rows.segments_BT.tolist()):
        for q, own in enumerate(segments):
            for kv, other in enumerate(segments):
                expected = kv <= q and other in (own, PROMPT)
                at = torch.tensor([row, 0, q, kv])
                assert bool(sees(*at)) == expected
                assert bool(mask_B1TT[row, 0, q, kv] == 0) == expected


class _Layer(nn.Module):
    """What attention reads off a layer."""

    num_key_value_groups = 2
    is_causal = True


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    )
)
def test_attention_in_parts_is_that_with_a_dense_mask(lengths):
    rows = share_rows(
        [
            (torch.ones(p).long(), [torch.ones(n).long() for n in responses])
            for p, responses in lengths
        ]
    )
    torch.manual_seed(0)
    count, length = rows.ids_BT.shape
    query, key, value = (
        torch.randn(count, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    kept = (rows.segments_BT != PADDING).double()[:, :, None, None]
    weight = torch.randn(count, length, 4, 8, dtype=torch.float64) * kept
    found = []
    for name, attend in ((PARTS, attend_in_parts), ("sdpa", sdpa_attention_forward)):
        mask = attention_mask(rows.segments_BT, name, torch.float64)
        mixed, _ = attend(_Layer(), query, key, value, mask)
        gradients = torch.autograd.grad((mixed * weight).sum(), (query, key, value))
        found.append([mixed * kept, *gradients])
    for ours, dense in zip(*found, strict=True):
        assert (ours - dense).abs().max() <= 1e-12


def test_flex_attention_computes_the_same():
    """On the CPU, and not compiled: the block mask with FlexAttention against the dense one."""
    from torch.nn.attention.flex_attention import flex_attention

    rows = share_rows(
        [
            (torch.ones(150).long(), [torch.ones(90).long(), torch.ones(200).long()]),
            (torch.ones(20).long(), [torch.ones(3).long(), torch.ones(140).long()]),
        ]
    )
    torch.manual_seed(0)
    length = rows.ids_BT.shape[1]
    query, key, value = (torch.randn(2, 2, length, 16, dtype=torch.float64) for _ in range(3))
    block = attention_mask(rows.segments_BT, "flex_attention", torch.float64)
    assert block.shape == (
        2,
        1,
        length,
        length,
    )  # four dimensions: transformers passes it on as it is
    dense = attention_mask(rows.segments_BT, "sdpa", torch.float64)
    flexible = flex_attention(query, key, value, block_mask=block)
    plain = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    assert (flexible - plain).abs().max() <= 1e-12


@pytest.mark.parametrize("chunk", [0, 1, 7, 50, 1000])
def test_the_head_in_chunks_is_the_head(chunk):
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=False, dtype=torch.float64)
    hidden_ND = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    labels_N, weight_N = torch.randint(30, (50,)), torch.randn(50, dtype=torch.float64)
    largest = 0

    def watched(states: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(states))
        return head(states)

    whole_N, parts_N = (
        token_logps(head(hidden_ND), labels_N),
        head_logps(watched, hidden_ND, labels_N, chunk),
    )
    assert (whole_N - parts_N).abs().max() <= 1e-14
    ours, theirs = (
        torch.autograd.grad((logps_N * weight_N).sum(), [hidden_ND, head.weight])
        for logps_N in (parts_N, whole_N)
    )
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) <= 1e-13
    assert largest == min(max(chunk, 1), 50)


def test_chunks_change_nothing_in_a_model(model, pairs, monkeypatch):
    whole = loss_and_gradients(shared, model, pairs)
    monkeypatch.setattr(shared_module, "MOST_LOGITS", 320 * 13)
    loss, logps, gradients = distances(whole, loss_and_gradients(shared, model, pairs))
    assert loss <= 1e-12
    assert logps <= 1e-10
    assert gradients <= 1e-8
