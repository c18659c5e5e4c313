"""Which way pairs are scored: shared rows where a model computes the same in them, plain rows elsewhere.

What a config says comes first; then one pair is scored both ways and the numbers decide.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sima_ray.tuning.attention import ATTENTIONS, PARTS, attention_of, set_attention
from sima_ray.tuning.dataset import EncodedPair, UnusablePair
from sima_ray.tuning.forward import (
    Computation,
    Model,
    PairForward,
    base_of,
    concatenated,
    response_logps,
)
from sima_ray.tuning.shared import shared, shared_logps

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Mean distance of a token's log-probabilities up to which two ways agree: rounding is well below, a token that
sees what it should not, or stands where it should not, well above."""

_LOG = logging.getLogger(__name__)

_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""What a model that cannot take such rows may raise."""


Run = Callable[[Sequence[EncodedPair], Computation], tuple[Tensor, ...]]
"""Computes something of pairs with the model, as a `PairScorer` does."""


@dataclass(frozen=True, slots=True)
class ForwardChoice:
    """A way to score pairs.

    Attributes:
        forward: It.
        reason: Why it is the plain one; None where rows are shared.
    """

    forward: PairForward
    reason: str | None = None


def choose_forward(
    model: Model,
    pairs: Iterable[EncodedPair],
    max_tokens: int | None = None,
    *,
    run: Run | None = None,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> ForwardChoice:
    """Share rows where that is valid for this model, shown on the first usable of these pairs.

    The language model computes with the best attention that works from then on: FlexAttention on CUDA, sdpa in
    parts elsewhere.

    Args:
        model: On its device, with or without adapters.
        pairs: As many as are needed are taken; where none is usable, nothing is measured.
        max_tokens: Longest plain row; None for no limit.
        run: How the model is made to compute; None to call it.
        gather: The lists of all workers, joined: what one finds against shared rows counts for all. The pairs must
            be the same on all.
    """
    base = base_of(model)
    run = run or _calling(base)
    if reason := static_reason(base, max_tokens):
        return ForwardChoice(concatenated, reason)
    probe = next(_plainly_scored(run, pairs), None)
    if probe is None:
        return ForwardChoice(shared)
    for attention in attentions_for(base):
        set_attention(base, attention)
        reason = next(filter(None, gather([disagreement(base, *probe, run=run)])), None)
        if reason is None:
            return ForwardChoice(shared)
        _LOG.warning("%s attention is not used: %s", attention, reason)
    return ForwardChoice(concatenated, reason)


def static_reason(model: Model, max_tokens: int | None = None) -> str | None:
    """Why rows cannot be shared, as far as classes and configs tell; None where they have nothing against it."""
    text = model.config.get_text_config()
    accepts = inspect.signature(getattr(model, model.base_model_prefix).forward).parameters
    if model.config.is_encoder_decoder:
        return "an encoder-decoder: the prompt is no part of the response's row"
    if getattr(text, "cross_attention_layers", None):
        return "images are read by cross-attention"
    if any(getattr(module, "_is_stateful", False) for module in model.modules()):
        return "a recurrent state goes from one response to the next"
    if other := _layers_without_free_mask(text, max_tokens):
        return f"layers that see by a rule of their own: {', '.join(other)}"
    if getattr(text, "alibi", False):
        return "positions that count the tokens between two cannot restart"
    marks = "token_type_ids" in accepts and "mm_token_type_ids" not in accepts
    if marks or getattr(text, "use_bidirectional_attention", None):
        return "tokens of an image or a prompt see each other both ways"
    if "position_ids" not in accepts:
        return "the model takes no position ids"
    if (attention := attention_of(model)) not in ATTENTIONS:
        return f"{attention} takes no mask"
    return None


def _layers_without_free_mask(text: Any, max_tokens: int | None) -> list[str]:
    """Kinds of layers that do more than the mask says: windows that a plain row may outgrow, chunks, scans."""
    window = getattr(text, "sliding_window", None)
    wide = window is not None and max_tokens is not None and max_tokens <= window
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"] * (window is not None))
    allowed = {"full_attention", "attention", *(["sliding_attention"] if wide else [])}
    return sorted(kinds - allowed)


def disagreement(
    model: Model, pair: EncodedPair, plain_N: Tensor, *, run: Run | None = None
) -> str | None:
    """How far the shared row of a pair is from its plain rows; None where they agree.

    With FlexAttention the backward pass is tried too, as a training step takes it: it is a kernel of its own.

    Args:
        model: The bare one.
        pair: The probe.
        plain_N: Of its response tokens, chosen then rejected, scored plainly.
        run: See `choose_forward`.
    """
    run = run or _calling(model)
    try:
        with torch.no_grad():
            logps_N, _ = run([pair], _shared_logps)
        if attention_of(model) == "flex_attention":
            _try_backward(model, pair, run)
    except torch.OutOfMemoryError:
        raise  # says nothing of the model; and where workers share weights, others wait for this one in the pass
    except _FAILURES as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    distance = (logps_N - plain_N).abs().mean().item()
    tolerance = TOLERANCES[model.get_input_embeddings().weight.dtype]
    if distance <= tolerance:  # and not if it is NaN
        return None
    return (
        f"shared and plain rows differ by {distance:.2g} a token in their log-probabilities, "
        f"over {tolerance:.0e}"
    )


def _try_backward(model: Model, pair: EncodedPair, run: Run) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return
    training = model.training
    model.train()  # layers are checkpointed, where they are, only so
    try:
        logps_N, _ = run([pair], _shared_logps)
        torch.autograd.grad(logps_N.sum(), trained, allow_unused=True)
    finally:
        model.train(training)


def _calling(model: Model) -> Run:
    return lambda pairs, compute: compute(model, pairs)


def _shared_logps(model: Model, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    return shared_logps(model, pairs, [(pair.chosen_C, pair.rejected_R) for pair in pairs])


def attentions_for(model: Model) -> list[str]:
    """The attentions to try, best first; the last is the model's own."""
    own = attention_of(model)
    better = ["flex_attention"] if can_flex(model) else []
    return [*better, *([PARTS] if own == "sdpa" else []), own]


def can_flex(model: Model) -> bool:
    """Whether the language model can compute with FlexAttention, which is worth it on CUDA."""
    from transformers.utils.import_utils import is_torch_flex_attn_available

    # Training, reference pass and evaluation, with rows of many shapes: near dynamo's limit, beyond which it would
    # compute FlexAttention uncompiled, with all scores in memory.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    on_cuda = model.get_input_embeddings().weight.device.type == "cuda"
    supports = getattr(model.get_decoder(), "_supports_flex_attn", False)
    return bool(on_cuda and supports and is_torch_flex_attn_available())


def _plainly_scored(run: Run, pairs: Iterable[EncodedPair]) -> Iterator[tuple[EncodedPair, Tensor]]:
    """The usable ones of these pairs with the log-probabilities of their response tokens."""
    for pair in pairs:
        try:
            with torch.no_grad():
                plain_N, _ = run([pair], response_logps)
        except UnusablePair:
            continue
        yield pair, plain_N
