"""OpenAI's protocol on the critic, spoken by OpenAI's own client."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from critic_app import ScoringPolicy, case, client, data_url, error_of, judge, png

from sima_ray.critic.verdict import parse_verdict

IMAGE = {"type": "image_url", "image_url": {"url": data_url(png())}}


@pytest.fixture
def policy() -> ScoringPolicy:
    return ScoringPolicy()


@pytest.fixture
async def ai(policy: ScoringPolicy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with client(policy) as http:
        # By its types it wants the client of a fork of httpx; this one does as well.
        transport: Any = http
        yield openai.AsyncOpenAI(
            api_key="any", base_url="http://critic/v1", http_client=transport, max_retries=0
        )


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


async def test_models(ai: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in ai.models.list()] == ["policy", "critic"]


async def test_the_policy_answers(ai: openai.AsyncOpenAI, policy: ScoringPolicy) -> None:
    content = [{"type": "text", "text": "What "}, IMAGE, {"type": "text", "text": "is it?"}]
    answer = await ai.chat.completions.create(
        model="policy", messages=user(content), max_tokens=7, temperature=0.5, top_p=0.9, seed=3
    )
    (choice,) = answer.choices
    assert choice.message.content == "1 images, 'What is it?'"
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 3)
    assert (answer.model, answer.system_fingerprint) == ("policy", "fake-1")
    (request,) = policy.requests
    assert [part["type"] for part in request.pop("content")] == ["text", "image", "text"]
    assert request == {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}


async def test_what_openai_has_for_defaults(ai: openai.AsyncOpenAI, policy: ScoringPolicy) -> None:
    answer = await ai.chat.completions.create(model="policy", messages=user("Hello"))
    assert answer.choices[0].message.content == "0 images, 'Hello'"
    request = policy.requests[0]
    assert (request["temperature"], request["top_p"], request["seed"]) == (1.0, 1.0, None)


@pytest.mark.parametrize(
    ("judged", "verdict", "reason"),
    [
        (case(1, 3), "[[2]]", "By 2, 1 images."),
        (case(3, 1, ground_truth="It is."), "[[1]]", "By 2, 1 images."),
        (case(1, 3, question="please be partial"), "[[tie]]", "By 1, 1 images."),
        (case(3, 3), "[[tie]]", "The responses say the same."),
        (case(2, 3, 1), "[[2]]", "Best first: 2, 1, 3."),
    ],
)
async def test_the_critic_judges(
    ai: openai.AsyncOpenAI, judged: dict[str, Any], verdict: str, reason: str
) -> None:
    content = [{"type": "text", "text": json.dumps(judged)}, IMAGE]
    answer = await ai.chat.completions.create(model="critic", messages=user(content), temperature=0)
    message: Any = answer.choices[0].message
    assert message.content == f"{reason}\n{verdict}"
    async with client(ScoringPolicy()) as http:
        report = await judge(http, judged | {"image": data_url(png())})
    assert message.critique | {"seconds": 0} == report | {"seconds": 0}
    if len(judged["responses"]) == 2 and report["winner"]:
        assert parse_verdict(message.content) == (reason, report["winner"])


async def test_the_critics_length_can_be_less_but_not_more(
    ai: openai.AsyncOpenAI, policy: ScoringPolicy
) -> None:
    for limit in (5, 10**6):
        await ai.chat.completions.create(
            model="critic", messages=user(json.dumps(case(1, 2))), max_tokens=limit
        )
    limits = {request["max_tokens"] for request in policy.requests}
    assert min(limits) == 5 and len(limits) == 2 and max(limits) < 10**6


@pytest.mark.parametrize(
    ("changes", "status", "code", "words"),
    [
        ({"stream": True}, 400, "unsupported", "stream: answers come whole"),
        ({"n": 2}, 400, "unsupported", "n: one answer"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "unsupported", "messages: one"),
        ({"messages": user("a") + user("b")}, 400, "unsupported", "messages: one user"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, 400, "unsupported", "max_tokens and"),
        ({"model": "gpt-4"}, 404, "model_not_found", "model: policy or critic"),
        ({"model": "critic", "temperature": 1}, 400, "unsupported", "temperature: the critic"),
        ({"model": "critic"}, 422, "invalid_request", "messages.0: the text must be a JSON"),
        ({"model": "critic", "messages": user("[]")}, 422, "invalid_request", "messages.0: a JSON"),
        (
            {"model": "critic", "messages": user("{}")},
            422,
            "invalid_request",
            "messages.0: question",
        ),
        ({"logit_bias": {"1": 1}}, 422, "invalid_request", "logit_bias: "),
        ({"max_tokens": 0}, 422, "invalid_request", "max_tokens: "),
        ({"messages": []}, 422, "invalid_request", "messages: "),
        ({"messages": user("x" * 2001)}, 422, "invalid_request", "messages.0.0: over"),
        ({"messages": user("please refuse")}, 422, "invalid_request", "too long"),
        ({"messages": user("please be down")}, 503, "unavailable", "the policy does not answer"),
        ({"messages": user("please wait")}, 504, "timeout", "no answer in time"),
        (
            {"messages": user([{"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}])},
            422,
            "invalid_request",
            "image: only data: URLs, or https",
        ),
    ],
)
async def test_what_is_refused(changes: dict[str, Any], status: int, code: str, words: str) -> None:
    body = {"model": "policy", "messages": user("Hello")} | changes
    limit = 0.5 if status == 504 else 30
    async with client(ScoringPolicy(), request_timeout_s=limit) as http:
        reply = await http.post("/v1/chat/completions", json=body)
    found = error_of(reply)
    assert found[:2] == (status, code) and found[2].startswith(words), found


async def test_openais_client_understands_the_errors(ai: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream: answers come whole") as refused:
        await ai.chat.completions.create(model="policy", messages=user("Hi"), stream=True)
    assert refused.value.code == "unsupported"


async def test_one_image_only(ai: openai.AsyncOpenAI) -> None:
    text = {"type": "text", "text": json.dumps(case(1, 2, image=data_url(png())))}
    plain = await ai.chat.completions.create(model="critic", messages=user([text]))
    assert (plain.choices[0].message.content or "").startswith("By 1, 1 images.")
    with pytest.raises(openai.UnprocessableEntityError, match="one image"):
        await ai.chat.completions.create(model="critic", messages=user([text, IMAGE]))
