"""Job: DPO with LoRA on one round's pairs."""

from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int) -> None:
    """Train on the pairs that the round's preferences job left."""
    from sima_ray.runtime import stages

    stages.train(run, number)


if __name__ == "__main__":
    main("train", "Tune the policy on one round's preference pairs.", body)
