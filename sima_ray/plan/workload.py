"""How much there is to do: lengths of what is read and written, and how often."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.config import RunConfig
from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.data.prompts import read_lines
from sima_ray.errors import DataError, why
from sima_ray.plan.architecture import Architecture
from sima_ray.plan.asked import Asked, asked

PAPERS_PROMPTS = 17_000
_CHARACTERS_A_TOKEN = 4.0
_LARGEST = (640, 640)
"""The largest of COCO's images."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a config does not say.

    Attributes:
        prompts: How many; None counts the prompts file, or takes the paper's number where it is not there.
        image: Width and height of an ordinary image, pixels; COCO's.
        question_tokens: Of a question and the chat template around it.
        response_tokens: Of an ordinary response or ground truth, where generation.max_tokens allows it.
        reason_tokens: Of a critique.
        pairs: Share of the prompts that becomes pairs.
        mfu_training: Share of the GPU's peak that training reaches.
        mfu_prefill: The same of reading prompts.
        bandwidth: Share of the memory bandwidth that writing tokens reaches.
        start_hours: Of engines or workers, once a stage.
    """

    prompts: int | None = None
    image: tuple[int, int] = (640, 480)
    question_tokens: int = 60
    response_tokens: int = 150
    reason_tokens: int = 120
    pairs: float = 0.6
    mfu_training: float = 0.35
    mfu_prefill: float = 0.4
    bandwidth: float = 0.6
    start_hours: float = 0.08

    def sentence(self) -> str:
        """All of them, for the head of a plan."""
        return (
            f"images of {self.image[0]}×{self.image[1]}, {self.question_tokens} tokens a question, "
            f"{self.response_tokens} a response, {self.reason_tokens} a critique; "
            f"{self.pairs:.0%} of the prompts become pairs; training at {self.mfu_training:.0%} of the GPU's "
            f"peak, prefill at {self.mfu_prefill:.0%}, decoding at {self.bandwidth:.0%} of its bandwidth"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What a run's files say: read once, however many settings are tried.

    Attributes:
        prompts: How many, and `prompts_from` says why.
        pairs: Of a round.
        static: Tokens of the critic's criteria and examples.
        asked: By an evaluation, of all suites.
    """

    prompts: int
    prompts_from: str
    pairs: int
    static: int
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Numbers that several stages need.

    Attributes:
        prompts: How many, and `prompts_from` says why.
        image_tokens, largest_image_tokens: Of an ordinary image, and of the largest.
        patches: What the vision tower sees of an ordinary image.
        prompt: Tokens of an ordinary prompt, image included.
        response: Of an ordinary response.
        longest_response: That may be trained on.
        pairs: Of a round.
        static: Tokens of the critic's criteria and examples.
        case: Of a case without image and responses.
        reason: Of a critique.
        asked: By an evaluation, of all suites.
    """

    prompts: int
    prompts_from: str
    image_tokens: int
    largest_image_tokens: int
    patches: int
    prompt: int
    response: int
    longest_response: int
    pairs: int
    static: int
    case: int
    reason: int
    asked: tuple[Asked, ...]

    @property
    def critique(self) -> int:
        """Tokens that an ordinary critique reads."""
        return self.static + self.image_tokens + self.case + 2 * self.response

    @property
    def row(self) -> int:
        """Tokens of an ordinary pair's row, [image + prompt | chosen | rejected]."""
        return self.prompt + 2 * self.response


def read_files(config: RunConfig, assume: Assumptions) -> Found:
    """Count what a run begins with, where its files are on this machine.

    Raises:
        DataError: A file that is there and cannot be read.
    """
    prompts, origin = _prompts(config, assume)
    return Found(
        prompts=prompts,
        prompts_from=origin,
        pairs=_pairs(config, prompts, assume),
        static=_static(config),
        asked=asked(config.evaluation, assume.response_tokens) if config.evaluation else (),
    )


def workload(config: RunConfig, model: Architecture, assume: Assumptions, found: Found) -> Workload:
    """What a run has to do; reads no file."""
    image = model.image.tokens(*assume.image)
    largest = max(image, model.image.tokens(*_LARGEST))
    prompt = image + assume.question_tokens
    room = config.training.max_tokens - largest - assume.question_tokens
    response = min(assume.response_tokens, config.generation.max_tokens)
    return Workload(
        prompts=found.prompts,
        prompts_from=found.prompts_from,
        image_tokens=image,
        largest_image_tokens=largest,
        patches=model.image.patches(*assume.image),
        prompt=prompt,
        response=response,
        longest_response=max(0, min(config.generation.max_tokens, room)),
        pairs=found.pairs,
        static=found.static,
        case=assume.question_tokens + response,  # a ground truth is as long
        reason=min(assume.reason_tokens, config.critic.max_tokens),
        asked=found.asked,
    )


def _prompts(config: RunConfig, assume: Assumptions) -> tuple[int, str]:
    limit = config.data.limit
    if assume.prompts is not None:
        return min(assume.prompts, limit or assume.prompts), "as given"
    if config.data.prompts is None:
        return 0, "the run begins with given pairs"
    file = Path(config.data.prompts)
    if file.is_file():
        lines = islice(read_lines(config.data.prompts), limit)
        return sum(1 for _ in lines), f"lines of {file.name}"
    return min(
        PAPERS_PROMPTS, limit or PAPERS_PROMPTS
    ), "the paper's number: the prompts file is not on this machine"


def _pairs(config: RunConfig, prompts: int, assume: Assumptions) -> int:
    """Those that the prompts give, or the given ones."""
    given = config.data.pairs
    if given is None:
        return max(1, round(prompts * assume.pairs))
    try:
        found = pq.read_metadata(given).num_rows if Path(given).is_file() else PAPERS_PROMPTS
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{given}: cannot be read as Parquet: {why(error)}") from error
    return max(1, min(found, config.data.limit or found))


def _static(config: RunConfig) -> int:
    """Tokens of the critic's criteria and examples."""
    file = config.critic.examples
    examples = load_examples(Path(file)) if file and Path(file).is_file() else load_examples()
    prompt = CriticPrompt(Layout(config.critic.layout), examples)
    texts = [
        str(part.get("text", "")) for part in prompt.content(None, "", "", first="", second="")
    ]
    return round(sum(map(len, texts)) / _CHARACTERS_A_TOKEN)
