"""Local paths and URIs through pyarrow, and the images below an image root: in a folder, or in shards.

An image name never leaves its root: `..`, foreign URIs and absolute paths elsewhere are
MISSING_IMAGE.
"""

import os
import posixpath
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Protocol

import pyarrow as pa
from pyarrow import fs
from pyarrow.fs import FileSelector, FileType

from sima_ray.data.names import places, plain_name
from sima_ray.data.shards import Shards, is_shard, open_shards
from sima_ray.errors import DataError, why
from sima_ray.images import ImageProblem, check_image
from sima_ray.records import Quarantine

MAX_IMAGE_BYTES = 64 * 2**20
"""Larger image files are set aside unread: one of them must not fill a worker's memory."""


@cache
def open_location(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or URI, and the path in it.

    Raises:
        DataError: A URI that pyarrow cannot open.
    """
    if "://" not in location:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{location}: cannot be opened: {why(error)}") from error
    return filesystem, path


class ImageFile(Protocol):
    """An image that was found: a file of its own, or a member of a shard."""

    @property
    def path(self) -> str:
        """In its root's file system; a member's is its shard's, and the name in it."""
        ...

    @property
    def size(self) -> int:
        """The most bytes that reading it holds."""
        ...

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ImageProblem: BROKEN_IMAGE: a member that cannot be unpacked.
            OSError: It cannot be read.
        """
        ...


def resolve_image(root: str, name: str) -> ImageFile:
    """The image that `name` means.

    A root is a folder, a zip or tar file, or a folder of such shards. A name is relative to the root, or
    absolute below it. A name that is not there as it stands is looked for where COCO's layouts would have
    it: `000000000009.jpg`, `train2017/…`, `coco/train2017/…` and `COCO_train2014_…` all find the same
    file, whichever of them exists. A folder's own files come before the members of its shards.

    Raises:
        ImageProblem: MISSING_IMAGE: not there, or outside the root.
        DataError: A root that cannot be opened, or a shard that is broken.
    """
    place = _root(root)
    found = place.find(_below(root, place.base, name))
    if found is None:
        raise _missing(f"image {name!r} is not in {root}")
    return found


def check_root(root: str) -> Shards | None:
    """Check that an image root can be read; its shards, where it has some.

    Raises:
        DataError: There is none, or one of its shards is broken.
    """
    place = _root(root)
    if not place.exists:
        raise DataError(f"{root}: there is no such image folder, .zip or uncompressed .tar")
    return place.shards


def load_image(root: str, name: str, max_pixels: int) -> bytes:
    """Read and check one image: what `sima validate` accepts is what the stages accept.

    Raises:
        ImageProblem: With `.reason`: missing, too large (bytes or pixels), broken.
        DataError: A root that cannot be opened.
    """
    data = read_image(root, name)
    try:
        check_image(data, max_pixels)
    except ImageProblem as problem:
        raise ImageProblem(problem.reason, f"image {name!r}: {problem}") from problem
    return data


def read_image(root: str, name: str) -> bytes:
    """The bytes of an image that was checked before.

    Raises:
        ImageProblem: MISSING_IMAGE, IMAGE_TOO_LARGE by its bytes, or BROKEN_IMAGE in a shard.
        DataError: A root that cannot be opened.
    """
    try:
        image = resolve_image(root, name)
        if image.size > MAX_IMAGE_BYTES:
            raise ImageProblem(
                Quarantine.IMAGE_TOO_LARGE,
                f"image {name!r}: {image.size:,} bytes, over the {MAX_IMAGE_BYTES:,} allowed",
            )
        return image.read()
    except OSError as error:
        raise _missing(f"image {name!r} cannot be read: {why(error)}") from error


def _below(root: str, base: str, name: str) -> str:
    """The name relative to the root, or an ImageProblem when it points elsewhere."""
    outside = _missing(f"image {name!r} is outside the image folder {root}")
    relative = name
    if "://" in name:
        if not name.startswith(f"{root.rstrip('/')}/"):
            raise outside
        relative = name[len(root.rstrip("/")) + 1 :]
    elif name.startswith("/"):
        if not name.startswith(f"{base.rstrip('/')}/"):
            raise outside
        relative = name[len(base.rstrip("/")) + 1 :]
    plain = plain_name(relative)
    if plain is None:
        raise outside
    return plain


def _missing(message: str) -> ImageProblem:
    return ImageProblem(Quarantine.MISSING_IMAGE, message)


@dataclass(frozen=True, slots=True)
class _Loose:
    """A file of its own."""

    filesystem: fs.FileSystem
    path: str
    size: int

    def read(self) -> bytes:
        with self.filesystem.open_input_file(self.path) as file:
            return file.read()


class _Root:
    """Where images are looked for; what is found out about it is found out once, by one thread."""

    def __init__(self, location: str) -> None:
        self._filesystem, self.base = open_location(location)
        self._type = self._filesystem.get_file_info(self.base).type
        self.exists = self._type is FileType.Directory or self._is_shard
        self._lock = Lock()
        self._listed: tuple[Shards | None, bool] | None = None

    @property
    def _is_shard(self) -> bool:
        return self._type is FileType.File and is_shard(self.base)

    @property
    def shards(self) -> Shards | None:
        """Those of the root; None where it has none."""
        return self._contents()[0]

    def find(self, name: str) -> ImageFile | None:
        """The image of a plain name, in the first of its places that has it."""
        names = places(name)
        # A folder is not listed before it lacks something: it may hold a hundred thousand images.
        if not self._is_shard and (self._listed is None or self._listed[1]):
            for place in names:
                path = posixpath.join(self.base, place)
                info = self._filesystem.get_file_info(path)
                if info.type is FileType.File:
                    return _Loose(self._filesystem, path, info.size or 0)
        shards = self.shards
        found = (shards.find(place) for place in names) if shards else ()
        return next((member for member in found if member is not None), None)

    def _contents(self) -> tuple[Shards | None, bool]:
        """The shards, and whether there may be files beside them."""
        with self._lock:
            if self._listed is None:
                entries = self._entries()
                shards = [e for e in entries if e.type is FileType.File and is_shard(e.path)]
                opened = open_shards(self._filesystem, shards) if shards else None
                self._listed = opened, not shards or len(shards) < len(entries)
            return self._listed

    def _entries(self) -> list[fs.FileInfo]:
        if self._is_shard:
            return [self._filesystem.get_file_info(self.base)]
        try:
            return self._filesystem.get_file_info(FileSelector(self.base, allow_not_found=True))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.base}: cannot be listed: {why(error)}") from error


_roots: dict[str, _Root] = {}
_roots_lock = Lock()


def _root(location: str) -> _Root:
    """A root by its location; one that is not there is looked for again."""
    with _roots_lock:
        if (root := _roots.get(location)) is None:
            root = _Root(location)
            if root.exists:
                _roots[location] = root
        return root
