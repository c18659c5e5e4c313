"""`sima convert`: model folders from one layout into another."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sima_ray.policy.convert import Converted


class To(StrEnum):
    """Layouts to convert to."""

    HF = "hf"
    ORIGINAL = "original"


class Dtype(StrEnum):
    """Types of weights."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Model folder, or a LoRA folder with --base.", show_default=False
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder to make.", show_default=False)
    ],
    to: Annotated[
        To,
        typer.Option(help="hf: for transformers, vLLM and sima; original: for LLaVA's own code."),
    ] = To.HF,
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What a LoRA adapter was trained on, in either layout."),
    ] = None,
    vision_tower: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of openai/clip-vit-large-patch14-336, where the checkpoint only names it.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of all weights; default: the language model's own.")
    ] = None,
    pad_images: Annotated[
        bool,
        typer.Option(
            "--pad-images",
            help="The processor pads images to squares, as LLaVA's own code does; else it crops them, as "
            "llava-hf's folders do.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model folder that is there.")
    ] = False,
) -> None:
    """Convert LLaVA-1.5 folders: LLaVA's own layout to Hugging Face's and back; LoRA folders are merged.

    sima convert llava-v1.5-7b llava-1.5-7b-hf --vision-tower clip-vit-large-patch14-336
    """
    from sima_ray.policy.convert import Step
    from sima_ray.policy.convert import convert as convert_folder
    from sima_ray.policy.convert_config import Layout

    def show(step: Step) -> None:
        typer.echo(
            f"{step.number}/{step.files}  {step.file.name} · {step.tensors:,} tensors · "
            f"{step.size / 1e9:.2f} GB",
            err=True,
        )

    done = convert_folder(
        source,
        output,
        to=Layout(to.value),
        base=base,
        vision_tower=vision_tower,
        dtype=dtype and dtype.value,
        pad_images=pad_images,
        force=force,
        on_step=show,
    )
    typer.echo(f"{output}: {_summary(done)}")


def _summary(done: "Converted") -> str:
    parts = [
        f"{done.read:,} tensors read, {done.written:,} written",
        f"{done.size / 1e9:.2f} GB of {done.dtype} in {done.files} file{'s' * (done.files != 1)}",
    ]
    parts += [f"{count:,} left out ({reason})" for reason, count in done.skipped.items()]
    if done.cast:
        parts.append(f"{done.cast:,} were of another type")
    before, after = done.rows
    if after != before:
        parts.append(f"vocabulary {before:,} → {after:,}")
    if done.adapter is not None:
        parts.append(f"adapter: {done.adapter.summary()}")
    return " · ".join(parts)
