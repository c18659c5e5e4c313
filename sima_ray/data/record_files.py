"""Records of a data set one after another, whatever holds them: JSON, JSON lines, Parquet, Arrow, or a folder.

What a file is, its first bytes say. Parquet and Arrow are streamed, a few rows in memory at a time, for their rows
may hold images; JSON is read as a whole.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow import fs

from sima_ray.data.locations import open_location
from sima_ray.errors import DataError, one_line, why

_ROWS = 32
_BUFFER_BYTES = 1 << 20
"""Columns of a Parquet row group are read through a buffer of this size: whole, they may be gigabytes. What is
held is a page of each, for which most writers take the rows of a group up to a thousand."""

_SPLIT = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")
"""How files of the Hugging Face hub are named."""

Record = tuple[str, Any]
"""Where a record is, in words, and what it holds; None for a line that is no JSON."""


def read_records(location: str, columns: Collection[str]) -> Iterator[Record]:
    """Every record of a file, or of a folder's data files in the order of their names.

    A folder is one that `datasets` saved, or holds Parquet files or JSON lines at any depth.

    Args:
        location: Path or URI. JSON may be compressed, if its name says so.
        columns: What is read of Parquet and Arrow; others are passed over.

    Raises:
        DataError: It cannot be read, holds none of the columns, or holds several splits.
    """
    files = _files(location)
    for file in files:
        name = f"{file.rpartition('/')[2]}: " if files != [location] else ""
        for where, record in _read_file(file, columns):
            yield f"{name}{where}", record


def json_records(location: str) -> Iterator[Record]:
    """Every record of a JSON array or of JSON lines.

    Raises:
        DataError: It cannot be read, or is an array that is no JSON.
    """
    text = _read_text(location)
    if not text.lstrip().startswith("["):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parsed(line)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: not JSON: {one_line(error)}; was its download cut off?"
        ) from error
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


def named(where: str, name: object) -> str:
    """A place with the record's own id, where it has one: "row 7 (id 12)"."""
    return where if name is None else f"{where} (id {one_line(name)})"


def _read_file(location: str, columns: Collection[str]) -> Iterator[Record]:
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_file(path) as file:
            magic = file.read(4)
        if magic not in (b"PAR1", b"\xff\xff\xff\xff"):
            yield from json_records(location)
            return
        batches = _parquet if magic == b"PAR1" else _arrow
        rows = (
            row for batch in batches(filesystem, path, columns, location) for row in _rows(batch)
        )
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location}: cannot be read: {why(error)}") from error


def _parquet(
    filesystem: fs.FileSystem, path: str, columns: Collection[str], location: str
) -> Iterator[pa.RecordBatch]:
    streamed = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False}
    with pq.ParquetFile(path, filesystem=filesystem, **streamed) as file:
        wanted = _known(file.schema_arrow.names, columns, location)
        yield from file.iter_batches(_ROWS, columns=wanted)


def _arrow(
    filesystem: fs.FileSystem, path: str, columns: Collection[str], location: str
) -> Iterator[pa.RecordBatch]:
    with filesystem.open_input_file(path) as stream, pa.ipc.open_stream(stream) as reader:
        wanted = _known(reader.schema.names, columns, location)
        for batch in reader:
            chosen = batch.select(wanted)
            for start in range(0, chosen.num_rows, _ROWS):
                yield chosen.slice(start, _ROWS)


def _known(names: Iterable[str], columns: Collection[str], location: str) -> list[str]:
    names = list(names)
    if not (wanted := [name for name in names if name in columns]):
        raise DataError(f"{location}: no column that is known here; it has {', '.join(names)}")
    return wanted


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    yield from batch.to_pylist()


def _files(location: str) -> list[str]:
    """The data files of a location."""
    filesystem, path = open_location(location)
    kind = filesystem.get_file_info(path).type
    if kind is fs.FileType.NotFound:
        raise DataError(f"{location}: is not there")
    if kind is fs.FileType.File:
        return [location]
    root = location.rstrip("/")
    selector = fs.FileSelector(path, recursive=True)
    below = [info.path[len(path.rstrip("/")) + 1 :] for info in filesystem.get_file_info(selector)]
    names = sorted(n for n in below if not any(part[0] in "._" for part in n.split("/")))
    if "state.json" in names:  # what `datasets` saved: it may hold files of other data, too
        return [f"{root}/{name}" for name in _saved_files(f"{root}/state.json")]
    saved = {name.rpartition("/")[0] for name in names if name.endswith("/state.json")}
    if len(saved) == 1:
        return _files(f"{root}/{saved.pop()}")
    splits = saved or {
        found["split"] for name in names if (found := _SPLIT.fullmatch(name.rpartition("/")[2]))
    }
    if saved or len(splits) > 1:
        raise DataError(
            f"{location}: holds the splits {', '.join(sorted(splits))}: name one's files"
        )
    for endings in ((".parquet",), (".jsonl", ".jsonl.gz")):
        if files := [f"{root}/{name}" for name in names if name.endswith(endings)]:
            return files
    raise DataError(f"{location}: holds neither Parquet, nor JSON lines, nor a saved data set")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_text(location: str) -> str:
    filesystem, path = open_location(location)
    try:
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: not UTF-8 at byte {error.start}") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location}: cannot be read: {why(error)}") from error


def _saved_files(state: str) -> list[str]:
    """The files of a data set that `datasets` saved, by its state file."""
    try:
        files = json.loads(_read_text(state))["_data_files"]
        names = [str(file["filename"]) for file in files]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{state}: not of a data set that `datasets` saved: {one_line(error)}"
        ) from error
    if odd := [name for name in names if "/" in name]:
        raise DataError(f"{state}: names a file outside its folder: {odd[0]}")
    return names
