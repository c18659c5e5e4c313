"""From the end of an exchange to a result or an error; no network here."""

import json
from collections.abc import Mapping
from typing import Any

from sima_ray.client.errors import (
    CaseRefused,
    CriticError,
    CriticFailed,
    CriticUnavailable,
    TokenRefused,
)
from sima_ray.client.results import CritiqueResult, read_result
from sima_ray.client.retry import Ended, NoReply, Reply
from sima_ray.client.settings import Endpoint

REFUSED = frozenset({400, 413, 422})
"""Statuses that are about the case."""

BATCH_CODES: dict[str, type[CriticError]] = {
    "invalid_request": CaseRefused,
    "too_large": CaseRefused,
    "unavailable": CriticUnavailable,
    "overloaded": CriticUnavailable,
    "timeout": CriticUnavailable,
}
"""Of a case in a batch, whose error has a code but no status of its own."""


def result_of(ended: Ended, endpoint: Endpoint) -> CritiqueResult:
    """The verdict on one case.

    Raises:
        CriticError: There is none.
    """
    answer, request_id = json_of(ended, endpoint)
    return read_result(answer, request_id)


def results_of(ended: Ended, endpoint: Endpoint, cases: int) -> list[CritiqueResult | CriticError]:
    """The verdicts on a batch, in its order, each with its own error.

    Raises:
        CriticError: The batch as a whole failed.
    """
    answer, request_id = json_of(ended, endpoint)
    found = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != cases:
        raise CriticFailed(
            f"{endpoint.url}: the answer to a batch does not have its {cases} results",
            code="unreadable_answer",
            request_id=request_id,
        )
    return [_item(part, request_id) for part in found]


def _item(part: Any, request_id: str | None) -> CritiqueResult | CriticError:
    if not isinstance(part, dict) or "error" not in part:
        try:
            return read_result(part, request_id)
        except CriticFailed as error:
            return error
    code, message, own_id = _told(part)
    kind = BATCH_CODES.get(code, CriticFailed)
    return kind(message or code or "failed", None, code, own_id or request_id)


def json_of(ended: Ended, endpoint: Endpoint) -> tuple[Any, str | None]:
    """The JSON of a 200, and the request's id.

    Raises:
        CriticError: Anything else.
    """
    outcome = ended.outcome
    if not isinstance(outcome, Reply) or outcome.status != 200:
        raise error_of(ended, endpoint)
    request_id = outcome.headers.get("x-request-id")
    try:
        return json.loads(outcome.body), request_id
    except (ValueError, RecursionError) as error:
        raise CriticFailed(
            f"{endpoint.url}: what answers there is no critic: its answer is no JSON",
            200,
            "unreadable_answer",
            request_id,
        ) from error


def error_of(ended: Ended, endpoint: Endpoint) -> CriticError:
    """What went wrong, in one line: what, where, what to do."""
    if isinstance(ended.outcome, NoReply):
        return _no_reply(ended, ended.outcome, endpoint)
    status, headers = ended.outcome.status, ended.outcome.headers
    try:
        code, message, request_id = _told(json.loads(ended.outcome.body))
    except (ValueError, RecursionError):
        code, message, request_id = "", "", None
    about = (status, code or "http_error", request_id or headers.get("x-request-id"))
    where = endpoint.url
    if status in (401, 403):
        todo = "give the critic's own token in $SIMA_CRITIC_TOKEN or a token file"
        if endpoint.token is None:
            return TokenRefused(
                f"{where}: the critic needs a token, and none was found: {todo}", *about
            )
        return TokenRefused(f"{where}: the critic refuses {_name(endpoint.source)}: {todo}", *about)
    if status in REFUSED:
        return CaseRefused(message or f"{where}: the case was refused with {status}", *about)
    if status in (429, 503):
        words = message or "not available now"
        return CriticUnavailable(
            f"{where}: {words} ({_effort(ended)}): try again later, or give it more time", *about
        )
    if status == 504:
        return CriticUnavailable(
            f"{where}: the critic had no verdict within its own time limit: try again when it is "
            "less busy, or raise policy.service.request_timeout_s",
            *about,
        )
    if status >= 500:
        return CriticFailed(
            f"{where}: the critic failed with {status} ({_effort(ended)}): its log has request "
            f"{about[2] or 'unnamed'}",
            *about,
        )
    return CriticFailed(
        f"{where}: answered {status}{f' ({message})' if message else ''}: is the URL a critic's, and of "
        "this version?",
        *about,
    )


def _no_reply(ended: Ended, outcome: NoReply, endpoint: Endpoint) -> CriticUnavailable:
    if outcome.kind == "timeout":
        return CriticUnavailable(
            f"{endpoint.url}: no answer in time ({_effort(ended)}): give it more, or see whether it is busy",
            code="timeout",
        )
    if outcome.kind == "refused":
        return CriticUnavailable(
            f"{endpoint.url}: no critic can be reached there ({outcome.words}; {_effort(ended)}): is it up? "
            "sima serve CONFIG starts one; $SIMA_CRITIC_URL names another",
            code="unreachable",
        )
    return CriticUnavailable(
        f"{endpoint.url}: the connection broke ({outcome.words}; {_effort(ended)}): try again",
        code="unreachable",
    )


def _told(answer: Any) -> tuple[str, str, str | None]:
    """Code, message and request id of `{"error": {…}}`; empty where there are none."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    if not isinstance(error, Mapping):
        return "", "", None
    code, message, request_id = (error.get(key) for key in ("code", "message", "request_id"))
    return (
        code if isinstance(code, str) else "",
        " ".join(message.split()) if isinstance(message, str) else "",
        request_id if isinstance(request_id, str) else None,
    )


def _effort(ended: Ended) -> str:
    tries = "1 try" if ended.tries == 1 else f"{ended.tries} tries"
    return f"{tries} in {ended.seconds:.1f} s"


def _name(source: str) -> str:
    return source if source.startswith("the token") else f"the token of {source}"
