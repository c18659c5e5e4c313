"""Readers of the benchmarks' published files: what is asked, about which image, and what is right.

Whatever a file has that cannot be used is an error that names the file and the entry: a benchmark is
asked whole, or it is another one.
"""

import base64
import binascii
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from sima_ray.data.locations import open_location
from sima_ray.errors import DataError, why
from sima_ray.metrics.mmhal import TYPES, MMHalItem

T = TypeVar("T")

_COCO_PREFIX = re.compile(r"^COCO_(?:train|val)2014_")


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask about one image."""

    row_id: str
    image: str
    text: str
    expected: str = ""


def read_text(location: str) -> str:
    """A text file at any location.

    Raises:
        DataError: It cannot be read.
    """
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{location}: cannot be read: {why(error)}") from error


def read_json(location: str) -> Any:
    """The value in a JSON file at any location.

    Raises:
        DataError: It cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(location))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{location}: cannot be read: {why(error)}") from error


def image_key(name: str) -> str:
    """What all of COCO's names of one image have in common: `000000000009.jpg`."""
    return _COCO_PREFIX.sub("", name.rpartition("/")[2])


def read_questions(location: str, expected: str) -> list[Question]:
    """A JSON-lines file of questions, as POPE's are; `expected` names the field with the right answer.

    Raises:
        DataError: The file cannot be read, or a line lacks a field; names the line.
    """

    def question(number: int, row: Any) -> Question:
        row_id = str(row.get("id", row.get("question_id", number)))
        return Question(row_id, row["image"], row["text"], row[expected])

    return _entries(location, _json_lines(location), question)


@dataclass(frozen=True, slots=True)
class AmberQuestion:
    """One of AMBER's questions.

    Attributes:
        id: Its number, the same in queries and annotations.
        image, text: What is asked, about which image.
        kind: The annotated type: "generative", "discriminative-hallucination", …
        truth: Annotated objects, or ("yes",) or ("no",).
        expected: Of a generative one: objects that are absent and likely to be made up.
    """

    id: int
    image: str
    text: str
    kind: str
    truth: tuple[str, ...]
    expected: tuple[str, ...] = ()


def read_amber(folder: str, part: str) -> list[AmberQuestion]:
    """The questions of one part of AMBER with their annotations.

    Args:
        folder: AMBER's `data` folder; the queries are in its `query`.
        part: "generative", "existence", "attribute" or "relation".

    Raises:
        DataError: A file cannot be read, or has two entries of one id; or a question has no annotation that
            fits it.
    """
    name = part if part == "generative" else f"discriminative-{part}"
    queries, annotations = f"{folder}/query/query_{name}.json", f"{folder}/annotations.json"
    found: dict[int, tuple[str, Any, Any]] = {}
    asked = set[int]()

    def annotation(_: int, row: Any) -> None:
        number = int(row["id"])
        if number in found:
            raise ValueError(f"a second annotation of {number}")
        found[number] = (str(row["type"]), row["truth"], row.get("hallu", []))

    def question(_: int, row: Any) -> AmberQuestion:
        number = int(row["id"])
        kind, truth, hallu = found[number]
        generative = part == "generative"
        if number in asked:
            raise ValueError(f"a second question {number}")
        asked.add(number)
        if (kind == "generative") != generative:
            raise ValueError(f"annotated as {kind}")
        if not generative and truth not in ("yes", "no"):
            raise ValueError(f"its truth is {truth!r}, neither yes nor no")
        return AmberQuestion(
            id=number,
            image=_text(row["image"]),
            text=_text(row["query"]),
            kind=kind,
            truth=_words(truth) if generative else (truth,),
            expected=_words(hallu),
        )

    _entries(annotations, _array(annotations), annotation)
    return _entries(queries, _array(queries), question)


@dataclass(frozen=True, slots=True)
class HalBenchQuestion:
    """One of Object HalBench's questions; `encoded` is the image itself, in base 64, where the file has it."""

    coco_id: int
    text: str
    encoded: str

    @property
    def image(self) -> str:
        """The image's name in COCO."""
        return f"{self.coco_id:012d}.jpg"

    def decoded(self) -> bytes:
        """The image's bytes.

        Raises:
            DataError: The file has none, or not in base 64.
        """
        try:
            data = base64.b64decode(self.encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"image {self.coco_id}: not in base 64: {error}") from error
        if not data:
            raise DataError(
                f"image {self.coco_id}: not in the file of questions: give evaluation.halbench.images"
            )
        return data


def read_halbench(location: str) -> list[HalBenchQuestion]:
    """Object HalBench's JSON lines: image_id, question, and image in base 64.

    Raises:
        DataError: The file cannot be read, or a line lacks a field; names the line.
    """
    return _entries(
        location,
        _json_lines(location),
        lambda _, row: HalBenchQuestion(
            int(row["image_id"]), _text(row["question"]), str(row.get("image") or "")
        ),
    )


def read_mmhal(location: str) -> list[MMHalItem]:
    """MMHal-Bench's response_template.json.

    Raises:
        DataError: The file cannot be read, or an entry lacks a field or has an unknown type.
    """

    def item(_: int, row: Any) -> MMHalItem:
        if row["question_type"] not in TYPES:
            raise ValueError(
                f"question_type {row['question_type']!r} is none of {', '.join(TYPES)}"
            )
        return MMHalItem(
            image_id=_text(row["image_id"]),
            image_src=str(row.get("image_src") or ""),
            question=_text(row["question"]),
            answer=_text(row["gt_answer"]),
            contents=_words(row["image_content"]),
            kind=row["question_type"],
        )

    return _entries(location, _array(location), item)


def mmhal_images(item: MMHalItem) -> list[str]:
    """The names that an item's image may have in a folder: its URL's last part, or its id."""
    leaf = unquote(urlsplit(item.image_src).path).rpartition("/")[2]
    return [
        *([leaf] if leaf else []),
        *(f"{item.image_id}.{end}" for end in ("jpg", "png", "jpeg")),
    ]


@dataclass(frozen=True, slots=True)
class MementosItem:
    """A sequence of images, in one file, and a person's description of it.

    Attributes:
        image: Name of the file.
        description: The person's.
        domain: "dl" (daily life), "robo" or "cmc" (comics), by the name of the list.
    """

    image: str
    description: str
    domain: str


def read_mementos(location: str) -> list[MementosItem]:
    """One of Mementos' lists: CSV with image_name (in one of them: image) and description.

    Raises:
        DataError: The file cannot be read, or a row lacks a field.
    """
    domain = location.rpartition("/")[2].removesuffix(".csv").removesuffix("_description")
    rows = csv.DictReader(io.StringIO(read_text(location), newline=""), strict=True)

    def numbered() -> Iterator[tuple[int, Any]]:
        try:
            for row in rows:
                yield rows.line_num, row
        except csv.Error as error:
            raise DataError(f"{location}:{rows.line_num}: not CSV: {error}") from error

    def item(_: int, row: Any) -> MementosItem:
        image = row["image_name"] if "image_name" in row else row["image"]
        return MementosItem(_text(image), _text(row["description"]), domain)

    return _entries(location, numbered(), item)


def _json_lines(location: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(location).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{location}:{number}: not a question: {error!r}") from error


def _array(location: str) -> Iterator[tuple[int, Any]]:
    values = read_json(location)
    if not isinstance(values, list):
        raise DataError(f"{location}: must hold a JSON array")
    return enumerate(values, 1)


def _entries(
    location: str, rows: Iterator[tuple[int, Any]], make: Callable[[int, Any], T]
) -> list[T]:
    found: list[T] = []
    for number, row in rows:
        try:
            found.append(make(number, row))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{location}:{number}: not a question: {error!r}") from error
    if not found:
        raise DataError(f"{location}: holds no questions")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    return value


def _words(values: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{values!r} is no list")
    return tuple(_text(value) for value in values)
