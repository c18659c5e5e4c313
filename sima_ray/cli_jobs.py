"""`sima submit`, `status`, `logs`, `stop`, `resume`: the jobs on a cluster."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sima_ray.cli_config import ConfigPath, Model, Name, Set, load_config

if TYPE_CHECKING:
    from sima_ray.runtime.submission import Target

Address = Annotated[
    str | None,
    typer.Option(
        help="Ray dashboard URL, as in http://HEAD:8265. "
        "Default: $RAY_API_SERVER_ADDRESS, or the cluster of `sima up`."
    ),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where the run folders are.")]

_ID = "Its id, or the end of it that no other has."
OptionalJob = Annotated[str | None, typer.Argument(metavar="[JOB]", help=_ID, show_default=False)]
Wait = Annotated[bool, typer.Option(help="Follow the log and exit with the job's status.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show the whole log, not only progress.")
]


def submit(
    stage: Annotated[
        str,
        typer.Argument(help="preferences, train, merge, evaluate, report or pipeline."),
    ],
    config: ConfigPath,
    address: Address = None,
    round: Annotated[
        int | None, typer.Option(min=0, help="Round; default: the first without this stage.")
    ] = None,
    wait: Wait = True,
    verbose: Verbose = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and submit nothing.")
    ] = False,
    model: Model = None,
    name: Name = None,
    settings: Set = None,
) -> None:
    """Submit a stage, or the whole pipeline, to a Ray cluster as a job. Ctrl-C leaves the job running."""
    from sima_ray.errors import ConfigError

    resolved = load_config(config, settings, model, name)
    if dry_run:
        typer.echo(resolved.dump(), nl=False)
        return
    from sima_ray.runtime import submission

    if stage not in submission.STAGES:
        raise ConfigError(f"no stage {stage!r}: choose one of {', '.join(submission.STAGES)}")
    target = submission.find_cluster(address)
    arguments = () if round is None else ("--round", str(round))
    job = submission.submit(stage, resolved, target, arguments)
    submitted(job, target, wait, verbose)


def status(
    job: OptionalJob = None,
    address: Address = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, help="At most so many, the newest.")
    ] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List this project's jobs on a cluster; of one job, everything about it."""
    from sima_ray.runtime import jobs, submission

    target = submission.find_cluster(address)
    if job is not None:
        found = jobs.find_job(job, target)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            typer.echo(jobs.details(found, jobs.log(found, target)))
        return
    listed = jobs.list_jobs(target)
    if as_json:
        typer.echo(json.dumps([one.to_json() for one in listed[:limit]], indent=2))
        return
    if not listed:
        typer.echo(f"no jobs of this project at {target.address}", err=True)
        return
    typer.echo(jobs.table(listed[:limit]))
    if len(listed) > limit:
        typer.echo(f"… and {len(listed) - limit} older: --limit {len(listed)}", err=True)


def logs(
    job: OptionalJob = None,
    follow_on: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on until the job ends; exit with its status."),
    ] = False,
    verbose: Verbose = False,
    address: Address = None,
) -> None:
    """Show what a job has said so far; the newest job, unless one is named. Ctrl-C leaves it running."""
    from sima_ray.runtime import jobs, submission
    from sima_ray.runtime.progress import shown

    target = submission.find_cluster(address)
    found = jobs.find_job(job, target)
    if job is None:
        typer.echo(f"job          {found.id}", err=True)
    if follow_on:
        follow(found.id, target, verbose)
        return
    whole = jobs.log(found, target)
    lines = whole if verbose else shown(whole)
    for line in lines:
        typer.echo(line)
    if not lines:
        typer.echo(f"no progress yet; its log has {len(whole):,} lines: --verbose", err=True)


def stop(
    job: Annotated[str, typer.Argument(metavar="JOB", help=_ID)],
    address: Address = None,
) -> None:
    """End a job, and wait until it is ended. What it finished is kept: `sima resume` goes on from there."""
    from sima_ray.errors import ClusterError
    from sima_ray.runtime import jobs, submission

    target = submission.find_cluster(address)
    found = jobs.find_job(job, target)
    if found.over:
        raise ClusterError(f"{found.id} has ended already, as {found.state}")
    typer.echo(f"stopping     {found.id}")
    state = submission.stop(found.id, target)
    typer.echo(f"{state.lower():<12} {found.id}")
    if found.run and state == "STOPPED" and found.stage in submission.STAGES:
        typer.echo(f"to go on     sima resume {found.run}{submission.option(target)}")


def resume(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG", help="Run folder, its name in --runs, or the run's config."
        ),
    ],
    address: Address = None,
    runs: Runs = Path("runs"),
    wait: Wait = True,
    verbose: Verbose = False,
) -> None:
    """Submit again what was interrupted in a run, with the run's own settings; what is done is not done again."""
    from sima_ray.runtime import submission
    from sima_ray.runtime.runs import done_line, resumption

    found = resumption(run, runs)
    typer.echo(f"run          {found.run.folder}")
    typer.echo(f"done         {done_line(found.run)}")
    if found.stage is None:
        again = f"sima submit pipeline {found.run.folder}/run.yaml"
        left = f"next: {again}" if found.run.summary is None else "the run is complete"
        typer.echo(f"nothing was interrupted; {left}")
        return
    typer.echo(f"resuming     {' '.join((found.stage, *found.arguments))}")
    target = submission.find_cluster(address)
    job = submission.submit(found.stage, found.config, target, found.arguments)
    submitted(job, target, wait, verbose)


def follow(job: str, target: "Target", verbose: bool = False) -> None:
    """Show a job's log until the job ends; raises `JobFailed`, with the job's exit code, where it failed."""
    from sima_ray.errors import JobFailed
    from sima_ray.runtime import submission
    from sima_ray.runtime.progress import Screen

    screen, where = Screen(), submission.option(target)
    try:
        submission.follow(job, target, on_line=typer.echo if verbose else screen.line)
    except KeyboardInterrupt:
        typer.echo(
            f"\nThe job goes on.\nto follow it sima logs -f {job}{where}\n"
            f"to end it    sima stop {job}{where}"
        )
        raise
    except JobFailed:
        if not verbose:
            typer.echo(f"whole log    sima logs --verbose {job}{where}")
        raise


def submitted(job: str, target: "Target", wait: bool, verbose: bool) -> None:
    """Say which job was submitted, and follow it, or say how to."""
    from sima_ray.runtime import submission

    typer.echo(f"job          {job} at {target.address}")
    if wait:
        follow(job, target, verbose)
    else:
        typer.echo(f"to follow it sima logs -f {job}{submission.option(target)}")
