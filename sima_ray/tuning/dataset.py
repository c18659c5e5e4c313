"""Preference pairs as token ids: read, rendered as the service renders them, checked.

Dimensions: P prompt tokens (image tokens expanded), C tokens of the chosen response, R of the rejected one; both
end with the end-of-sequence token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL.Image import Image
from torch import Tensor

from sima_ray.data.locations import open_location, read_image
from sima_ray.errors import DataError, ModelError, why
from sima_ray.images import ImageProblem, decode_image
from sima_ray.policy.chat import join_response, placeholders, render_prompt
from sima_ray.policy.checkpoint import image_token_id
from sima_ray.ports import image_part, text_part
from sima_ray.records import PreferencePair

MAX_IMAGE_PIXELS = 200_000_000
"""A last guard against images that fill the memory: the limit of the run has set larger ones aside before."""

_COLUMNS = ["row_id", "image", "prompt", "chosen", "rejected"]
_OPTIONAL = {
    "chosen_from": "",
    "rejected_from": "",
    "weight": 1.0,
    "chosen_logp": None,
    "rejected_logp": None,
    "chosen_tokens": None,
    "rejected_tokens": None,
}


class SetAside(StrEnum):
    """Why a pair is not trained on."""

    DUPLICATE_ID = "duplicate_id"
    EMPTY_RESPONSE = "empty_response"  # chosen or rejected has no token but the end
    TOO_LONG = "too_long"  # prompt + longer response, over max_tokens or the model's own context
    IMAGE_TOKENS = "image_tokens"  # not as many image tokens as image features
    MISSING_IMAGE = "missing_image"
    BROKEN_IMAGE = "broken_image"
    CHANGED_IMAGE = "changed_image"  # another file than the reference saw: this one stops the run
    BAD_WEIGHT = "bad_weight"  # negative or not finite
    BAD_REFERENCE = "bad_reference"  # the reference's log-probability is not finite


class UnusablePair(DataError):
    """A pair that cannot be trained on; it is set aside and counted, and the run goes on."""

    def __init__(self, row_id: str, reason: SetAside, detail: str) -> None:
        super().__init__(f"pair {row_id}: {detail}")
        self.row_id = row_id
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair as token ids.

    Attributes:
        pair: Where it comes from.
        prompt_P, chosen_C, rejected_R: int64 token ids.
        image_inputs: What the processor made of the image (`pixel_values`, …), a leading dimension of one image.
        image_digest: Names the image file's bytes, and so tells whether it has changed.
    """

    pair: PreferencePair
    prompt_P: Tensor
    chosen_C: Tensor
    rejected_R: Tensor
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    image_digest: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of both rows, the prompt in each."""
        return 2 * len(self.prompt_P) + len(self.chosen_C) + len(self.rejected_R)

    @property
    def width(self) -> int:
        """Tokens of the longer row."""
        return len(self.prompt_P) + max(len(self.chosen_C), len(self.rejected_R))


Kind = tuple[tuple[str, tuple[float, ...]], ...]


def kind_of(pair: EncodedPair) -> Kind:
    """What the number of an image's features depends on: shapes, and sizes that are among the inputs."""
    return tuple(
        (name, tuple(tensor.flatten().tolist()) if tensor.numel() < 8 else tuple(tensor.shape))
        for name, tensor in sorted(pair.image_inputs.items())
    )


def read_pairs(location: str) -> list[PreferencePair]:
    """Read pairs from a Parquet file or a folder of them, sorted by row id (files have no stable order).

    Raises:
        DataError: Not there, not Parquet, a missing column, or no pairs.
    """
    filesystem, path = open_location(location)
    try:
        table = pq.read_table(path, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{location}: pairs cannot be read: {why(error)}") from error
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise DataError(f"{location}: not a pairs file: no column {', '.join(missing)}")
    names = _COLUMNS + [name for name in _OPTIONAL if name in table.column_names]
    rows = [_OPTIONAL | row for row in table.select(names).to_pylist()]
    if not rows:
        raise DataError(f"{location}: holds no pairs: nothing to train on")
    for row in rows:
        if empty := [name for name in _COLUMNS if row[name] is None]:
            raise DataError(f"{location}: pair {row['row_id']} has no {', '.join(empty)}")
    pairs = [PreferencePair(**row) for row in rows]
    return sorted(pairs, key=lambda pair: (pair.row_id, pair.chosen, pair.rejected))


class PairEncoder:
    """Turns pairs into token ids with a policy's own processor."""

    def __init__(
        self, processor: Any, images: str, max_tokens: int, context: int | None = None
    ) -> None:
        """Args:
        processor: Of the policy.
        images: What image names are relative to, as `data.images` of a run.
        max_tokens: Longest allowed prompt + response.
        context: The longest that the model can take, where it has a limit.
        """
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._images = images
        self._max_tokens, self._limit = max_tokens, "max_tokens"
        if context is not None and context < max_tokens:
            self._max_tokens, self._limit = context, "the model's own context"
        self._image_id = image_token_id(processor)
        ids = map(self._tokenizer.convert_tokens_to_ids, placeholders(processor))
        self._placeholders = {self._image_id, *ids} - {None, self._tokenizer.unk_token_id}
        self._one_at_a_time = Lock()  # a tokenizer is not for several threads
        self._eos = self._tokenizer.eos_token_id
        if self._eos is None:
            raise ModelError("the tokenizer has no end-of-sequence token")

    def encode(self, pair: PreferencePair) -> EncodedPair:
        """Render and tokenise one pair; for any thread.

        The boundary between prompt and response is the longest prefix that the tokens of prompt, prompt + chosen
        and prompt + rejected share, so that it is right for tokenizers that join text across it.

        Raises:
            UnusablePair: For any reason but DUPLICATE_ID.
        """
        with self._one_at_a_time:
            return self._encode(pair)

    def _encode(self, pair: PreferencePair) -> EncodedPair:
        self._check_fields(pair)
        prompt = render_prompt(self._processor, [image_part(b""), text_part(pair.prompt)])
        texts = [prompt, *(join_response(prompt, text) for text in (pair.chosen, pair.rejected))]
        plain, chosen, rejected = (self._ids(text) for text in texts)
        shared = min(_common(plain, chosen), _common(plain, rejected))
        responses = [chosen[shared:], rejected[shared:]]
        for side, ids in zip(("chosen", "rejected"), responses, strict=True):
            if not ids:
                raise UnusablePair(
                    pair.row_id, SetAside.EMPTY_RESPONSE, f"the {side} response has no token"
                )
            if not self._placeholders.isdisjoint(ids):  # the engine wrote it as ordinary letters
                raise UnusablePair(
                    pair.row_id, SetAside.IMAGE_TOKENS, "a response holds an image token"
                )
            ids.append(self._eos)
        data, image = self._image(pair)
        prompt_ids, image_inputs = self._with_image(pair, prompt, plain, image)
        prompt_ids = prompt_ids[: len(prompt_ids) - (len(plain) - shared)]
        if (longest := len(prompt_ids) + max(map(len, responses))) > self._max_tokens:
            detail = f"{longest} tokens, over the {self._max_tokens} of {self._limit}"
            raise UnusablePair(pair.row_id, SetAside.TOO_LONG, detail)
        ids = [torch.tensor(ids) for ids in (prompt_ids, *responses)]
        digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        return EncodedPair(pair, ids[0], ids[1], ids[2], image_inputs, digest)

    def _check_fields(self, pair: PreferencePair) -> None:
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not text.strip():
                raise UnusablePair(
                    pair.row_id, SetAside.EMPTY_RESPONSE, f"the {side} response is empty"
                )
        if not (np.isfinite(pair.weight) and pair.weight >= 0):
            raise UnusablePair(pair.row_id, SetAside.BAD_WEIGHT, f"weight {pair.weight}")

    def _ids(self, text: str) -> list[int]:
        ids = list(self._tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1:] == [self._eos] else ids

    def _image(self, pair: PreferencePair) -> tuple[bytes, Image]:
        """The image file's bytes, and what they show."""
        try:
            data = read_image(self._images, pair.image)
            return data, decode_image(data, MAX_IMAGE_PIXELS)
        except ImageProblem as problem:
            missing = problem.reason == SetAside.MISSING_IMAGE
            reason = SetAside.MISSING_IMAGE if missing else SetAside.BROKEN_IMAGE
            raise UnusablePair(pair.row_id, reason, f"image {pair.image}: {problem}") from problem

    def _with_image(
        self, pair: PreferencePair, prompt: str, plain: list[int], image: Image
    ) -> tuple[list[int], dict[str, Tensor]]:
        """The prompt's ids with its image token expanded, and the image's tensors."""
        inputs = dict(self._processor(text=[prompt], images=[image], return_tensors="pt"))
        ids = inputs.pop("input_ids")[0].tolist()
        for name in [name for name in inputs if name.endswith(("attention_mask", "type_ids"))]:
            if inputs[name].shape == (1, len(ids)):  # of the text: the forward pass makes its own
                inputs.pop(name)
        if ids[-1] == self._eos:
            ids.pop()
        after = plain[::-1].index(self._image_id) if self._image_id in plain else -1
        if (
            plain.count(self._image_id) != 1
            or ids[len(ids) - after :] != plain[len(plain) - after :]
        ):
            raise UnusablePair(
                pair.row_id, SetAside.IMAGE_TOKENS, "the prompt does not hold exactly one image"
            )
        return ids, inputs


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
