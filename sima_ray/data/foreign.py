"""Other projects' preference data as a pairs file that a run trains on, and a folder of its images.

Records stream through: what is held is the hash of each pair, and a few rows with their images.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sima_ray.data.locations import MAX_IMAGE_BYTES, load_image, open_location
from sima_ray.data.preference import (
    COLUMNS,
    Form,
    NoPair,
    Preference,
    SetAside,
    record_id,
    to_preference,
)
from sima_ray.data.record_files import named, read_records
from sima_ray.errors import DataError, one_line, why
from sima_ray.images import ImageInfo, ImageProblem, check_image, read_header
from sima_ray.ports import JsonDict
from sima_ray.records import PAIR_SCHEMA, PreferencePair, Quarantine

ORIGIN = b"sima_ray.origin"
"""The key under which a pairs file keeps where its pairs come from, as JSON."""

GIVEN = "given"
EXAMPLES = 5
"""Records of each reason that are named."""

_THREADS = 4
_CHUNK = 16 * _THREADS
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(slots=True)
class Source:
    """What a location held: `records` = `pairs` + the sum of `set_aside`."""

    location: str
    records: int = 0
    pairs: int = 0
    forms: Counter[Form] = field(default_factory=Counter[Form])
    set_aside: Counter[SetAside] = field(default_factory=Counter[SetAside])

    def to_json(self) -> JsonDict:
        """The counts as plain values."""
        return {
            "location": self.location,
            "records": self.records,
            "pairs": self.pairs,
            "forms": {form.value: n for form, n in sorted(self.forms.items())},
            "set_aside": {reason.value: n for reason, n in sorted(self.set_aside.items())},
        }


@dataclass(slots=True)
class Taken:
    """What was made: pairs and images, and the records that became none.

    Attributes:
        sources: What each location held.
        written: Images that were written, embedded ones each once.
        there: Embedded images that were there before.
        size: Bytes of the written ones.
        problems: A line for some records that were set aside, of each reason the first.
    """

    sources: list[Source] = field(default_factory=list[Source])
    written: int = 0
    there: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list[str])

    def count_images(self, placed: Iterable["_Placed | NoPair"], counted: set[str]) -> None:
        """Count embedded images that were written, or were there; each once, by its name."""
        found = {p.name: p.written for p in placed if isinstance(p, _Placed)}
        sizes = [n for name, n in found.items() if n is not None and name not in counted]
        self.written += sum(size > 0 for size in sizes)
        self.there += sum(size == 0 for size in sizes)
        self.size += sum(sizes)
        counted.update(found)

    def set_aside(self, where: str, problem: NoPair) -> None:
        """Count a record of the last source that became no pair."""
        source, reason = self.sources[-1], problem.reason
        source.set_aside[reason] += 1
        if sum(source.set_aside[reason] for source in self.sources) <= EXAMPLES:
            self.problems.append(f"{source.location}: {where}: {reason}: {one_line(problem)}")

    @property
    def records(self) -> int:
        """Of all sources."""
        return sum(source.records for source in self.sources)

    @property
    def pairs(self) -> int:
        """Of all sources."""
        return sum(source.pairs for source in self.sources)


@dataclass(frozen=True, slots=True)
class _Row:
    """A record: where it was, and what it says or why it says nothing usable."""

    where: str
    said: Preference | NoPair


@dataclass(frozen=True, slots=True)
class _Placed:
    """An image that was checked: its name, and the bytes that were written if it was embedded."""

    name: str
    written: int | None = None


def take_pairs(
    locations: Iterable[str],
    output: str,
    *,
    images: str,
    max_pixels: int,
    max_chars: int,
    on_progress: Callable[[Taken], None] = lambda _: None,
) -> Taken:
    """Write the pairs of other projects' preference data as a pairs file.

    A pair keeps its record's id where no pair before has it, and has a hash of its content in it otherwise. The
    file says in its metadata what it was made of.

    Args:
        locations: Paths or URIs of files or folders, see `sima_ray.data.record_files`.
        output: The Parquet file to write; it appears when it is whole.
        images: The folder that image names are relative to. Embedded images are written there, each once, under
            a hash of its bytes; one that is there is not written again.
        max_pixels: Larger images are set aside.
        max_chars: Longer questions or responses are set aside.
        on_progress: Told every few rows.

    Raises:
        DataError: A source that cannot be read, or no pair in any of them.
    """
    taken, seen = Taken(), _Seen()

    def placed(image: str | bytes) -> _Placed | NoPair:
        try:
            return _place(image, images, max_pixels)
        except ImageProblem as problem:
            missing = problem.reason is Quarantine.MISSING_IMAGE
            hint = ": --images DIR says where images are" if missing else ""
            return NoPair(SetAside(problem.reason.value), f"{problem}{hint}")

    def pairs() -> Iterator[PreferencePair]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for location in locations:
                taken.sources.append(Source(location))
                records = read_records(location, COLUMNS)
                rows = (_read(record, where, max_chars) for where, record in records)
                while chunk := list(islice(rows, _CHUNK)):
                    # Each image once: those of neighbouring records are often the same.
                    said = [row.said for row in chunk if isinstance(row.said, Preference)]
                    shown = dict.fromkeys(preference.image for preference in said)
                    found = dict(zip(shown, pool.map(placed, shown), strict=True))
                    taken.count_images(found.values(), seen.images)
                    yield from _pairs(chunk, found, taken, seen)
                    on_progress(taken)

    _write(output, pairs(), taken, images)
    return taken


def origin_of(pairs: str) -> JsonDict | None:
    """What a pairs file was made of, where `take_pairs` made it.

    Raises:
        DataError: It cannot be read.
    """
    filesystem, path = open_location(pairs)
    try:
        metadata = pq.read_metadata(path, filesystem=filesystem).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{pairs}: pairs cannot be read: {why(error)}") from error
    return json.loads(metadata[ORIGIN]) if ORIGIN in metadata else None


@dataclass(frozen=True, slots=True)
class _Seen:
    """Hashes and ids of all pairs so far, and the names of their images."""

    digests: set[bytes] = field(default_factory=set[bytes])
    images: set[str] = field(default_factory=set[str])
    ids: set[str] = field(default_factory=set[str])

    def pair(self, said: Preference, image: str) -> PreferencePair:
        """The pair, under an id that no other has.

        Raises:
            NoPair: It was seen before.
        """
        texts = (said.prompt, said.chosen, said.rejected)
        digest = hashlib.sha256(json.dumps([image, *texts]).encode()).digest()
        if digest in self.digests:
            raise NoPair(SetAside.DUPLICATE, "an earlier record says the same")
        row_id = said.given_id or digest.hex()[:20]
        if row_id in self.ids:
            row_id = f"{row_id}-{digest.hex()[:12]}"
        self.digests.add(digest)
        self.ids.add(row_id)
        return PreferencePair(row_id, image, *texts, GIVEN, GIVEN)


def _read(record: Any, where: str, max_chars: int) -> _Row:
    where = named(where, record_id(record))
    try:
        return _Row(where, to_preference(record, max_chars))
    except NoPair as problem:
        return _Row(where, problem)


def _pairs(
    rows: Iterable[_Row], images: Mapping[str | bytes, _Placed | NoPair], taken: Taken, seen: _Seen
) -> Iterator[PreferencePair]:
    """The pairs of rows whose images were checked; the others are counted."""
    source = taken.sources[-1]
    for row in rows:
        source.records += 1
        try:
            if isinstance(row.said, NoPair):
                raise row.said
            source.forms[row.said.form] += 1
            image = images[row.said.image]
            if isinstance(image, NoPair):
                raise image
            pair = seen.pair(row.said, image.name)
        except NoPair as problem:
            taken.set_aside(row.where, problem)
        else:
            source.pairs += 1
            yield pair


def _place(image: str | bytes, root: str, max_pixels: int) -> _Placed:
    """Check an image by the rules of a run; write it where it is embedded.

    Raises:
        ImageProblem: It cannot be used, or is not there.
    """
    if isinstance(image, str):
        load_image(root, image, max_pixels)
        return _Placed(image)
    if len(image) > MAX_IMAGE_BYTES:
        text = f"{len(image):,} bytes, over the {MAX_IMAGE_BYTES:,} allowed"
        raise ImageProblem(Quarantine.IMAGE_TOO_LARGE, text)
    name = _name(image, read_header(image, max_pixels))
    filesystem, base = open_location(root)
    path = f"{base.rstrip('/')}/{name}"
    if filesystem.get_file_info(path).size == len(image):
        return _Placed(name, written=0)
    check_image(image, max_pixels)
    filesystem.create_dir(os.path.dirname(path), recursive=True)
    with filesystem.open_output_stream(f"{path}.partial") as stream:
        stream.write(image)
    filesystem.move(f"{path}.partial", path)
    return _Placed(name, written=len(image))


def _name(image: bytes, info: ImageInfo) -> str:
    """A name by content, in one of 256 folders: a folder of a hundred thousand files is slow to list."""
    digest = hashlib.sha256(image).hexdigest()[:32]
    return f"{digest[:2]}/{digest}.{_SUFFIXES[info.format]}"


def _write(output: str, pairs: Iterator[PreferencePair], taken: Taken, images: str) -> None:
    filesystem, path = open_location(output)
    partial = f"{path}.partial"
    try:
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        with pq.ParquetWriter(partial, PAIR_SCHEMA, filesystem=filesystem) as writer:
            while group := [asdict(pair) for pair in islice(pairs, 1024)]:
                writer.write_table(pa.Table.from_pylist(group, PAIR_SCHEMA))
            origin = {"images": images, "sources": [s.to_json() for s in taken.sources]}
            writer.add_key_value_metadata({ORIGIN: json.dumps(origin)})
        if not taken.pairs:
            filesystem.delete_file(partial)
            raise _nothing(taken)
        filesystem.move(partial, path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{output}: cannot be written: {why(error)}") from error


def _nothing(taken: Taken) -> DataError:
    where = ", ".join(source.location for source in taken.sources)
    first = f": {taken.problems[0]}" if taken.problems else ": no record at all"
    return DataError(f"no pair in {where}{first}")
