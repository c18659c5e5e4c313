"""Job: score the policy of one round (0: the model that the run began with) on held-out images."""

from typing import TYPE_CHECKING

from jobs.entry import main
from sima_ray.errors import DataError

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int, suites: str) -> None:
    """Deploy the round's policy, evaluate it, and take it down again; a report that is there is made anew."""
    from sima_ray.runtime import stages

    service = stages.PolicyService(run)
    try:
        stages.evaluate(run, number, service, _names(suites))
    finally:
        service.release()
    if run.folder.exists("summary.json"):
        try:
            stages.report(run)
        except DataError as missing:  # the other round is still to be scored
            run.progress.say(f"{'report':<12} {missing}")


def next_round(run: "Run", suites: str) -> int:
    """The first round with a policy that lacks a suite."""
    from sima_ray.runtime.evaluating import first_left

    return first_left(run, _names(suites))


def _names(suites: str) -> list[str] | None:
    return suites.split(",") if suites else None


if __name__ == "__main__":
    main("evaluate", "Evaluate the policy of one round.", body, next_round, suites="")
