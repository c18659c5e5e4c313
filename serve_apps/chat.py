"""OpenAI's chat routes on the critic: what speaks that protocol can ask the policy, and the critic.

Model "policy" answers one user message. Model "critic" judges the case that the message's text holds as JSON (the
fields of `POST /v1/critique`; the image may be an `image_url` part): its answer is a reason and, in the last line,
`[[1]]`, `[[2]]` or `[[tie]]`, with the whole report as the message's `critique`.
"""

import asyncio
import json
import time
from typing import Annotated, Any, Literal, cast

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_apps.critic_models import (
    CASE,
    CritiqueReport,
    CritiqueRequest,
    Text,
    check_lengths,
    image_bytes,
    in_words,
    invalid,
    is_inline,
)
from serve_apps.guard import ApiError
from serve_apps.judging import Judge, failure
from serve_apps.remote_images import RemoteImages
from serve_apps.strict_json import NotJson, check_json
from sima_ray.config import CriticConfig, ServiceConfig
from sima_ray.errors import ServiceError
from sima_ray.ports import CompletionRequest, Part, Policy, image_part, text_part

MODELS = ("policy", "critic")

_FORBID = ConfigDict(extra="forbid")


class TextContent(BaseModel):
    model_config = _FORBID

    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    model_config = _FORBID

    url: Text = Field(description="As the image of POST /v1/critique.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Makes no difference.")


class ImageContent(BaseModel):
    model_config = _FORBID

    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class UserMessage(BaseModel):
    model_config = _FORBID

    role: str = Field(description='"user".')
    content: Text | list[Content]


class ChatRequest(BaseModel):
    """One question to the policy, or one case to the critic."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "policy",
                    "messages": [{"role": "user", "content": "What is on the table?"}],
                    "max_tokens": 16,
                    "temperature": 0,
                },
                {
                    "model": "critic",
                    "messages": [{"role": "user", "content": json.dumps(CASE)}],
                },
            ]
        },
    )

    model: str
    messages: list[UserMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="By default the critic's own limit.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The same.")
    temperature: float | None = Field(None, ge=0, le=2, description="The critic takes 0 alone.")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int | None = None
    stream: bool | None = None
    user: str | None = Field(None, description="Makes no difference.")


class Chat:
    """Answers chat requests."""

    def __init__(
        self,
        policy: Policy,
        judge: Judge,
        critic: CriticConfig,
        service: ServiceConfig,
        images: RemoteImages,
    ) -> None:
        self._policy, self._judge, self._images = policy, judge, images
        self._critic, self._service = critic, service

    async def answer(self, request: ChatRequest, request_id: str) -> dict[str, Any]:
        """A chat completion.

        Raises:
            ApiError: None can be given.
        """
        parts = _user_parts(request)
        max_tokens = request.max_completion_tokens or request.max_tokens
        if request.model == "critic":
            if request.temperature:
                raise _unsupported(
                    "temperature: the critic judges greedily: leave it out, or say 0"
                )
            case = _case(parts)
            report = await self._judge.one(case, max_tokens)
            message = {"content": verdict_text(report), "critique": report.model_dump()}
            return _completion(
                request.model, request_id, message, report.prompt_tokens, report.tokens, "stop"
            ) | {"system_fingerprint": report.model_version}
        completion = await self._ask(
            parts,
            {
                "max_tokens": max_tokens or self._critic.max_tokens,
                "temperature": 1.0 if request.temperature is None else request.temperature,
                "top_p": 1.0 if request.top_p is None else request.top_p,
                "seed": request.seed,
            },
        )
        message = {"content": completion.get("text", "")}
        return _completion(
            request.model,
            request_id,
            message,
            completion.get("prompt_tokens", 0),
            completion.get("tokens", 0),
            completion.get("finish_reason", "stop"),
        ) | {"system_fingerprint": completion.get("model_version", "")}

    async def _ask(self, parts: list[TextContent | ImageContent], sampling: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(self._service.request_timeout_s):
                content = await self._content(parts)
                request = cast(CompletionRequest, {"content": content, **sampling})
                completion = await self._policy.complete(request)
        except TimeoutError as error:
            raise ApiError(504, "timeout", "no answer in time") from error
        except ServiceError as error:
            raise failure(error) from error
        if "error" in completion:
            raise invalid(completion["error"])
        return completion

    async def _content(self, parts: list[TextContent | ImageContent]) -> list[Part]:
        texts = {f"messages.0.{n}": p.text for n, p in enumerate(parts) if p.type == "text"}
        check_lengths(texts, self._service)
        urls = [part.image_url.url for part in parts if part.type == "image_url"]
        # Named a thousand times, an image would be sent on and decoded a thousand times.
        if sum(not is_inline(url) for url in urls) > 1:
            raise invalid("image: one URL at most in a message")
        remote = self._images.of_request()
        return [
            text_part(part.text)
            if part.type == "text"
            else image_part(await image_bytes(part.image_url.url, self._service, remote))
            for part in parts
        ]


def add_chat_routes(api: FastAPI, chat: Chat) -> None:
    """`GET /v1/models` and `POST /v1/chat/completions`."""

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What can be asked."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "sima-ray"} for name in MODELS
        ]
        return {"object": "list", "data": data}

    @api.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> dict[str, Any]:
        """OpenAI's protocol: model "policy" answers one user message, model "critic" judges a case."""
        return await chat.answer(body, request.state.request_id)


def verdict_text(report: CritiqueReport) -> str:
    """A report as a critic's text: a reason, and a verdict that `parse_verdict` reads."""
    if report.comparisons:
        reason = f"Best first: {', '.join(str(number) for number in report.ranking)}."
    elif report.orders:
        reason = report.orders[0].reason
    else:
        reason = "The responses say the same."
    return f"{reason}\n[[{'tie' if report.winner is None else report.winner}]]"


def _user_parts(request: ChatRequest) -> list[TextContent | ImageContent]:
    """The parts of the one message.

    Raises:
        ApiError: What these routes do not do.
    """
    if request.model not in MODELS:
        raise ApiError(404, "model_not_found", f"model: {' or '.join(MODELS)}")
    if request.stream:
        raise _unsupported("stream: answers come whole: leave it out, or say false")
    if request.n not in (None, 1):
        raise _unsupported("n: one answer a request")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise _unsupported("max_tokens and max_completion_tokens: give one of them")
    if len(request.messages) != 1 or request.messages[0].role != "user":
        raise _unsupported("messages: one user message, and no other")
    content = request.messages[0].content
    if isinstance(content, str):
        return [TextContent(type="text", text=content)]
    return list(content)


def _case(parts: list[TextContent | ImageContent]) -> CritiqueRequest:
    """The case that a message holds.

    Raises:
        ApiError: It holds none.
    """
    text = "".join(part.text for part in parts if part.type == "text")
    images = [part.image_url.url for part in parts if part.type == "image_url"]
    try:
        check_json(text.encode())
        case = json.loads(text)
        if not isinstance(case, dict) or len(images) + ("image" in case) > 1:
            raise invalid("messages.0: a JSON object like that of POST /v1/critique, and one image")
        return CritiqueRequest.model_validate({**case, **({"image": images[0]} if images else {})})
    except NotJson as problem:
        raise invalid(f"messages.0: the text must be a JSON object: {problem}") from problem
    except ValidationError as error:
        raise invalid(f"messages.0: {in_words(error.errors())}") from error


def _completion(
    model: str,
    request_id: str,
    message: dict[str, Any],
    prompt_tokens: int,
    tokens: int,
    finish_reason: str,
) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", **message},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        },
    }


def _unsupported(message: str) -> ApiError:
    return ApiError(400, "unsupported", message)
