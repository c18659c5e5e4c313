"""A fake policy, for tests of what calls one: not a model, but with a book of what it was asked."""

import asyncio
import json
import math
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import ray.cloudpickle

from sima_ray.errors import ServiceError
from sima_ray.ports import Completion, CompletionRequest, Policy

# Ray's workers do not know where tests live: what this module passes to them travels by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Book:
    """Where fake policies write down what they were asked."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    async def add(self, entry: dict[str, Any]) -> int:
        """Write down a request; how many of its kind there were."""
        self.entries.append(entry)
        return sum(e["kind"] == entry["kind"] for e in self.entries)

    async def read(self) -> list[dict[str, Any]]:
        return self.entries


def book_actor(**options: Any) -> Any:
    """A book in a process of its own."""
    remote: Any = ray.remote(Book)
    return remote.options(num_cpus=0, **options).remote()


class SharedBook:
    """A book behind an actor, for policies that run anywhere in the cluster."""

    def __init__(self, actor: Any = None) -> None:
        self.actor = actor or book_actor()

    async def add(self, entry: dict[str, Any]) -> int:
        return await self.actor.add.remote(entry)

    @property
    def entries(self) -> list[dict[str, Any]]:
        return ray.get(self.actor.read.remote())


class FakePolicy(Policy):
    """Not a model: answers by the words of the question, and writes down what it was asked.

    The question (see `ask`) says how a row goes: "same" has identical candidates, "tie" a critic
    that always takes the first shown, "mumble" one that gives no verdict, "refused" an answer
    {"error"}, "crash" an exception; all others have a critic that prefers the greedy candidate.

    Args:
        book: Where it writes.
        down_after: From the request after this one of each kind on, nobody answers.
        hold_after: Critiques after this one are never answered.
        die_at: The process ends at this request of each kind.
    """

    def __init__(
        self,
        book: Book | SharedBook,
        *,
        down_after: int | None = None,
        hold_after: int | None = None,
        die_at: int | None = None,
    ) -> None:
        self._book = book
        self._down_after = down_after
        self._hold_after = hold_after
        self._die_at = die_at

    async def complete(self, request: CompletionRequest) -> Completion:
        text = "".join(str(part.get("text", "")) for part in request["content"])
        question = json.loads(text[text.rindex("Q{") + 1 : text.rindex("}Q") + 1])
        critic = "Response 1" in text
        kind = "critic" if critic else "sampled" if request["temperature"] else "greedy"
        entry = {"row": question["row"], "kind": kind, "seed": request.get("seed")}
        entry["images"] = sum(part["type"] == "image" for part in request["content"])
        entry["logprob"] = request.get("logprob", False)
        entry["alternatives"] = request.get("alternatives")
        number = await self._book.add(entry)
        if self._down_after is not None and number > self._down_after:
            raise ServiceError("no replica answers")
        if number == self._die_at:
            os._exit(1)
        if critic and self._hold_after is not None and number > self._hold_after:
            await asyncio.Event().wait()
        await asyncio.sleep(random.uniform(0, 0.01))
        match question["way"]:
            case "refused":
                return {"error": "prompt is too long"}
            case "crash" if kind == "sampled":
                raise RuntimeError("a bug")
            case _:
                answer = _answer(question, kind, text)
                return answer | {"logprob": -1.5 if request.get("logprob") else None}


def ask(row: int, way: str) -> str:
    """A question that tells the fake policy which row it is and how it goes."""
    return f"Q{json.dumps({'row': row, 'way': way})}Q"


def fake(book: Book | SharedBook, **how: int) -> Callable[[], Policy]:
    """A factory of fake policies; see `FakePolicy`."""
    return partial(FakePolicy, book, **how)


def _answer(question: dict[str, Any], kind: str, text: str) -> Completion:
    if kind == "critic":
        case = text[text.rindex("Q{") :]
        first = 1 if case.index("greedy says") < case.index("sampled says") else 2
        choice = {"tie": "[[1]]", "mumble": "both"}.get(question["way"], f"[[{first}]]")
        answer = f"A reason. {choice}"
    elif question["way"] == "same":
        answer = "They say the same"
    else:
        answer = f"{kind} says {'more ' * question['row']}"
    completion: Completion = {
        "text": answer,
        "tokens": len(answer.split()),
        "prompt_tokens": 10,
        "cached_tokens": 0,
        "finish_reason": "stop",
        "model_version": "fake",
    }
    if answer.endswith("]]"):
        likely = [math.log(0.75), math.log(0.25)]
        completion["alternatives"] = likely if answer.endswith("[[1]]") else likely[::-1]
    return completion
