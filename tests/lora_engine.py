"""A program for tests: `vllm.LLM` with our engine arguments answers greedily with adapters as LoRA requests.

Reads JSON on standard input: `model`, `adapters` (folders), `prompts` ({"text", "image": a file}). Prints, as its
last line, for the base and then for each adapter the answers ({"tokens", "logprobs"}), or the error in words.
"""

import json
import os
import sys
from typing import Any

from PIL import Image

from sima_ray.config import EngineConfig
from sima_ray.runtime.deployment import environment

MAX_TOKENS = 12
RANK = 128
"""The rank of the paper's adapters; smaller ones fit, too."""


def main() -> None:
    asked = json.load(sys.stdin)
    engine = EngineConfig(
        accelerator="cpu", dtype="float32", max_model_len=512, max_num_seqs=8, block_size=32
    )
    os.environ.update(environment(engine) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from serve_apps.policy import engine_arguments

    llm = LLM(
        asked["model"],
        **engine_arguments(engine),
        distributed_executor_backend="uni",
        enable_lora=True,
        max_lora_rank=RANK,
    )
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0)
    prompts: Any = [
        {
            "prompt": prompt["text"],
            "multi_modal_data": {"image": [Image.open(prompt["image"]).convert("RGB")]},
        }
        for prompt in asked["prompts"]
    ]
    found: list[Any] = []
    for number, adapter in enumerate([None, *asked["adapters"]]):
        request = LoRARequest(str(number), number, adapter) if adapter else None
        try:
            outputs = llm.generate(prompts, params, lora_request=request, use_tqdm=False)
        except ValueError as error:
            found.append(str(error))
            continue
        found.append([_answer(output.outputs[0]) for output in outputs])
    print(json.dumps(found))


def _answer(output: Any) -> dict[str, Any]:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    logprobs = [step[token].logprob for token, step in steps]
    return {"tokens": list(output.token_ids), "logprobs": logprobs}


if __name__ == "__main__":
    main()
