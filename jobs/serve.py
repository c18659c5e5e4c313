"""Job: deploy the policy of one round and the critic, and leave them up."""

import os
from typing import TYPE_CHECKING

from jobs.entry import main

if TYPE_CHECKING:
    from sima_ray.runtime.run import Run


def body(run: "Run", number: int, app: str) -> None:
    """Deploy both apps; they outlive the job."""
    from sima_ray.runtime.serving import critic_of, deploy_critic, deploy_policy, start_serve

    policy = run.config.policy
    start_serve(policy.service.host, policy.service.port)
    with run.progress.stage("policy") as stage:
        deploy_policy(policy, model=run.policy(number), version=run.version(number), name=app)
        stage.result(f"{run.version(number)} is up")
    critic, route_prefix = critic_of(app)
    with run.progress.stage("critic") as stage:
        url = deploy_critic(
            run.config.critic,
            policy.service,
            token_hashes=[os.environ["SIMA_TOKEN_HASH"]],
            policy=app,
            name=critic,
            route_prefix=route_prefix,
        )
        stage.result(f"{url}/v1/critique")


if __name__ == "__main__":
    main("serve", "Deploy a round's policy and the critic, and leave them up.", body, app="policy")
