"""Local paths and URIs through pyarrow, and the images below an image root.

An image name never leaves its root: `..`, foreign URIs and absolute paths elsewhere are
MISSING_IMAGE.
"""

import os
import posixpath
import re
from functools import cache

import pyarrow as pa
from pyarrow import fs

from sima_ray.errors import DataError
from sima_ray.images import ImageProblem, check_image
from sima_ray.records import Quarantine

MAX_IMAGE_BYTES = 64 * 2**20
"""Larger image files are set aside unread: one of them must not fill a worker's memory."""

_COCO_NAME = re.compile(
    r"(?:coco/)?(?:(?:train|val)20(?:14|17)/)?(?:COCO_(?:train|val)2014_)?(?P<leaf>[^/]+)"
)
_COCO_PLACES = (
    "{leaf}",
    "train2017/{leaf}",
    "val2017/{leaf}",
    "coco/train2017/{leaf}",
    "coco/val2017/{leaf}",
    "COCO_train2014_{leaf}",
    "COCO_val2014_{leaf}",
    "train2014/COCO_train2014_{leaf}",
    "val2014/COCO_val2014_{leaf}",
)
"""Where COCO keeps one and the same image, by how and when it was downloaded; ids are unique over
all sets."""


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
        raise DataError(f"{location}: cannot be opened: {one_line(error)}") from error
    return filesystem, path


def resolve_image(root: str, name: str) -> str:
    """The path, in the root's file system, of the image that `name` means.

    A name is relative to the root, or absolute below it. A name that is not there as it stands is
    looked for where COCO's layouts would have it: `000000000009.jpg`, `train2017/…`,
    `coco/train2017/…` and `COCO_train2014_…` all find the same file, whichever of them exists.

    Raises:
        ImageProblem: MISSING_IMAGE: not there, or outside the root.
        DataError: A root that cannot be opened.
    """
    filesystem, base = open_location(root)
    relative = _below(root, base, name)
    names = [relative]
    if match := _COCO_NAME.fullmatch(relative):
        names += [place.format(leaf=match["leaf"]) for place in _COCO_PLACES]
    for candidate in dict.fromkeys(names):
        path = posixpath.join(base, candidate)
        if filesystem.get_file_info(path).type == fs.FileType.File:
            return path
    raise _missing(f"image {name!r} is not in {root}")


def bare_name(name: str) -> str | None:
    """The shortest name by which `resolve_image` finds an image; None for one that is not below a root."""
    parts = name.split("/")
    if "://" in name or name.startswith("/") or ".." in parts or "\0" in name:
        return None
    relative = "/".join(part for part in parts if part not in ("", "."))
    match = _COCO_NAME.fullmatch(relative)
    return match["leaf"] if match else relative or None


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
        ImageProblem: MISSING_IMAGE, or IMAGE_TOO_LARGE by its bytes.
        DataError: A root that cannot be opened.
    """
    path = resolve_image(root, name)
    filesystem, _ = open_location(root)
    try:
        size = filesystem.get_file_info(path).size or 0
        if size > MAX_IMAGE_BYTES:
            raise ImageProblem(
                Quarantine.IMAGE_TOO_LARGE,
                f"image {name!r}: {size:,} bytes, over the {MAX_IMAGE_BYTES:,} allowed",
            )
        with filesystem.open_input_file(path) as file:
            return file.read()
    except OSError as error:
        raise _missing(f"image {name!r} cannot be read: {one_line(error)}") from error


def one_line(error: object, limit: int = 300) -> str:
    """An error's text on one line, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


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
    parts = relative.split("/")
    if ".." in parts or "\0" in relative or relative.startswith("/"):
        raise outside
    return "/".join(part for part in parts if part not in ("", "."))


def _missing(message: str) -> ImageProblem:
    return ImageProblem(Quarantine.MISSING_IMAGE, message)
