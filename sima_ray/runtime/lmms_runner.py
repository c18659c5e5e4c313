"""Runs lmms-eval in its own environment: a process that takes orders on stdin and evaluates them one by one.

It is run by its path with that environment's Python, and imports nothing of this project. An order is a JSON
line (see `main`), its reply a line that starts with `REPLY`. All else that comes out is lmms-eval's own talk.
The policy's token is in the environment as `TOKEN`; OPENAI_API_KEY stays what judges are asked with.
"""

# pyright: reportMissingImports=false

import argparse
import json
import os
import sys
import traceback
from functools import cache
from typing import Any

REPLY = "[lmms] "
TOKEN = "SIMA_POLICY_TOKEN"

UNSCORED = "unscored"
"""Added to the results: answers that the judge wrote no score for. MM-Vet counts them as 0 and only logs it."""

_SAYS_SO = "failed to get a score"

REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""What lmms-eval's own command line strips from answers."""


def main() -> None:
    """Carry out order after order until stdin ends.

    An order to check has: check (names of tasks) and include_path. One to evaluate has: task, output (folder), url
    and model (of the endpoint), version (of the weights, for the record), limit (samples, or null), max_tokens (no
    task may ask for more), concurrency, retries, and include_path (folder of further tasks, or null).
    """
    for line in sys.stdin:
        order = json.loads(line)
        try:
            (check if "check" in order else evaluate)(order)
            reply: dict[str, Any] = {"error": None}
        except (Exception, SystemExit) as error:  # a task that fails must not cost the others
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        sys.stderr.flush()
        print(f"\n{REPLY}{json.dumps(reply)}", flush=True)


def check(order: dict[str, Any]) -> None:
    """Find every task, before a model is served for them."""
    for task in order["check"]:
        task_manager(task, order["include_path"])


def evaluate(order: dict[str, Any]) -> None:
    """Evaluate one task and leave lmms-eval's own files, results and samples, in the order's folder."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.utils import get_datetime_str
    from loguru import logger

    task, where = order["task"], order["output"]
    tracker = EvaluationTracker(output_path=where)
    told = f"model={order['version']},base_url={order['url']},endpoint_model={order['model']}"
    tracker.general_config_tracker.log_experiment_args("openai", told, "", "", False)
    date = get_datetime_str(timezone="UTC")
    unscored: list[Any] = []
    sink = logger.add(unscored.append, level="INFO", filter=lambda r: _SAYS_SO in r["message"])
    results = simple_evaluate(
        model=make_model(order),
        model_args=told,
        tasks=[task],
        batch_size=1,
        limit=order["limit"],
        log_samples=True,
        task_manager=task_manager(task, order["include_path"]),
        datetime_str=date,
        cli_args=argparse.Namespace(
            output_path=where, process_with_media=False, reasoning_tags=REASONING_TAGS
        ),
    )
    logger.remove(sink)
    results[UNSCORED] = len(unscored)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples, datetime_str=date)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])


def task_manager(task: str, include_path: str | None) -> Any:
    """Knows a task; lmms-eval's own thousands are only read when the folder has none of that name."""
    if include_path is not None:
        own = read_tasks(include_path, False)
        if task in own.all_tasks:
            return own
    manager = read_tasks(include_path, True)
    if task not in manager.all_tasks:
        raise LookupError(f"lmms-eval knows no task {task!r}")
    return manager


@cache
def read_tasks(include_path: str | None, defaults: bool) -> Any:
    """The tasks of a folder, and lmms-eval's own too, which takes seconds."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=include_path, include_defaults=defaults)


def make_model(order: dict[str, Any]) -> Any:
    """lmms-eval's client of an OpenAI endpoint, with a limit to what tasks ask for.

    LLaVA-Bench asks for 4,096 new tokens, more than LLaVA-1.5 has room for: such a request would be refused.
    """
    from lmms_eval.models.chat.openai import OpenAICompatible

    class Policy(OpenAICompatible):
        def generate_until(self, requests: Any) -> Any:
            for request in requests:
                asked = request.args[2]
                asked["max_new_tokens"] = min(
                    asked.get("max_new_tokens", order["max_tokens"]), order["max_tokens"]
                )
            return super().generate_until(requests)

    return Policy(
        model=order["model"],
        base_url=order["url"],
        api_key=os.environ[TOKEN],
        num_concurrent=order["concurrency"],
        max_retries=order["retries"],
        httpx_trust_env=False,  # the endpoint is on this machine: no proxy
    )


if __name__ == "__main__":
    main()
