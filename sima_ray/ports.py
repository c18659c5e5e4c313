"""How the pure parts reach a policy: a Protocol, and the plain dicts that cross process borders.

A request is a dict so that callers of the policy service need not import vLLM or this project's server:

    {"content": [{"type": "text", "text": …} | {"type": "image", "image": <bytes>}, …],
     "max_tokens": int, "temperature": float, "top_p": float, "seed": int | None, "logprob": bool,
     "alternatives": [str, str]}

`image` holds the encoded file (JPEG, PNG or WebP); `logprob` asks for the answer's log-probability. The answer:

    {"text": str, "tokens": int, "prompt_tokens": int, "cached_tokens": int, "logprob": float | None,
     "finish_reason": "stop" | "length", "model_version": str, "alternatives": [float, float]}

`logprob` is the sum over all generated tokens, an end of sequence among them, in nats, before temperature and
top-p; None where it was not asked for, or where another token than the tokenizer's end of sequence ended the
answer.

`alternatives` are two texts that differ in exactly one token, such as two verdicts. The answer's are these two
tokens' log-probabilities (nats, before temperature and top-p) at the last place where one of them was generated;
they are left out where neither was, and where the texts differ in no token or in more.

For a request that can never succeed (too long, undecodable image, …) the answer is {"error": str}. A
request that may succeed later (overload, a dead replica) raises instead, and the caller retries.
"""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from sima_ray.together import together


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    type: Literal["image"]
    image: bytes


Part = TextPart | ImagePart
"""One piece of a user message; a message is a list of them, in the order that the model reads."""


class CompletionRequest(TypedDict):
    content: list[Part]
    max_tokens: int
    temperature: float
    top_p: NotRequired[float]
    seed: NotRequired[int | None]
    logprob: NotRequired[bool]
    alternatives: NotRequired[list[str]]


class Completion(TypedDict, total=False):
    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    logprob: float | None
    finish_reason: str
    model_version: str
    alternatives: list[float]
    error: str


class Policy(Protocol):
    """Something that answers: the Serve deployment behind a handle, or a fake in a test."""

    async def complete(self, request: CompletionRequest) -> Completion:
        """Answer one request.

        Raises:
            ServiceError: When the policy could not be reached in spite of retries.
        """
        ...

    async def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Answer requests that share a beginning, such as an image: together, by one version of the weights.

        They go to one replica in one call, where the engine computes what they share once. Where one of them
        fails in a way that may pass, all do, and none is computed further.

        Raises:
            ServiceError: When the policy could not be reached in spite of retries.
        """
        return await together(self.complete(request) for request in requests)


def text_part(text: str) -> TextPart:
    """A piece of text of a user message."""
    return {"type": "text", "text": text}


def image_part(image: bytes) -> ImagePart:
    """An image of a user message, as an encoded file."""
    return {"type": "image", "image": image}


JsonDict = dict[str, Any]
