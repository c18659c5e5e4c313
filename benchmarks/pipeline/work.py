"""What all contenders get: the demo's prompts, and the requests that the rows of ours stand for."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks.pipeline.depth import deepen
from sima_ray.config import DataConfig, RunConfig
from sima_ray.ports import Completion, CompletionRequest, JsonDict, Policy

T = TypeVar("T")

SEED = 21
"""Of the scenes: those that the demo draws, which the policy was not made from."""

WARM = 64
"""Scenes of another seed, for warming up."""


@dataclass(frozen=True, slots=True)
class Work:
    """A folder with prompts, and how they are used.

    Attributes:
        folder: Holds the worlds `timed` and `warm`, and `rows`, which ours wrote.
        config: The run config's file.
        prompts: Timed.
        few: Of them, for a contender that takes long.
        layers: Of the policy's language model, its own or more.
    """

    folder: Path
    config: Path
    prompts: int
    few: int
    layers: int

    @property
    def run(self) -> RunConfig:
        """The run config, with the policy that is measured; its prompts aside."""
        run = RunConfig.load(self.config)
        policy = run.policy.model_copy(update={"model": str(self.folder / "policy")})
        return run.model_copy(update={"policy": policy})

    @property
    def rows(self) -> str:
        """The folder of the rows that the requests are made from."""
        return str(self.folder / "rows")

    def data(self, name: str) -> DataConfig:
        """A world's prompts and images."""
        world = self.folder / name
        paths = {"prompts": str(world / "prompts.jsonl"), "images": str(world / "images")}
        return self.run.data.model_copy(update=paths)

    def write(self) -> None:
        """Describe it in its folder, and make the worlds and the policy."""
        from sima_ray.demo.world import build_world

        build_world(self.folder / "timed", "train", self.prompts, SEED)
        build_world(self.folder / "warm", "train", WARM, SEED + 1)
        own = Path(RunConfig.load(self.config).policy.model)
        deepen(own, self.layers, self.folder / "policy")
        described = asdict(self) | {"folder": str(self.folder), "config": str(self.config)}
        (self.folder / "work.json").write_text(json.dumps(described), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Work":
        """What `write` left."""
        found: dict[str, Any] = json.loads((folder / "work.json").read_text(encoding="utf-8"))
        return cls(folder, Path(found["config"]), found["prompts"], found["few"], found["layers"])


@dataclass(frozen=True, slots=True)
class Requests:
    """Of one row: its candidates', then its critiques' in both orders; none where nothing is to be judged."""

    candidates: list[CompletionRequest]
    critiques: list[CompletionRequest]


def read_rows(folder: str) -> list[JsonDict]:
    """The rows that ours wrote, by their ids."""
    import pyarrow.parquet as pq

    from sima_ray.data.blocks import committed_files

    rows = [row for file in committed_files(folder) for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["row_id"])


def evenly(rows: Sequence[T], few: int) -> list[T]:
    """So many of them, at even distances: rows differ by ten times in what they take, so that the first
    few would stand for the others badly."""
    few = min(few, len(rows))
    return [rows[(2 * k + 1) * len(rows) // (2 * few)] for k in range(few)]


def requests_of(work: Work, rows: list[JsonDict]) -> list[Requests]:
    """What the stages ask for these rows, by the stages' own code."""
    return asyncio.run(_requests(work, rows))


class _Recorder(Policy):
    """A policy that keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[CompletionRequest] = []

    async def complete(self, request: CompletionRequest) -> Completion:
        self.asked.append(request)
        answer = {"text": "", "tokens": 1, "logprob": 0.0, "finish_reason": "stop"}
        return cast(Completion, answer | {"model_version": ""})


async def _requests(work: Work, rows: list[JsonDict]) -> list[Requests]:
    from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
    from sima_ray.data.work import Critic, Generate

    run, data = work.run, work.data("timed")
    examples = load_examples(Path(run.critic.examples)) if run.critic.examples else load_examples()
    generate = Generate(data, run.generation, run.seed)
    critic = Critic(data, run.critic, CriticPrompt(Layout(run.critic.layout), examples))
    found: list[Requests] = []
    for row in rows:
        asked = _Recorder(), _Recorder()
        await generate(asked[0], row)
        await critic(asked[1], row)
        found.append(Requests(asked[0].asked, asked[1].asked))
    return found


def image_of(request: CompletionRequest) -> bytes | None:
    """The encoded image of a request."""
    return next((part["image"] for part in request["content"] if part["type"] == "image"), None)


def image_name(request: CompletionRequest) -> str | None:
    """Tells images apart by what is in them."""
    image = image_of(request)
    return None if image is None else hashlib.sha256(image).hexdigest()
