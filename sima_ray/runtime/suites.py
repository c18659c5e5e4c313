"""The suites beside CHAIR: what each asks, how an answer is scored, and the figures of scored rows.

A suite's rows are kept as JSON lines, an object a question: `row_id`, `image`, `text`, `response`,
`failure` (null, or why it has no score) and what was scored. All figures follow from the rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from sima_ray.config import EvaluationConfig, RunConfig
from sima_ray.config.evaluation import SuiteName
from sima_ray.data import benchmarks
from sima_ray.data.benchmarks import Question, image_key
from sima_ray.data.locations import load_image
from sima_ray.errors import DataError
from sima_ray.images import ImageProblem, check_image
from sima_ray.metrics import amber, halbench, mementos, mmhal
from sima_ray.metrics.bootstrap import Ratio
from sima_ray.metrics.chair import CaptionScore, score_caption
from sima_ray.metrics.pope import parse_labels, parse_yes_no, yes_no_ratios
from sima_ray.ports import JsonDict
from sima_ray.records import Quarantine
from sima_ray.runtime.evaluation import (
    check_annotated,
    image_loader,
    read_truth,
    read_vocabulary,
)


@dataclass(frozen=True)
class Judging:
    """How a suite's answers are judged.

    Attributes:
        prompt: What the judge is asked about a response.
        read: What its answer says, as the row keeps it; None where that cannot be read.
    """

    prompt: Callable[[Question, str], str]
    read: Callable[[str], JsonDict | None]


@dataclass(frozen=True)
class Suite:
    """A benchmark, read and ready to be asked.

    Attributes:
        questions: What is asked.
        load: The image of a question, checked.
        max_tokens: Of an answer.
        score: What a row keeps beside question and response.
        judging: For suites whose score is a judge's.
    """

    questions: list[Question]
    load: Callable[[Question], bytes]
    max_tokens: int
    score: Callable[[Question, str], JsonDict]
    judging: Judging | None = None


def open_suite(name: SuiteName, settings: EvaluationConfig, run: RunConfig) -> Suite:
    """Read a suite's files.

    Raises:
        DataError: A file that cannot be used.
    """
    suite = _OPEN[name](settings, run)
    seen = Counter(question.row_id for question in suite.questions)
    if twice := [row_id for row_id, count in seen.items() if count > 1]:
        raise DataError(f"evaluation.{name}: has {twice[0]} twice ({len(twice)} such)")
    return suite


def columns(name: SuiteName, rows: Iterable[JsonDict]) -> dict[str, Ratio]:
    """The columns of a suite's figures, over the rows that have a score."""
    return _COLUMNS[name]([row for row in rows if row["failure"] is None])


def counts(name: SuiteName, rows: Iterable[JsonDict]) -> dict[str, int]:
    """How many questions have a score, of the figures that are of one type of them."""
    if name != "mmhal":
        return {}
    kinds = Counter(row["kind"] for row in rows if row["failure"] is None)
    return {f"score.{kind}": kinds[kind] for kind in mmhal.TYPES if kinds[kind]}


def labels(
    name: SuiteName, figures: Iterable[str], counted: Sequence[Mapping[str, int]] = ()
) -> dict[str, str]:
    """The figures that a table shows, in order, with their labels; all others are kept, not shown.

    Args:
        name: The suite.
        figures: Those that there are.
        counted: `counts` of each side of the table, put to the labels.
    """
    if name != "pope":
        there = set(figures)
        return {
            figure: label + _questions(figure, counted)
            for figure, label in _LABELS[name].items()
            if figure in there
        }
    shown: dict[str, str] = {}
    for figure in figures:
        file, _, what = figure.rpartition(".")
        if what in _POPE_LABELS:
            shown[figure] = f"{file.replace('_', ' ')} {_POPE_LABELS[what]}"
    return shown


def _questions(figure: str, counted: Sequence[Mapping[str, int]]) -> str:
    """What a label adds on the questions of a figure that is of one type: the same number is told once."""
    if not any(figure in side for side in counted):
        return ""
    numbers = dict.fromkeys(side.get(figure, 0) for side in counted if side)
    return f" (n = {' → '.join(f'{number:,}' for number in numbers)})"


def _open_pope(settings: EvaluationConfig, run: RunConfig) -> Suite:
    assert settings.images is not None, "POPE has images"
    questions: list[Question] = []
    for location in settings.pope:
        file = location.rpartition("/")[2].removesuffix(".jsonl").removesuffix(".json")
        found = benchmarks.read_questions(location, "label")
        parse_labels([question.expected for question in found])
        questions += [Question(f"{file}/{q.row_id}", q.image, q.text, q.expected) for q in found]

    def score(question: Question, response: str) -> JsonDict:
        said = parse_yes_no(response, settings.pope_rule)
        return {"said": said, "label": parse_labels([question.expected])[0]}

    load = image_loader(settings.images, run)
    return Suite(questions, load, settings.max_tokens, score)


def _pope_columns(rows: Sequence[JsonDict]) -> dict[str, Ratio]:
    ratios: dict[str, Ratio] = {}
    for file in dict.fromkeys(row["row_id"].rpartition("/")[0] for row in rows):
        part = [row for row in rows if row["row_id"].rpartition("/")[0] == file]
        found = yes_no_ratios(
            [row["said"] for row in part], [row["label"] for row in part], positive=True
        )
        ratios |= {f"{file}.{figure}": ratio for figure, ratio in found.items()}
    return ratios


def _open_amber(settings: EvaluationConfig, run: RunConfig) -> Suite:
    section = settings.amber
    assert section is not None, "AMBER has a section"
    similar = benchmarks.read_json(section.similar) if section.similar else None
    words = amber.AmberWords.of(
        benchmarks.read_json(f"{section.data}/relation.json"),
        benchmarks.read_text(f"{section.data}/safe_words.txt").splitlines(),
        similar,
    )
    found = [
        question
        for part in section.parts
        for question in benchmarks.read_amber(section.data, part)[: section.limit]
    ]
    for question in found:
        if question.kind == "generative":  # a word without associations is found before it costs
            words.score("", question.truth, question.expected)
    asked = {str(question.id): question for question in found}

    def score(question: Question, response: str) -> JsonDict:
        about = asked[question.row_id]
        if about.kind == "generative":
            return {
                "kind": about.kind,
                **asdict(words.score(response, about.truth, about.expected)),
            }
        label = parse_labels(about.truth)[0]
        return {"kind": about.kind, "said": parse_yes_no(response), "label": label}

    questions = [
        Question(str(q.id), q.image, q.text + ("" if q.kind == "generative" else section.suffix))
        for q in found
    ]
    return Suite(questions, image_loader(section.images, run), section.max_tokens, score)


def _amber_columns(rows: Sequence[JsonDict]) -> dict[str, Ratio]:
    told = [row for row in rows if row["kind"] == "generative"]
    asked = [row for row in rows if row["kind"] != "generative"]
    names = amber.DescriptionScore.__slots__
    ratios: dict[str, Ratio] = {}
    if told:
        ratios |= amber.generative_ratios(
            [amber.DescriptionScore(**{name: row[name] for name in names}) for row in told]
        )
    if asked:
        ratios |= amber.discriminative_ratios(
            [row["kind"] for row in asked],
            [row["said"] for row in asked],
            [row["label"] for row in asked],
        )
    return ratios


def _open_halbench(settings: EvaluationConfig, run: RunConfig) -> Suite:
    section = settings.halbench
    assert section is not None, "Object HalBench has a section"
    found = benchmarks.read_halbench(section.questions)[: section.limit]
    instances = section.instances or settings.instances
    assert instances is not None, "Object HalBench has annotations"
    vocabulary = read_vocabulary(section.synonyms or settings.chair_synonyms)
    truth = read_truth(instances, section.captions or settings.captions, vocabulary)
    check_annotated([question.image for question in found], truth, instances)
    encoded = {question.image: question for question in found}

    def inside(question: Question) -> bytes:
        data = encoded[question.image].decoded()
        check_image(data, run.data.max_image_pixels)
        return data

    def score(question: Question, response: str) -> JsonDict:
        return asdict(score_caption(response, truth[image_key(question.image)], vocabulary))

    questions = [Question(str(q.coco_id), q.image, q.text) for q in found]
    load = image_loader(section.images, run) if section.images else inside
    return Suite(questions, load, section.max_tokens, score)


def _halbench_columns(rows: Sequence[JsonDict]) -> dict[str, Ratio]:
    names = CaptionScore.__slots__
    return halbench.halbench_ratios(
        [CaptionScore(**{name: row[name] for name in names}) for row in rows]
    )


def _open_mmhal(settings: EvaluationConfig, run: RunConfig) -> Suite:
    section = settings.mmhal
    assert section is not None, "MMHal-Bench has a section"
    found = benchmarks.read_mmhal(section.questions)[: section.limit]
    # An image can have several questions, so rows are numbered.
    items = {f"{number}-{item.image_id}": item for number, item in enumerate(found, 1)}

    def load(question: Question) -> bytes:
        names = benchmarks.mmhal_images(items[question.row_id])
        return _first_image(section.images, names, run.data.max_image_pixels)

    def read(text: str) -> JsonDict | None:
        rating = mmhal.read_rating(text)
        return None if rating is None else {"rating": rating}

    questions = [
        Question(row_id, item.image_id, item.question, item.answer)
        for row_id, item in items.items()
    ]
    return Suite(
        questions,
        load,
        section.max_tokens,
        score=lambda question, _: {"kind": items[question.row_id].kind},
        judging=Judging(
            lambda question, response: mmhal.mmhal_prompt(items[question.row_id], response), read
        ),
    )


def _mmhal_columns(rows: Sequence[JsonDict]) -> dict[str, Ratio]:
    return mmhal.mmhal_ratios([row["kind"] for row in rows], [row["rating"] for row in rows])


def _open_mementos(settings: EvaluationConfig, run: RunConfig) -> Suite:
    section = settings.mementos
    assert section is not None, "Mementos has a section"
    found = [
        item
        for location in section.descriptions
        for item in benchmarks.read_mementos(location)[: section.limit]
    ]

    def read(text: str) -> JsonDict | None:
        keywords = mementos.read_keywords(text)
        return None if keywords is None else asdict(keywords)

    questions = [
        Question(f"{item.domain}/{item.image}", item.image, section.prompt, item.description)
        for item in found
    ]
    return Suite(
        questions,
        image_loader(section.images, run),
        section.max_tokens,
        score=lambda question, _: {"domain": question.row_id.partition("/")[0]},
        judging=Judging(
            lambda question, response: mementos.mementos_prompt(question.expected, response), read
        ),
    )


def _mementos_columns(rows: Sequence[JsonDict]) -> dict[str, Ratio]:
    names = mementos.Keywords.__slots__
    return mementos.mementos_ratios(
        [mementos.Keywords(**{name: row[name] for name in names}) for row in rows]
    )


def _first_image(root: str, names: Sequence[str], max_pixels: int) -> bytes:
    """The first of some names that is there; where none is, the problem of the first."""
    missing: ImageProblem | None = None
    for name in names:
        try:
            return load_image(root, name, max_pixels)
        except ImageProblem as problem:
            if problem.reason is not Quarantine.MISSING_IMAGE:
                raise
            missing = missing or problem
    assert missing is not None, "an image has a name"
    raise missing


_OPEN: dict[SuiteName, Callable[[EvaluationConfig, RunConfig], Suite]] = {
    "pope": _open_pope,
    "amber": _open_amber,
    "halbench": _open_halbench,
    "mmhal": _open_mmhal,
    "mementos": _open_mementos,
}
_COLUMNS: dict[SuiteName, Callable[[Sequence[JsonDict]], dict[str, Ratio]]] = {
    "pope": _pope_columns,
    "amber": _amber_columns,
    "halbench": _halbench_columns,
    "mmhal": _mmhal_columns,
    "mementos": _mementos_columns,
}
TITLES: dict[SuiteName, str] = {
    "chair": "CHAIR",
    "pope": "POPE",
    "amber": "AMBER",
    "halbench": "Object HalBench, by rules",
    "mmhal": "MMHal-Bench",
    "mementos": "Mementos",
}
_POPE_LABELS = {"accuracy": "accuracy ↑", "f1": "F1 ↑", "yes_share": "share of yes"}
_LABELS: dict[SuiteName, dict[str, str]] = {
    "amber": {
        "chair": "CHAIR ↓",
        "cover": "Cover ↑",
        "hal": "Hal ↓",
        "cog": "Cog ↓",
        "length": "words a description",
        "all.accuracy": "accuracy ↑",
        "all.precision": "precision of no ↑",
        "all.recall": "recall of no ↑",
        "all.f1": "F1 of no ↑",
        "all.yes_share": "share of yes",
        **{f"{part}.f1": f"{part} F1 ↑" for part in ("existence", "attribute", "relation")},
    },
    "halbench": {
        "response": "response ↓",
        "mention": "mention ↓",
        "recall": "recall ↑",
        "objects": "objects a description",
        "length": "words a description",
    },
    "mmhal": {
        "score": "score ↑",
        "hallucination": "hallucination ↓",
        **{f"score.{kind}": f"{kind} ↑" for kind in mmhal.TYPES},
    },
    "mementos": {
        f"{what}.{figure}": f"{what} {label} ↑"
        for what in ("object", "behaviour")
        for figure, label in (("recall", "recall"), ("precision", "precision"), ("f1", "F1"))
    },
}
