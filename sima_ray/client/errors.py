"""What a caller of the critic's client may catch. Each is one line: what, where, what to do."""

from sima_ray.errors import ServiceError


class CriticError(ServiceError):
    """Base: no verdict.

    Attributes:
        message: The line itself, as `str(error)` gives it.
        status: The HTTP status; None when there was no answer, or the case was never sent.
        code: The service's name for it ("invalid_request", "overloaded", …), or ours ("unreachable", …).
        request_id: Under which the service's log has it, where there was an answer.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        code: str = "",
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, status, code, request_id)
        self.message, self.status, self.code, self.request_id = message, status, code, request_id

    def __str__(self) -> str:
        return self.message


class CaseRefused(CriticError):
    """The case can never be judged as it is: a bad image, too long, malformed. Not tried again."""


class TokenRefused(CriticError):
    """A token is missing or wrong. Not tried again."""


class CriticUnavailable(CriticError):
    """Nobody there, overloaded, or no answer in time, in spite of the tries: later it may work."""


class CriticFailed(CriticError):
    """The service failed, or what answered is not a critic."""
