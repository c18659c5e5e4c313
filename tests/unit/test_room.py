"""What no cluster of these nodes can give is refused; what some arrangement could give is not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sima_ray.config import EngineConfig, PolicyConfig, ServiceConfig, TrainingConfig
from sima_ray.runtime.room import Demand, run_demands, serving_demand, shortage, training_demand

LAPTOP = {"CPU": 2.0, "memory": 8e9}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0}


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"accelerator": "gpu"} | changes)


def policy(service: dict[str, Any] | None = None, **engine: Any) -> PolicyConfig:
    return PolicyConfig(
        model="model",
        engine=EngineConfig.model_validate(engine),
        service=ServiceConfig.model_validate(service or {}),
    )


def short(run: tuple[PolicyConfig, TrainingConfig], *nodes: dict[str, float]) -> str:
    """The first shortage of a run on these nodes."""
    return next(filter(None, (shortage(demands, nodes) for demands in run_demands(*run))), "")


def test_what_is_asked_and_what_there_is() -> None:
    cpu = policy(accelerator="cpu")
    assert short((cpu, training(workers=8)), LAPTOP) == (
        "training asks for 8 workers of 1 CPU and 1 GPU; "
        "this cluster has 2 CPU and 0 GPU in all, on 1 node"
    )
    assert short((policy(tensor_parallel_size=8), training()), GPU_NODE) == (
        "policy.service asks for 1 replica of 1 CPU and 8 GPU; "
        "this cluster has 16 CPU and 4 GPU in all, on 1 node"
    )
    assert short((policy({"min_replicas": 9, "max_replicas": 9}), training()), GPU_NODE, GPU_NODE)


def test_replicas_that_stay_need_room_beside_training() -> None:
    both = (policy(), training(workers=8))
    assert short(both, GPU_NODE, GPU_NODE) == (
        "training asks for 8 workers of 1 CPU and 1 GPU; while it runs, policy.service asks for "
        "1 replica of 1 CPU and 1 GPU; this cluster has 32 CPU and 8 GPU in all, on 2 nodes"
    )
    for service in ({"release_for_training": True}, {"min_replicas": 0}):
        assert not short((policy(service), training(workers=8)), GPU_NODE, GPU_NODE)
    assert not short(both, GPU_NODE, GPU_NODE, GPU_NODE)


def test_a_part_must_fit_one_node() -> None:
    wide = Demand("training", "worker", 2, [{"CPU": 3.0}])
    assert shortage([wide], [{"CPU": 2.0}] * 4).endswith("has 8 CPU in all, on 4 nodes")
    assert not shortage([wide], [{"CPU": 4.0}] * 2)
    assert shortage([wide], [{"CPU": 5.0}]) and not shortage([wide], [{"CPU": 6.0}])


def test_shares_of_a_cpu_are_not_lost_to_rounding() -> None:
    assert not shortage([Demand("data", "worker", 3, [{"CPU": 0.1}])], [{"CPU": 0.3}])
    assert shortage([Demand("data", "worker", 4, [{"CPU": 0.1}])], [{"CPU": 0.3}])


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_what_can_be_placed_is_never_refused(
    sizes: list[tuple[int, int]], cpus: int, gpus: int, workers: int
) -> None:
    """Nodes are made of what is then asked for, so that it fits by construction."""
    replica = serving_demand(policy(cpus=cpus, tensor_parallel_size=gpus), 1)
    tuning = training_demand(training(workers=workers, cpus_per_worker=cpus))
    nodes = [{"CPU": float(c), "GPU": float(g)} for c, g in sizes]
    for bundle in [*replica.bundles, *(list(tuning.bundles) * workers)]:
        place = nodes[len(nodes) // 2]
        for key, amount in bundle.items():
            place[key] += amount
    assert not shortage([replica, tuning], nodes)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_asked_always_fits(count: int) -> None:
    demands = [Demand("policy.service", "replica", 0, [{"GPU": 1.0}])] * count
    assert not shortage(demands, [LAPTOP])
