"""`sima plan`: what a run needs, before anything is rented."""

import json
from typing import Annotated

import typer

from sima_ray.cli_config import ConfigPath, Model, Set, load_config


def plan(
    config: ConfigPath,
    model: Model = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Of the cluster. Short for --set hardware.gpus=N.")
    ] = None,
    gpu_memory_gb: Annotated[
        float | None, typer.Option(help="Of one GPU, in 10⁹ bytes; hardware.gpu_memory_gb.")
    ] = None,
    gpu_tflops: Annotated[
        float | None, typer.Option(help="Its dense bfloat16 peak; hardware.gpu_tflops.")
    ] = None,
    gpu_bandwidth_gb_s: Annotated[
        float | None, typer.Option(help="Of its memory; hardware.gpu_bandwidth_gb_s.")
    ] = None,
    gpu_link_gb_s: Annotated[
        float | None, typer.Option(help="Received from other GPUs; hardware.gpu_link_gb_s.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Default: the prompts file's, or the paper's 17,000.")
    ] = None,
    image_size: Annotated[
        str, typer.Option(metavar="WxH", help="An ordinary image, pixels.")
    ] = "640x480",
    response_tokens: Annotated[int, typer.Option(min=1, help="Of an ordinary response.")] = 150,
    reason_tokens: Annotated[int, typer.Option(min=1, help="Of an ordinary critique.")] = 120,
    pairs_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the prompts that become pairs.")
    ] = 0.6,
    mfu_training: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the peak that training reaches.")
    ] = 0.35,
    mfu_prefill: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share that reading prompts reaches.")
    ] = 0.4,
    bandwidth_share: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the bandwidth that writing reaches.")
    ] = 0.6,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    settings: Set = None,
) -> None:
    """Work out memory per GPU, hours and disk of a run, and show how; exits with 1 where it does not fit."""
    given = {
        "gpus": gpus,
        "gpu_memory_gb": gpu_memory_gb,
        "gpu_tflops": gpu_tflops,
        "gpu_bandwidth_gb_s": gpu_bandwidth_gb_s,
        "gpu_link_gb_s": gpu_link_gb_s,
    }
    hardware = [f"hardware.{name}={value}" for name, value in given.items() if value is not None]
    resolved = load_config(config, [*(settings or []), *hardware], model)
    from sima_ray.errors import ConfigError
    from sima_ray.plan.architecture import find_architecture
    from sima_ray.plan.plan import as_options, make_plan, settings_on_gpus
    from sima_ray.plan.workload import Assumptions

    assume = Assumptions(
        prompts=prompts,
        image=_size(image_size),
        response_tokens=response_tokens,
        reason_tokens=reason_tokens,
        pairs=pairs_share,
        mfu_training=mfu_training,
        mfu_prefill=mfu_prefill,
        bandwidth=bandwidth_share,
    )
    architecture = find_architecture(resolved.policy.model)
    if "cpu" in (resolved.policy.engine.accelerator, resolved.training.accelerator):
        on_gpus = settings_on_gpus(resolved, *architecture, assume)
        raise ConfigError(
            f"{config}: a plan is of GPUs, and this run is of CPUs; "
            + (
                f"for the same on GPUs add {as_options(on_gpus)}"
                if on_gpus
                else "no change of settings that was tried makes it fit GPUs"
            )
        )
    made = make_plan(resolved, *architecture, assume)
    typer.echo(json.dumps(made.to_json(), indent=2) if as_json else "\n".join(made.lines()))
    if made.problems:
        raise typer.Exit(1)


def _size(text: str) -> tuple[int, int]:
    from sima_ray.errors import ConfigError

    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError(f"--image-size {text}: give WIDTHxHEIGHT, as in 640x480")
    return int(width), int(height)
