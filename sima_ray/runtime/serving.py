"""Serve applications from Python: start Serve, deploy the policy and the critic, swap weights, remove.

Everything is declarative (as `serve deploy FILE` is), because only then a new `user_config` reaches running
replicas in place. Processes that change applications at once lose none of one another's changes
(`sima_ray.runtime.applications`).
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError

from sima_ray.config import CriticConfig, PolicyConfig, ServiceConfig
from sima_ray.errors import ConfigError, ServiceError
from sima_ray.policy.checkpoint import check_policy
from sima_ray.policy.sample import read_sample
from sima_ray.ports import JsonDict
from sima_ray.runtime.applications import (
    POLL_S,
    apply,
    change,
    details,
    ensure_room,
    overridden,
    wait,
    wait_until_gone,
    withdraw,
)
from sima_ray.runtime.client import DEPLOYMENT, MAY_PASS
from sima_ray.runtime.deployment import bundles, scaling_options
from sima_ray.runtime.routing import with_possible_routing
from sima_ray.runtime.sockets import free_ports, is_free

_START_S = 30.0
"""For a Serve that another run starts to come up."""


def start_serve(host: str = "127.0.0.1", port: int = 8000) -> int:
    """Start Serve on this cluster unless it runs, and return the port of its HTTP proxy.

    Args:
        host: Where to listen.
        port: 0 picks a free one.

    Raises:
        ServiceError: When the port is taken, or Serve runs already but on another address.
    """
    if (there := _listening(host, port)) is not None:
        return there
    if port and not is_free(host, port):
        raise ServiceError(
            f"port {port} on {host} is taken: stop what listens there, or choose another port"
        )
    port = port or free_ports(1, host)[0]
    try:
        serve.start(http_options={"host": host, "port": port})
    except ActorAlreadyExistsError:  # another run starts it at this moment
        deadline = time.monotonic() + _START_S
        while (there := _listening(host, port)) is None:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
        return there
    return port


def _listening(host: str, port: int) -> int | None:
    """The port of the Serve that runs; None where none does.

    Raises:
        ServiceError: It listens elsewhere.
    """
    found = details()
    if found is None or found.http_options is None:
        return None
    there = found.http_options
    if port not in (0, there.port) or there.host != host:
        raise ServiceError(
            f"Serve already listens on {there.host}:{there.port}, not on {host}:{port}: "
            "use that address, or shut Serve down first"
        )
    return int(there.port)


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
    service = with_possible_routing(config.service)
    fields = (*GUARD_FIELDS, *(QUEUE_FIELDS if service.openai_routes else ()))
    fixed = ServiceConfig(
        openai_routes=service.openai_routes, **service.model_dump(include={*fields})
    )
    app: JsonDict = {
        "name": name,
        "route_prefix": f"/{name}" if service.openai_routes else None,
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


GUARD_FIELDS = (
    *("max_body_bytes", "max_image_pixels", "max_text_chars", "body_timeout_s"),
    *("requests_per_minute", "concurrent_per_token", "token_file"),
)
"""What the policy's application is built with; another value restarts its replicas."""

QUEUE_FIELDS = (
    *("target_ongoing_requests", "max_ongoing_requests", "max_queued_requests"),
    *("min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s"),
)
"""So too where it has HTTP routes, which queue and scale by themselves."""


def swap_policy(
    model: str,
    version: str,
    name: str = "policy",
    timeout_s: float = 300.0,
    sample: JsonDict | None = None,
) -> list[JsonDict]:
    """Load other weights of the same architecture on all replicas, in place.

    Where there is a sample of what they compute, each replica compares before it answers with them. Replicas that
    start later take the same weights by the same rule. When one replica cannot take them, all get the former
    ones back.

    Args:
        model: The folder.
        version: The name of these weights in every answer.
        name: The application's name.
        timeout_s: How long to wait.
        sample: Default: what merging left beside the weights, if it did.

    Returns:
        What each replica says of itself (see `replica_states`).

    Raises:
        ModelError: A model folder that is missing, incomplete or damaged.
        ServiceError: No such application, or a replica that could not take the weights (with its reason).
    """
    check_policy(model)
    sample = sample or read_sample(model)
    new = {"model": model, "version": version} | ({"sample": sample} if sample else {})
    return swap_user_config(new, name, timeout_s)


def swap_user_config(new: JsonDict, name: str, timeout_s: float) -> list[JsonDict]:
    """Give all replicas of an application these arguments of `serve_apps.weights.Weights.swap`, or none.

    Returns:
        What each replica says of itself.

    Raises:
        ServiceError: No such application, or a replica that could not take them.
    """
    app, _ = change(name, lambda app: overridden(app, DEPLOYMENT, user_config=new))
    before = user_config(app)
    try:
        return _wait_for_version(name, new["version"], timeout_s)
    except ServiceError as error:
        change(name, lambda app: overridden(app, DEPLOYMENT, user_config=before))
        version = before["version"]
        try:
            states = _wait_for_version(name, version, timeout_s, ignore_errors=True)
        except ServiceError as again:
            raise ServiceError(f"{error}; and going back to {version!r} failed: {again}") from error
        raise ServiceError(
            f"{error}; {version!r} answers again, on all {len(states)} replicas"
        ) from error


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


def critic_of(policy: str) -> tuple[str, str]:
    """Name and route prefix of the critic that asks a policy application, so that several fit one cluster."""
    return ("critic", "/") if policy == "policy" else (f"critic-{policy}", f"/critic-{policy}")


def remove(name: str, timeout_s: float = 300.0) -> None:
    """Remove an application, and wait until its replicas are gone; no error when there is none.

    Raises:
        ServiceError: Its replicas did not end in time.
    """
    if details() is None:
        return
    if not withdraw(name):
        serve.delete(name, _blocking=False)
    wait_until_gone(name, timeout_s)


def unserve(policy: str) -> list[str]:
    """Remove a policy application and the critic that asks it; the names of those that were there.

    Raises:
        ServiceError: Neither was there, or replicas did not end in time.
    """
    found = details()
    there = found.applications if found else {}
    # The critic first: it must not be left without its policy, also where this is interrupted.
    names = [name for name in (critic_of(policy)[0], policy) if name in there]
    if not names:
        others = f"; there are: {', '.join(sorted(there))}" if there else ""
        raise ServiceError(f"no application {policy!r} is deployed{others}")
    for name in names:
        remove(name)
    return names


def replica_states(name: str = "policy", timeout_s: float = 60.0) -> list[JsonDict]:
    """What each running replica of a policy application says of itself (see `serve_apps.policy.Policy.state`).

    Raises:
        ServiceError: When not all of them answered in time.
    """
    handle = serve.get_deployment_handle(DEPLOYMENT, name)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        # A handle picks replicas by itself: ask in rounds until each that Serve lists has answered.
        wanted = running_replicas(name)
        if not wanted:
            return []
        asked = [handle.state.remote() for _ in range(4 * len(wanted))]
        states: dict[str, JsonDict] = {}
        for response in asked:
            try:
                state = response.result(timeout_s=max(1.0, deadline - time.monotonic()))
            except MAY_PASS:  # it ended meanwhile, or has no time
                continue
            states[state["replica"]] = state
        if wanted <= set(states):
            return [states[replica] for replica in sorted(wanted)]
        time.sleep(POLL_S)
    raise ServiceError(f"not every replica of {name!r} answered within {timeout_s:.0f} s")


def running_replicas(name: str) -> set[str]:
    """The ids of a policy application's running replicas.

    Raises:
        ServiceError: No such application.
    """
    replicas = live_policy(name).replicas
    return {replica.replica_id for replica in replicas if replica.state == "RUNNING"}


def live_policy(name: str) -> Any:
    """Serve's own account of a policy application's deployment.

    Raises:
        ServiceError: No such application; names those that there are.
    """
    found = details()
    apps = found.applications if found else {}
    if name not in apps or DEPLOYMENT not in apps[name].deployments:
        there = ", ".join(sorted(key for key, app in apps.items() if DEPLOYMENT in app.deployments))
        raise ServiceError(
            f"no policy application {name!r} is deployed"
            + (f"; there are: {there}" if there else "")
        )
    return apps[name].deployments[DEPLOYMENT]


def job_runtime_env() -> JsonDict:
    """This job's runtime environment, for applications that must find the same code and variables."""
    env = dict(ray.get_runtime_context().runtime_env)
    keys = ("working_dir", "py_modules", "env_vars", "pip", "uv", "conda", "config")
    return {key: env[key] for key in keys if env.get(key)}


def _ensure_running(service: ServiceConfig) -> None:
    if details() is None:
        start_serve(service.host, service.port)


def user_config(app: JsonDict) -> JsonDict:
    """The declared model and version of a policy application."""
    for deployment in app.get("deployments", []):
        if deployment["name"] == DEPLOYMENT and "user_config" in deployment:
            return dict(deployment["user_config"])
    return {"model": app["args"]["model"], "version": "base"}


def _wait_for_version(
    name: str, version: str, timeout_s: float, ignore_errors: bool = False
) -> list[JsonDict]:
    """Wait until all replicas answer with a version; what they say of themselves.

    Raises:
        ServiceError: Not in time, or, unless `ignore_errors`, one says that it could not take the weights.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        wait(name, max(1.0, deadline - time.monotonic()))
        states = replica_states(name, max(1.0, deadline - time.monotonic()))
        for state in states:
            if state["swap_error"] and not ignore_errors:
                raise ServiceError(f"{version!r} could not be loaded: {state['swap_error']}")
        if all(state["version"] == version for state in states):
            return states
        time.sleep(POLL_S)
    raise ServiceError(f"not every replica of {name!r} had {version!r} within {timeout_s:.0f} s")
