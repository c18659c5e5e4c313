"""`sima data`: the files that a run begins with."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
    _say_problems(drawn.problems, len(drawn.problems))
    for source in drawn.sources:
        aside = _aside(source.set_aside)
        typer.echo(
            f"{source.location}: {source.records:,} records, {source.prompts:,} prompts{aside}"
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
    _say_problems([f"{name}: {why}" for name, why in found.failed.items()], len(found.failed))
    typer.echo(
        f"{output}: {found.wanted:,} images: {found.there:,} were there, {found.fetched:,} fetched "
        f"({found.size / 1e6:,.1f} MB), {len(found.failed):,} failed"
    )
    if found.failed:
        raise typer.Exit(1)


@app.command()
def pairs(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE…",
            help="Preference data in TRL's, RLAIF-V's or LLaVA/POVID's form: Parquet, JSON lines, JSON, or a "
            "folder that `datasets` saved; paths or URIs.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Parquet to write.")
    ],
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="What image names are relative to, and where embedded images are written; "
            "default: `images` beside the output.",
            show_default=False,
        ),
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Of an image; default: the run config's.")
    ] = None,
    max_chars: Annotated[
        int | None,
        typer.Option(min=1, help="Of a question or response; default: the run config's."),
    ] = None,
) -> None:
    """Read other projects' preference data as pairs that `sima submit train` takes (`data.pairs`).

    sima data pairs RLAIF-V-Dataset/*.parquet --output rlaif-v/pairs.parquet
    """
    from sima_ray.config import DataConfig
    from sima_ray.data.foreign import Taken, take_pairs
    from sima_ray.runtime.progress import Screen, Stage

    stage = Stage("pairs", Screen(sys.stderr))

    def show(taken: Taken) -> None:
        stage.update(f"{taken.records:,} records · {taken.pairs:,} pairs")

    images = images or f"{output.rpartition('/')[0] or '.'}/images"
    limits = DataConfig(pairs=output, images=images)
    taken = take_pairs(
        sources,
        output,
        images=images,
        max_pixels=max_pixels or limits.max_image_pixels,
        max_chars=max_chars or limits.max_text_chars,
        on_progress=show,
    )
    stage.finish()
    _say_problems(taken.problems, taken.records - taken.pairs)
    for source in taken.sources:
        forms = ", ".join(sorted(source.forms))
        typer.echo(
            f"{source.location}: {source.records:,} records{f' ({forms})' if forms else ''}, "
            f"{source.pairs:,} pairs{_aside(source.set_aside)}"
        )
    if taken.written or taken.there:
        there = f", {taken.there:,} were there" if taken.there else ""
        typer.echo(
            f"{images}: {taken.written:,} images written ({taken.size / 1e6:,.1f} MB){there}"
        )
    typer.echo(f"{output}: {taken.pairs:,} pairs")
    typer.echo(f"a run on them: data: {{pairs: {output}, images: {images}}}")


def _say_problems(lines: Sequence[str], count: int) -> None:
    """The first of `count` problems, of which `lines` names some or all."""
    for line in lines[:_SHOWN]:
        typer.echo(line, err=True)
    if count > len(shown := lines[:_SHOWN]):
        typer.echo(f"… and {count - len(shown):,} more", err=True)


def _aside(reasons: Counter[Any]) -> str:
    """What was set aside, and why: ", 3 set aside (no_image 2, no_answer 1)"; empty where nothing was."""
    aside = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items()))
    return f", {reasons.total():,} set aside ({aside})" if aside else ""
