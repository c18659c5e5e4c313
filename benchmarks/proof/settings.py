"""What is compared, on what, and how often: every size, seed, setting and arm of the proof."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sima_ray.config import RunConfig

ROUNDS = 3
"""Rounds of the critic's first seed; every other arm has one."""

CHOICE_SEED, TEST_SEED, HELD_OUT_SEED = 11, 12, 0
"""Of the worlds: training prompts for the choice and for the test, and all held-out scenes."""

POPE_KINDS = ("random", "popular", "adversarial")
FIGURES = ("chair_s", "chair_i", "recall", "errors", "objects", "length")
"""Of a caption, as `sima_ray.metrics.summary.ratios` names them."""

LAYOUTS = ("examples_first", "image_first")

BASE = "base"
"""The policy before training, beside the arms."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the proof is; smaller only to try it out.

    Attributes:
        scenes: Held-out scenes of the validation world, and of the test world.
        prompts: Training prompts at most; settings of the grid that want more are left out.
        seeds: DPO seeds of each arm of the test.
    """

    scenes: int = 500
    prompts: int = 1600
    seeds: int = 3

    @property
    def critic_scenes(self) -> int:
        """Test scenes on which the critic is measured: those of the test world are among them."""
        return 2 * self.scenes


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of the choice."""

    prompts: int
    learning_rate: float
    epochs: int

    @property
    def name(self) -> str:
        """As it stands in the run's name."""
        return f"{self.prompts}-{self.learning_rate:g}-{self.epochs}"

    def training(self) -> dict[str, Any]:
        """The part of a config's `training` that it sets."""
        return {"learning_rate": self.learning_rate, "epochs": self.epochs}


GRID = (
    Setting(prompts=800, learning_rate=2e-4, epochs=2),
    Setting(prompts=800, learning_rate=3e-4, epochs=2),
    Setting(prompts=1600, learning_rate=1e-4, epochs=2),
    Setting(prompts=1600, learning_rate=2e-4, epochs=1),
    Setting(prompts=1600, learning_rate=2e-4, epochs=2),
    Setting(prompts=1600, learning_rate=3e-4, epochs=1),
)


def grid(prompts: int) -> tuple[Setting, ...]:
    """The settings that need at most that many prompts; where none does, the first, cut down to them."""
    first = GRID[0]
    cut = Setting(prompts, first.learning_rate, first.epochs)
    return tuple(setting for setting in GRID if setting.prompts <= prompts) or (cut,)


@dataclass(frozen=True, slots=True)
class Arm:
    """What an arm of the test is trained on.

    Attributes:
        name: In runs, tables and JSON.
        label: In the picture.
        about: What is preferred, in a line.
        rule: The name of a rule of `preferences.RULES`; None takes the critic's verdicts.
        pairs: Settings of `pairs` that differ from the config's.
        other_layout: Takes the verdicts of the layout that the config does not have.
    """

    name: str
    label: str
    about: str
    rule: str | None = None
    pairs: Mapping[str, Any] = field(default_factory=dict)
    other_layout: bool = False


CRITIC = Arm(
    "critic",
    "self-critic",
    "the policy's own verdicts, where both orders prefer the same candidate",
)
CONTROLS = (
    Arm(
        "random", "random preferences", "either candidate, by lot anew for each seed", rule="random"
    ),
    Arm(
        "shorter",
        "always the shorter",
        "the candidate with fewer words; equally many give no pair",
        rule="shorter",
    ),
    Arm(
        "greedy",
        "always the greedy one",
        "the greedy candidate, not the sampled one",
        rule="greedy",
    ),
)
ORACLE = Arm(
    "oracle",
    "judge without errors",
    "the candidate with fewer errors against the scene itself; equally many give no pair",
    rule="oracle",
)
POLICIES = (
    Arm(
        "critic_keep",
        "inconsistent kept",
        "where the orders disagree, one of the two contradicting verdicts, by lot anew for each seed",
        pairs={"inconsistent_weight": 1.0},
    ),
    Arm(
        "critic_half",
        "inconsistent at half weight",
        "the same, these pairs at half the weight",
        pairs={"inconsistent_weight": 0.5},
    ),
    Arm(
        "critic_balanced",
        "lengths balanced",
        "as many pairs whose preferred side is the shorter as the longer; the surplus left out by lot",
        pairs={"length_policy": "balance"},
    ),
)
"""Arms that differ from the critic's in what becomes of its verdicts."""


def other_layout(config: RunConfig) -> str:
    """The layout that the config does not have."""
    return next(layout for layout in LAYOUTS if layout != config.critic.layout)


def arms_of(config: RunConfig) -> tuple[Arm, ...]:
    """All arms of the test, the critic's first."""
    layout = other_layout(config)
    words = layout.replace("_", " ")
    about = f"as critic, from a prompt of the other layout ({words})"
    other = Arm(f"{CRITIC.name}_{layout}", f"self-critic, {words}", about, other_layout=True)
    return (CRITIC, other, *CONTROLS, ORACLE, *POLICIES)


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """A config with other values: mappings are merged into its sections, the rest replaces.

    Raises:
        ConfigError: A key or value that does not fit.
    """
    return RunConfig.parse(_merged(config.model_dump(), values), origin="proof")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
    }
    return {**old, **new, **both}
