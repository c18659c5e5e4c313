"""Job: score the policy of one round (0: the model that the run began with) on held-out images."""

from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int) -> None:
    """Deploy the round's policy, evaluate it, and take it down again."""
    from sima_ray.runtime import stages

    service = stages.PolicyService(run)
    try:
        stages.evaluate(run, number, service)
    finally:
        service.release()


if __name__ == "__main__":
    main("evaluate", "Evaluate the policy of one round.", body)
