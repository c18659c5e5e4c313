"""What a stage does for one row: build the requests, ask the policy, fill the row's columns. No Ray
here.

The requests of a row go in one call: the greedy and the sampled candidate together, both orders of
a critique together, so that the engine computes what they share once, and the service is called
half as often. A stage has many rows in flight, which keeps the engine full.
"""

import asyncio
import hashlib
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Protocol, cast

from sima_ray.config import CriticConfig, DataConfig, GenerationConfig
from sima_ray.critic.judge import Case, critique
from sima_ray.critic.prompt import CriticPrompt
from sima_ray.critic.vote import decide, identical
from sima_ray.data.locations import load_image, read_image
from sima_ray.errors import RequestRefused, ServiceError, one_line
from sima_ray.pairs import to_pair
from sima_ray.ports import (
    Completion,
    CompletionRequest,
    JsonDict,
    Part,
    Policy,
    image_part,
    text_part,
)
from sima_ray.records import Candidate, Critique, Outcome, Prompt

REQUESTS = 2
"""Of a row, in one call: two candidates, or a critique in both orders."""
WINDOW = 100
MIN_ROWS = 50
"""A run stops when more than half of the last WINDOW rows failed, of at least MIN_ROWS."""


class RowWork(Protocol):
    """The work of one stage for one good row."""

    async def __call__(self, policy: Policy, row: JsonDict) -> JsonDict:
        """The columns that the stage fills.

        Raises:
            ImageProblem: The row's image cannot be used.
            RequestRefused: A request can never succeed.
            ServiceError: A request failed for good.
        """
        ...


@dataclass(frozen=True)
class Generate:
    """Two candidates for a row: the greedy one, then the sampled one."""

    data: DataConfig
    generation: GenerationConfig
    seed: int

    async def __call__(self, policy: Policy, row: JsonDict) -> JsonDict:
        image = await asyncio.to_thread(
            load_image, self.data.images, row["image"], self.data.max_image_pixels
        )
        content: list[Part] = [image_part(image), text_part(row["text"])]
        greedy: CompletionRequest = {
            "content": content,
            "max_tokens": self.generation.max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": None,
            "logprob": True,
        }
        sampled: CompletionRequest = {
            **greedy,
            "temperature": self.generation.temperature,
            "top_p": self.generation.top_p,
            "seed": candidate_seed(self.seed, row["row_id"], 1),
        }
        answers = await policy.complete_all([greedy, sampled])
        candidates = [
            _candidate(kind, request, answer)
            for kind, request, answer in zip(
                ("greedy", "sampled"), (greedy, sampled), answers, strict=True
            )
        ]
        return {"candidates": [asdict(candidate) for candidate in candidates]}


@dataclass(frozen=True)
class Critic:
    """A critique of a row's candidates in both orders; none when they say the same."""

    data: DataConfig
    critic: CriticConfig
    prompt: CriticPrompt

    async def __call__(self, policy: Policy, row: JsonDict) -> JsonDict:
        responses = [candidate["text"] for candidate in row["candidates"]]
        critiques: list[Critique] = []
        if not identical(*responses):
            image = await asyncio.to_thread(read_image, self.data.images, row["image"])
            case = Case(image, row["text"], row["ground_truth"], (responses[0], responses[1]))
            critiques = await critique(policy, self.prompt, case, self.critic.max_tokens)
        return {
            "critiques": [asdict(critique) for critique in critiques],
            "prompt_version": self.prompt.version,
        }


def decide_row(row: JsonDict) -> JsonDict:
    """The outcome columns of a judged row, and the pair's when there is a preference."""
    if row["quarantine"]:
        return {"outcome": Outcome.QUARANTINED.value}
    candidates = [Candidate(**candidate) for candidate in row["candidates"]]
    critiques = [Critique(**critique) for critique in row["critiques"]]
    outcome = decide([candidate.text for candidate in candidates], critiques)
    if not outcome.is_preference:
        return {"outcome": outcome.value}
    prompt = Prompt(row["row_id"], row["image"], row["text"], row["ground_truth"], row["source"])
    pair = to_pair(prompt, candidates, outcome)
    return {
        "outcome": outcome.value,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "chosen_from": pair.chosen_from,
        "rejected_from": pair.rejected_from,
        "weight": pair.weight,
        "chosen_logp": pair.chosen_logp,
        "rejected_logp": pair.rejected_logp,
        "chosen_tokens": pair.chosen_tokens,
        "rejected_tokens": pair.rejected_tokens,
    }


def candidate_seed(run_seed: int, row_id: str, candidate: int) -> int:
    """The sampling seed of a candidate: the same whenever, wherever and how often it is asked
    for."""
    digest = hashlib.sha256(f"{run_seed}\0{row_id}\0{candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # 31 bits: every engine takes that


@dataclass(slots=True)
class Health:
    """Tells a bad row now and then from a service that is not well."""

    recent: deque[bool] = field(default_factory=lambda: deque[bool](maxlen=WINDOW))

    def record(self, failure: str | None) -> None:
        """Count a row; `failure` says why it failed.

        Raises:
            ServiceError: Too many of the last rows failed for the run to go on.
        """
        self.recent.append(failure is not None)
        failed, rows = sum(self.recent), len(self.recent)
        if failure is not None and rows >= MIN_ROWS and failed > rows / 2:
            raise ServiceError(
                f"{failed} of the last {rows} rows failed, the last one with: {failure}. "
                "The run stops here; see to the policy service and run the same command again"
            )


def _candidate(kind: str, request: CompletionRequest, completion: Completion) -> Candidate:
    """A candidate of the policy's answer.

    Raises:
        RequestRefused: It is none: the request can never succeed.
    """
    answer = cast(JsonDict, completion)
    if "error" in answer:
        raise RequestRefused(one_line(answer["error"]))
    return Candidate(
        text=answer["text"],
        kind=kind,
        temperature=request["temperature"],
        top_p=request.get("top_p", 1.0),
        seed=request.get("seed"),
        tokens=answer["tokens"],
        logprob=answer["logprob"],
        finish_reason=answer["finish_reason"],
        model_version=answer["model_version"],
    )
