"""`sima data`: the files that a run begins with."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make a run's input files.", no_args_is_help=True)

_SHOWN = 20


@app.callback()
def data() -> None:
    """Make a run's input files."""


@app.command()
def prompts(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE…",
            help="LLaVA-Instruct's JSON (complex_reasoning_77k.json, detail_23k.json, …) or prompts as "
            "JSON lines; paths or URIs.",
            show_default=False,
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="To write.")],
    count: Annotated[int, typer.Option(min=0, help="So many; 0: all.")] = 17_000,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Draw prompts from LLaVA-Instruct: each conversation's first question, its answer as ground truth.

    sima data prompts complex_reasoning_77k.json detail_23k.json --output prompts.jsonl
    """
    from sima_ray.data.instruct import draw_prompts

    drawn = draw_prompts(sources, output, count=count or None, seed=seed)
    for line in drawn.problems[:_SHOWN]:
        typer.echo(line, err=True)
    if len(drawn.problems) > _SHOWN:
        typer.echo(f"… and {len(drawn.problems) - _SHOWN:,} more", err=True)
    for source in drawn.sources:
        aside = ", ".join(f"{reason} {n:,}" for reason, n in sorted(source.set_aside.items()))
        typer.echo(
            f"{source.location}: {source.records:,} records, {source.prompts:,} prompts"
            + (f", {source.set_aside.total():,} set aside ({aside})" if aside else "")
        )
    fewer = f", {count:,} were asked for" if drawn.written < count else ""
    typer.echo(f"{output}: {drawn.written:,} of {drawn.prompts:,} prompts, seed {seed}{fewer}")


@app.command()
def images(
    source: Annotated[str, typer.Argument(metavar="PROMPTS", help="JSON lines that name images.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to.")],
    url: Annotated[
        str | None,
        typer.Option(help="What the names are relative to; default: COCO's train2017."),
    ] = None,
    connections: Annotated[int, typer.Option(min=1, max=256, help="At once.")] = 16,
) -> None:
    """Fetch the images that a prompts file names, and no others; run it again, and it goes on.

    sima data images prompts.jsonl --output train2017
    """
    from sima_ray.data.fetch import COCO, Fetched, fetch_images
    from sima_ray.runtime.progress import Screen, Stage

    stage = Stage("images", Screen(sys.stderr))

    def show(found: Fetched) -> None:
        stage.update(f"{found.done:,}/{found.wanted:,} · {found.size / 1e6:,.1f} MB fetched")

    found = fetch_images(source, output, url or COCO, connections=connections, on_progress=show)
    for name, reason in list(found.failed.items())[:_SHOWN]:
        typer.echo(f"{name}: {reason}", err=True)
    if len(found.failed) > _SHOWN:
        typer.echo(f"… and {len(found.failed) - _SHOWN:,} more", err=True)
    typer.echo(
        f"{output}: {found.wanted:,} images: {found.there:,} were there, {found.fetched:,} fetched "
        f"({found.size / 1e6:,.1f} MB), {len(found.failed):,} failed"
    )
    if found.failed:
        raise typer.Exit(1)
