"""The rounds of a run: which is the last, and which policy is its result.

Both follow from the figures in the run folder alone, so that a run that is taken up again, and the
report, come to what the first process came to.
"""

from sima_ray.metrics.stopping import Verdict, judge
from sima_ray.runtime.run import Run

NOTHING_TO_ASK = "no prompt is left to ask"


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
    empty = (k for k in range(1, last + 1) if nothing_to_ask(run, k))
    return next(empty, last + 1) - 1


def best_round(run: Run) -> int:
    """The round whose policy is the run's result: the last one, unless `early_stopping` chooses."""
    found = verdict(run)
    return last_round(run) if found is None else found.best


def nothing_to_ask(run: Run, number: int) -> bool:
    """Whether the prompts of a round were chosen (`data.prompts_after_first`) and are none."""
    chosen = run.done(f"round-{number}-prompts")
    return chosen is not None and not chosen["result"]["rows"]
