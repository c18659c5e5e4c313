"""A client of the critic service, for programs that have no Ray: `CriticClient` and `AsyncCriticClient`."""

from sima_ray.client.asynchronous import AsyncCriticClient
from sima_ray.client.blocking import CriticClient
from sima_ray.client.case import Case
from sima_ray.client.errors import (
    CaseRefused,
    CriticError,
    CriticFailed,
    CriticUnavailable,
    TokenRefused,
)
from sima_ray.client.results import ComparisonResult, CritiqueResult, OrderResult
from sima_ray.client.retry import Retry

__all__ = [
    "AsyncCriticClient",
    "Case",
    "CaseRefused",
    "ComparisonResult",
    "CriticClient",
    "CriticError",
    "CriticFailed",
    "CriticUnavailable",
    "CritiqueResult",
    "OrderResult",
    "Retry",
    "TokenRefused",
]
