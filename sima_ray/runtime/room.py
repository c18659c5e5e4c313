"""Whether a cluster can ever give what a run asks for, said before anything is generated.

Only what no arrangement could satisfy is refused: a demand larger than all nodes together, or a
part of it that fits no node. What others use at the moment is not looked at, for it comes back.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sima_ray.config import PolicyConfig, TrainingConfig
from sima_ray.errors import ClusterError
from sima_ray.runtime.applications import NEVER_FITS_AFTER_S, POLL_S, may_grow, node_resources
from sima_ray.runtime.deployment import bundles

Resources = Mapping[str, float]

_ROUNDING = 1e-6  # 0.3 / 0.1 is below 3 in binary


@dataclass(frozen=True, slots=True)
class Demand:
    """So many units at once, each of some bundles, of which each must fit one node.

    Attributes:
        stage: Who asks.
        unit: What is asked for, in the singular.
        count: How many of them.
        bundles: What each reserves.
    """

    stage: str
    unit: str
    count: int
    bundles: Sequence[Resources]

    @property
    def total(self) -> dict[str, float]:
        """All that is reserved, by resource."""
        return added(list(self.bundles) * self.count)

    def __str__(self) -> str:
        units = f"1 {self.unit}" if self.count == 1 else f"{self.count} {self.unit}s"
        return f"{self.stage} asks for {units} of {in_words(added(self.bundles))}"


def serving_demand(policy: PolicyConfig, count: int) -> Demand:
    """So many replicas of the policy."""
    return Demand("policy.service", "replica", count, bundles(policy.engine))


def training_demand(training: TrainingConfig) -> Demand:
    """The workers of a training run."""
    gpu: dict[str, float] = {"GPU": 1.0} if training.accelerator == "gpu" else {}
    return Demand("training", "worker", training.workers, [{"CPU": training.cpus_per_worker} | gpu])


def run_demands(policy: PolicyConfig, training: TrainingConfig) -> list[list[Demand]]:
    """What a run needs at one time: serving, training, and both where the replicas stay."""
    serving = serving_demand(policy, max(1, policy.service.min_replicas))
    tuning = training_demand(training)
    staying = serving_demand(policy, policy.service.min_replicas)
    both = [] if policy.service.release_for_training else [[tuning, staying]]
    return [[serving], [tuning], *both]


def ensure_room(at_once: Sequence[Sequence[Demand]], say: Callable[[str], None]) -> None:
    """Check that each list of demands fits the cluster, now or soon: nodes may still be joining.

    Where nodes may join at any time nothing is refused, but what is missing is said.

    Raises:
        ClusterError: Names what is asked and what there is.
    """
    start = time.monotonic()
    while lack := next(filter(None, (shortage(d, node_resources()) for d in at_once)), ""):
        if may_grow():
            say(f"{'cluster':<12} {lack}; waiting for nodes")
            return
        if time.monotonic() - start > NEVER_FITS_AFTER_S:
            raise ClusterError(lack)
        time.sleep(POLL_S)


def shortage(demands: Sequence[Demand], nodes: Sequence[Resources]) -> str:
    """What is asked and what there is, where nodes can never give it at one time; else empty.

    Args:
        demands: All of them at once.
        nodes: All resources of each node, used or not.
    """
    total = added(demand.total for demand in demands)
    short = any(
        amount > sum(node.get(key, 0) for node in nodes) + _ROUNDING
        for key, amount in total.items()
    )
    if not short and all(_capacity(d, nodes) >= d.count for d in demands):
        return ""
    asked = "; while it runs, ".join(str(demand) for demand in demands if demand.count)
    there = {key: sum(node.get(key, 0) for node in nodes) for key in total}
    where = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    return f"{asked}; this cluster has {in_words(there)} in all, on {where}"


def added(parts: Iterable[Resources]) -> dict[str, float]:
    """The sum of resources."""
    total: dict[str, float] = {}
    for part in parts:
        total |= {key: total.get(key, 0.0) + amount for key, amount in part.items()}
    return total


def in_words(resources: Resources) -> str:
    """Resources as a person reads them: "4 CPU and 1 GPU"."""
    return " and ".join(f"{amount:g} {key}" for key, amount in resources.items())


def _capacity(demand: Demand, nodes: Sequence[Resources]) -> int:
    """An upper limit to the units that fit: exact where a unit is one bundle."""
    alike = Counter(tuple(sorted(bundle.items())) for bundle in demand.bundles)
    return min(
        sum(_times(dict(bundle), node) for node in nodes) // count
        for bundle, count in alike.items()
    )


def _times(bundle: Resources, node: Resources) -> int:
    """How often a bundle fits a node."""
    return min(
        int(node.get(key, 0) / amount + _ROUNDING) for key, amount in bundle.items() if amount
    )
