"""Serve's declared applications: read them, apply changed ones, wait until one runs or say why it does not."""

import re
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.serve.schema import (
    ApplicationStatus,
    ServeApplicationSchema,
    ServeDeploySchema,
    ServeInstanceDetails,
)

from sima_ray.errors import ClusterError, ServiceError
from sima_ray.ports import JsonDict

POLL_S = 0.1
NEVER_FITS_AFTER_S = 5.0


def client() -> Any:
    """Serve's controller client; None when Serve does not run."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def details() -> ServeInstanceDetails | None:
    """Serve's whole state; None when it does not run."""
    if not ray.is_initialized():
        raise ClusterError("no Ray cluster: call ray.init first, or run this as a Ray job")
    running = client()
    return None if running is None else ServeInstanceDetails(**running.get_serve_details())


def applications() -> dict[str, JsonDict]:
    """The declared applications, by name."""
    found = details()
    if found is None:
        return {}
    return {
        name: app.deployed_app_config.model_dump(exclude_unset=True)
        for name, app in found.applications.items()
        if app.deployed_app_config is not None and app.status != ApplicationStatus.DELETING
    }


def apply(app: JsonDict) -> None:
    """Add or change one application, and leave the others as they are."""
    apply_all(applications() | {app["name"]: app})


def apply_all(apps: dict[str, JsonDict]) -> None:
    """State all applications; one that is declared now and is not among them is removed."""
    schema = ServeDeploySchema(
        applications=[ServeApplicationSchema(**app) for app in apps.values()]
    )
    client().deploy_apps(schema)


def ensure_room(needs: Sequence[dict[str, float]]) -> None:
    """Check that each bundle fits some node, now or soon: nodes may still be joining.

    Raises:
        ClusterError: Names what no node has.
    """
    start = time.monotonic()
    while lack := _lacking(needs):
        if time.monotonic() - start > NEVER_FITS_AFTER_S:
            raise ClusterError(lack)
        time.sleep(POLL_S)


def wait(name: str, timeout_s: float) -> None:
    """Wait until an application runs.

    Raises:
        ServiceError: It failed, or did not run in time.
    """
    start = time.monotonic()
    message = ""
    while time.monotonic() - start < timeout_s:
        found = details()
        app = found.applications.get(name) if found else None
        if app is not None:
            message = _reason(app)
            match app.status:
                case ApplicationStatus.RUNNING:
                    return
                case ApplicationStatus.DEPLOY_FAILED:
                    raise ServiceError(f"application {name!r} did not start: {message}")
        time.sleep(POLL_S)
    raise ServiceError(
        f"application {name!r} did not start within {timeout_s:.0f} s"
        + (f": {message}" if message else "")
    )


def wait_until_gone(name: str, timeout_s: float) -> None:
    """Wait until an application's replicas have ended.

    Raises:
        ServiceError: Not in time.
    """
    start = time.monotonic()
    while (found := details()) and name in found.applications:
        if time.monotonic() - start > timeout_s:
            raise ServiceError(f"application {name!r} has not ended within {timeout_s:.0f} s")
        time.sleep(POLL_S)


def _reason(app: Any) -> str:
    """Why an application is not running, in one line: the last line of what its deployments report."""
    texts = [deployment.message for deployment in app.deployments.values()] + [app.message]
    for text in texts:
        lines = [line.strip() for line in re.split(r"[\n]|\\n", text or "") if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Problem)\b", line)]
        if errors or lines:
            return re.sub(r"^RuntimeError: ", "", (errors or lines)[-1])[:500]
    return ""


def _lacking(needs: Sequence[dict[str, float]]) -> str:
    """What no node has, in words; empty when each bundle fits some node, or nodes may still join."""
    from ray._private.state import state

    alive = [node for node in ray.nodes() if node["Alive"]]
    # An autoscaler may add what is missing. Only a cluster on loopback is known to stay as it is.
    if state.get_max_resources_from_cluster_config() is not None or any(
        not node["NodeManagerAddress"].startswith("127.") for node in alive
    ):
        return ""
    nodes = [node["Resources"] for node in alive]
    for bundle in needs:
        if not any(_fits(bundle, node) for node in nodes):
            wanted = ", ".join(f"{amount:g} {key}" for key, amount in bundle.items())
            return f"a replica needs {wanted} on one node, and no node has that"
    return ""


def _fits(bundle: dict[str, float], node: dict[str, float]) -> bool:
    return all(node.get(key, 0) >= amount for key, amount in bundle.items())
