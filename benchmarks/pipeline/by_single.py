"""One request at a time, as SIMA's released scripts ask: transformers' `generate`, no batch, no shared prefix."""

import time
from typing import Any

from benchmarks.pipeline.trial import Trial
from benchmarks.pipeline.work import Requests, Work, evenly, image_of, read_rows, requests_of
from sima_ray.ports import CompletionRequest, JsonDict

SETTINGS: list[JsonDict] = [
    {"dtype": dtype, "attention": attention, "threads": threads}
    for dtype in ("float32", "bfloat16")
    for attention in ("sdpa", "eager")
    for threads in (1, 2)
]


def measure(work: Work, setting: JsonDict) -> Trial:
    """A few rows' requests, one after another."""
    rows = evenly(read_rows(work.rows), setting.get("few", work.few))
    asked = requests_of(work, rows)
    model = Model(work, setting)
    model.ask(asked[0])
    begun = time.perf_counter()
    tokens = sum(model.ask(row) for row in asked)
    seconds = time.perf_counter() - begun
    return Trial("single", len(asked), seconds, tokens, {"setting": setting})


class Model:
    """The policy in transformers."""

    def __init__(self, work: Work, setting: JsonDict) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        torch.set_num_threads(setting["threads"])
        torch.manual_seed(0)
        folder = work.run.policy.model
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=setting["dtype"], attn_implementation=setting["attention"]
        )
        self._gpu = work.run.policy.engine.accelerator == "gpu"
        self._model: Any = loaded.eval().to("cuda" if self._gpu else "cpu")
        self._processor: Any = AutoProcessor.from_pretrained(folder)

    def ask(self, row: Requests) -> int:
        """Tokens that came, of all requests of a row."""
        return sum(self._one(request) for request in (*row.candidates, *row.critiques))

    def _one(self, request: CompletionRequest) -> int:
        import torch

        from sima_ray.images import decode_image
        from sima_ray.policy.chat import render_prompt

        file = image_of(request)
        assert file is not None
        inputs = self._processor(
            images=decode_image(file, 10**9),
            text=render_prompt(self._processor, request["content"]),
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        how: JsonDict = {"do_sample": False}
        if request["temperature"]:
            top_p = request.get("top_p", 1.0)
            how = {"do_sample": True, "temperature": request["temperature"], "top_p": top_p}
        with torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=request["max_tokens"], **how)
        new = ids[0, inputs["input_ids"].shape[1] :]
        self._processor.tokenizer.decode(new, skip_special_tokens=True)
        return len(new)
