"""Serve applications from Python: start Serve, deploy the policy and the critic, swap weights, remove.

Everything is declarative (as `serve deploy FILE` is), because only then a new `user_config` reaches running
replicas in place. A declarative deploy states *all* applications: each change here reads the present ones,
changes one, and applies them together; changes from several processes at once must take turns.
"""

import contextlib
import re
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ServeApplicationSchema,
    ServeDeploySchema,
    ServeInstanceDetails,
)

from sima_ray.config import CriticConfig, PolicyConfig, ServiceConfig
from sima_ray.errors import ClusterError, ConfigError, ServiceError
from sima_ray.ports import JsonDict
from sima_ray.runtime.client import DEPLOYMENT

POLL_S = 0.1
NEVER_FITS_AFTER_S = 10.0


def start_serve(host: str = "127.0.0.1", port: int = 8000) -> int:
    """Start Serve on this cluster unless it runs, and return the port of its HTTP proxy.

    Args:
        host: Where to listen.
        port: 0 picks a free one.

    Raises:
        ServiceError: When the port is taken, or Serve runs already but on another address.
    """
    details = _details()
    if details is not None and details.http_options is not None:
        there = details.http_options
        if port not in (0, there.port) or there.host != host:
            raise ServiceError(
                f"Serve already listens on {there.host}:{there.port}, not on {host}:{port}: "
                "use that address, or shut Serve down first"
            )
        return int(there.port)
    port = _free_port(host, port)
    serve.start(http_options={"host": host, "port": port})
    return port


def deploy_policy(
    config: PolicyConfig,
    *,
    version: str = "base",
    model: str | None = None,
    name: str = "policy",
    timeout_s: float = 900.0,
) -> None:
    """Deploy the policy and wait until its replicas answer.

    Args:
        config: Model, engine and service.
        version: The name of these weights in every answer.
        model: The folder to load instead of `config.model`.
        name: The application's name.
        timeout_s: How long to wait.

    Raises:
        ModelError: A model folder that is missing or incomplete.
        ClusterError: Resources that no node has.
        ServiceError: A replica that does not start (with its reason), or no answer in time.
    """
    from serve_apps.policy import bundles, check_model, scaling_options

    if model is not None:
        config = config.model_copy(update={"model": model})
    check_model(config.model)
    _ensure_running()
    # What may change on running replicas goes into the overrides, the rest into the builder's arguments.
    service = config.service
    fixed = ServiceConfig(
        openai_routes=service.openai_routes,
        **service.model_dump(include=set(GUARD_FIELDS)),
    )
    app: JsonDict = {
        "name": name,
        "route_prefix": "/policy" if service.openai_routes else None,
        "import_path": "serve_apps.policy:build_app",
        "runtime_env": job_runtime_env(),
        "args": config.model_copy(update={"service": fixed}).model_dump(mode="json"),
        "deployments": [
            {
                "name": DEPLOYMENT,
                "user_config": {"model": config.model, "version": version},
                **scaling_options(service),
            }
        ],
    }
    _apply(app)
    _wait(name, timeout_s, needs=bundles(config.engine))


GUARD_FIELDS = ("max_body_bytes", "max_image_pixels", "max_text_chars", "token_file")


def swap_policy(model: str, version: str, name: str = "policy", timeout_s: float = 300.0) -> None:
    """Load other weights of the same architecture on all replicas, in place.

    Returns when every replica answers with the new version. When one cannot load them, the application's
    former version is put back.

    Raises:
        ModelError: A model folder that is missing or incomplete.
        ServiceError: No such application, or a replica that could not load the weights (with its reason).
    """
    from serve_apps.policy import check_model

    check_model(model)
    app = _applications().get(name)
    if app is None:
        raise ServiceError(f"no application {name!r} is deployed")
    before = _user_config(app)
    _apply(_with_user_config(app, {"model": model, "version": version}))
    try:
        _wait_for_version(name, version, timeout_s)
    except ServiceError:
        _apply(_with_user_config(app, before))
        with contextlib.suppress(ServiceError):
            _wait_for_version(name, before["version"], timeout_s)
        raise


def deploy_critic(
    config: CriticConfig,
    service: ServiceConfig,
    *,
    tokens: Sequence[str] = (),
    without_token: bool = False,
    policy: str = "policy",
    name: str = "critic",
    route_prefix: str = "/",
    timeout_s: float = 120.0,
) -> str:
    """Deploy the critic over HTTP and wait until it answers.

    Args:
        config: How it judges.
        service: Limits and replicas; `token_file` holds tokens that can be changed while it runs.
        tokens: Bearer tokens (see `serve_apps.guard.new_token`); only their hashes leave this process.
        without_token: Answer anybody.
        policy: The application that it asks.
        name, route_prefix: Of its own application.
        timeout_s: How long to wait.

    Returns:
        Its URL.

    Raises:
        ConfigError: No token of any kind, and not `without_token`.
        ServiceError: It does not start.
    """
    from serve_apps.guard import token_hash

    if not (tokens or service.token_file or without_token):
        raise ConfigError(
            "the critic needs a token: pass one, set token_file, or ask for none at all"
        )
    _ensure_running()
    app: JsonDict = {
        "name": name,
        "route_prefix": route_prefix,
        "import_path": "serve_apps.critic:build_app",
        "runtime_env": job_runtime_env(),
        "args": {
            "critic": config.model_dump(mode="json"),
            "service": service.model_dump(mode="json"),
            "policy": policy,
            "token_hashes": [token_hash(token) for token in tokens],
            "without_token": without_token,
        },
    }
    _apply(app)
    _wait(name, timeout_s)
    details = _details()
    assert details is not None and details.http_options is not None
    return f"http://{details.http_options.host}:{details.http_options.port}{route_prefix}".rstrip(
        "/"
    )


def remove(name: str) -> None:
    """Remove an application, and wait until its replicas are gone; no error when there is none."""
    if _details() is None:
        return
    apps = _applications()
    if apps.pop(name, None) is not None:
        _apply_all(apps)
    serve.delete(name)  # waits


def replica_states(name: str = "policy", timeout_s: float = 60.0) -> list[JsonDict]:
    """What each running replica of a policy application says of itself (see `serve_apps.policy.Policy.state`).

    Raises:
        ServiceError: When not all of them answered in time.
    """
    handle = serve.get_deployment_handle(DEPLOYMENT, name)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # A handle picks replicas by itself: ask in rounds until each that Serve lists has answered.
        wanted = _running_replicas(name)
        asked = [handle.state.remote() for _ in range(4 * max(1, len(wanted)))]
        states: dict[str, JsonDict] = {}
        for response in asked:
            state = response.result(timeout_s=max(1.0, deadline - time.monotonic()))
            states[state["replica"]] = state
        if wanted and wanted <= set(states):
            return [states[replica] for replica in sorted(wanted)]
        time.sleep(POLL_S)
    raise ServiceError(f"not every replica of {name!r} answered within {timeout_s:.0f} s")


def job_runtime_env() -> JsonDict:
    """This job's runtime environment, for applications that must find the same code and variables."""
    env = dict(ray.get_runtime_context().runtime_env)
    keys = ("working_dir", "py_modules", "env_vars", "pip", "uv", "conda", "config")
    return {key: env[key] for key in keys if env.get(key)}


# --- reading and applying ------------------------------------------------------------------------------------


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _details() -> ServeInstanceDetails | None:
    """Serve's whole state; None when it does not run."""
    if not ray.is_initialized():
        raise ClusterError("no Ray cluster: call ray.init first, or run this as a Ray job")
    client = _client()
    return None if client is None else ServeInstanceDetails(**client.get_serve_details())


def _ensure_running() -> None:
    if _details() is None:
        start_serve()


def _applications() -> dict[str, JsonDict]:
    """The declared applications, by name."""
    details = _details()
    if details is None:
        return {}
    return {
        name: app.deployed_app_config.model_dump(exclude_unset=True)
        for name, app in details.applications.items()
        if app.deployed_app_config is not None and app.status != ApplicationStatus.DELETING
    }


def _apply(app: JsonDict) -> None:
    _apply_all(_applications() | {app["name"]: app})


def _apply_all(apps: dict[str, JsonDict]) -> None:
    schema = ServeDeploySchema(
        applications=[ServeApplicationSchema(**app) for app in apps.values()]
    )
    _client().deploy_apps(schema)


def _user_config(app: JsonDict) -> JsonDict:
    for deployment in app.get("deployments", []):
        if deployment["name"] == DEPLOYMENT and "user_config" in deployment:
            return dict(deployment["user_config"])
    return {"model": app["args"]["model"], "version": "base"}


def _with_user_config(app: JsonDict, user_config: JsonDict) -> JsonDict:
    others = [d for d in app.get("deployments", []) if d["name"] != DEPLOYMENT]
    mine = next((d for d in app.get("deployments", []) if d["name"] == DEPLOYMENT), {})
    changed = {"name": DEPLOYMENT, **mine, "user_config": user_config}
    return {**app, "deployments": [*others, changed]}


# --- waiting -------------------------------------------------------------------------------------------------


def _wait(name: str, timeout_s: float, needs: Sequence[dict[str, float]] = ()) -> None:
    """Wait until an application runs.

    Raises:
        ClusterError: It needs what no node has.
        ServiceError: It failed, or did not run in time.
    """
    start = time.monotonic()
    message = ""
    while (waited := time.monotonic() - start) < timeout_s:
        details = _details()
        app = details.applications.get(name) if details else None
        if app is not None:
            message = _reason(app)
            match app.status:
                case ApplicationStatus.RUNNING:
                    return
                case ApplicationStatus.DEPLOY_FAILED | ApplicationStatus.UNHEALTHY:
                    raise ServiceError(f"application {name!r} did not start: {message}")
        if waited > NEVER_FITS_AFTER_S and (lack := _lacking(needs)):
            raise ClusterError(f"application {name!r} can never start: {lack}")
        time.sleep(POLL_S)
    raise ServiceError(
        f"application {name!r} did not start within {timeout_s:.0f} s"
        + (f": {message}" if message else "")
    )


def _wait_for_version(name: str, version: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        _wait(name, max(1.0, deadline - time.monotonic()))
        states = replica_states(name, max(1.0, deadline - time.monotonic()))
        for state in states:
            if state["swap_error"]:
                raise ServiceError(f"{version!r} could not be loaded: {state['swap_error']}")
        if all(state["version"] == version for state in states):
            return
        time.sleep(POLL_S)
    raise ServiceError(f"not every replica of {name!r} had {version!r} within {timeout_s:.0f} s")


def _running_replicas(name: str) -> set[str]:
    details = _details()
    app = details.applications.get(name) if details else None
    if app is None or DEPLOYMENT not in app.deployments:
        raise ServiceError(f"no policy application {name!r} is deployed")
    replicas = app.deployments[DEPLOYMENT].replicas
    return {replica.replica_id for replica in replicas if replica.state == "RUNNING"}


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

    if state.get_max_resources_from_cluster_config() is not None:
        return ""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in needs:
        fits: Callable[[Any], bool] = lambda node, b=bundle: all(  # noqa: E731
            node.get(key, 0) >= amount for key, amount in b.items()
        )
        if not any(fits(node) for node in nodes):
            wanted = ", ".join(f"{amount:g} {key}" for key, amount in bundle.items())
            return f"a replica needs {wanted} on one node, and no node has that"
    return ""


def _free_port(host: str, port: int) -> int:
    """Check that a port of this machine is free; 0 finds one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServiceError(
                f"port {port} on {host} is taken: stop what listens there, or choose another port"
            ) from error
        return int(probe.getsockname()[1])
