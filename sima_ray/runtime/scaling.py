"""How many replicas a live policy has: changed without a restart of those that run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sima_ray.config import ServiceConfig
from sima_ray.errors import ClusterError, ConfigError, ServiceError
from sima_ray.ports import JsonDict
from sima_ray.runtime.applications import POLL_S, change, may_grow, node_resources, overridden
from sima_ray.runtime.client import DEPLOYMENT
from sima_ray.runtime.deployment import scaling_options
from sima_ray.runtime.serving import live_policy


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between how many replicas an application has."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} to {self.high}"


def scale_policy(
    name: str = "policy", low: int | None = None, high: int | None = None
) -> tuple[Bounds, Bounds]:
    """Set between how many replicas a live application has; running ones go on as they are.

    A lower bound of 0 alone lets all of them end at once; the next request starts one again.

    Args:
        name: The policy's application.
        low: None leaves it.
        high: None leaves it.

    Returns:
        The bounds before and now.

    Raises:
        ConfigError: The lower bound is above the upper one.
        ServiceError: No such application.
        ClusterError: More than this cluster can ever hold.
    """
    if low is not None:
        _ensure_holds(name, low)

    def changed(app: JsonDict) -> JsonDict:
        new = _bounds(app)
        new = Bounds(new.low if low is None else low, new.high if high is None else high)
        if new.low > new.high:
            raise ConfigError(f"at least {new.low} and at most {new.high} replicas cannot be")
        scaling = _scaling(app) | {"min_replicas": new.low, "max_replicas": new.high}
        if low == 0 and high is None:
            scaling["initial_replicas"] = 0  # now, not after the delay of an idle replica
        return overridden(app, DEPLOYMENT, autoscaling_config=scaling)

    before, after = change(name, changed)
    return _bounds(before), _bounds(after)


def wait_for_replicas(name: str, bounds: Bounds, timeout_s: float) -> int:
    """Wait until as many replicas run as the bounds say, and none starts or ends; how many.

    Raises:
        ServiceError: Not in time: says what runs, and what the others wait for.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        replicas = live_policy(name).replicas
        running = sum(replica.state == "RUNNING" for replica in replicas)
        if running == len(replicas) and bounds.low <= running <= bounds.high:
            return running
        if time.monotonic() > deadline:
            message = " ".join(live_policy(name).message.split())[:300]
            raise ServiceError(
                f"{running} replicas of {name!r} run after {timeout_s:.0f} s, {bounds} are asked for"
                + (f": {message}" if message else "")
            )
        time.sleep(POLL_S)


def capacity(bundles: Sequence[dict[str, float]], nodes: Sequence[dict[str, float]]) -> int:
    """How many replicas fit nodes that hold nothing else.

    Args:
        bundles: What a replica reserves: one bundle on one node; several may lie on several nodes.
        nodes: The resources of each node.
    """
    if len(bundles) > 1:
        names = {name for bundle in bundles for name in bundle}
        need = {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in names}
        return _times(need, total)
    return sum(_times(bundles[0], node) for node in nodes)


def _times(need: dict[str, float], has: dict[str, float]) -> int:
    return int(min(has.get(name, 0.0) / amount + 1e-6 for name, amount in need.items() if amount))


def _ensure_holds(name: str, replicas: int) -> None:
    """Check that so many replicas fit the cluster, where it is known not to grow."""
    bundles, nodes = _bundles(live_policy(name).deployment_config), node_resources()
    if may_grow() or not any(amount for bundle in bundles for amount in bundle.values()):
        return
    if replicas > (room := capacity(bundles, nodes)):
        each = " + ".join(_words(bundle) for bundle in bundles)
        keys = {key for bundle in bundles for key in bundle}
        there = {key: sum(node.get(key, 0.0) for node in nodes) for key in sorted(keys)}
        raise ClusterError(
            f"{replicas} replicas of {each} each are asked for; the cluster's {len(nodes)} nodes have "
            f"{_words(there)} in all, room for {room}"
        )


def _words(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _bundles(config: Any) -> list[dict[str, float]]:
    """What a replica of a live deployment reserves."""
    if isinstance(config.placement_group_bundles, list) and config.placement_group_bundles:
        return [dict(bundle) for bundle in config.placement_group_bundles]
    options = config.ray_actor_options.model_dump()
    need = {"CPU": options.get("num_cpus") or 0.0, "GPU": options.get("num_gpus") or 0.0}
    return [{name: amount for name, amount in need.items() if amount} or {"CPU": 0.0}]


def _scaling(app: JsonDict) -> JsonDict:
    """The declared autoscaling, or what the builder takes in its place."""
    for deployment in app.get("deployments", []):
        if deployment["name"] == DEPLOYMENT and deployment.get("autoscaling_config"):
            return dict(deployment["autoscaling_config"])
    service = ServiceConfig.model_validate((app.get("args") or {}).get("service") or {})
    scaling = scaling_options(service)["autoscaling_config"]
    return {key: value for key, value in scaling.items() if key != "initial_replicas"}


def _bounds(app: JsonDict) -> Bounds:
    scaling = _scaling(app)
    low = int(scaling.get("min_replicas", 1))
    return Bounds(low, int(scaling.get("max_replicas", max(low, 1))))
