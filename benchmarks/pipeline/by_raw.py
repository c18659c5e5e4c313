"""Bare vLLM: `vllm.LLM`, everything in two batches; and what a prefix cache saves a case's second order."""

import os
import statistics
import time
from typing import Any

from benchmarks.pipeline.trial import Trial
from benchmarks.pipeline.work import Requests, Work, read_rows, requests_of
from sima_ray.ports import CompletionRequest, JsonDict

SETTINGS: list[JsonDict] = [
    {"threads": threads, "own_process": own, "replicas_room": room}
    for threads in (1, 2)
    for own in (True, False)
    for room in (False, True)
]
"""OpenMP's threads; whether the engine has a process of its own beside the one that tokenises; whether it has as
many sequences in a step, and as much cache, as all our replicas together, or as one."""

CASES = 24
"""Of which both orders are timed."""


def measure(work: Work, setting: JsonDict) -> Trial:
    """All requests of the rows, or with `few` those of the first of them; with `orders`, their ratio too."""
    rows = requests_of(work, read_rows(work.rows))
    if setting.get("few"):
        rows = rows[: setting["few"]]
    engine = Engine(work, setting)
    warm = [request for row in rows[:8] for request in (*row.candidates, *row.critiques)]
    engine.answer(warm)
    engine.empty()
    seconds, tokens, alone = 0.0, 0, 0.0
    for batch in (
        [request for row in rows for request in row.candidates],
        [request for row in rows for request in row.critiques],
    ):
        begun = time.perf_counter()
        prompts = engine.prepare(batch)
        prepared = time.perf_counter()
        tokens += engine.generate(*prompts)
        alone += time.perf_counter() - prepared
        seconds += time.perf_counter() - begun
    more: JsonDict = {"engine_s": alone, "setting": setting}
    if setting.get("orders"):
        more |= orders(engine, rows)
    return Trial("raw", len(rows), seconds, tokens, more)


class Engine:
    """`vllm.LLM` with our engine arguments."""

    def __init__(self, work: Work, setting: JsonDict) -> None:
        from sima_ray.runtime.deployment import environment

        policy = work.run.policy
        count = policy.service.max_replicas if setting["replicas_room"] else 1
        engine = policy.engine.model_copy(
            update={
                "max_num_seqs": policy.engine.max_num_seqs * count,
                "cpu_kv_cache_gb": policy.engine.cpu_kv_cache_gb * count,
            }
        )
        os.environ.update(environment(engine))
        os.environ["OMP_NUM_THREADS"] = str(setting["threads"])
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(setting["own_process"]))
        from transformers import AutoProcessor
        from vllm import LLM

        from serve_apps.policy import engine_arguments

        self._llm = LLM(policy.model, **engine_arguments(engine))
        self._processor: Any = AutoProcessor.from_pretrained(policy.model)

    def prepare(self, requests: list[CompletionRequest]) -> tuple[list[Any], list[Any]]:
        """Prompts and parameters; an image that several requests have is decoded once."""
        from serve_apps.engine import sampling
        from sima_ray.images import decode_image
        from sima_ray.policy.alternatives import differing_tokens
        from sima_ray.policy.chat import render_prompt

        decoded: dict[bytes, Any] = {}
        prompts: list[JsonDict] = []
        parameters: list[Any] = []
        for request in requests:
            files = [part["image"] for part in request["content"] if part["type"] == "image"]
            for file in files:
                if file not in decoded:
                    decoded[file] = decode_image(file, 10**9)
            prompts.append(
                {
                    "prompt": render_prompt(self._processor, request["content"]),
                    "multi_modal_data": {"image": [decoded[file] for file in files]},
                }
            )
            first, second = request.get("alternatives") or ("", "")
            pair = differing_tokens(self._processor.tokenizer, first, second)
            parameters.append(sampling(dict(request), pair))
        return prompts, parameters

    def generate(self, prompts: list[Any], parameters: list[Any]) -> int:
        """Tokens that came."""
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def answer(self, requests: list[CompletionRequest]) -> int:
        """Both in one."""
        return self.generate(*self.prepare(requests))

    def prompt_tokens(self, requests: list[CompletionRequest]) -> list[tuple[int, int]]:
        """Of requests that are answered together for their first token: all, and those that were cached."""
        first: list[CompletionRequest] = [{**request, "max_tokens": 1} for request in requests]
        outputs = self._llm.generate(*self.prepare(first), use_tqdm=False)
        return [(len(o.prompt_token_ids or ()), o.num_cached_tokens or 0) for o in outputs]

    def empty(self) -> None:
        """Forget all prefixes."""
        assert self._llm.reset_prefix_cache()


def orders(engine: Engine, rows: list[Requests]) -> JsonDict:
    """A case at a time: both orders together, as the stages ask, against each from nothing."""
    cases = [row.critiques for row in rows if row.critiques][:CASES]
    found: JsonDict = {"orders_ratio_tokens": _computed(engine, cases)}
    for name, limit in (("orders_ratio", None), ("orders_ratio_prefill", 1)):
        warm, cold = 0.0, 0.0
        ratios: list[float] = []
        for critiques in cases:
            asked: list[CompletionRequest] = [
                {**c, "max_tokens": limit or c["max_tokens"]} for c in critiques
            ]
            together = _seconds(engine, asked)
            apart = sum(_seconds(engine, [one]) for one in asked)
            warm, cold = warm + together, cold + apart
            ratios.append(together / apart)
        found[name] = warm / cold
        found[f"{name}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
        found[f"{name}_cold_ms"] = 1000 * cold / len(cases) / 2
    return found


def _computed(engine: Engine, cases: list[list[CompletionRequest]]) -> float:
    """The ratio in prompt tokens that the engine computes, which a large model's prefill goes by."""
    warm = cold = 0
    for case in cases:
        engine.empty()
        for whole, cached in engine.prompt_tokens(case):
            warm, cold = warm + whole - cached, cold + whole
    return warm / cold


def _seconds(engine: Engine, requests: list[CompletionRequest]) -> float:
    """Of answering them together, nothing cached before; prepared before the clock starts."""
    prepared = engine.prepare(requests)
    engine.empty()
    begun = time.perf_counter()
    engine.generate(*prepared)
    return time.perf_counter() - begun
