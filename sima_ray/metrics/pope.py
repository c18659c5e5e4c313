"""POPE: yes/no questions on whether an object is in an image (Li et al. 2023).

Answers are read by one of three rules, which agree wherever the answer is the word itself:

- `first_sentence`: what the first sentence says; one that says neither is counted apart, and wrong.
- `published`: as POPE's own script: no where the first sentence has the word no, No or not, else yes, so
  that an empty answer is a yes.
- `exact`: as lmms-eval: the whole answer is the word yes or no, or else neither ("Yes." is neither).
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from sima_ray.errors import DataError
from sima_ray.metrics.bootstrap import Ratio

Rule = Literal["first_sentence", "published", "exact"]

_SENTENCE = re.compile(r"[^.!?\n]*[^.!?\s][^.!?\n]*")
_UNDECIDED = re.compile(
    r"\b(?:not|cannot|can't|don't|unable to) (?:be )?(?:sure|certain|clear|know|say|tell)\b"
)
_WORD = re.compile(
    r"\b(?:(?P<yes>yes|yeah|yep)"
    r"|(?P<no>no|not|none|nope|nothing|neither|nobody|never|zero|cannot|without|\w+n't))\b"
)
_STATED = re.compile(
    r"^(?:there (?:is|are)|i (?:can )?see|(?:the|this) (?:image|picture) (?:shows|has|contains))\b"
)


@dataclass(frozen=True, slots=True)
class PopeFigures:
    """Figures over questions; "yes" is the positive class.

    Attributes:
        questions: How many were asked.
        accuracy: Share answered right; an answer that is neither yes nor no is wrong.
        precision, recall, f1: Of "yes"; 0 where nothing is below the line.
        yes_share: Share of the answers that are yes.
        unparsed: Answers that are neither yes nor no.
    """

    questions: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_share: float
    unparsed: int

    def to_json(self) -> dict[str, float]:
        """The figures as plain values."""
        return asdict(self)


def parse_yes_no(text: str, rule: Rule = "first_sentence") -> bool | None:
    """What an answer says by a rule: True for yes, False for no, None for neither.

    By its first sentence: the first yes or negation decides ("No, there is not", "Yes, no doubt");
    without either, a statement that something is there ("There is a dog") is a yes. "I am not sure" is
    neither.
    """
    if rule == "exact":
        return {"yes": True, "no": False}.get(text.lower().strip())
    if rule == "published":
        words = text.partition(".")[0].replace(",", "").split(" ")
        return {"No", "no", "not"}.isdisjoint(words)
    sentence = _SENTENCE.search(text.lower().replace("’", "'"))
    if sentence is None:
        return None
    answer = sentence.group().strip()
    word = _WORD.search(answer)
    explicit = word is not None and word.group() in ("yes", "no")
    if not explicit and _UNDECIDED.search(answer):
        return None
    if word is not None:
        return word["yes"] is not None
    return True if _STATED.match(answer) else None


def pope(
    answers: Sequence[str], labels: Sequence[str], rule: Rule = "first_sentence"
) -> PopeFigures:
    """Score answers against labels, one of each a question.

    Args:
        answers: What the policy wrote.
        labels: "yes" or "no", in any case.
        rule: How answers are read.

    Raises:
        DataError: Not one label an answer, no questions at all, or a label that is neither yes nor
            no.
    """
    if len(answers) != len(labels):
        raise DataError(
            f"POPE needs a label an answer: {len(answers)} answers, {len(labels)} labels"
        )
    if not answers:
        raise DataError("POPE has no questions")
    said = [parse_yes_no(answer, rule) for answer in answers]
    ratios = yes_no_ratios(said, parse_labels(labels), positive=True)
    return PopeFigures(
        questions=len(said),
        unparsed=said.count(None),
        **{name: ratio.value for name, ratio in ratios.items()},
    )


def parse_labels(labels: Sequence[str]) -> list[bool]:
    """Labels as truths.

    Raises:
        DataError: A label that is neither yes nor no.
    """
    truth = [label.strip().lower() for label in labels]
    if wrong := sorted(set(truth) - {"yes", "no"}):
        raise DataError(f"labels must be yes or no, not {', '.join(map(repr, wrong))}")
    return [label == "yes" for label in truth]


def yes_no_ratios(
    said: Sequence[bool | None], truth: Sequence[bool], *, positive: bool
) -> dict[str, Ratio]:
    """The columns, a row a question, of accuracy, precision, recall, f1 and yes_share.

    Args:
        said: What each answer says; None, neither yes nor no, is wrong and in neither class.
        truth: What is right.
        positive: The class that precision, recall and f1 are of. POPE's is yes; AMBER's is no, the
            answer that shows a hallucination was withstood.
    """
    pairs = list(zip(said, truth, strict=True))
    hits = [float(answer == right == positive) for answer, right in pairs]
    claimed = [float(answer == positive) for answer in said]
    actual = [float(right == positive) for right in truth]
    return {
        "accuracy": Ratio.mean([float(answer == right) for answer, right in pairs]),
        "precision": Ratio.of(hits, claimed),
        "recall": Ratio.of(hits, actual),
        "f1": Ratio.of(
            [2 * hit for hit in hits], [a + b for a, b in zip(claimed, actual, strict=True)]
        ),
        "yes_share": Ratio.mean([float(answer is True) for answer in said]),
    }
