"""`sima evaluate`: a round's policy on the suites of its config."""

from typing import Annotated

import typer

from sima_ray.cli_config import ConfigPath, Model, Set, load_config
from sima_ray.cli_jobs import Address, Verbose, Wait, submitted


def evaluate(
    config: ConfigPath,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="chair, pope, amber, halbench, mmhal or mementos; default: all that the config has.",
            show_default=False,
        ),
    ] = None,
    round: Annotated[
        int | None,
        typer.Option(min=0, help="0: before tuning; default: the first that lacks one of them."),
    ] = None,
    model: Model = None,
    settings: Set = None,
    address: Address = None,
    wait: Wait = True,
    verbose: Verbose = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and submit nothing.")
    ] = False,
) -> None:
    """Score a round's policy, through its service, on benchmarks; what was scored before is not asked again.

    sima evaluate CONFIG --round 0 --suite amber --suite mmhal
    """
    from sima_ray.errors import ConfigError

    resolved = load_config(config, settings, model)
    has = resolved.evaluation.suites if resolved.evaluation else ()
    if unknown := [name for name in suite or () if name not in has]:
        known = f"it has {', '.join(has)}" if has else "it has no `evaluation` section"
        raise ConfigError(f"{config}: no files for the suite {', '.join(unknown)}; {known}")
    if not has:
        raise ConfigError(f"{config}: it has no `evaluation` section")
    if round is not None and round > resolved.rounds:
        raise ConfigError(f"--round {round}: the run has {resolved.rounds} rounds")
    if dry_run:
        typer.echo(resolved.dump(), nl=False)
        return
    from sima_ray.runtime import submission

    target = submission.find_cluster(address)
    arguments = () if round is None else ("--round", str(round))
    if suite:
        arguments += ("--suites", ",".join(suite))
    job = submission.submit("evaluate", resolved, target, arguments)
    submitted(job, target, wait, verbose)
