"""What all verbs that take a run config share: the config, and settings given beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sima_ray.config import RunConfig

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Run config (YAML).")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting that counts instead of the config's, as in training.epochs=1. Repeatable.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Short for --set policy.model=DIR."),
]
Name = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Short for --set name=NAME.")
]


def load_config(
    config: Path, settings: list[str] | None, model: str | None = None, name: str | None = None
) -> "RunConfig":
    """The resolved config of a command line.

    Raises:
        ConfigError: See `RunConfig.load`.
    """
    from sima_ray.config import RunConfig

    short = [("policy.model", model), ("name", name)]
    overrides = [f"{key}={value}" for key, value in short if value is not None]
    return RunConfig.load(config, [*(settings or []), *overrides])
