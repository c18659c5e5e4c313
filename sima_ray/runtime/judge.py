"""A judge behind OpenAI's chat completions: asked with retries, its answers kept, its failures counted.

A question that fails has no score: callers leave it out, and see it in `Judged.failure`. Only answers
that could be read are kept, by the hash of what was asked, so that a suite that is run again asks,
and pays for, nothing twice.
"""

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import httpx

from sima_ray.client.asynchronous import drive
from sima_ray.client.common import no_reply, reply
from sima_ray.client.retry import Clock, Ended, NoReply, Reply, Retry, exchange
from sima_ray.config import JudgeConfig
from sima_ray.config.origins import read_url
from sima_ray.data.benchmarks import read_text
from sima_ray.errors import ConfigError, ServiceError
from sima_ray.ports import JsonDict
from sima_ray.runtime.run import RunFolder

T = TypeVar("T")

_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
"""What a hosted API answers where another try may succeed."""

_SETUP = {
    401: "refuses the key",
    403: "refuses the key",
    404: "has no such model or address",
}
"""What no other question would fare better with."""

_CONNECT_S = 10.0


class Failure(StrEnum):
    """Why a question has no verdict."""

    POLICY = "policy"
    """The policy gave no response to judge."""

    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    RATE_LIMIT = "rate_limit"
    SERVER_ERROR = "server_error"
    REFUSED = "refused"
    """The request was refused for its content, or the judge declined."""

    MALFORMED = "malformed"
    """An answer that is no chat completion."""

    UNPARSEABLE = "unparseable"
    """A completion without the verdict that was asked for."""


@dataclass(frozen=True, slots=True)
class Judged(Generic[T]):
    """What came of one question.

    Attributes:
        verdict: What the judge's answer says; None where it failed.
        failure: Why; None where it did not.
        answer: The judge's words, where there are any; else what happened.
        cached: Whether the answer was there from before.
    """

    verdict: T | None
    failure: Failure | None
    answer: str
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of the prompts and of the answers, as the endpoint counted them."""

    prompt: int = 0
    answer: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.prompt + other.prompt, self.answer + other.answer)

    def cost(self, settings: JudgeConfig) -> float | None:
        """What they cost; None without a price."""
        if settings.price_in is None or settings.price_out is None:
            return None
        return (self.prompt * settings.price_in + self.answer * settings.price_out) / 1e6


@dataclass(frozen=True, slots=True)
class _Answer:
    """A completion's text, and what it took."""

    text: str
    tokens: Tokens


@dataclass
class Spent:
    """What a judge was asked, and what it took.

    Attributes:
        asked: Questions.
        cached: Those of them whose answer was there from before.
        tries: Requests that were sent.
        tokens: Of all completions that came.
        tokens_before: Of the answers that were there from before, when they were made.
        failures: Questions without a verdict, by kind.
    """

    asked: int = 0
    cached: int = 0
    tries: int = 0
    tokens: Tokens = Tokens()
    tokens_before: Tokens = Tokens()
    failures: Counter[Failure] = field(default_factory=Counter[Failure])


class Judge:
    """Asks one endpoint.

    Args:
        settings: The endpoint, and how patient to be.
        cache: Where answers are kept.
        transport: In place of the network.
        clock: In place of time.
    """

    def __init__(
        self,
        settings: JudgeConfig,
        cache: RunFolder,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings, self._cache, self._transport = settings, cache, transport
        self._clock = clock or Clock()
        self._key = read_key(settings)
        self.spent = Spent()

    def judge(
        self,
        prompts: Mapping[str, str],
        read: Callable[[str], T | None],
        show: Callable[[int, Spent], None] = lambda done, spent: None,
    ) -> dict[str, Judged[T]]:
        """Ask about every row.

        Args:
            prompts: What to ask, by row.
            read: Reads the verdict in an answer; None where it has none.
            show: Called after each question with how many are done.

        Raises:
            ServiceError: The endpoint refuses the key or knows no such model.
        """
        return asyncio.run(self._all(prompts, read, show))

    def tolerate(self, judged: Sequence[Judged[Any]]) -> None:
        """Raise `ServiceError` where so many have no verdict that the others' mean says little."""
        settings = self._settings
        failed = [one for one in judged if one.failure is not None]
        if len(failed) <= settings.max_failed_share * len(judged):
            return
        kinds = Counter(one.failure for one in failed)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise ServiceError(
            f"the judge {settings.model} gave no verdict on {len(failed)} of {len(judged)} questions "
            f"({counts}), over the {settings.max_failed_share:.1%} of evaluation.judge.max_failed_share; "
            f"the first: {failed[0].answer[:200]!r}; run it again: what was judged is kept"
        )

    def to_json(self) -> JsonDict:
        """What was asked and what it took, as plain values."""
        settings, spent = self._settings, self.spent
        return {
            "model": settings.model,
            "asked": spent.asked,
            "cached": spent.cached,
            "tries": spent.tries,
            "prompt_tokens": spent.tokens.prompt,
            "answer_tokens": spent.tokens.answer,
            "cost": spent.tokens.cost(settings),
            "cost_before": spent.tokens_before.cost(settings),
            "failures": {kind.value: count for kind, count in sorted(spent.failures.items())},
        }

    async def _all(
        self,
        prompts: Mapping[str, str],
        read: Callable[[str], T | None],
        show: Callable[[int, Spent], None],
    ) -> dict[str, Judged[T]]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        slots = asyncio.Semaphore(self._settings.concurrency)
        done: dict[str, Judged[T]] = {}

        # A proxy of the environment is not asked for what runs on this machine.
        local = read_url(self._settings.base_url).host in ("localhost", "127.0.0.1", "::1")
        async with httpx.AsyncClient(
            headers=headers, transport=self._transport, trust_env=not local
        ) as http:

            async def one(row: str, prompt: str) -> None:
                async with slots:
                    done[row] = judged = await self._one(http, prompt, read)
                self.spent.asked += 1
                self.spent.cached += judged.cached
                if judged.failure is not None:
                    self.spent.failures[judged.failure] += 1
                show(len(done), self.spent)

            tasks = [asyncio.create_task(one(row, prompt)) for row, prompt in prompts.items()]
            try:
                await asyncio.gather(*tasks)
            finally:  # the first error ends the others
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return {row: done[row] for row in prompts}

    async def _one(
        self, http: httpx.AsyncClient, prompt: str, read: Callable[[str], T | None]
    ) -> Judged[T]:
        body = self._body(prompt)
        name = _hash({"url": self._settings.base_url, **body})
        known = await asyncio.to_thread(self._kept, name)
        if known is not None and (verdict := read(known.text)) is not None:
            self.spent.tokens_before += known.tokens
            return Judged(verdict, None, known.text, cached=True)
        judged: Judged[T] | None = None
        for _ in range(self._settings.readings):
            answer = await self._ask(http, body)
            if isinstance(answer, Judged):
                return answer
            self.spent.tokens += answer.tokens
            if (verdict := read(answer.text)) is not None:
                await asyncio.to_thread(self._keep, name, body, answer)
                return Judged(verdict, None, answer.text)
            judged = Judged(None, Failure.UNPARSEABLE, answer.text)
        assert judged is not None, "a question is asked at least once"
        return judged

    async def _ask(self, http: httpx.AsyncClient, body: JsonDict) -> _Answer | Judged[Any]:
        """The judge's answer, or how the question failed."""
        settings = self._settings
        retry = Retry(settings.attempts, settings.first_wait_s, settings.longest_wait_s)

        async def send(left_s: float) -> Reply | NoReply:
            self.spent.tries += 1
            limit = max(min(left_s, settings.timeout_s), 0.001)
            try:
                async with asyncio.timeout(limit):
                    response = await http.post(
                        f"{settings.base_url}/chat/completions",
                        json=body,
                        timeout=httpx.Timeout(limit, connect=min(_CONNECT_S, limit)),
                    )
                    return reply(response, response.content)
            except TimeoutError:
                return NoReply("timeout")
            except httpx.RequestError as error:
                return no_reply(error)

        ended = await drive(exchange(retry, settings.give_up_s, self._clock, _BUSY), send)
        return self._read(ended)

    def _read(self, ended: Ended) -> _Answer | Judged[Any]:
        outcome = ended.outcome
        if isinstance(outcome, NoReply):
            kind = Failure.TIMEOUT if outcome.kind == "timeout" else Failure.UNREACHABLE
            words = outcome.words or "no answer in time"
            return Judged(None, kind, f"{words}, {ended.tries} tries")
        if outcome.status in _SETUP:
            raise ServiceError(
                f"evaluation.judge: {self._settings.base_url} {_SETUP[outcome.status]} "
                f"({outcome.status}, model {self._settings.model}): {self._words(outcome)}"
            )
        if outcome.status != 200:
            kind = _kind(outcome.status)
            what = f"{outcome.status}, {ended.tries} tries: {self._words(outcome)}"
            return Judged(None, kind, what)
        try:
            completion = json.loads(outcome.body)
            choice = completion["choices"][0]
            message = choice["message"]
            usage = completion.get("usage") or {}
            tokens = Tokens(
                int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
            )
            text, refusal = message.get("content"), message.get("refusal")
            if choice.get("finish_reason") == "content_filter" or refusal:
                self.spent.tokens += tokens
                return Judged(None, Failure.REFUSED, str(refusal or text or ""))
            if not isinstance(text, str):
                raise TypeError("no text in the message")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return Judged(None, Failure.MALFORMED, self._words(outcome))
        return _Answer(text, tokens)

    def _body(self, prompt: str) -> JsonDict:
        settings = self._settings
        body: JsonDict = {
            "model": settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": settings.max_tokens,
        }
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        return body

    def _kept(self, name: str) -> _Answer | None:
        if not self._cache.exists(name[:2], f"{name}.json"):
            return None
        kept = self._cache.read_json(name[:2], f"{name}.json")
        return _Answer(kept["answer"], Tokens(*kept["tokens"]))

    def _keep(self, name: str, body: JsonDict, answer: _Answer) -> None:
        tokens = [answer.tokens.prompt, answer.tokens.answer]
        value = {"request": body, "answer": answer.text, "tokens": tokens}
        self._cache.write_json(value, name[:2], f"{name}.json")

    def _words(self, outcome: Reply) -> str:
        """The start of an answer on one line, without the key: some endpoints repeat it."""
        text = " ".join(outcome.body[:2000].decode("utf-8", "replace").split())
        return (text.replace(self._key, "[key]") if self._key else text)[:300]


def read_key(settings: JudgeConfig) -> str | None:
    """The endpoint's key; None where it needs none.

    Raises:
        ConfigError: The variable or the file that is to hold it does not, or holds something else.
    """
    if settings.key_env is not None:
        key, where = os.environ.get(settings.key_env, ""), f"key_env: ${settings.key_env}"
        advice = "set it where the cluster's head was started, or name a file by key_file"
    elif settings.key_file is not None:
        key, where = read_text(settings.key_file), f"key_file: {settings.key_file}"
        advice = "write the key into it"
    else:
        return None
    key = key.strip()
    if not key:
        raise ConfigError(f"evaluation.judge.{where} holds no key here: {advice}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"evaluation.judge.{where}: one line of plain characters is a key")
    return key


def _kind(status: int) -> Failure:
    if status == 429:
        return Failure.RATE_LIMIT
    return Failure.SERVER_ERROR if status >= 500 else Failure.REFUSED


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
