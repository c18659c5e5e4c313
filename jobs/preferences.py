"""Job: candidates, critiques and preference pairs of one round."""

from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int) -> None:
    """Deploy the policy, run the stage, and take the policy down again."""
    from sima_ray.runtime import stages

    service = stages.PolicyService(run)
    try:
        stages.preferences(run, number, service)
    finally:
        service.release()


if __name__ == "__main__":
    main("preferences", "Make one round's preference pairs.", body)
