"""What moves through a run: prompts, candidates, critiques, outcomes, pairs; the Arrow schema.

A row starts as a prompt and gains columns stage by stage (generate, critique, outcome). It never
disappears: it ends as a preference pair, as one of the counted outcomes, or in the quarantine with
its reason.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
# (pyarrow ships no types.)

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import pyarrow as pa

Order = Literal["12", "21"]
"""Which candidate is shown first: "12" shows candidate 0 as Response 1, "21" as Response 2."""

Choice = Literal[1, 2]
"""The response a critic chose, by the number it was shown under."""

ORDERS: tuple[Order, Order] = ("12", "21")


class Outcome(StrEnum):
    """How a row ended. Exactly one per row; the ledger counts them all."""

    PREFERRED_FIRST = "preferred_first"  # both orders chose candidate 0: a pair
    PREFERRED_SECOND = "preferred_second"  # both orders chose candidate 1: a pair
    INCONSISTENT = "inconsistent"  # the orders disagree: a tie
    INCONSISTENT_KEPT = "inconsistent_kept"  # they disagree, and the config keeps it: a pair
    GIVEN = "given"  # a pair that the run began with, in place of a prompt: a pair
    UNPARSEABLE = "unparseable"  # at least one critique has no verdict
    IDENTICAL = "identical"  # the candidates say the same: nothing to prefer, no critique asked
    LENGTH_POLICY = "length_policy"  # a verdict that the length policy left out of the pairs
    QUARANTINED = "quarantined"  # bad input, or a request that failed for good

    @property
    def is_pair(self) -> bool:
        """Whether the row became a preference pair."""
        return self.is_preference or self in (Outcome.INCONSISTENT_KEPT, Outcome.GIVEN)

    @property
    def is_preference(self) -> bool:
        """Whether both orders prefer the same candidate."""
        return self in (Outcome.PREFERRED_FIRST, Outcome.PREFERRED_SECOND)


class Quarantine(StrEnum):
    """Why a row was set aside."""

    MALFORMED_LINE = "malformed_line"  # not a JSON object
    MISSING_FIELD = "missing_field"
    EMPTY_FIELD = "empty_field"
    FIELD_TOO_LONG = "field_too_long"
    DUPLICATE_ID = "duplicate_id"
    MISSING_IMAGE = "missing_image"
    BROKEN_IMAGE = "broken_image"  # truncated or not a JPEG/PNG/WebP
    IMAGE_TOO_LARGE = "image_too_large"  # more pixels or bytes than allowed, by its header
    REQUEST_FAILED = "request_failed"  # the policy refused it: asking again is no use
    SERVICE_FAILED = "service_failed"  # beyond the retries; asked again when the run goes on


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about one image, with its ground-truth answer.

    Attributes:
        row_id: Stable and unique in a run: the input's own `id`, or a hash of the content.
        image: Path or URI, relative to the image root unless absolute.
        text: The question, without image placeholders.
        ground_truth: The answer that the critic may read; the policy never sees it.
        source: "FILE:LINE" of the input.
    """

    row_id: str
    image: str
    text: str
    ground_truth: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response of the policy.

    Attributes:
        text: The response.
        kind: "greedy" or "sampled".
        temperature, top_p, seed: The sampling that made it (seed None when greedy).
        tokens: Generated tokens, the end token included.
        logprob: Sum of the log-probabilities of these tokens (natural log) under the sampling-free
            policy; None where it is not known, or another token than the tokenizer's end of
            sequence ended the response.
        finish_reason: "stop" or "length".
        model_version: The policy version that answered.
    """

    text: str
    kind: str
    temperature: float
    top_p: float
    seed: int | None
    tokens: int
    logprob: float | None
    finish_reason: str
    model_version: str


@dataclass(frozen=True, slots=True)
class Critique:
    """One verdict, in one order.

    Attributes:
        order: See `Order`.
        raw: The critic's whole text.
        reason: The text before the verdict.
        choice: The response chosen, by the number it was shown under; None when unparseable.
        tokens: Generated tokens.
        prompt_tokens: Tokens of the prompt, the image's included.
        cached_tokens: Those of them that the engine had in its prefix cache.
        model_version: The policy version that judged.
        probability: That candidate 0 is better, whatever the order and the choice: how the model's
            own probabilities divide between the two verdicts; None where that is not known.
    """

    order: Order
    raw: str
    reason: str
    choice: Choice | None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    model_version: str = ""
    probability: float | None = None


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A training example for DPO: `chosen` is preferred to `rejected` for this prompt.

    Attributes:
        row_id, image, prompt: What was asked.
        chosen, rejected: The responses.
        chosen_from, rejected_from: Their candidates' kinds; "given" where another data set brought them.
        weight: Scales the pair's loss.
        chosen_logp, rejected_logp: Sums of the log-probabilities of the responses' tokens, the end
            included, as the policy generated them; None where that is not known, or the response
            was cut and has no end.
        chosen_tokens, rejected_tokens: How many tokens these are sums of; None where that is not
            known.
    """

    row_id: str
    image: str
    prompt: str
    chosen: str
    rejected: str
    chosen_from: str
    rejected_from: str
    weight: float = 1.0
    chosen_logp: float | None = None
    rejected_logp: float | None = None
    chosen_tokens: int | None = None
    rejected_tokens: int | None = None


PROMPT_FIELDS = [
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("image", pa.string()),
    pa.field("text", pa.string()),
    pa.field("ground_truth", pa.string()),
    pa.field("source", pa.string()),
]

CANDIDATE = pa.struct(
    [
        ("text", pa.string()),
        ("kind", pa.string()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("seed", pa.int64()),
        ("tokens", pa.int32()),
        ("logprob", pa.float64()),
        ("finish_reason", pa.string()),
        ("model_version", pa.string()),
    ]
)

CRITIQUE = pa.struct(
    [
        ("order", pa.string()),
        ("raw", pa.string()),
        ("reason", pa.string()),
        ("choice", pa.int8()),
        ("tokens", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("model_version", pa.string()),
        ("probability", pa.float64()),
    ]
)

ROW_SCHEMA = pa.schema(
    [
        *PROMPT_FIELDS,
        # Set as soon as a row is known to be bad; later stages pass such a row through untouched.
        pa.field("quarantine", pa.string()),
        pa.field("error", pa.string()),
        pa.field("candidates", pa.list_(CANDIDATE)),
        pa.field("critiques", pa.list_(CRITIQUE)),
        pa.field("prompt_version", pa.string()),
        pa.field("outcome", pa.string()),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.string()),
        pa.field("chosen_from", pa.string()),
        pa.field("rejected_from", pa.string()),
        pa.field("weight", pa.float64()),
        pa.field("chosen_logp", pa.float64()),
        pa.field("rejected_logp", pa.float64()),
        pa.field("chosen_tokens", pa.int32()),
        pa.field("rejected_tokens", pa.int32()),
    ]
)
"""The one schema of the preferences data set; columns that a stage has not reached yet are null, and
so are, as they are read, those that a file of an older version lacks, fields of structs among them."""

PAIR_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_from", pa.string()),
        ("rejected_from", pa.string()),
        ("weight", pa.float64()),
        ("chosen_logp", pa.float64()),
        ("rejected_logp", pa.float64()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
    ]
)
"""The columns of `PreferencePair`, as pairs.parquet has them."""
