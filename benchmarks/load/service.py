"""The service that is measured: an engine's application and the critic's, deployed for one measurement."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.clients import Door
from sima_ray.config import CriticConfig, RunConfig, ServiceConfig
from sima_ray.critic.judge import Case, critique
from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.ports import Policy
from sima_ray.runtime.critic_token import token_hash

ENGINES = ("fixed", "policy")


@dataclass(frozen=True)
class Engine:
    """What answers.

    Attributes:
        name: One of `ENGINES`.
        run: The run config, of which the policy and the critic are used.
        seconds: That `fixed` takes for each completion.
    """

    name: str
    run: RunConfig
    seconds: float = 0.05

    @property
    def critic(self) -> CriticConfig:
        """How the critic asks it."""
        return self.run.critic if self.name == "policy" else CriticConfig()


@dataclass(frozen=True)
class Service:
    """A deployed one: its door, how its critic asks, and the same engine through the in-cluster handle."""

    door: Door
    critic: CriticConfig
    connect: Callable[[], Policy]


@contextmanager
def deployed(
    engine: Engine, limits: ServiceConfig, max_tokens: int | None = None
) -> Iterator[Service]:
    """The service on the cluster that this process is connected to.

    Args:
        engine: What answers.
        limits: Of the engine's deployment and of the critic's.
        max_tokens: Of a critique, instead of the config's.
    """
    from sima_ray.runtime.client import connect_policy
    from sima_ray.runtime.serving import deploy_critic, remove

    critic = engine.critic
    if max_tokens is not None:
        critic = critic.model_copy(update={"max_tokens": max_tokens})
    token = secrets.token_hex(16)
    try:
        _deploy_engine(engine, limits)
        url = deploy_critic(critic, limits, token_hashes=[token_hash(token)])
        yield Service(Door(url, token), critic, connect_policy(retries=1, timeout_s=60))
    finally:
        remove("critic")
        remove("policy")


@contextmanager
def bare_beside(service: Service) -> Iterator[Door]:
    """An application of nothing on the same Serve; its door."""
    from ray import serve

    from benchmarks.load.bare import ROUTE, build_app

    serve.run(build_app(), name="bare", route_prefix=ROUTE)
    yield Door(service.door.url + ROUTE, service.door.token)
    serve.delete("bare")


def _deploy_engine(engine: Engine, limits: ServiceConfig) -> None:
    from serve_apps.fixed_time import FixedTime, declaration
    from sima_ray.runtime.applications import apply, wait
    from sima_ray.runtime.deployment import scaling_options
    from sima_ray.runtime.serving import deploy_policy

    if engine.name == "policy":
        deploy_policy(engine.run.policy.model_copy(update={"service": limits}))
        return
    settings = FixedTime(seconds=engine.seconds)
    apply(declaration("policy", settings, scaling_options(limits)))
    wait("policy", 120)


class InCluster:
    """Critiques without the door: both completions through the handle, as the pipeline asks."""

    def __init__(self, service: Service) -> None:
        critic = service.critic
        examples = load_examples(Path(critic.examples)) if critic.examples else load_examples()
        self._prompt = CriticPrompt(Layout(critic.layout), examples)
        self._policy, self._max_tokens = service.connect(), critic.max_tokens

    async def judge(self, case: Case) -> None:
        """Ask for both orders."""
        await critique(self._policy, self._prompt, case, self._max_tokens)
