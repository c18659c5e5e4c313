"""`sima runs` and `sima runs show`: run folders, read without a cluster."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sima_ray.cli_jobs import Address, Runs

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    folder: Runs = Path("runs"),
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """List the runs: how far each is, its state, CHAIR_s and recall before and after; `show`: all of one."""
    context.obj = folder
    if context.invoked_subcommand is not None:
        return
    from sima_ray.runtime import runs as library

    listed = library.list_runs(folder)
    found = [run for run in listed if isinstance(run, library.RunView)]
    live = _live(address) if any(run.attempt and not run.attempt.ended for run in found) else set()
    if as_json:
        typer.echo(json.dumps([run.to_json(live) for run in found], indent=2))
    elif found:
        typer.echo(library.table(found, live))
    else:
        typer.echo(f"no runs in {folder}", err=True)
    for run in listed:
        if not isinstance(run, library.RunView):
            typer.echo(f"sima: left out: {run}", err=True)


@app.command()
def show(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, or its name in the folder of --runs.")
    ],
    price: Annotated[
        float | None,
        typer.Option(
            "--price-per-hour",
            min=0,
            metavar="PRICE",
            help="Of a policy replica or a training worker: adds what each stage cost, "
            "a range where the replicas follow the load.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where every row, token and second of a run went; exit with 1 when a total does not add up."""
    from sima_ray.errors import LedgerError
    from sima_ray.runtime.account import account
    from sima_ray.runtime.account import show as text
    from sima_ray.runtime.runs import find_run

    found = account(find_run(run, context.obj), price)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else text(found, price))
    if found.problems:
        raise LedgerError(f"{found.run.folder}: {'; '.join(found.problems)}")


def _live(address: str | None) -> set[str]:
    """Runs that go on, where a cluster can be asked: the list is of use without one too."""
    from sima_ray.errors import ClusterError
    from sima_ray.runtime import jobs, submission
    from sima_ray.runtime.runs import live_names

    try:
        return live_names(jobs.list_jobs(submission.find_cluster(address)))
    except ClusterError:
        if address is not None:
            raise
        return set()
