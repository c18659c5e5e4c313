"""POPE: yes/no questions on whether an object is in an image (Li et al. 2023)."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sima_ray.errors import DataError

_SENTENCE = re.compile(r"[^.!?\n]*[^.!?\s][^.!?\n]*")
_UNDECIDED = re.compile(
    r"\b(?:not|cannot|can't|don't|unable to) (?:be )?(?:sure|certain|clear|know|say|tell)\b"
)
_WORD = re.compile(r"\b(?:(?P<yes>yes|yeah|yep)|(?P<no>no|not|none|nope|cannot|without|\w+n't))\b")
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


def parse_yes_no(text: str) -> bool | None:
    """What an answer says, by its first sentence: True for yes, False for no, None for neither.

    The first yes or negation decides ("No, there is not", "Yes, no doubt"); without either, a
    statement that something is there ("There is a dog") is a yes. "I am not sure" is neither.
    """
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


def pope(answers: Sequence[str], labels: Sequence[str]) -> PopeFigures:
    """Score answers against labels, one of each a question.

    Args:
        answers: What the policy wrote.
        labels: "yes" or "no", in any case.

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
    truth = [label.strip().lower() for label in labels]
    if wrong := sorted(set(truth) - {"yes", "no"}):
        raise DataError(f"POPE labels must be yes or no, not {', '.join(map(repr, wrong))}")
    said = [parse_yes_no(answer) for answer in answers]
    pairs = [(answer, label == "yes") for answer, label in zip(said, truth, strict=True)]
    hits = pairs.count((True, True))
    yes, positives = said.count(True), truth.count("yes")
    return PopeFigures(
        questions=len(pairs),
        accuracy=(hits + pairs.count((False, False))) / len(pairs),
        precision=hits / yes if yes else 0.0,
        recall=hits / positives if positives else 0.0,
        f1=2 * hits / (yes + positives) if yes + positives else 0.0,
        yes_share=yes / len(pairs),
        unparsed=said.count(None),
    )
