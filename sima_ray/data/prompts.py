"""Prompts files: every line checked, and indexed as rows of which none is ever lost.

The input is JSON lines (compressed if its name says so): {"image", "text", "ground_truth", optional
"id"}. Blank lines are no prompts and are skipped; every other line becomes exactly one row of the
index, a bad one with its reason. Memory stays flat at any size but for the ids.
"""

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.config import DataConfig
from sima_ray.data.locations import check_root, load_image, open_location
from sima_ray.errors import DataError, one_line, why
from sima_ray.images import ImageProblem
from sima_ray.ports import JsonDict
from sima_ray.records import PROMPT_FIELDS, ROW_SCHEMA, Quarantine

FIELDS = ("image", "text", "ground_truth")
MAX_NAME_CHARS = 1024
"""Longest image name and id."""
ROWS_A_GROUP = 1024
CHUNK_BYTES = 1 << 20
THREADS = min(16, 4 * (os.cpu_count() or 1))
"""That check images: decoding needs the cores, an image at a URI waits for its server."""

PLACEHOLDER = re.compile(r"\s*<image>\s*")


@dataclass(frozen=True, slots=True)
class PromptIndex:
    """What a prompts file held: `rows` = `good` + the sum of `problems`."""

    rows: int
    good: int
    problems: Counter[Quarantine]


class BadLine(Exception):
    """A line that is no usable prompt, or a field that is none."""

    def __init__(self, reason: Quarantine, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: its number from 1, its bytes, whether it is over the limit, whether it ended."""

    number: int
    data: bytes
    too_long: bool
    ended: bool


@dataclass(slots=True)
class _Checker:
    """Turns lines into rows; remembers the ids it has given out."""

    config: DataConfig
    ids: set[str] = field(default_factory=set)

    def row(self, line: _Line) -> JsonDict:
        """The row of one line, good or bad."""
        row: JsonDict = dict.fromkeys(ROW_SCHEMA.names)
        row["source"] = f"{self.config.prompts}:{line.number}"
        try:
            values = self._parse(line)
            row.update(self._readable(values))
            row["row_id"] = given = self._given_id(values)
            self._check(values, row)
            row["row_id"] = given or _content_id(row)
            if row["row_id"] in self.ids:
                raise BadLine(
                    Quarantine.DUPLICATE_ID,
                    "an earlier line has this id" if given else "an earlier line says the same",
                )
        except BadLine as bad:
            row["quarantine"], row["error"] = bad.reason.value, one_line(bad)
            row["row_id"] = self._free_id(row["row_id"], line.number)
        self.ids.add(row["row_id"])
        return row

    def _parse(self, line: _Line) -> JsonDict:
        """The line's JSON object."""
        if line.too_long:
            limit = _max_line_bytes(self.config)
            raise BadLine(Quarantine.FIELD_TOO_LONG, f"the line has more than {limit:,} bytes")
        try:
            values = json.loads(line.data.decode("utf-8-sig" if line.number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise BadLine(
                Quarantine.MALFORMED_LINE, f"not UTF-8 at byte {error.start} of the line"
            ) from error
        except (ValueError, RecursionError) as error:
            cut = "" if line.ended else " (the file ends within this line: it may have been cut)"
            raise BadLine(Quarantine.MALFORMED_LINE, f"not JSON: {one_line(error)}{cut}") from error
        if not isinstance(values, dict):
            raise BadLine(
                Quarantine.MALFORMED_LINE, f"must be a JSON object, not {_json_type(values)}"
            )
        return values

    def _readable(self, values: JsonDict) -> JsonDict:
        """What a bad line's row shows of it."""
        texts = {k: v for k in FIELDS if isinstance(v := values.get(k), str) and _encodes(v)}
        return {name: text[: self.config.max_text_chars] for name, text in texts.items()}

    def _given_id(self, values: JsonDict) -> str | None:
        """The input's own id, if it has one: a string or an integer."""
        given = values.get("id")
        if given is None:
            return None
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise BadLine(
                Quarantine.MALFORMED_LINE,
                f"'id' must be a string or integer, not {_json_type(given)}",
            )
        return checked_text("id", str(given), MAX_NAME_CHARS)

    def _check(self, values: JsonDict, row: JsonDict) -> None:
        """Put the checked fields into the row."""
        for name in FIELDS:
            value = values.get(name)
            if value is None:
                raise BadLine(Quarantine.MISSING_FIELD, f"'{name}' is missing")
            if not isinstance(value, str):
                raise BadLine(
                    Quarantine.MALFORMED_LINE, f"'{name}' must be a string, not {_json_type(value)}"
                )
            if name == "text":
                value = PLACEHOLDER.sub(" ", value)
            limit = MAX_NAME_CHARS if name == "image" else self.config.max_text_chars
            row[name] = checked_text(name, value, limit)

    def _free_id(self, given: str | None, number: int) -> str:
        """An id for a bad row that no other row has: the given one, if it has one, and the line."""
        row_id = f"{given or ''}@line-{number}"
        while row_id in self.ids:
            row_id += "+"
        return row_id


def index_prompts(config: DataConfig, destination: str, *, root: bool = True) -> PromptIndex:
    """Check a prompts file, line by line, and write a Parquet file with one row for each line.

    A row's id is the input's own `id`, or a hash of image, text and ground truth. Literal `<image>`
    placeholders are taken out of the question. A bad line is a row too: with its reason in
    `quarantine`, the details in `error`, and an id of its own. With `limit`, the first N prompts
    are taken.

    Args:
        config: Where the prompts are, and the limits.
        destination: The Parquet file to write; it appears when it is whole.
        root: Check that the image root is there, and no shard in it broken.

    Raises:
        DataError: The prompts file cannot be read or holds no line; no such image root.
    """
    if root:
        check_root(config.images)
    checker = _Checker(config)
    lines = islice(_lines(config), config.limit)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{config.prompts}: holds no prompts")
    lines = chain((first,), lines)
    good, problems = 0, Counter[Quarantine]()
    filesystem, path = open_location(destination)
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    partial = f"{path}.partial"
    with pq.ParquetWriter(partial, ROW_SCHEMA, filesystem=filesystem) as writer:
        while rows := [checker.row(line) for line in islice(lines, ROWS_A_GROUP)]:
            problems.update(Quarantine(row["quarantine"]) for row in rows if row["quarantine"])
            good += sum(row["quarantine"] is None for row in rows)
            writer.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA))
    filesystem.move(partial, path)
    return PromptIndex(good + problems.total(), good, problems)


def read_index(index: str, *, bad: bool = False) -> Iterator[JsonDict]:
    """The rows of an index (or of any Parquet file of ROW_SCHEMA) that are good, or those that are
    `bad`.

    Raises:
        DataError: The index cannot be read.
    """
    columns = [column.name for column in PROMPT_FIELDS] + ["quarantine", "error"]
    filesystem, path = open_location(index)
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(ROWS_A_GROUP, columns=columns):
                yield from (row for row in batch.to_pylist() if bool(row["quarantine"]) is bad)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{index}: cannot be read: {why(error)}") from error


def check_images(
    config: DataConfig,
    index: str,
    *,
    threads: int = THREADS,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[JsonDict]:
    """The good rows of an index whose image cannot be used, with `quarantine` and `error` set, in its order.

    The stages load images by the same function, so what passes here passes there. An image that many
    rows name is loaded once.

    Args:
        config: Where the images are, and the limits.
        index: What `index_prompts` wrote.
        threads: Images at once.
        on_progress: Called after each row with how many there were.

    Raises:
        DataError: The index or the image root cannot be opened.
    """
    return check_rows(config, read_index(index), threads=threads, on_progress=on_progress)


def check_rows(
    config: DataConfig,
    rows: Iterator[JsonDict],
    *,
    threads: int = THREADS,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[JsonDict]:
    """Of rows with an `image`, those whose image cannot be used; see `check_images`.

    Raises:
        DataError: The image root cannot be opened.
    """
    loaded = images_loaded(config.images, rows, config.max_image_pixels, threads=threads)
    for number, (row, problem) in enumerate(loaded, 1):
        if problem is not None:
            yield {**row, "quarantine": problem.reason.value, "error": one_line(problem)}
        on_progress(number)


def images_loaded(
    root: str, rows: Iterator[JsonDict], max_pixels: int, *, threads: int = THREADS
) -> Iterator[tuple[JsonDict, ImageProblem | None]]:
    """Each row, and what is wrong with its `image`; see `check_images`."""

    def load(name: str) -> ImageProblem | None:
        try:
            load_image(root, name, max_pixels)
        except ImageProblem as problem:
            return problem
        return None

    known: dict[str, ImageProblem | None] = {}
    asked: dict[str, Future[ImageProblem | None]] = {}
    ahead: deque[JsonDict] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for row in islice(rows, 16 * threads - len(ahead)):
                ahead.append(row)
                if (name := row["image"]) not in known and name not in asked:
                    asked[name] = pool.submit(load, name)
            if not ahead:
                return
            row = ahead.popleft()
            if (name := row["image"]) in asked:
                known[name] = asked.pop(name).result()
            yield row, known[name]


def problem_lines(index: str) -> Iterator[str]:
    """One line for each bad row of an index, in the order of the file."""
    return (describe(row) for row in read_index(index, bad=True))


def describe(row: JsonDict) -> str:
    """One line about a bad row: file, line, id, reason."""
    return f"{row['source']}: {row['quarantine']}: {row['error']} (id {row['row_id']})"


def read_lines(location: str) -> Iterator[bytes]:
    """The lines of a prompts file that are neither blank nor over the limit of a line.

    Raises:
        DataError: The file cannot be read.
    """
    lines = _lines(DataConfig(prompts=location, images="."))
    return (line.data for line in lines if not line.too_long)


def _lines(config: DataConfig) -> Iterator[_Line]:
    """The lines of the prompts file that are not blank; none held beyond the limit of a line."""
    limit = _max_line_bytes(config)
    assert config.prompts is not None
    filesystem, path = open_location(config.prompts)
    number, held, too_long = 1, b"", False
    try:
        with filesystem.open_input_stream(path) as stream:
            chunk = stream.read(CHUNK_BYTES)
            if chunk.startswith(b"PAR1"):
                names = pq.read_schema(path, filesystem=filesystem).names
                raise DataError(f"{config.prompts}: {_not_prompts(names)}")
            while chunk:
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    data = held + end
                    if too_long or data.strip():
                        yield _Line(number, data[:limit], too_long or len(data) > limit, True)
                    number, held, too_long = number + 1, b"", False
                too_long = too_long or len(held) + len(rest) > limit
                held = b"" if too_long else held + rest
                chunk = stream.read(CHUNK_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{config.prompts}: cannot be read: {why(error)}") from error
    if too_long or held.strip():
        yield _Line(number, held, too_long, False)


def _not_prompts(columns: Collection[str]) -> str:
    """What a Parquet file holds in place of prompts, and who takes it."""
    if {"chosen", "rejected"} <= set(columns):
        return (
            "preference pairs, not prompts: name the file as data.pairs in a run config, for "
            "`sima validate CONFIG` and `sima submit train CONFIG`"
        )
    return f"Parquet, not JSON lines: a prompt is a line with {', '.join(FIELDS)}"


def _max_line_bytes(config: DataConfig) -> int:
    """What a line of fields within their limits can take: a character is 12 bytes at most, as
    escaped JSON."""
    return 24 * config.max_text_chars + (64 << 10)


def checked_text(name: str, value: str, limit: int) -> str:
    """A field's value without white space around it.

    Raises:
        BadLine: It is empty, too long, or cannot be written as UTF-8.
    """
    value = value.strip()
    if not _encodes(value):
        raise BadLine(Quarantine.MALFORMED_LINE, f"'{name}' holds half a surrogate pair")
    if not value:
        raise BadLine(Quarantine.EMPTY_FIELD, f"'{name}' is empty")
    if len(value) > limit:
        raise BadLine(
            Quarantine.FIELD_TOO_LONG,
            f"'{name}' has {len(value):,} characters, over the {limit:,} allowed",
        )
    return value


def _encodes(value: str) -> bool:
    """Whether a string can be written as UTF-8 (JSON can hold half a surrogate pair)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _content_id(row: JsonDict) -> str:
    content = json.dumps([row[name] for name in FIELDS])
    return hashlib.sha256(content.encode()).hexdigest()[:20]


def _json_type(value: Any) -> str:
    match value:
        case bool():
            return "a boolean"
        case None:
            return "null"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"
