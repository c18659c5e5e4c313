"""A sample of what a policy computes: log-probabilities of a few fixed texts about fixed images.

Merging writes it beside the weights. A replica that takes new weights compares before they answer anybody: what
the engine computes from the files that it read must be what was computed when they were written.

    logprobs: for each of `sample_cases`, of the last tokens of the text, one by one
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sima_ray.errors import ModelError, ParityError
from sima_ray.images import decode_image
from sima_ray.policy.chat import join_response, render_prompt
from sima_ray.policy.checkpoint import fingerprint, load_policy
from sima_ray.ports import JsonDict, image_part, text_part

VERSION_FILE = "sima.json"
"""Says of a merged folder what it was made of, and holds its sample."""

TOKENS = 16
"""Of each text's end that are compared."""

TOLERANCE = 0.1
"""Largest allowed mean |Δ log-probability|: bfloat16 on two implementations stays well below."""

_CASES = 1
"""Number of this list of cases; a sample of another list is not read."""
_RESPONSES = (
    "A large red square and a small blue circle on a white background.",
    "There is a green triangle at the bottom; nothing else can be seen here.",
)
_SIDE = 96


@dataclass(frozen=True, slots=True)
class SampleCase:
    """A whole text, prompt and response, and its image (PNG)."""

    text: str
    image: bytes


def sample_cases(processor: Any) -> list[SampleCase]:
    """The fixed cases as this policy reads them."""
    cases: list[SampleCase] = []
    for number, response in enumerate(_RESPONSES):
        image = _picture(number)
        prompt = render_prompt(processor, [image_part(image), text_part("Describe the image.")])
        cases.append(SampleCase(join_response(prompt, response), image))
    return cases


def make_sample(model: Any, processor: Any) -> JsonDict:
    """What a loaded policy computes (transformers' own forward pass)."""
    import torch

    logprobs: list[list[float]] = []
    for case in sample_cases(processor):
        image = decode_image(case.image, _SIDE * _SIDE)
        inputs = processor(text=case.text, images=[image], return_tensors="pt").to(model.device)
        inputs = inputs.to(model.dtype)  # the image; token ids stay as they are
        with torch.no_grad():
            logits_TV = model(**inputs).logits[0, -TOKENS - 1 : -1]
        tokens_T = inputs["input_ids"][0, -TOKENS:]
        logprobs_TV = logits_TV.double().log_softmax(-1)
        logprobs.append(logprobs_TV.gather(-1, tokens_T[:, None])[:, 0].tolist())
    return {"cases": _CASES, "logprobs": logprobs}


def sample_of(folder: str) -> JsonDict:
    """Load a policy from its folder and make its sample."""
    model, processor = load_policy(folder)
    return make_sample(model, processor)


def read_sample(folder: str) -> JsonDict | None:
    """The sample that lies beside a policy's weights; None where merging has left none.

    Raises:
        ModelError: The weights are not those that the sample was made of.
    """
    try:
        written = json.loads((Path(folder) / VERSION_FILE).read_text(encoding="utf-8"))
        version, sample = written["version"], written.get("sample")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if fingerprint(folder) != version:
        raise ModelError(
            f"{folder}: the weights are not those that were merged ({VERSION_FILE} says {version}): "
            "changed or damaged since; merge again"
        )
    return sample if sample and sample.get("cases") == _CASES else None


def compare_sample(sample: JsonDict, found: Sequence[Sequence[float]]) -> float:
    """Mean |Δ log-probability| between a sample and what weights compute now.

    Raises:
        ParityError: It is above `TOLERANCE`, or not a number.
    """
    wanted = [value for values in sample["logprobs"] for value in values]
    flat = [value for values in found for value in values]
    assert len(wanted) == len(flat)
    difference = sum(abs(a - b) for a, b in zip(wanted, flat, strict=True)) / len(wanted)
    if not difference <= TOLERANCE:  # NaN fails, too
        raise ParityError(
            f"the weights compute something else than their sample: {difference:.3g} per token "
            f"(allowed: {TOLERANCE:g})"
        )
    return difference


def _picture(number: int) -> bytes:
    """A shape on white, the same bytes of pixels everywhere."""
    image = Image.new("RGB", (_SIDE, _SIDE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    if number == 0:
        draw.rectangle((12, 12, 60, 60), fill=(200, 30, 30))
        draw.ellipse((66, 66, 84, 84), fill=(30, 30, 200))
    else:
        draw.polygon(((20, 84), (76, 84), (48, 50)), fill=(30, 160, 60))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
