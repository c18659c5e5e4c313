"""What the critic reads: criteria, worked examples, the case, and where the image stands among them.

The wording lives in `templates/*.j2`; the worked examples in a YAML file (`examples/default.yaml`, or the run
config's own). Two layouts (`Layout`) put the same pieces in another order.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import jinja2
import yaml

from sima_ray.errors import ConfigError, why
from sima_ray.ports import ImagePart, Part, image_part, text_part
from sima_ray.records import Choice, Order

HERE = Path(__file__).parent
DEFAULT_EXAMPLES = HERE / "examples" / "default.yaml"


class Layout(StrEnum):
    """The order of the pieces.

    IMAGE_FIRST is the paper's. EXAMPLES_FIRST puts what never changes before the image, so that an engine with
    a prefix cache computes it once for all rows, and image + question + ground truth once for both orders.
    """

    IMAGE_FIRST = "image_first"
    EXAMPLES_FIRST = "examples_first"


@dataclass(frozen=True, slots=True)
class WorkedExample:
    """A text-only example in the prompt: a case with its reason and choice."""

    question: str
    ground_truth: str
    first: str
    second: str
    reason: str
    choice: Choice


@dataclass(frozen=True)
class CriticPrompt:
    """Builds critic prompts of one layout with one set of worked examples."""

    layout: Layout
    examples: tuple[WorkedExample, ...]

    def content(
        self, image: bytes | None, question: str, ground_truth: str | None, first: str, second: str
    ) -> list[Part]:
        """The user message that asks which of two responses is better.

        Args:
            image: The encoded image file; None asks without an image.
            question: What the responses answer.
            ground_truth: The answer known to be right; None asks without one.
            first, second: The texts to show as Response 1 and Response 2.
        """
        static = "\n".join(
            [_render("criteria")]
            + [_render("example", number=n, example=e) for n, e in enumerate(self.examples, 1)]
        )
        case = _render(
            "case", question=question, ground_truth=ground_truth, first=first, second=second
        )
        shown: list[ImagePart] = [] if image is None else [image_part(image)]
        if self.layout is Layout.IMAGE_FIRST:
            return [*shown, text_part(f"{static}\n{case}")]
        return [text_part(f"{static}\n"), *shown, text_part(case)]

    @property
    def version(self) -> str:
        """A short hash of all that shapes the prompt: templates, layout and examples."""
        parts = [_source(name) for name in ("criteria", "example", "case")]
        parts += [
            self.layout.value,
            *(json.dumps(asdict(e), sort_keys=True) for e in self.examples),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def in_order(order: Order, responses: Sequence[str]) -> tuple[str, str]:
    """The two responses as the critic reads them in this order."""
    first, second = responses
    return (first, second) if order == "12" else (second, first)


def load_examples(path: Path = DEFAULT_EXAMPLES) -> tuple[WorkedExample, ...]:
    """Read worked examples from a YAML list of mappings with the fields of `WorkedExample`.

    Raises:
        ConfigError: When the file cannot be read, or does not hold one example for each choice.
    """
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        examples = tuple(WorkedExample(**row) for row in rows)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: worked examples cannot be read: {why(error)}") from error
    if {e.choice for e in examples} != {1, 2}:
        raise ConfigError(f"{path}: worked examples need one with choice 1 and one with choice 2")
    return examples


@cache
def _source(name: str) -> str:
    return (HERE / "templates" / f"{name}.j2").read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    # Prompts are plain text, never HTML: nothing to escape.
    return jinja2.Template(_source(name), undefined=jinja2.StrictUndefined, autoescape=False)


def _render(name: str, **values: object) -> str:
    return _template(name).render(**values)
