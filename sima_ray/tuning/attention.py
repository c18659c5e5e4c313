"""The attention of rows whose responses share a prompt: who sees whom, in the form that each kernel takes.

A token sees what stands before it, in the prompt or in its own response. FlexAttention takes that as a block mask,
eager and sdpa attention as a dense one. `PARTS` needs none: the prompt with the first response is an ordinary
causal row, and each further response asks the prompt and itself. With a prompt of P and two responses of C tokens
that is about P²/2 + 2PC scores instead of the (P + 2C)² of a dense mask, none of which is skipped by the kernels.

Dimensions: B rows, T padded tokens a row, H heads, E of a head, P tokens of prompt, C of a response, Q tokens that
ask, K that are asked.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sima_ray.tuning.last_layer import read_by

PROMPT, PADDING = 0, -1
"""Segments that are no response; these count from 1."""

PARTS = "sima_parts"
"""Our name for transformers of sdpa attention in parts; its mask are the segments, (B, 1, 1, T)."""

ATTENTIONS = ("eager", "sdpa", "flex_attention", PARTS)
"""What a language model may compute shared rows with."""


def attention_of(model: Any) -> str:
    """transformers' name of the attention that the language model computes with."""
    return model.get_decoder().config._attn_implementation


def set_attention(model: Any, attention: str) -> None:
    """Change the language model's attention, and leave the vision tower's."""
    if attention_of(model) != attention:
        model.get_decoder().set_attn_implementation(attention)


def visible(segments_BT: Tensor) -> Callable[[Any, Any, Any, Any], Tensor]:
    """Which token (kv) another (q) sees: what stands before it, in the prompt or in its own segment.

    Returns:
        A predicate of (row, head, q, kv), FlexAttention's `mask_mod`; it also takes tensors that broadcast.
        Padding sees itself, so that no row of the attention is empty; nothing sees padding but padding.
    """

    def sees(row: Any, head: Any, q: Any, kv: Any) -> Tensor:
        segment = segments_BT[row, kv]
        return (kv <= q) & ((segment == PROMPT) | (segment == segments_BT[row, q]))

    return sees


def attention_mask(segments_BT: Tensor, attention: str, dtype: torch.dtype) -> Any:
    """The mask in the form that an attention takes.

    Args:
        segments_BT: Of `SharedRows`.
        attention: One of `ATTENTIONS`.
        dtype: Of the model.

    Returns:
        A `BlockMask` for FlexAttention; the segments for `PARTS`, in the CPU's memory, so that no layer waits for
        a device to read them; else (B, 1, T, T) to add to the scores, which saves making it so from a boolean in
        every layer. All have four dimensions: such a mask transformers passes on to every layer as it is.
    """
    rows, length = segments_BT.shape
    device = segments_BT.device
    if attention == PARTS:
        return segments_BT.cpu()[:, None, None]
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(visible(segments_BT), rows, None, length, length, device=device)
    row_B111 = torch.arange(rows, device=device)[:, None, None, None]
    at_T = torch.arange(length, device=device)
    sees_B1TT = visible(segments_BT)(row_B111, 0, at_T[:, None], at_T)
    return _added(sees_B1TT, dtype)


def attend_in_parts(
    module: Any,
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    segments_B11T: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention `PARTS`, as transformers calls one.

    Args:
        module: The layer's; says by how much keys repeat.
        query_BHTE, key_BHTE, value_BHTE: Keys and values may have fewer heads.
        segments_B11T: Of `SharedRows`; None for plain rows, padded on the right.
        options: As of sdpa attention.

    Returns:
        (mixed_BTHE, None), 0 where padded, and in the last layer where nothing reads it.
    """
    if segments_B11T is None:
        return sdpa_attention_forward(module, query_BHTE, key_BHTE, value_BHTE, None, **options)
    rows: list[Tensor] = []
    for row, segments in enumerate(segments_B11T[:, 0, 0].tolist()):
        q_1HTE, k_1HTE, v_1HTE = (t[row : row + 1] for t in (query_BHTE, key_BHTE, value_BHTE))
        mixed: list[Tensor] = []
        for start, end, asked in _parts(segments, whole=read_by(module) is None):
            keys, values = (
                torch.cat([t[:, :, a:b] for a, b in asked], dim=2)
                if len(asked) > 1
                else t[:, :, :end]
                for t in (k_1HTE, v_1HTE)
            )
            mask = _behind(end - start, keys) if start else None
            part = q_1HTE[:, :, start:end]
            mixed.append(sdpa_attention_forward(module, part, keys, values, mask, **options)[0])
        rows.append(_padded(mixed, len(segments), segments.count(PADDING)))
    return torch.cat(rows), None


def _parts(segments: list[int], *, whole: bool) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Of a row: from where to where tokens ask, and what they ask, each up to itself.

    Args:
        segments: Of a row's tokens.
        whole: Whether all of the prompt asks; else only its last token.
    """
    parts: list[tuple[int, int, list[tuple[int, int]]]] = []
    at = prompt = 0
    for segment, run in groupby(segments):
        start, at = at, at + len(list(run))
        if segment == PROMPT:
            prompt = at
            parts.append((0 if whole else at - 1, at, [(0, at)]))
        elif segment != PADDING and start == prompt:
            parts[0] = (parts[0][0], at, [(0, at)])
        elif segment != PADDING:
            parts.append((start, at, [(0, prompt), (start, at)]))
    return parts


def _behind(asking: int, keys: Tensor) -> Tensor:
    """A mask (1, 1, Q, K) where those that ask are the last of those that are asked."""
    asked = keys.shape[2]
    sees_QK = torch.ones(asking, asked, dtype=torch.bool, device=keys.device)
    return _added(sees_QK.tril_(asked - asking)[None, None], keys.dtype)


def _added(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores so that only what is seen counts."""
    added = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return added.masked_fill_(~sees, torch.finfo(dtype).min)


def _padded(mixed: list[Tensor], length: int, padding: int) -> Tensor:
    """The parts of a row after one another, (1, T, H, E), zeros before and after them."""
    heads, size = mixed[0].shape[2:]
    unread = length - padding - sum(part.shape[1] for part in mixed)
    before, after = (mixed[0].new_zeros(1, missing, heads, size) for missing in (unread, padding))
    return torch.cat([before, *mixed, after], dim=1)


AttentionInterface.register(PARTS, attend_in_parts)
