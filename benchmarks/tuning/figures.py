"""What the trials come to: medians over repeats, ratios, and their spread."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from benchmarks.tuning.shapes import Lengths, Shapes
from benchmarks.tuning.trial import TRAINERS, Trial
from sima_ray.ports import JsonDict

Measure = Literal["cpu_s", "wall_s"]
Repeat = Mapping[str, Trial]
"""The trials of one repeat, by trainer."""

KEYS = {"trl": "trl", "released": "sima"}
"""The trainers that ours is compared with, as the figures' names have them."""

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16, by a part of the device's name (SXM where there is a choice)."""


def cost(trial: Trial, measure: Measure, epochs: int) -> float:
    """What a run of the first so many epochs cost, the reference included."""
    reference = getattr(trial.reference, measure) if trial.reference else 0.0
    return reference + steps_cost(trial, measure, epochs)


def steps_cost(trial: Trial, measure: Measure, epochs: int) -> float:
    """The same without a reference pass of its own."""
    return sum(getattr(lap, measure) for lap in trial.epochs[:epochs])


def reference_share(trial: Trial, measure: Measure) -> float:
    """Share of the whole run that the reference pass took."""
    return getattr(trial.reference, measure) / cost(trial, measure, len(trial.epochs))


def working_bytes(trial: Trial) -> int:
    """What the steps needed at most beyond what was in use before them."""
    return trial.peak_bytes - trial.ready_bytes


def figures(
    repeats: Sequence[Repeat],
    shapes: Shapes,
    lengths: Sequence[Lengths],
    measure: Measure,
    peak_flops: float | None = None,
) -> JsonDict:
    """All figures of a benchmark.

    Args:
        repeats: At least one, each with a trial of every trainer, all of as many epochs.
        shapes: Of the model.
        lengths: Of the pairs.
        measure: What a cost is.
        peak_flops: Of the device; None where it is not known.
    """
    epochs = len(repeats[0]["ours"].epochs)
    runs: dict[str, Callable[[Trial], float]] = {
        "speedup": lambda trial: cost(trial, measure, epochs),
        "one_epoch_speedup": lambda trial: cost(trial, measure, 1),
        "steps_speedup": lambda trial: steps_cost(trial, measure, epochs),
        "wall_speedup": lambda trial: cost(trial, "wall_s", epochs),
    }
    found: JsonDict = {}
    for trainer, key in KEYS.items():
        for name, of in runs.items():
            found[f"{name}_vs_{key}"] = spread([of(r[trainer]) / of(r["ours"]) for r in repeats])
        for name, of in {
            "memory": lambda trial: trial.peak_bytes,
            "working_memory": working_bytes,
        }.items():
            found[f"{name}_vs_{key}"] = spread([of(r["ours"]) / of(r[trainer]) for r in repeats])
    found["reference_share"] = spread([reference_share(r["ours"], measure) for r in repeats])
    whole: JsonDict = {name: values["median"] for name, values in found.items()}
    whole["measure"] = measure
    whole["spread"] = {name: [v["min"], v["max"]] for name, v in found.items()}
    whole["trainers"] = {
        trainer: _trainer([r[trainer] for r in repeats], trainer, shapes, lengths, peak_flops)
        for trainer in TRAINERS
    }
    whole["repeats"] = [{name: asdict(trial) for name, trial in r.items()} for r in repeats]
    return whole


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _trainer(
    trials: Sequence[Trial],
    trainer: str,
    shapes: Shapes,
    lengths: Sequence[Lengths],
    peak_flops: float | None,
) -> JsonDict:
    """One trainer's own figures."""
    epochs, pairs = len(trials[0].epochs), len(lengths)
    seen = pairs * epochs
    tokens = epochs * sum(2 * n.prompt + n.chosen + n.rejected for n in lengths)
    flops = sum(run_flops(shapes, n, epochs, shared=trainer == "ours") for n in lengths)
    walls = [cost(trial, "wall_s", epochs) for trial in trials]
    own: JsonDict = {
        "cpu_s_per_pair": spread([cost(trial, "cpu_s", epochs) / seen for trial in trials]),
        "one_epoch_cpu_s_per_pair": spread([cost(trial, "cpu_s", 1) / pairs for trial in trials]),
        "wall_s_per_pair": spread([wall / seen for wall in walls]),
        "tokens_per_s": spread([tokens / wall for wall in walls]),
        "peak_bytes": spread([trial.peak_bytes for trial in trials]),
        "working_bytes": spread([working_bytes(trial) for trial in trials]),
    }
    if peak_flops is not None:
        own["share_of_peak"] = spread([flops / wall / peak_flops for wall in walls])
    return own


def run_flops(shapes: Shapes, pair: Lengths, epochs: int, *, shared: bool) -> float:
    """FLOPs of the decoder and its head for one pair in a run, reference included.

    By hand, with N parameters in the linear layers, layers × width = A and a head of H parameters: a forward pass
    over T tokens, of which S pairs see each other, and C + R predicted ones costs 2NT + 4AS + 2H(C + R). Backward
    through frozen weights costs 2NT + 8AS + 2H(C + R). Plain rows do a forward, a backward and a reference forward
    an epoch; shared rows one reference forward in all, and in the last layer nothing but keys and values for the
    tokens of the prompt, its last one left aside.

    The vision tower and the adapters are left aside: at 7B about 4% and 2 × 5% of the decoder's.
    """
    p, c, r = pair.prompt, pair.chosen, pair.rejected
    width, layers = shapes.text_width, shapes.text_layers
    skipped_linear = skipped_sees = 0.0
    if shared:
        tokens = p + (c - 1) + (r - 1)
        sees = p * p / 2 + sum(p * n + n * n / 2 for n in (c - 1, r - 1))
        skipped_linear = 2 * (2 * width**2 + 3 * width * shapes.text_inner) * (p - 1)
        skipped_sees = (p - 1) ** 2 / 2
    else:
        tokens = 2 * p + c + r
        sees = sum((p + n) ** 2 / 2 for n in (c, r))
    linear = 2 * (shapes.decoder_parameters * tokens) - skipped_linear
    linear += 2 * width * shapes.vocabulary * (c + r)
    attention = 4 * width * (layers * sees - skipped_sees)
    forward, backward = linear + attention, linear + 2 * attention
    return epochs * (forward + backward) + (1 if shared else epochs) * forward


def table(found: JsonDict) -> str:
    """For a terminal."""
    device_memory = 2**20
    lines = [f"{'':<10} {'CPU-s/pair':>20} {'wall s/pair':>12} {'tokens/s':>10} {'peak MiB':>9}"]
    for name, own in found["trainers"].items():
        cpu = own["cpu_s_per_pair"]
        text = f"{cpu['median']:.3f} [{cpu['min']:.3f}, {cpu['max']:.3f}]"
        lines.append(
            f"{name:<10} {text:>20} {own['wall_s_per_pair']['median']:>12.3f} "
            f"{own['tokens_per_s']['median']:>10.0f} "
            f"{own['peak_bytes']['median'] / device_memory:>9.0f}"
            + (f"  {own['share_of_peak']['median']:.1%} of peak" if "share_of_peak" in own else "")
        )
    lines.append("")
    for name, (low, high) in found["spread"].items():
        lines.append(f"{name:<28} {found[name]:6.2f}   [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)
