"""From a case to its report: every pair of responses, in both orders, all at once."""

import asyncio
import logging
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from serve_apps.critic_models import (
    CaseError,
    ComparisonReport,
    Contest,
    CritiqueReport,
    CritiqueRequest,
    ErrorWords,
    OrderReport,
    in_words,
    invalid,
    to_contest,
)
from serve_apps.guard import ApiError
from serve_apps.remote_images import RemoteImages, RequestImages
from sima_ray.config import CriticConfig, ServiceConfig
from sima_ray.critic.findings import read_findings
from sima_ray.critic.judge import RequestRefused, critique
from sima_ray.critic.probability import mean_probability
from sima_ray.critic.prompt import CriticPrompt, Layout, load_examples
from sima_ray.critic.ranking import Comparison, rank, undisputed
from sima_ray.critic.vote import decide, identical
from sima_ray.errors import ServiceError
from sima_ray.ports import Policy
from sima_ray.records import Critique, Outcome

logger = logging.getLogger("ray.serve")

AT_ONCE = 16
"""Pairs of responses of one request, a batch or a case of many responses, that are judged at the same time."""


class Meter(Protocol):
    """Where verdicts are counted."""

    def judged(self, report: CritiqueReport) -> None:
        """A report that was given."""
        ...

    def failed(self, code: str) -> None:
        """A case that was not judged, by its error's code."""
        ...


class Judge:
    """Judges cases by the policy.

    Raises:
        ConfigError: The worked examples cannot be read.
    """

    def __init__(
        self,
        policy: Policy,
        config: CriticConfig,
        service: ServiceConfig,
        meter: Meter | None,
        images: RemoteImages,
    ) -> None:
        examples = load_examples(Path(config.examples)) if config.examples else load_examples()
        self._policy, self._config, self._service = policy, config, service
        self._meter, self._images = meter, images
        self._prompt = CriticPrompt(Layout(config.layout), examples)

    async def one(self, request: CritiqueRequest, max_tokens: int | None = None) -> CritiqueReport:
        """Judge one case.

        Args:
            request: The case.
            max_tokens: Of each critique, when that is fewer than configured.

        Raises:
            ApiError: It was not judged.
        """
        slots, images = asyncio.Semaphore(AT_ONCE), self._images.of_request()
        return await self._counted(request, self._deadline(), slots, images, max_tokens)

    async def batch(self, cases: Sequence[Any]) -> list[CritiqueReport | CaseError]:
        """Judge each case by itself; what is wrong with one is its own result."""
        deadline, slots = self._deadline(), asyncio.Semaphore(AT_ONCE)
        images = self._images.of_request()

        async def judged(case: Any) -> CritiqueReport | CaseError:
            try:
                return await self._counted(case, deadline, slots, images)
            except ApiError as error:
                return CaseError(error=ErrorWords(code=error.code, message=error.message))
            except Exception as error:  # a bug: it must not cost the others their results
                bug = failure(error)
                return CaseError(error=ErrorWords(code=bug.code, message=bug.message))

        return await asyncio.gather(*(judged(case) for case in cases))

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._service.request_timeout_s

    async def _counted(
        self,
        case: Any,
        deadline: float,
        slots: asyncio.Semaphore,
        images: RequestImages,
        max_tokens: int | None = None,
    ) -> CritiqueReport:
        try:
            report = await self._in_time(case, deadline, slots, images, max_tokens)
        except ApiError as error:
            if self._meter is not None:
                self._meter.failed(error.code)
            raise
        if self._meter is not None:
            self._meter.judged(report)
        return report

    async def _in_time(
        self,
        case: Any,
        deadline: float,
        slots: asyncio.Semaphore,
        images: RequestImages,
        max_tokens: int | None,
    ) -> CritiqueReport:
        """The report, or every failure as an ApiError."""
        try:
            request = CritiqueRequest.model_validate(case)
            async with asyncio.timeout_at(deadline):
                contest = await to_contest(request, self._service, images)
                return await self._judge(contest, slots, max_tokens)
        except ValidationError as error:
            raise invalid(in_words(error.errors())) from error
        except TimeoutError as error:
            raise ApiError(504, "timeout", "no verdict in time") from error
        except ExceptionGroup as group:
            raise failure(group.exceptions[0]) from group

    async def _judge(
        self, contest: Contest, slots: asyncio.Semaphore, max_tokens: int | None
    ) -> CritiqueReport:
        start = time.perf_counter()
        tokens = min(max_tokens or self._config.max_tokens, self._config.max_tokens)

        async def ask(pair: tuple[int, int]) -> list[Critique]:
            async with slots:
                return await critique(self._policy, self._prompt, contest.case(*pair), tokens)

        pairs = list(combinations(range(len(contest.responses)), 2))
        async with asyncio.TaskGroup() as group:
            tasks = {
                pair: group.create_task(ask(pair))
                for pair in pairs
                if not identical(*contest.case(*pair).responses)
            }
        critiques = {pair: tasks[pair].result() if pair in tasks else [] for pair in pairs}
        return self._report(contest, critiques, start)

    def _report(
        self, contest: Contest, critiques: dict[tuple[int, int], list[Critique]], start: float
    ) -> CritiqueReport:
        reports = [compared(contest, *pair, found) for pair, found in critiques.items()]
        comparisons = [_comparison(report) for report in reports]
        count, every = len(contest.responses), [c for found in critiques.values() for c in found]
        best = undisputed(count, comparisons)
        agreeing = sum(report.consistent for report in reports)
        first = reports[0]
        return CritiqueReport(
            winner=None if best is None else best + 1,
            consistent=agreeing == len(reports),
            outcome=first.outcome if count == 2 else _outcome(best, reports),
            probability=first.probability if count == 2 else None,
            ranking=[index + 1 for index in rank(count, comparisons)],
            agreement=agreeing / len(reports),
            orders=first.orders if count == 2 else [],
            comparisons=[] if count == 2 else reports,
            model_version="+".join(sorted({c.model_version for c in every})),
            prompt_version=self._prompt.version,
            tokens=sum(c.tokens for c in every),
            prompt_tokens=sum(c.prompt_tokens for c in every),
            cached_tokens=sum(c.cached_tokens for c in every),
            seconds=round(time.perf_counter() - start, 4),
        )


def compared(
    contest: Contest, first: int, second: int, critiques: Sequence[Critique]
) -> ComparisonReport:
    """The verdict on two responses, by their indices, over both orders (none where they say the same)."""
    outcome = decide(contest.case(first, second).responses, critiques)
    same = outcome is Outcome.IDENTICAL
    winners = {Outcome.PREFERRED_FIRST: first + 1, Outcome.PREFERRED_SECOND: second + 1}
    return ComparisonReport(
        responses=(first + 1, second + 1),
        winner=winners.get(outcome),
        consistent=outcome.is_preference or same,
        outcome=outcome.value,
        probability=0.5 if same else mean_probability(c.probability for c in critiques),
        orders=[
            OrderReport(
                order=c.order,
                reason=c.reason,
                findings=read_findings(c.reason),
                raw=c.raw,
                choice=c.choice,
                probability=c.probability,
            )
            for c in critiques
        ],
    )


def failure(error: BaseException) -> ApiError:
    """What a caller may know of why the policy gave no answer."""
    match error:
        case RequestRefused():
            return invalid(str(error))
        case ServiceError() | TimeoutError():
            return ApiError(
                503,
                "unavailable",
                "the policy does not answer now; try again",
                {"Retry-After": "2"},
            )
        case _:
            logger.error("A case failed", exc_info=error)
            return ApiError(500, "internal", "the service failed; see its log")


def _comparison(report: ComparisonReport) -> Comparison:
    first, second = report.responses
    winner = None if report.winner is None else report.winner - 1
    return Comparison(first - 1, second - 1, winner, report.probability)


def _outcome(best: int | None, reports: Sequence[ComparisonReport]) -> str:
    """In a word, for more than two responses."""
    if all(report.outcome == Outcome.IDENTICAL for report in reports):
        return Outcome.IDENTICAL.value
    return "undecided" if best is None else "preferred"
