"""Blocks of rows on their way through a run: which are left to do, and which are committed.

A block is committed when its Parquet file is whole. Parquet ends in its footer, so a file that a
crash cut off cannot be taken for a whole one; there is no second record that could disagree. A
resumed run reads the ids in the committed files and plans new blocks of what is left.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from sima_ray.data.locations import open_location
from sima_ray.errors import DataError, LedgerError, why
from sima_ray.records import ROW_SCHEMA, Quarantine

Block = tuple[tuple[str, int, int], ...]
"""Rows to read together: spans (file, first row, row after the last)."""


def committed_files(folder: str) -> list[str]:
    """The whole Parquet files of a folder by name, as paths in its file system; none without it."""
    return [path for path, whole in _parquet_files(folder) if whole]


def discard_incomplete(folder: str) -> int:
    """Delete the files that a crash cut off, so that every Parquet file in the folder is whole; how
    many."""
    filesystem, _ = open_location(folder)
    broken = [path for path, whole in _parquet_files(folder) if not whole]
    for path in broken:
        filesystem.delete_file(path)
    return len(broken)


def reopen_failed(folder: str) -> int:
    """Take the rows that a failing service cost out of the committed files, so that they are left to do; how many.

    A file is replaced at once by one without them: a crash leaves the one or the other.
    """
    filesystem, _ = open_location(folder)
    reason, reopened = pc.field("quarantine"), 0
    failed = reason == Quarantine.SERVICE_FAILED.value
    for path in committed_files(folder):
        reasons = pq.read_table(path, columns=["quarantine"], filesystem=filesystem)
        if not (count := reasons.filter(failed).num_rows):
            continue
        rest = pq.read_table(path, filesystem=filesystem).filter(~failed | reason.is_null())
        pq.write_table(rest, f"{path}.partial", filesystem=filesystem)
        filesystem.move(f"{path}.partial", path)
        reopened += count
    return reopened


def committed_rows(folder: str) -> int:
    """How many rows are committed, from the footers alone: cheap enough to show progress by."""
    filesystem, _ = open_location(folder)
    return sum(
        pq.read_metadata(path, filesystem=filesystem).num_rows for path in committed_files(folder)
    )


def committed_ids(folder: str) -> set[str]:
    """The ids of all committed rows.

    Raises:
        LedgerError: A row that was committed twice.
    """
    filesystem, _ = open_location(folder)
    ids: set[str] = set()
    for path in committed_files(folder):
        table = pq.read_table(path, columns=["row_id"], filesystem=filesystem)
        new = table.column("row_id").to_pylist()
        before = len(ids)
        ids.update(new)
        if len(ids) != before + len(new):
            raise LedgerError(
                f"{path}: holds rows that another file of {folder} holds too; "
                "did two runs write there at once? Delete the folder and run again"
            )
    return ids


@dataclass(frozen=True)
class RowSource(Datasource):
    """Ray Data reads rows of ROW_SCHEMA from here, a planned block at a time, in small tasks."""

    location: str
    blocks: tuple[Block, ...]

    @classmethod
    def plan(cls, location: str, rows_per_block: int, done: str | None) -> "RowSource":
        """Plan the blocks of a Parquet file, or of a folder of them, without the rows committed in
        `done`.

        Raises:
            DataError: The location holds no Parquet file that can be read.
            LedgerError: See `committed_ids`.
        """
        skip = committed_ids(done) if done is not None else set[str]()
        spans = _spans(location, skip)
        return cls(location, tuple(_blocks(spans, rows_per_block)))

    def get_name(self) -> str:
        return "Rows"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a block; an empty one when nothing is left."""
        return [self._task(block) for block in self.blocks or ((),)]

    def _task(self, block: Block) -> ReadTask:
        location = self.location
        rows = sum(stop - start for _, start, stop in block)
        metadata = BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(lambda: [_read(location, block)], metadata, schema=ROW_SCHEMA)


def _read(location: str, block: Block) -> pa.Table:
    """The rows of a block, in ROW_SCHEMA; only the row groups that hold them are read."""
    filesystem, _ = open_location(location)
    pieces: list[pa.Table] = []
    for path, start, stop in block:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            first = 0
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if first < stop and last > start:
                    table = file.read_row_group(group)
                    begin = max(start - first, 0)
                    pieces.append(table.slice(begin, min(stop, last) - first - begin))
                first = last
    # The empty table gives the columns that a file of an older version lacks.
    whole = pa.concat_tables([ROW_SCHEMA.empty_table(), *pieces], promote_options="default")
    return whole.select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def _spans(location: str, skip: set[str]) -> Iterator[tuple[str, int, int]]:
    """The runs of neighbouring rows that are not to be skipped."""
    filesystem, path = open_location(location)
    info = filesystem.get_file_info(path)
    paths = committed_files(location) if info.type is fs.FileType.Directory else [path]
    if not paths:
        raise DataError(f"{location}: holds no Parquet file")
    for path in paths:
        start = number = 0
        for row_id in _row_ids(filesystem, path):
            if row_id in skip:
                if start < number:
                    yield path, start, number
                start = number + 1
            number += 1
        if start < number:
            yield path, start, number


def _row_ids(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(columns=["row_id"]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {why(error)}") from error


def _blocks(spans: Iterable[tuple[str, int, int]], size: int) -> Iterator[Block]:
    """Cut and join spans to blocks of `size` rows; the last one holds the rest."""
    block: list[tuple[str, int, int]] = []
    room = size
    for path, start, stop in spans:
        while start < stop:
            end = min(stop, start + room)
            block.append((path, start, end))
            room -= end - start
            start = end
            if not room:
                yield tuple(block)
                block, room = [], size
    if block:
        yield tuple(block)


def _parquet_files(folder: str) -> list[tuple[str, bool]]:
    """The Parquet files of a folder by name, and whether each is whole."""
    filesystem, base = open_location(folder)
    infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
    paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
    return [(path, _is_whole(filesystem, path)) for path in paths]


def _is_whole(filesystem: fs.FileSystem, path: str) -> bool:
    try:
        pq.read_metadata(path, filesystem=filesystem)
    except pa.ArrowInvalid:
        return False
    return True
