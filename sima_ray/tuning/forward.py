"""Log-probabilities of chosen and rejected responses under a vision-language model.

`PairForward` is what training needs; `concatenated` is the plain implementation, two padded rows a pair, that
faster ones (`sima_ray.tuning.shared`) are held against.

Dimensions: B pairs, W = 2B rows (chosen of all pairs, then rejected of all), T padded tokens a row, D hidden,
N response tokens of all rows together, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sima_ray.errors import ModelError
from sima_ray.loss import token_logps
from sima_ray.tuning.dataset import EncodedPair, SetAside, UnusablePair

Model = Any
"""A Hugging Face image-text-to-text model, with or without LoRA layers in it."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Sums of the log-probabilities of each response's tokens, the end included, in float32 or better."""

    chosen_B: Tensor
    rejected_B: Tensor


class PairForward(Protocol):
    """A way to compute the log-probabilities of pairs; differentiable."""

    def __call__(self, model: Model, pairs: Sequence[EncodedPair], /) -> PairLogps:
        """Score a batch.

        Raises:
            UnusablePair: An image that gives another number of features than its prompt has tokens for.
        """
        ...


Computation = Callable[[Model, Sequence[EncodedPair]], tuple[Tensor, ...]]
"""What a model computes of pairs."""


class PairScorer(nn.Module):
    """A model as the module that an engine wraps: pairs in, (chosen_B, rejected_B) out.

    Whatever else is computed goes through it too: where workers share the weights, they are gathered for what
    happens within it.

    Attributes:
        model: With or without adapters.
        way: How pairs are scored.
    """

    def __init__(self, model: nn.Module, way: PairForward) -> None:
        super().__init__()
        self.model = model
        self.way = way

    def forward(
        self, pairs: Sequence[EncodedPair], compute: Computation | None = None
    ) -> tuple[Tensor, ...]:
        """(chosen_B, rejected_B), or what `compute` makes of the bare model and the pairs."""
        model = base_of(self.model)
        if compute is not None:
            return compute(model, pairs)
        logps = self.way(model, pairs)
        return logps.chosen_B, logps.rejected_B

    def score(self, model: Model, pairs: Sequence[EncodedPair]) -> PairLogps:
        """The scores as a `PairForward` of the model within."""
        assert model is base_of(self.model)
        return PairLogps(*self(pairs))


def concatenated(model: Model, pairs: Sequence[EncodedPair]) -> PairLogps:
    """The plain way: [prompt | chosen] and [prompt | rejected] as rows of one padded batch."""
    logps_N, row_N = response_logps(model, pairs)
    sums_W = logps_N.new_zeros(2 * len(pairs)).index_add(0, row_N, logps_N)
    return PairLogps(*sums_W.split(len(pairs)))


def response_logps(model: Model, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    """The log-probability of every response token, and the row it belongs to.

    Returns:
        (logps_N, row_N), rows in order and tokens in order within a row.
    """
    device = model.get_input_embeddings().weight.device
    rows = [(p.prompt_P, p.chosen_C) for p in pairs] + [(p.prompt_P, p.rejected_R) for p in pairs]
    ids_WT, mask_WT, response_WT = (tensor.to(device) for tensor in pad_rows(rows))
    hidden_WTD = last_hidden(model, pairs, ids_WT, mask_WT)
    # The state at a position predicts the next token, so the mask moves one to the left.
    predicts_WT = response_WT.roll(-1, dims=1)
    row_N = predicts_WT.nonzero()[:, 0]
    logits_NV = model.get_output_embeddings()(hidden_WTD[predicts_WT])
    return token_logps(logits_NV, ids_WT[response_WT]), row_N


def pad_rows(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of (prompt, response) as one batch, padded on the right.

    Returns:
        (ids_WT, mask_WT, response_WT): token ids (0 where padded), which positions are tokens, which of these
        belong to a response. The first position is never a response.
    """
    length = max(len(prompt) + len(response) for prompt, response in rows)
    ids_WT = torch.zeros(len(rows), length, dtype=torch.long)
    mask_WT = torch.zeros(len(rows), length, dtype=torch.long)
    response_WT = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids_WT[row, :end] = torch.cat([prompt, response])
        mask_WT[row, :end] = 1
        response_WT[row, len(prompt) : end] = True
    return ids_WT, mask_WT, response_WT


def last_hidden(
    model: Model,
    pairs: Sequence[EncodedPair],
    ids_WT: Tensor,
    mask: Any,
    positions: Tensor | None = None,
    copies: int = 2,
) -> Tensor:
    """The last hidden states of a batch of rows; the images are encoded once a pair where the model allows it.

    Args:
        model: Its language-model head is not applied.
        pairs: Whose images the rows show.
        ids_WT: All rows in the order of the pairs, and that `copies` times over.
        mask: What the model takes as an attention mask.
        positions: Position ids, (W, T) or (axes, W, T); None leaves them to the model.
        copies: Rows a pair.
    """
    backbone = getattr(model, model.base_model_prefix)
    accepts = inspect.signature(backbone.forward).parameters
    images = gather_images(pairs, ids_WT.device, model.get_input_embeddings().weight.dtype)
    inputs: dict[str, Any] = {"input_ids": ids_WT, "attention_mask": mask, "use_cache": False}
    if positions is not None:
        inputs["position_ids"] = positions
    if "mm_token_type_ids" in accepts:
        inputs["mm_token_type_ids"] = (ids_WT == model.config.image_token_id).long()
    if model.config.model_type == "gemma3":  # the tokens of an image see each other
        inputs["token_type_ids"] = (ids_WT == model.config.image_token_id).long()
    if "mm_encoder_outputs" in accepts:
        features = backbone.get_image_features(**images, return_dict=True)
        check_features(features.pooler_output, pairs, model.config.image_token_id)
        _repeat_features(features, copies)
        inputs["mm_encoder_outputs"] = {"image": features}
        grids = [name for name in images if name.endswith("thw")]
        inputs |= {name: torch.cat([images[name]] * copies) for name in grids}
    else:
        inputs |= {name: torch.cat([tensor] * copies) for name, tensor in images.items()}
    return backbone(**inputs).last_hidden_state


def _repeat_features(features: Any, copies: int) -> None:
    """Put the features of all images after themselves, in place, for as many copies of the rows."""
    pooled = features.pooler_output
    features.pooler_output = (
        torch.cat([pooled] * copies) if isinstance(pooled, Tensor) else [*pooled] * copies
    )
    # Some models also feed features of deeper vision layers into the first layers of the decoder.
    deeper = getattr(features, "deepstack_features", None)
    if deeper is not None:
        features.deepstack_features = [[*layer] * copies for layer in deeper]


def check_features(features: Any, pairs: Sequence[EncodedPair], image_token: int) -> None:
    """Check that each prompt has as many image tokens as its image has features.

    Raises:
        UnusablePair: Naming the first that does not; the model itself would only say that a sum is off.
    """
    if len(features) != len(pairs):
        return  # not one entry an image: the model's own check must do
    for pair, image in zip(pairs, features, strict=True):
        if problem := image_problem(pair, image.shape[0], image_token):
            raise problem


def image_problem(pair: EncodedPair, features: int, image_token: int) -> UnusablePair | None:
    """What is wrong where a prompt has not as many image tokens as its image has features."""
    tokens = int((pair.prompt_P == image_token).sum())
    if tokens == features:
        return None
    detail = f"{tokens} image tokens for {features} image features"
    return UnusablePair(pair.pair.row_id, SetAside.IMAGE_TOKENS, detail)


def feature_counts(model: Model, pairs: Sequence[EncodedPair]) -> tuple[Tensor]:
    """How many features each image has, by the vision tower alone; of no image where the model cannot tell so."""
    backbone = getattr(model, model.base_model_prefix)
    if "mm_encoder_outputs" not in inspect.signature(backbone.forward).parameters:
        return (torch.empty(0, dtype=torch.long),)
    embeddings = model.get_input_embeddings().weight
    images = gather_images(pairs, embeddings.device, embeddings.dtype)
    features = backbone.get_image_features(**images, return_dict=True).pooler_output
    counts = [image.shape[0] for image in features] if len(features) == len(pairs) else []
    return (torch.tensor(counts, dtype=torch.long),)


def gather_images(
    pairs: Sequence[EncodedPair], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The image inputs of all pairs, one after another; tiles of an image are padded to the most that one has."""
    gathered: dict[str, Tensor] = {}
    for name in pairs[0].image_inputs:
        tensors = [pair.image_inputs[name] for pair in pairs]
        most = max(tensor.shape[1] for tensor in tensors)
        if any(tensor.shape[1] != most for tensor in tensors):
            tensors = [
                nn.functional.pad(t, [0, 0] * (t.dim() - 2) + [0, most - t.shape[1]])
                for t in tensors
            ]
        tensor = torch.cat(tensors).to(device)
        gathered[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return gathered


def check_model(model: Model) -> None:
    """Check that the head alone turns hidden states into logits.

    Raises:
        ModelError: The model caps or scales its logits after the head.
    """
    text = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ModelError(f"{type(model).__name__} is not supported: it sets {name}")


def base_of(model: Model) -> Model:
    """The Hugging Face model within a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
