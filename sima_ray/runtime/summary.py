"""A finished run in one JSON value and one page: before and after, the critic, the ledger, the seconds."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq

from sima_ray.config import EvaluationConfig
from sima_ray.data.locations import open_location
from sima_ray.ledger import Ledger
from sima_ray.metrics.summary import compare
from sima_ray.ports import JsonDict
from sima_ray.records import Outcome
from sima_ray.runtime.evaluating import compared, marker
from sima_ray.runtime.evaluation import (
    Caption,
    captions_from_jsonl,
    columns,
    error_counter,
)
from sima_ray.runtime.rounds import best_round, idle, last_round, verdict
from sima_ray.runtime.run import Run
from sima_ray.runtime.suites import TITLES

FIGURES = {
    "chair_s": ("CHAIR_s ↓", "captions with a hallucinated object"),
    "chair_i": ("CHAIR_i ↓", "hallucinated object mentions"),
    "recall": ("recall ↑", "true objects that are named"),
    "objects": ("objects a caption", "mentions"),
    "length": ("words a caption", "length"),
    "errors": ("errors a caption ↓", "against the ground truth"),
}
"""The figures that are shown, in order: label and meaning. CHAIR never stands without recall and length."""

_TEMPLATE = Path(__file__).parent / "report.html.j2"


def summarise_run(run: Run) -> JsonDict:
    """Everything that the run's end shows.

    Raises:
        LedgerError: The rows of a round do not add up.
    """
    ledger = total_ledger(run)
    result: JsonDict = {"run": run.config.name, "folder": run.folder.root}
    if run.config.evaluation is not None:
        result["confidence"] = run.config.evaluation.confidence
        captioned = [f"round-{number}" for number in (0, best_round(run))]
        if all(run.folder.exists(folder, "captions.jsonl") for folder in captioned):
            result |= _evaluations(run, run.config.evaluation)
        if suites := compared(run, 0, best_round(run)):
            result["suites"] = suites
    given = run.done("round-1-pairs")
    result["critic"] = None if given else critic_figures(run, 1)
    if given:
        result["given"] = given["result"]["given"]
    result["ledger"] = ledger.to_json()
    result |= rounds(run)
    result["seconds"] = seconds(run)
    result["provenance"] = run.folder.read_json("provenance.json")
    return result


def total_ledger(run: Run) -> Ledger:
    """The sum of the rounds' ledgers.

    Raises:
        LedgerError: A round's rows do not add up.
    """
    total = Ledger(0)
    for number in range(1, run.config.rounds + 1):
        if done := run.done(f"round-{number}-preferences") or run.done(f"round-{number}-pairs"):
            ledger = Ledger.from_json(done["result"]["ledger"])
            ledger.check()
            total = total + ledger
    return total


def rounds(run: Run) -> JsonDict:
    """Which policy is the result and why no round followed, and what rounds took over from earlier ones.

    Empty for a run whose config says nothing on this.
    """
    found, last, best = verdict(run), last_round(run), best_round(run)
    result: JsonDict = {}
    if found is not None or last < run.config.rounds:
        ruled = found is not None and (found.stopped or last == run.config.rounds)
        result["final"] = {
            "round": best,
            "policy": run.policy(best),
            "last_round": last,
            "stopped_early": last < run.config.rounds,
            "reason": str(found) if ruled else idle(run, last + 1),
        }
    chosen = {k: run.done(f"round-{k}-prompts") for k in range(2, run.config.rounds + 1)}
    if prompts := {str(k): done["result"] for k, done in chosen.items() if done}:
        result["prompts"] = prompts
    made = {k: run.done(f"round-{k}-preferences") for k in range(2, last + 1)}
    mixed = {str(k): done["result"].get("earlier_pairs") for k, done in made.items() if done}
    if pairs := {k: counts for k, counts in mixed.items() if counts}:
        result["earlier_pairs"] = pairs
    return result


def seconds(run: Run) -> dict[str, float]:
    """Wall seconds of each finished stage, in the order in which they ran."""
    keys = ["prepare", "round-0-evaluate"]
    for number in range(1, run.config.rounds + 1):
        names = ("pairs", "prompts", "candidates", "preferences", "train", "merge", "evaluate")
        keys += [f"round-{number}-{name}" for name in names]
    for number in range(run.config.rounds + 1):
        keys += [marker(name, number) for name in TITLES if name != "chair"]
    return {key: done["seconds"] for key in keys if (done := run.done(key))}


def critic_figures(run: Run, number: int) -> JsonDict:
    """How the critic did in a round: consistent and unparseable verdicts, and agreement with the oracle.

    The oracle prefers the response with fewer errors; where both have equally many it has no say. Without an
    error counter in the config `agreement_with_oracle` is null.
    """
    settings = run.config.evaluation
    count = error_counter(settings.error_counter) if settings else None
    rows = list(_judged_rows(run, number))
    outcomes = Counter(Outcome(row["outcome"]) for row in rows)
    decided = sum(n for outcome, n in outcomes.items() if outcome.is_preference)
    asked = decided + outcomes[Outcome.INCONSISTENT] + outcomes[Outcome.UNPARSEABLE]
    agree = (
        [verdict for row in rows if (verdict := agrees(row, count)) is not None] if count else []
    )
    return {
        "judged": asked,
        "consistent": decided / max(decided + outcomes[Outcome.INCONSISTENT], 1),
        "unparseable": outcomes[Outcome.UNPARSEABLE] / max(asked, 1),
        "agreement_with_oracle": sum(agree) / len(agree) if agree else None,
        "agreement_pairs": len(agree),
    }


def judge_words(judge: JsonDict) -> str:
    """What a judge was asked for a suite, and what it took."""
    tokens = judge["prompt_tokens"] + judge["answer_tokens"]
    words = (
        f"{judge['model']}: {judge['asked']:,} asked, {judge['cached']:,} kept from before, "
        f"{sum(judge['failures'].values()):,} failed, {tokens:,} tokens"
    )
    if judge["cost"] is None:
        return words
    before = f", those kept {judge['cost_before']:.2f}" if judge["cached"] else ""
    return f"{words}, cost {judge['cost']:.2f}{before}"


def html(result: JsonDict) -> str:
    """The run as one page without scripts or outside files."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        result=result, figures=FIGURES, titles=TITLES, judge_words=judge_words
    )


def _evaluations(run: Run, settings: EvaluationConfig) -> JsonDict:
    last, best = last_round(run), best_round(run)
    before, after = _captions(run, 0), _captions(run, best)
    kept = {c.row_id for c in before} & {c.row_id for c in after}
    before = [caption for caption in before if caption.row_id in kept]
    after = [caption for caption in after if caption.row_id in kept]
    differences = compare(
        columns(before),
        columns(after),
        samples=settings.bootstrap_samples,
        confidence=settings.confidence,
        seed=run.config.seed,
    )
    done = [run.done(f"round-{k}-evaluate") for k in range(last + 1)]
    evaluated = [found["result"] if found else None for found in done]
    return {
        "before": evaluated[0],
        "after": evaluated[best],
        "difference": {name: estimate.to_json() for name, estimate in differences.items()},
        "rounds": [figures for figures in evaluated if figures],
        "examples": _examples(before, after),
    }


def _examples(before: list[Caption], after: list[Caption], count: int = 6) -> list[JsonDict]:
    """The first images whose caption changed: what the tuning did, not what it did best."""
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a.response != b.response]
    return [
        {"image": a.image, "before": a.response, "after": b.response} for a, b in changed[:count]
    ]


def _captions(run: Run, number: int) -> list[Caption]:
    return captions_from_jsonl(run.folder.read_text(f"round-{number}", "captions.jsonl"))


def _judged_rows(run: Run, number: int) -> Iterable[dict[str, Any]]:
    filesystem, path = open_location(run.round_path(number, "preferences"))
    names = ["ground_truth", "outcome", "candidates", "critiques"]
    for row in pq.read_table(path, columns=names, filesystem=filesystem).to_pylist():
        if row["critiques"]:
            yield row


def agrees(row: dict[str, Any], count: Any) -> bool | None:
    """Whether a row's verdict prefers the response with fewer errors; None where either has no preference."""
    outcome = Outcome(row["outcome"])
    if not outcome.is_preference:
        return None
    first, second = (count(c["text"], row["ground_truth"]) for c in row["candidates"])
    if first == second:
        return None
    return (first < second) == (outcome is Outcome.PREFERRED_FIRST)
