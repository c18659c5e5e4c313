"""Questions put to the served policy: greedy, many in flight, failures counted one by one."""

import asyncio
from collections.abc import Callable, Sequence

from sima_ray.data.benchmarks import Question
from sima_ray.errors import DataError, ServiceError
from sima_ray.images import ImageProblem
from sima_ray.ports import Policy, image_part, text_part
from sima_ray.runtime.progress import Stage

_FAILED_SHARE = 0.01


def ask(
    questions: Sequence[Question],
    load: Callable[[Question], bytes],
    connect: Callable[[], Policy],
    stage: Stage,
    *,
    max_tokens: int,
    concurrency: int,
) -> list[str | None]:
    """One greedy answer a question, in order; None where a request failed for good.

    Args:
        questions: What is asked.
        load: The image of a question, checked.
        connect: Makes the policy's client.
        stage: Shows how far it is.
        max_tokens: Of an answer.
        concurrency: Requests in flight.

    Raises:
        DataError: An image that cannot be used.
        ServiceError: More than one answer in a hundred failed.
    """

    async def everything() -> list[str | None]:
        policy, slots, done = connect(), asyncio.Semaphore(concurrency), 0

        async def one(question: Question) -> str | None:
            nonlocal done
            async with slots:
                answer = await _answer(question, load, policy, max_tokens)
            done += 1
            stage.update(f"{done:,}/{len(questions):,} answers")
            return answer

        return await asyncio.gather(*map(one, questions))

    answers = asyncio.run(everything())
    failed = [q.row_id for q, a in zip(questions, answers, strict=True) if a is None]
    if len(failed) > _FAILED_SHARE * len(questions):
        raise ServiceError(
            f"{len(failed)} of {len(questions)} evaluation requests failed, {failed[0]} among them: "
            "the figures would not be comparable"
        )
    return answers


async def _answer(
    question: Question, load: Callable[[Question], bytes], policy: Policy, max_tokens: int
) -> str | None:
    try:
        image = await asyncio.to_thread(load, question)
    except ImageProblem as problem:
        raise DataError(f"evaluation: {question.row_id}: {problem}") from problem
    try:
        completion = await policy.complete(
            {
                "content": [image_part(image), text_part(question.text)],
                "max_tokens": max_tokens,
                "temperature": 0.0,
            }
        )
    except ServiceError:  # one question must not cost the others
        return None
    return None if "error" in completion else completion.get("text", "")
