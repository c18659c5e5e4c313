"""Asking a policy for its verdict on two responses: one critique an order."""

from collections.abc import Sequence
from dataclasses import dataclass

from sima_ray.critic.probability import probability_of
from sima_ray.critic.prompt import CriticPrompt, in_order
from sima_ray.critic.verdict import VERDICTS, parse_verdict
from sima_ray.errors import RequestRefused
from sima_ray.ports import Completion, CompletionRequest, Policy
from sima_ray.records import ORDERS, Critique, Order


@dataclass(frozen=True, slots=True)
class Case:
    """What the critic judges: two responses to one question about one image.

    `image` is an encoded file; without it, or without `ground_truth`, the critic judges without.
    """

    image: bytes | None
    question: str
    ground_truth: str | None
    responses: tuple[str, str]


async def critique(
    policy: Policy,
    prompt: CriticPrompt,
    case: Case,
    max_tokens: int,
    orders: Sequence[Order] = ORDERS,
) -> list[Critique]:
    """Ask for a greedy verdict in each order, all in one call: they share all but the responses' places.

    Raises:
        RequestRefused: When the policy says that a request can never succeed.
        ServiceError: When the policy could not be reached in spite of retries.
    """
    requests: list[CompletionRequest] = []
    for order in orders:
        first, second = in_order(order, case.responses)
        content = prompt.content(case.image, case.question, case.ground_truth, first, second)
        requests.append(
            {
                "content": content,
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "alternatives": list(VERDICTS),
            }
        )
    answers = await policy.complete_all(requests)
    return [_critique(order, answer) for order, answer in zip(orders, answers, strict=True)]


def _critique(order: Order, completion: Completion) -> Critique:
    if "error" in completion:
        raise RequestRefused(completion["error"])
    raw = completion.get("text", "")
    reason, choice = parse_verdict(raw)
    return Critique(
        order=order,
        raw=raw,
        reason=reason,
        choice=choice,
        tokens=completion.get("tokens", 0),
        prompt_tokens=completion.get("prompt_tokens", 0),
        cached_tokens=completion.get("cached_tokens", 0),
        model_version=completion.get("model_version", ""),
        probability=probability_of(order, raw, completion.get("alternatives")),
    )
