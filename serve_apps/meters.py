"""The critic's counters, on Ray's own metrics endpoint beside Serve's."""

from ray.serve import metrics

from serve_apps.critic_models import CritiqueReport

SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300]
"""Upper bounds of the histogram."""


class ServeMeter:
    """`serve_apps.judging.Meter`, in a replica."""

    def __init__(self) -> None:
        self._critiques = metrics.Counter(
            "sima_critiques",
            description="Pairs of responses by the outcome of their critique.",
            tag_keys=("outcome",),
        )
        self._failures = metrics.Counter(
            "sima_critique_failures", description="Cases not judged.", tag_keys=("code",)
        )
        self._tokens = metrics.Counter("sima_critique_tokens", description="Tokens generated.")
        self._seconds = metrics.Histogram(
            "sima_critique_seconds", description="From a case to its report.", boundaries=SECONDS
        )

    def judged(self, report: CritiqueReport) -> None:
        for outcome in [c.outcome for c in report.comparisons] or [report.outcome]:
            self._critiques.inc(tags={"outcome": outcome})
        if report.tokens:  # a counter takes no zero
            self._tokens.inc(report.tokens)
        self._seconds.observe(report.seconds)

    def failed(self, code: str) -> None:
        self._failures.inc(tags={"code": code})
