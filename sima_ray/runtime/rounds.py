"""The rounds of a run: which is the last, and which policy is its result.

Both follow from the figures in the run folder alone, so that a run that is taken up again, and the
report, come to what the first process came to.
"""

from sima_ray.metrics.stopping import Verdict, judge
from sima_ray.runtime.run import Run


def verdict(run: Run, number: int | None = None) -> Verdict | None:
    """What `early_stopping` makes of the rounds that were evaluated, or of those up to `number`.

    None without the rule, and before the base model is evaluated.
    """
    rule = run.config.early_stopping
    if rule is None:
        return None
    figures: list[dict[str, float]] = []
    for k in range((run.config.rounds if number is None else number) + 1):
        done = run.done(f"round-{k}-evaluate")
        if done is None:
            break
        names = (rule.monitor, "recall", "length")
        figures.append({name: done["result"][name]["value"] for name in names})
    return judge(figures, rule) if figures else None


def last_round(run: Run) -> int:
    """The round after which no other follows."""
    found = verdict(run)
    last = found.last if found is not None and found.stopped else run.config.rounds
    return next((k for k in range(2, last + 1) if idle(run, k)), last + 1) - 1


def best_round(run: Run) -> int:
    """The round whose policy is the run's result: the last one, unless `early_stopping` chooses."""
    found = verdict(run)
    return last_round(run) if found is None else found.best


def idle(run: Run, number: int) -> str:
    """Why a round after the first changes nothing, so that the rounds end before it; else empty."""
    chosen = run.done(f"round-{number}-prompts")
    if chosen is not None and not chosen["result"]["rows"]:
        return f"end after {number - 1}: no prompt is left to ask"
    made = run.done(f"round-{number}-preferences")
    if made is None or made["result"]["ledger"]["pairs"]:
        return ""
    earlier = made["result"].get("earlier_pairs", {}).values()
    if any(counts["drawn"] for counts in earlier):
        return ""
    return f"end after {number - 1}: round {number} has no pair to be trained on"
