"""Ours: the stages as a run composes them, on a cluster of their own."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.own_cluster import own_cluster
from benchmarks.pipeline.layout import Best, Prompt, best
from benchmarks.pipeline.trial import Trial
from benchmarks.pipeline.work import Work, image_name, image_of, read_rows, requests_of
from sima_ray.ports import CompletionRequest, JsonDict


def measure(work: Work, setting: JsonDict) -> Trial:
    """Deploy, warm up with other prompts, empty the cache, and run all prompts.

    The first of all leaves its rows, from which the others' requests are made.
    """
    policy = work.run.policy
    with tempfile.TemporaryDirectory() as kept, own_cluster():
        # Not before: Ray reads the cluster's variables as it is imported.
        from sima_ray.runtime.serving import deploy_policy, swap_policy

        deploy_policy(policy)
        _prefer(work, "warm", f"{kept}/warm")
        # The same weights under another name are loaded anew: what was cached is gone.
        again = Path(kept, "policy")
        again.symlink_to(Path(policy.model).resolve())
        swap_policy(str(again), "emptied")
        seconds = _prefer(work, "timed", f"{kept}/rows")
        rows = read_rows(f"{kept}/rows")
        if not Path(work.rows).exists():
            shutil.copytree(f"{kept}/rows", work.rows)
    critiques = [critique for row in rows for critique in row["critiques"] or ()]
    answers = critiques + [candidate for row in rows for candidate in row["candidates"] or ()]
    most = _best(work, rows)
    return Trial(
        "ours",
        rows=len(rows),
        seconds=seconds,
        tokens=sum(answer["tokens"] for answer in answers),
        more={
            "pairs": sum(row["chosen"] is not None for row in rows),
            "set_aside": sum(row["quarantine"] is not None for row in rows),
            "critic_prompt_tokens": sum(critique["prompt_tokens"] for critique in critiques),
            "critic_cached_tokens": sum(critique["cached_tokens"] for critique in critiques),
            "layout_tokens": most.tokens,
            "layout_cached": most.cached,
        },
    )


def _prefer(work: Work, name: str, folder: str) -> float:
    """Seconds of the stages over a world's prompts; what they write is in the folder."""
    from sima_ray.data.prompts import index_prompts
    from sima_ray.data.sinks import write_preferences
    from sima_ray.data.stages import critique, generate, outcome, read_prompts
    from sima_ray.runtime.client import connect_policy

    run, data = work.run, work.data(name)
    generation = run.generation
    index = f"{folder}.parquet"
    index_prompts(data, index)
    connect = connect_policy(retries=generation.retries, timeout_s=generation.timeout_s)
    begun = time.perf_counter()
    rows = read_prompts(index, rows_per_block=generation.batch_size, done=folder)
    rows = generate(rows, data=data, generation=generation, seed=run.seed, connect=connect)
    rows = critique(rows, data=data, critic=run.critic, generation=generation, connect=connect)
    write_preferences(outcome(rows), folder)
    return time.perf_counter() - begun


def _best(work: Work, rows: list[JsonDict]) -> Best:
    """What the engine's cache could have had of these rows' critiques."""
    from transformers import AutoProcessor

    engine = work.run.policy.engine
    processor = AutoProcessor.from_pretrained(work.run.policy.model)
    good = [row for row in rows if row["quarantine"] is None]
    asked = [request for row in requests_of(work, good) for request in row.critiques]
    return best((_prompt(processor, request) for request in asked), engine.block_size or 128)


def _prompt(processor: Any, request: CompletionRequest) -> Prompt:
    """What the engine reads, by the processor alone."""
    from sima_ray.images import decode_image
    from sima_ray.policy.chat import render_prompt

    text, file = render_prompt(processor, request["content"]), image_of(request)
    images = None if file is None else decode_image(file, 10**9)
    ids = processor(images=images, text=text)["input_ids"][0]
    token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    return Prompt(list(ids), image_name(request), token)
