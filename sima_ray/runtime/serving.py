"""Serve applications from Python: start Serve, deploy the policy and the critic, swap weights, remove.

Everything is declarative (as `serve deploy FILE` is), because only then a new `user_config` reaches running
replicas in place. A declarative deploy states *all* applications: each change here reads the present ones,
changes one, and applies them together; changes from several processes at once must take turns.
"""

import contextlib
import socket
import time
from collections.abc import Sequence

import ray
from ray import serve

from sima_ray.config import CriticConfig, PolicyConfig, ServiceConfig
from sima_ray.errors import ConfigError, ServiceError
from sima_ray.policy.checkpoint import check_policy
from sima_ray.ports import JsonDict
from sima_ray.runtime.applications import (
    POLL_S,
    applications,
    apply,
    apply_all,
    details,
    ensure_room,
    wait,
    wait_until_gone,
)
from sima_ray.runtime.client import DEPLOYMENT
from sima_ray.runtime.deployment import bundles, scaling_options


def start_serve(host: str = "127.0.0.1", port: int = 8000) -> int:
    """Start Serve on this cluster unless it runs, and return the port of its HTTP proxy.

    Args:
        host: Where to listen.
        port: 0 picks a free one.

    Raises:
        ServiceError: When the port is taken, or Serve runs already but on another address.
    """
    found = details()
    if found is not None and found.http_options is not None:
        there = found.http_options
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
    if model is not None:
        config = config.model_copy(update={"model": model})
    check_policy(config.model)
    ensure_room(bundles(config.engine))
    _ensure_running(config.service)
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
    apply(app)
    wait(name, timeout_s)
    _wait_for_version(name, version, timeout_s)


GUARD_FIELDS = ("max_body_bytes", "max_image_pixels", "max_text_chars", "token_file")


def swap_policy(model: str, version: str, name: str = "policy", timeout_s: float = 300.0) -> None:
    """Load other weights of the same architecture on all replicas, in place.

    Returns when every replica answers with the new version. When one cannot load them, the application's
    former version is put back.

    Raises:
        ModelError: A model folder that is missing or incomplete.
        ServiceError: No such application, or a replica that could not load the weights (with its reason).
    """
    check_policy(model)
    app = applications().get(name)
    if app is None:
        raise ServiceError(f"no application {name!r} is deployed")
    before = _user_config(app)
    apply(_with_user_config(app, {"model": model, "version": version}))
    try:
        _wait_for_version(name, version, timeout_s)
    except ServiceError:
        apply(_with_user_config(app, before))
        with contextlib.suppress(ServiceError):
            _wait_for_version(name, before["version"], timeout_s)
        raise


def deploy_critic(
    config: CriticConfig,
    service: ServiceConfig,
    *,
    token_hashes: Sequence[str] = (),
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
        token_hashes: Of the bearer tokens (`sima_ray.runtime.critic_token.token_hash`).
        without_token: Answer anybody, where there is no token of either kind.
        policy: The application that it asks.
        name, route_prefix: Of its own application.
        timeout_s: How long to wait.

    Returns:
        Its URL.

    Raises:
        ConfigError: No token of either kind, and not `without_token`.
        ServiceError: It does not start.
    """
    if not (token_hashes or service.token_file or without_token):
        raise ConfigError("the critic needs a token: give a hash, or policy.service.token_file")
    _ensure_running(service)
    app: JsonDict = {
        "name": name,
        "route_prefix": route_prefix,
        "import_path": "serve_apps.critic:build_app",
        "runtime_env": job_runtime_env(),
        "args": {
            "critic": config.model_dump(mode="json"),
            "service": service.model_dump(mode="json"),
            "policy": policy,
            "token_hashes": list(token_hashes),
            "without_token": without_token,
        },
    }
    apply(app)
    wait(name, timeout_s)
    found = details()
    assert found is not None and found.http_options is not None
    address = f"{found.http_options.host}:{found.http_options.port}"
    return f"http://{address}{route_prefix}".rstrip("/")


def remove(name: str, timeout_s: float = 300.0) -> None:
    """Remove an application, and wait until its replicas are gone; no error when there is none.

    Raises:
        ServiceError: Its replicas did not end in time.
    """
    if details() is None:
        return
    apps = applications()
    if apps.pop(name, None) is not None:
        apply_all(apps)
    else:
        serve.delete(name, _blocking=False)
    wait_until_gone(name, timeout_s)


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
        if not wanted:
            return []
        asked = [handle.state.remote() for _ in range(4 * len(wanted))]
        states: dict[str, JsonDict] = {}
        for response in asked:
            state = response.result(timeout_s=max(1.0, deadline - time.monotonic()))
            states[state["replica"]] = state
        if wanted <= set(states):
            return [states[replica] for replica in sorted(wanted)]
        time.sleep(POLL_S)
    raise ServiceError(f"not every replica of {name!r} answered within {timeout_s:.0f} s")


def job_runtime_env() -> JsonDict:
    """This job's runtime environment, for applications that must find the same code and variables."""
    env = dict(ray.get_runtime_context().runtime_env)
    keys = ("working_dir", "py_modules", "env_vars", "pip", "uv", "conda", "config")
    return {key: env[key] for key in keys if env.get(key)}


def _ensure_running(service: ServiceConfig) -> None:
    if details() is None:
        start_serve(service.host, service.port)


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


def _wait_for_version(name: str, version: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        wait(name, max(1.0, deadline - time.monotonic()))
        states = replica_states(name, max(1.0, deadline - time.monotonic()))
        for state in states:
            if state["swap_error"]:
                raise ServiceError(f"{version!r} could not be loaded: {state['swap_error']}")
        if all(state["version"] == version for state in states):
            return
        time.sleep(POLL_S)
    raise ServiceError(f"not every replica of {name!r} had {version!r} within {timeout_s:.0f} s")


def _running_replicas(name: str) -> set[str]:
    found = details()
    app = found.applications.get(name) if found else None
    if app is None or DEPLOYMENT not in app.deployments:
        raise ServiceError(f"no policy application {name!r} is deployed")
    replicas = app.deployments[DEPLOYMENT].replicas
    return {replica.replica_id for replica in replicas if replica.state == "RUNNING"}


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
