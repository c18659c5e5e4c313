"""Images in zip and tar files, read in place: an index of the members, then one range read for each.

The index is a sorted Arrow table of some 60 bytes a member, made once a process from what `zipfile` and
`tarfile` list. One that took long to make is kept in the user's cache folder, where the node's other
processes map it.
"""

import hashlib
import io
import json
import os
import struct
import tarfile
import time
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from sima_ray.data.names import plain_name
from sima_ray.errors import DataError, last_line
from sima_ray.images import ImageProblem
from sima_ray.records import Quarantine

SUFFIXES = (".zip", ".tar")

KEEP_AFTER_S = 1.0
"""An index that took longer is kept for other processes."""
OPEN_FILES = 64
THREADS = 8
READ_AHEAD_BYTES = 4 << 20
"""Of a tar that is not on this machine: its headers lie between the images, so all of it passes by."""

_FORM = 1  # of a kept index: another one is made anew
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # zip: of the member's own header; tar: of its data
        ("packed", pa.int64()),  # bytes in the shard
        ("size", pa.int64()),  # bytes of the file
        ("crc", pa.uint32()),  # zip alone
        ("method", pa.int16()),  # zip's number of the compression, or one of the two below
    ]
)
_ENCRYPTED, _SPARSE = -1, -2
_NO_WAY = {_ENCRYPTED: "is encrypted", _SPARSE: "is a sparse file"}

_ZIP_HEADER = struct.Struct("<4s22xHH")
"""Before a zip member's data: signature, …, lengths of the name and of the extra field that follow."""
_ZIP_EXTRA_BYTES = 512
"""Read along for the extra field, whose length only the header tells."""

_UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    pa.ArrowException,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    struct.error,
)
"""What the two libraries raise on damaged archives."""


def is_shard(path: str) -> bool:
    """Whether a file's name is that of a zip or of a tar."""
    return path.lower().endswith(SUFFIXES)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard."""

    shards: "Shards"
    shard: str
    name: str
    offset: int
    packed: int
    unpacked: int
    crc: int | None
    method: int

    @property
    def path(self) -> str:
        """The shard's path and the name in it."""
        return f"{self.shard}/{self.name}"

    @property
    def size(self) -> int:
        """The most bytes that reading it holds."""
        return max(self.packed, self.unpacked)

    def read(self) -> bytes:
        """Its bytes, checked against the checksum where there is one.

        Raises:
            ImageProblem: BROKEN_IMAGE: damaged, encrypted, or of a compression that is not read.
            OSError: The shard cannot be read.
        """
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._broken(_NO_WAY.get(self.method, f"is compressed by method {self.method}"))
        file = self.shards.file(self.shard)
        try:
            if self.shard.lower().endswith(".zip"):
                data = self._unzipped(file)
            else:
                data = file.read_at(self.packed, self.offset)
        except (pa.ArrowInvalid, zlib.error) as error:  # a range that cannot be; no packed data
            raise self._broken("is damaged") from error
        if len(data) != self.unpacked or self.crc not in (None, zlib.crc32(data)):
            raise self._broken("is damaged")
        return data

    def _unzipped(self, file: pa.NativeFile) -> bytes:
        header = _ZIP_HEADER.size + len(self.name.encode()) + _ZIP_EXTRA_BYTES
        data = file.read_at(header + self.packed, self.offset)
        if len(data) < _ZIP_HEADER.size:
            raise self._broken("is damaged")
        signature, name, extra = _ZIP_HEADER.unpack_from(data)
        if signature != b"PK\3\4":
            raise self._broken("is not where the archive's list says")
        begin = _ZIP_HEADER.size + name + extra
        data = data[begin : begin + self.packed]
        if len(data) < self.packed:
            data = file.read_at(self.packed, self.offset + begin)
        if self.method == zipfile.ZIP_STORED:
            return data
        # One byte more than it should be tells a bomb, and is all that is unpacked of it.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.unpacked + 1)

    def _broken(self, how: str) -> ImageProblem:
        return ImageProblem(Quarantine.BROKEN_IMAGE, f"image {self.name!r} in {self.shard} {how}")


class Shards:
    """The members of some shards by name.

    Attributes:
        paths: Of the shards, in the order in which they count.
        repeated: Names that were there once more: in a shard the last counts, as when it is unpacked,
            and of several shards the first.
        unusable: Members whose names lead elsewhere or are no text, and a tar's links: nothing can ask for them.
    """

    def __init__(self, filesystem: fs.FileSystem, paths: Sequence[str], table: pa.Table) -> None:
        self.paths = tuple(paths)
        counts = json.loads((table.schema.metadata or {})[b"sima"])
        self.repeated: int = counts["repeated"]
        self.unusable: int = counts["unusable"]
        self.file = lru_cache(OPEN_FILES)(filesystem.open_input_file)
        """Opens a shard; those in use stay open."""
        self._table = table
        self._names = table["name"].chunk(0) if table.num_rows else pa.array([], pa.string())

    def __len__(self) -> int:
        return len(self._names)

    def __str__(self) -> str:
        shards = "1 shard" if len(self.paths) == 1 else f"{len(self.paths):,} shards"
        repeated = f", {self.repeated:,} names more than once" if self.repeated else ""
        unusable = f", {self.unusable:,} with unusable names" if self.unusable else ""
        return f"{len(self):,} files in {shards}{repeated}{unusable}"

    def find(self, name: str) -> Member | None:
        """The member of that very name."""
        row = bisect_left(range(len(self)), name, key=lambda place: self._names[place].as_py())
        if row == len(self) or self._names[row].as_py() != name:
            return None
        found: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        shard = self.paths[found["shard"]]
        place, packed, size = found["offset"], found["packed"], found["size"]
        return Member(self, shard, name, place, packed, size, found["crc"], found["method"])


def open_shards(filesystem: fs.FileSystem, files: Sequence[fs.FileInfo]) -> Shards:
    """Index shards, or take up an index of the very same files that was kept.

    Raises:
        DataError: An archive that cannot be read to its end; names it.
    """
    files = sorted(files, key=lambda file: file.path)
    paths = [file.path for file in files]
    kept = _kept(filesystem, files)
    if kept is not None:
        with suppress(OSError, pa.ArrowException, KeyError, ValueError):
            return Shards(filesystem, paths, pa.ipc.open_file(pa.memory_map(str(kept))).read_all())
    begun = time.monotonic()
    table = _indexed(filesystem, paths)
    if kept is not None and time.monotonic() - begun > KEEP_AFTER_S:
        with suppress(OSError):
            _keep(kept, table)
    return Shards(filesystem, paths, table)


def _indexed(filesystem: fs.FileSystem, paths: Sequence[str]) -> pa.Table:
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda item: _listed(filesystem, *item), enumerate(paths)))
    table = pa.concat_tables([table for table, _ in found], promote_options="none")
    listed = table.num_rows
    order = [("name", "ascending"), ("shard", "ascending"), ("offset", "descending")]
    table = table.sort_by(order).combine_chunks()
    if listed:
        names = table["name"].chunk(0)
        first = pc.call_function("not_equal", [names[1:], names[:-1]])
        table = table.filter(pa.concat_arrays([pa.array([True]), first])).combine_chunks()
    counts = {
        "repeated": listed - table.num_rows,
        "unusable": sum(unusable for _, unusable in found),
    }
    return table.replace_schema_metadata({"sima": json.dumps(counts)})


def _listed(filesystem: fs.FileSystem, number: int, path: str) -> tuple[pa.Table, int]:
    """A shard's members, and how many more have no usable name."""
    columns: list[list[Any]] = [[] for _ in _SCHEMA]
    unusable = 0
    members = _zipped if path.lower().endswith(".zip") else _tarred
    try:
        with filesystem.open_input_file(path) as file:
            for name, *rest in members(file, isinstance(filesystem, fs.LocalFileSystem)):
                name = _usable(name)
                if name is None:
                    unusable += 1
                    continue
                for column, value in zip(columns, (name, number, *rest), strict=True):
                    column.append(value)
        return pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), _SCHEMA), unusable
    except _UNREADABLE as error:
        raise DataError(
            f"{path}: no readable {path[-3:].lower()} archive: {last_line(error)}; was its download cut off?"
        ) from error


def _zipped(file: pa.NativeFile, local: bool) -> Iterator[tuple[Any, ...]]:
    with zipfile.ZipFile(cast(Any, file)) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                method = _ENCRYPTED if member.flag_bits & 1 else member.compress_type
                sizes = member.compress_size, member.file_size
                yield member.filename, member.header_offset, *sizes, member.CRC, method


def _tarred(file: pa.NativeFile, local: bool) -> Iterator[tuple[Any, ...]]:
    stream: Any = file if local else io.BufferedReader(cast(Any, file), READ_AHEAD_BYTES)
    archive: Any
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # or it would hold them all
            if member.isreg():
                method = _SPARSE if member.issparse() else zipfile.ZIP_STORED
                yield member.name, member.offset_data, member.size, member.size, None, method
            elif not member.isdir():  # a link or a device has no usable name, and is counted so
                yield "", 0, 0, 0, None, 0
        # It takes a damaged header for the end.
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a member nor the end at byte {archive.offset:,}")


def _usable(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return plain_name(name) or None


def _kept(filesystem: fs.FileSystem, files: Sequence[fs.FileInfo]) -> Path | None:
    """Where the index of these very files is kept, or would be; None where that cannot be told."""
    if any(file.mtime_ns is None for file in files):
        return None
    known = [_FORM, filesystem.type_name, [(f.path, f.size, f.mtime_ns) for f in files]]
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return None
    return folder / "sima" / f"shards-{name}.arrow"


def _keep(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    partial.replace(file)
