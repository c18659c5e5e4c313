"""New weights for a live policy: checked on every replica before they answer, taken back where one fails."""

import time
from dataclasses import dataclass
from typing import Any

import ray

from sima_ray.policy.checkpoint import check_policy
from sima_ray.policy.sample import read_sample, sample_of
from sima_ray.runtime.applications import change
from sima_ray.runtime.serving import swap_policy, user_config


@dataclass(frozen=True, slots=True)
class Promotion:
    """Weights that all replicas answer with now.

    Attributes:
        before: The version that answered until then.
        replicas: That run and compared; those that start later compare, too.
        difference: Mean |Δ log-probability| between replicas and sample, of the replica where it is largest.
        written: Whether merging wrote the sample; else it was made now, from the folder itself, and says only
            that replicas compute what the folder holds.
        seconds: From the first replica's swap to the last one's.
    """

    before: str
    replicas: int
    difference: float
    written: bool
    seconds: float


def promote(folder: str, version: str, name: str = "policy", timeout_s: float = 600.0) -> Promotion:
    """Put a folder's weights on all replicas of a live policy, in place.

    Args:
        folder: The policy's folder, on a volume that all nodes mount.
        version: The name of these weights in every answer.
        name: The policy's application.
        timeout_s: How long the swap may take.

    Raises:
        ModelError: A model folder that is missing, incomplete or damaged.
        ServiceError: No such application; or a replica that cannot load the weights, or computes something else
            with them: all have the former ones again.
    """
    check_policy(folder)
    declared, _ = change(name, dict)  # that it is there, before anything is computed
    sample = read_sample(folder)
    written = sample is not None
    if sample is None:
        # On a worker: the job itself runs on the head, which need not have a model's memory.
        task: Any = ray.remote(num_cpus=1, max_retries=1)(sample_of)
        made: Any = ray.get(task.remote(folder))
        sample = made
    started = time.monotonic()
    states = swap_policy(folder, version, name, timeout_s, sample)
    return Promotion(
        before=user_config(declared)["version"],
        replicas=len(states),
        difference=max((state["difference"] for state in states), default=0.0),
        written=written,
        seconds=time.monotonic() - started,
    )
