"""`sima`: the command line. Each verb parses, then imports what it needs, then calls the library."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from sima_ray import (
    __version__,
    cli_data,
    cli_evaluate,
    cli_jobs,
    cli_lmms,
    cli_models,
    cli_plan,
    cli_runs,
)
from sima_ray.cli_config import ConfigPath, Model, Name, Set, load_config
from sima_ray.cli_jobs import Address, follow
from sima_ray.errors import ConfigError, SimaError

app = typer.Typer(
    help="Vision-language models that improve themselves on your Ray cluster.",
    epilog="Exit codes: 0 it succeeded; 1 the input, the cluster or the job failed; 2 the command line or the "
    "config is wrong; 130 interrupted. What follows a job (submit, resume, logs -f, serve, scale, promote, "
    "unserve) ends with the job's own code; 128 + N: signal N ended it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _app_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise ConfigError(f"--app {name}: letters, digits, dots, dashes and underscores")
    return name


App = Annotated[
    str,
    typer.Option(
        "--app", metavar="NAME", callback=_app_name, help="The policy's Serve application."
    ),
]


def main() -> None:
    """Entry point of the console script: user errors are one line, anything else keeps its trace."""
    try:
        app()
    except SimaError as error:
        typer.secho(f"sima: {error}", fg="red", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("sima: interrupted", err=True)
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sima-ray {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def demo(
    config: Annotated[Path, typer.Option(help="Run config.")] = Path("configs/demo.yaml"),
    name: Name = None,
    cpus: Annotated[int, typer.Option(min=2, help="Logical CPUs of the demo's cluster.")] = 4,
    settings: Set = None,
) -> None:
    """Run the whole loop on this machine: answer, judge, tune, compare."""
    from sima_ray.demo.run import run_demo

    run_demo(load_config(config, settings, name=name), cpus)


for command in (cli_jobs.submit, cli_jobs.status, cli_jobs.logs, cli_jobs.stop, cli_jobs.resume):
    app.command()(command)
app.command()(cli_evaluate.evaluate)
app.command()(cli_lmms.lmms_eval)
app.command()(cli_plan.plan)
app.add_typer(cli_runs.app, name="runs")
app.add_typer(cli_data.app, name="data")
app.command()(cli_models.convert)


@app.command()
def serve(
    config: ConfigPath,
    address: Address = None,
    round: Annotated[int, typer.Option(min=0, help="Round whose policy to serve; 0: base.")] = 0,
    app: App = "policy",
    model: Model = None,
    name: Name = None,
    settings: Set = None,
) -> None:
    """Deploy a policy and the critic on a cluster, and leave them up; another --app is another pair beside it."""
    resolved = load_config(config, settings, model, name)
    from sima_ray.runtime import submission
    from sima_ray.runtime.critic_token import token_file, token_hash

    target, file = submission.find_cluster(address), token_file()
    environment = {"SIMA_TOKEN_HASH": token_hash(file.read_text(encoding="utf-8").strip())}
    job = submission.submit(
        "serve", resolved, target, ("--round", str(round), "--app", app), environment
    )
    typer.echo(f"job          {job} at {target.address}")
    follow(job, target)
    typer.echo(f"token        {file}")


@app.command()
def scale(
    replicas: Annotated[
        int | None, typer.Argument(min=0, help="So many; 0: none until a request comes.")
    ] = None,
    app: App = "policy",
    min: Annotated[int | None, typer.Option(min=0, help="At least so many.")] = None,
    max: Annotated[int | None, typer.Option(min=1, help="At most so many, by the load.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until the replicas run.")] = False,
    timeout: Annotated[float, typer.Option(min=1, metavar="S", help="Of --wait.")] = 900.0,
    address: Address = None,
) -> None:
    """Set how many replicas a served policy has; those that run go on."""
    if (replicas is None) == (min is None and max is None):
        raise ConfigError("give a number of replicas, or --min and --max")
    if min is not None and max is not None and min > max:
        raise ConfigError(f"--min {min} --max {max}: at least {min} and at most {max} cannot be")
    if replicas is not None:
        min, max = replicas, replicas or None
    bounds = [
        f"--{name}={value}" for name, value in (("min", min), ("max", max)) if value is not None
    ]
    _run_command(
        "scale",
        address,
        f"--app={app}",
        *bounds,
        *([f"--wait={timeout}"] if wait else []),
    )


@app.command()
def unserve(app: App = "policy", address: Address = None) -> None:
    """Take down a served policy and its critic; requests that are being answered still are."""
    _run_command("unserve", address, f"--app={app}")


@app.command()
def promote(
    policy: Annotated[
        Path,
        typer.Argument(
            metavar="POLICY",
            help="Its folder, as in RUN/round-1/policy; or an adapter, as in RUN/round-1/train/adapter.",
        ),
    ],
    app: App = "policy",
    version: Annotated[
        str | None,
        typer.Option(help="Its name in every answer; default: by the folder, as in RUN-round-1."),
    ] = None,
    address: Address = None,
) -> None:
    """Put other weights on a served policy, in place: checked on each replica, taken back where one fails."""
    folder = policy.absolute()
    name = version or _version_of(folder)
    _run_command("promote", address, str(folder), f"--app={app}", f"--version={name}")


@app.command()
def critique(
    image: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="JPEG, PNG or WebP; a URL of policy.service.image_origins.",
            show_default=False,
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What was asked.", show_default=False)
    ] = None,
    response: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Give two or more.", show_default=False),
    ] = None,
    ground_truth: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The answer known to be right.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead: JSON lines of image (relative to the file), question, ground_truth, "
            "responses and id; `-`: standard input. Writes a JSON line for each.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report as JSON.")] = False,
    url: Annotated[
        str | None, typer.Option(help="Default: $SIMA_CRITIC_URL, or http://127.0.0.1:8000.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Default: $SIMA_CRITIC_TOKEN, or the file that `sima serve` wrote."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds a case, tries and waits included.")
    ] = 600.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Cases of --file at once.")] = 8,
) -> None:
    """Ask a served critic which response to a question about an image is better.

    sima critique --image cat.png --question "What is it?" --response "A cat." --response "A dog."
    """
    if file is not None and (image or question or response or ground_truth):
        raise ConfigError("--file holds the cases: leave out --image, --question, --response, …")
    if file is None and (not question or len(response or []) < 2):
        raise ConfigError("give --question and two or more --response, or --file cases.jsonl")
    from sima_ray.client import AsyncCriticClient, Case, CriticClient, Retry
    from sima_ray.client.command import critique_file, critique_one

    if file is not None:
        many = AsyncCriticClient(url, token_file=token_file, timeout=timeout)
        critique_file(many, file, concurrency, sys.stdout)
        return
    one = CriticClient(url, token_file=token_file, timeout=timeout, retry=Retry(attempts=4))
    critique_one(one, Case(question or "", response or [], image, ground_truth), as_json)


@app.command()
def up(
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs.")] = 4,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs; default: all found.")] = None,
    port: Annotated[int | None, typer.Option(help="Dashboard port; default: a free one.")] = None,
) -> None:
    """Start a local Ray cluster: loopback only, token required."""
    from sima_ray.runtime import cluster

    started = cluster.up(cpus, gpus, port)
    typer.echo(f"cluster      {started.address}")
    typer.echo(f"token        {started.token_file}")
    typer.echo("next         sima submit pipeline CONFIG · sima serve CONFIG · sima down")


@app.command()
def down() -> None:
    """End the local Ray cluster that `sima up` started."""
    from sima_ray.runtime import cluster

    typer.echo(f"ended        {cluster.down().address}")


@app.command()
def validate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|PROMPTS",
            help="A run config (.yaml), or a prompts file: JSON lines, a path or a URI.",
            show_default=False,
        ),
    ],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ZIP|TAR|URI",
            help="What image names are relative to; with a config: instead of its data.images.",
            show_default=False,
        ),
    ] = None,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Check the prompts alone.")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write all that was found as JSON; `-`: to standard output."
        ),
    ] = None,
    model: Model = None,
    settings: Set = None,
) -> None:
    """Say what a run would set aside and why, without a cluster; exit code 1 where it is anything.

    sima validate prompts.jsonl --images train2017.zip
    """
    from sima_ray.config import DataConfig
    from sima_ray.runtime import validation

    if target.lower().endswith((".yaml", ".yml")):
        given = [] if images is None else [f"data.images={images}"]
        config = load_config(Path(target), [*(settings or []), *given], model)
        found = validation.check_run(config, images=not no_images)
    else:
        if model is not None or settings:
            raise ConfigError(f"{target}: --model and --set belong to a run config (.yaml)")
        if images is None and not no_images:
            raise ConfigError(f"{target}: give --images as well, or --no-images")
        data = DataConfig(prompts=target, images=images or ".")
        found = validation.check_prompts(data, images=not no_images, root=images is not None)
    validation.show(found, sys.stderr if json == "-" else sys.stdout)
    if json is not None:
        validation.write(found, json)
    if not found.good:
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as in runs/demo.")],
) -> None:
    """Show a finished run: before and after, the critic, the ledger."""
    from sima_ray.runtime.tables import show_summary

    show_summary(run)


@app.command()
def doctor() -> None:
    """Check this machine: versions, engine, memory, and what a demo needs."""
    from sima_ray.runtime.doctor import examine

    if not examine():
        raise typer.Exit(1)


def _version_of(folder: Path) -> str:
    """What a run itself calls the policy of its round; any other folder has its own name."""
    found = re.search(r"([^/]+)/(round-\d+)/(policy|train/adapter)$", folder.as_posix())
    return f"{found[1]}-{found[2]}" if found else folder.name


def _run_command(command: str, address: str | None, *arguments: str) -> None:
    """Run a command that belongs to no run as a job, and end with its status."""
    from sima_ray.runtime import submission

    target = submission.find_cluster(address)
    job = submission.submit_command(command, target, arguments)
    follow(job, target)
