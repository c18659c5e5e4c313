"""`sima plan`: a run on paper. Memory of each stage, hours, disk, what does not fit and what would make it fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sima_ray.config import RunConfig
from sima_ray.plan.architecture import Architecture
from sima_ray.plan.changes import smallest_change, with_settings
from sima_ray.plan.hours import plan_disk, plan_hours
from sima_ray.plan.serving import plan_serving
from sima_ray.plan.training import plan_training
from sima_ray.plan.workload import Assumptions, Found, Workload, read_files, workload
from sima_ray.plan.worksheet import Figure, Section, millions


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on paper.

    Attributes:
        config, assumptions: What it is of.
        source: Where the model's figures are from.
        sections: Model, serve, train, hours, disk.
        change: Settings that would make it fit; None where it fits, or where nothing that was tried helps.
    """

    config: RunConfig
    assumptions: Assumptions
    source: str
    sections: list[Section]
    change: list[str] | None

    @property
    def problems(self) -> list[str]:
        """All that does not fit."""
        return [problem for section in self.sections for problem in section.problems]

    def section(self, title: str) -> Section:
        """The section whose title begins so."""
        return next(section for section in self.sections if section.title.startswith(title))

    def lines(self) -> list[str]:
        """As a person reads it."""
        hardware = self.config.hardware
        head = [
            f"run          {self.config.name}: {self.config.policy.model}",
            f"figures      {self.source}",
            f"hardware     {hardware.gpus} GPUs of {hardware.gpu_memory_gb:g} GB (10⁹ bytes), "
            f"{hardware.gpu_tflops:g} TFLOP/s, {hardware.gpu_bandwidth_gb_s:,.0f} GB/s; "
            f"{hardware.gpu_link_gb_s:,.0f} GB/s between them",
            f"assumed      {self.assumptions.sentence()}",
            "",
        ]
        return head + [line for section in self.sections for line in section.lines()] + self._end()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.config.name,
            "model": self.config.policy.model,
            "source": self.source,
            "hardware": self.config.hardware.model_dump(),
            "assumptions": asdict(self.assumptions),
            "fits": not self.problems,
            "problems": self.problems,
            "change": self.change,
            "sections": [section.to_json() for section in self.sections],
        }

    def _end(self) -> list[str]:
        if not self.problems:
            return ["fits"]
        if self.change is None:
            return ["does not fit, and no change of settings that was tried makes it fit"]
        return [
            "does not fit; the smallest change that was found to make it fit:",
            f"  {as_options(self.change)}",
        ]


def as_options(settings: Sequence[str]) -> str:
    """Settings as a command line has them."""
    return " ".join(f"--set {setting}" for setting in settings)


def make_plan(
    config: RunConfig, model: Architecture, source: str, assume: Assumptions | None = None
) -> Plan:
    """Work a run out.

    Args:
        config: The run's.
        model: Its policy.
        source: Where the model's figures are from.
        assume: What the config does not say.

    Raises:
        DataError: A file of the run that is there and cannot be read.
    """
    assume = assume or Assumptions()
    found = read_files(config, assume)
    load = workload(config, model, assume, found)
    serving, training = plan_serving(config, model, load), plan_training(config, model, load)
    cached = serving.value("KV cache")
    sections = [
        _model(model, load),
        serving,
        training,
        plan_hours(config, model, load, assume, cached),
        plan_disk(config, model, load),
    ]
    change = None
    if serving.problems or training.problems:
        change = smallest_change(config, lambda other: _fits(other, model, assume, found))
    return Plan(config, assume, source, sections, change)


def settings_on_gpus(
    config: RunConfig, model: Architecture, source: str, assume: Assumptions | None = None
) -> list[str] | None:
    """Settings with which a run of CPUs is one of GPUs that fits; None where none of those that are tried does."""
    settings = ["policy.engine.accelerator=gpu", "training.accelerator=gpu"]
    if (on_gpus := with_settings(config, settings)) is None:
        return None
    plan = make_plan(on_gpus, model, source, assume)
    if plan.problems and plan.change is None:
        return None
    return [*settings, *(plan.change or [])]


def _fits(config: RunConfig, model: Architecture, assume: Assumptions, found: Found) -> bool:
    load = workload(config, model, assume, found)
    serving, training = plan_serving(config, model, load), plan_training(config, model, load)
    return not serving.problems and not training.problems


def _model(model: Architecture, load: Workload) -> Section:
    text = model.language
    figures = [
        Figure(
            "language model",
            text.parameters / 1e9,
            "e9",
            f"{text.layers} layers × {millions(text.per_layer)} + {1 if text.tied else 2} × "
            f"{text.vocabulary:,} × {text.width}",
        ),
        Figure(
            "vision tower",
            model.vision / 1e9,
            "e9",
            f"{model.vision_layers} layers of {model.vision_width}",
        ),
        Figure("projector", model.projector / 1e9, "e9"),
        Figure("parameters", model.parameters / 1e9, "e9", f"{model.parameters:,}"),
        Figure(
            "tokens of an image",
            load.image_tokens,
            "tokens",
            f"{load.largest_image_tokens:,} of the largest, {load.patches:,} patches in the vision tower",
        ),
        Figure(
            "tokens of a critique",
            load.critique,
            "tokens",
            f"{load.static:,} criteria and examples + {load.image_tokens:,} image + {load.case} case + "
            f"2 × {load.response} responses",
        ),
        Figure(
            "tokens of a pair's row",
            load.row,
            "tokens",
            f"[{load.prompt:,} image and prompt | {load.response} | {load.response}]",
        ),
    ]
    return Section(f"model: {model.family}", figures)
