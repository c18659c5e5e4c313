"""Serve's declared applications: read them, change one, wait until it runs or say why it does not.

A declarative deploy states *all* applications. So a change reads the present ones, changes one and states them
all again; Serve's controller takes that only where nobody changed any of them meanwhile, else it is made again.
No process holds anything: one that dies has made its change or has not.
"""

import asyncio
import random
import re
import time
from collections.abc import Callable, Sequence
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
CHANGE_TIMEOUT_S = 60.0
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
    return {} if client() is None else _read()[1]


def apply(app: JsonDict) -> None:
    """Add or replace one application, and leave the others as they are."""
    _change_all(lambda apps: apps | {app["name"]: app})


def change(name: str, changed: Callable[[JsonDict], JsonDict]) -> tuple[JsonDict, JsonDict]:
    """Change one declared application, and leave the others as they are.

    Args:
        name: Of the application.
        changed: Makes the new declaration out of the present one, without changing that; called again when
            others were faster.

    Returns:
        Its declarations before and after.

    Raises:
        ServiceError: No such application.
    """

    def one(apps: dict[str, JsonDict]) -> dict[str, JsonDict]:
        if name not in apps:
            there = f"; there are: {', '.join(sorted(apps))}" if apps else ""
            raise ServiceError(f"no application {name!r} is deployed{there}")
        return apps | {name: changed(apps[name])}

    before, after = _change_all(one)
    return before[name], after[name]


def withdraw(name: str) -> bool:
    """Take one application out of the declared ones; whether it was among them."""
    found = False

    def without(apps: dict[str, JsonDict]) -> dict[str, JsonDict]:
        nonlocal found
        # Asked again after the controller died in the change, it may be gone already: by our own doing.
        found = found or name in apps
        return {key: apps[key] for key in apps if key != name}

    _change_all(without)
    return found


def overridden(app: JsonDict, deployment: str, **options: Any) -> JsonDict:
    """A declaration with these options of one deployment, and everything else as it is."""
    declared = app.get("deployments", [])
    mine = next((d for d in declared if d["name"] == deployment), {"name": deployment})
    others = [d for d in declared if d["name"] != deployment]
    return {**app, "deployments": [*others, {**mine, **options}]}


def _change_all(
    changed: Callable[[dict[str, JsonDict]], dict[str, JsonDict]],
) -> tuple[dict[str, JsonDict], dict[str, JsonDict]]:
    """Change the declared applications; what they were and what they are now."""
    if client() is None:
        raise ServiceError("Serve does not run on this cluster: nothing is deployed")
    deadline = time.monotonic() + CHANGE_TIMEOUT_S
    while True:
        seen, before = _read()
        after = changed(before)
        if after == before or _state_all(after, seen):
            return before, after
        if time.monotonic() > deadline:
            raise ServiceError(
                f"others have been changing Serve's applications for {CHANGE_TIMEOUT_S:.0f} s: try again"
            )
        time.sleep(POLL_S * random.random())


def _read() -> tuple[JsonDict, dict[str, JsonDict]]:
    """All that is declared, for `_state_all`; and of that the applications that are not being removed.

    Those that run come without their `initial_replicas`: Serve would go back to that number whenever a
    declaration changes, so that new weights under load would end all replicas but one.
    """
    seen = _dumped(ray.get(client()._controller.get_app_configs.remote()))
    found = details()
    states = {name: app.status for name, app in found.applications.items()} if found else {}
    return seen, {
        name: _without_initial(app) if states[name] == ApplicationStatus.RUNNING else app
        for name, app in seen.items()
        if states.get(name, ApplicationStatus.DELETING) != ApplicationStatus.DELETING
    }


def _state_all(apps: dict[str, JsonDict], seen: JsonDict) -> bool:
    """State all applications, if what is declared still is what was seen; whether it was.

    One that is declared now and is not among them is removed.
    """

    # Nested, so that it travels by value: the controller may have another revision of this project, or none.
    def compare_and_apply(controller: Any, seen: JsonDict, schema: Any) -> bool:
        from ray._common.utils import _BACKGROUND_TASKS

        async def in_its_loop() -> bool:  # without an await: nobody comes between
            now = controller.get_app_configs()
            if {name: app.model_dump(exclude_unset=True) for name, app in now.items()} != seen:
                return False
            controller.apply_config(schema)
            return True

        # `__ray_call__` runs in a thread of its own; the controller's state and its count of tasks submitted
        # belong to the event loop (from two threads at once Ray ends the process: "already exists").
        tasks = list(_BACKGROUND_TASKS)
        loop = next(t.get_loop() for t in tasks if t.get_coro().__name__ == "run_control_loop")
        return asyncio.run_coroutine_threadsafe(in_its_loop(), loop).result()

    schema = ServeDeploySchema(
        applications=[ServeApplicationSchema(**app) for app in apps.values()]
    )
    call = client()._controller.__ray_call__.remote(compare_and_apply, seen, schema)
    return bool(ray.get(call))


def _dumped(apps: dict[str, ServeApplicationSchema]) -> JsonDict:
    return {name: app.model_dump(exclude_unset=True) for name, app in apps.items()}


def _without_initial(app: JsonDict) -> JsonDict:
    deployments = [dict(deployment) for deployment in app.get("deployments", [])]
    for deployment in deployments:
        if isinstance(scaling := deployment.get("autoscaling_config"), dict):
            deployment["autoscaling_config"] = {
                key: value for key, value in scaling.items() if key != "initial_replicas"
            }
    return app | ({"deployments": deployments} if deployments else {})


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


def may_grow() -> bool:
    """Whether nodes may still join: only a cluster on loopback without an autoscaler is known to stay as it is."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() is not None or any(
        not node["NodeManagerAddress"].startswith("127.") for node in ray.nodes() if node["Alive"]
    )


def node_resources() -> list[dict[str, float]]:
    """All resources of each node, used or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _lacking(needs: Sequence[dict[str, float]]) -> str:
    """What no node has, in words; empty when each bundle fits some node, or nodes may still join."""
    if may_grow():
        return ""
    nodes = node_resources()
    for bundle in needs:
        if not any(_fits(bundle, node) for node in nodes):
            wanted = ", ".join(f"{amount:g} {key}" for key, amount in bundle.items())
            return f"a replica needs {wanted} on one node, and no node has that"
    return ""


def _fits(bundle: dict[str, float], node: dict[str, float]) -> bool:
    return all(node.get(key, 0) >= amount for key, amount in bundle.items())
