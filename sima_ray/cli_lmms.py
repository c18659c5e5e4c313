"""`sima lmms-eval`: the LLaVA benchmarks, base and tuned, by lmms-eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from sima_ray.cli_jobs import Address, Runs, Verbose, Wait, submitted

if TYPE_CHECKING:
    from sima_ray.config import RunConfig


def lmms_eval(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CONFIG", help="Run folder, its name in --runs, or the run's config."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="As lmms-eval calls them. `paper`: those of the paper's table; `unjudged`: those of them that "
            "need no judge.",
        ),
    ] = "paper",
    round: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Give two or more: others are held against the first. Default: 0 and the last that is merged.",
            show_default=False,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Further tasks, on a volume that the head mounts."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions of each task: to try it out.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="No task may ask for more. Default: 1024, or half of the model's context.",
            show_default=False,
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|NAME=VALUE",
            help="For lmms-eval. NAME: as the head node has it (a judge's OPENAI_API_KEY); NAME=VALUE: seen "
            "by all who see the cluster's jobs.",
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Of an environment with lmms-eval on the head. Default: the job makes one, once.",
        ),
    ] = None,
    address: Address = None,
    runs: Runs = Path("runs"),
    wait: Wait = True,
    verbose: Verbose = False,
) -> None:
    """Evaluate a run's policies by lmms-eval against the served model: base and tuned, in one paired table.

    sima lmms-eval runs/demo --tasks unjudged
    """
    from sima_ray.config.lmms import LmmsEval
    from sima_ray.errors import ConfigError

    try:
        settings = LmmsEval(
            tasks=_tasks(tasks, env or []),
            rounds=_rounds(round or []),
            limit=limit,
            max_tokens=max_tokens,
            include_path=include_path and str(include_path),
            python=python and str(python),
            variables=_variables(env or []),
            requirements="" if python else _requirements(),
        )
    except ValidationError as error:
        wrong = {f"{e['loc'][0]}: {e['input']!r} will not do" for e in error.errors()}
        raise ConfigError("; ".join(sorted(wrong))) from error
    from sima_ray.runtime import submission

    config = _config(run, runs)
    target = submission.find_cluster(address)
    files = {"lmms-eval.json": settings.model_dump_json()}
    job = submission.submit("lmms_eval", config, target, files=files)
    submitted(job, target, wait, verbose)


def _config(run: str, runs: Path) -> "RunConfig":
    from sima_ray.config import RunConfig
    from sima_ray.runtime.runs import find_run

    file = Path(run).expanduser()
    return RunConfig.load(file if file.is_file() else find_run(run, runs) / "run.yaml")


def _tasks(given: str, env: list[str]) -> list[str]:
    """The names, presets written out, each once.

    Raises:
        ConfigError: One that is scored by a judge, and no key for it.
    """
    from sima_ray.config.lmms import JUDGED_TASKS, PRESETS
    from sima_ray.errors import ConfigError

    names = [name.strip() for name in given.split(",") if name.strip()]
    tasks = list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))
    judged = [task for task in tasks if task in JUDGED_TASKS]
    if judged and not any(variable.endswith("API_KEY") for variable in env):
        raise ConfigError(
            f"--tasks: a judge scores {' and '.join(judged)}: give --env OPENAI_API_KEY (set on the cluster's "
            "head node; OPENAI_API_URL and MODEL_VERSION name another judge), or take --tasks unjudged"
        )
    return tasks


def _rounds(given: list[int]) -> list[int]:
    from sima_ray.errors import ConfigError

    rounds = list(dict.fromkeys(given))
    if len(rounds) == 1:
        raise ConfigError("--round: give two or more, as in --round 0 --round 1")
    return rounds


def _variables(env: list[str]) -> list[str]:
    from sima_ray.config.lmms import is_secret
    from sima_ray.errors import ConfigError

    for variable in env:
        name, given, _ = variable.partition("=")
        if given and is_secret(name):
            raise ConfigError(
                f"--env {name}=…: the cluster shows a job's settings to all who see it: "
                f"set {name} on the head node and give --env {name}"
            )
    return env


def _requirements() -> str:
    import sima_ray
    from sima_ray.errors import ConfigError

    file = Path(sima_ray.__file__).parents[1] / "requirements" / "lmms-eval.txt"
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read: run sima from a checkout, or name an environment with --python"
        ) from error
