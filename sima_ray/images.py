"""What counts as a usable image, for data and services: JPEG, PNG or WebP, not huge, whole.

Sizes are read from the header before anything is decoded: a small file can claim gigapixels.
"""

import contextlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass

from PIL import Image, ImageOps

from sima_ray.errors import DataError
from sima_ray.records import Quarantine

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ASPECT_RATIO = 100
"""Image processors scale the shorter side up: a strip of 1 × 50,000 would become gigapixels."""

_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError, LookupError)
"""What Pillow raises on damaged files, across its formats."""

# Our own limit is checked from the header; Pillow's would only add a warning to it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image's header says."""

    format: str
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Width × height."""
        return self.width * self.height


class ImageProblem(DataError):
    """An image that cannot be used; `reason` is BROKEN_IMAGE or IMAGE_TOO_LARGE."""

    def __init__(self, reason: Quarantine, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_header(data: bytes, max_pixels: int) -> ImageInfo:
    """Check format and size without decoding.

    Raises:
        ImageProblem: Not a JPEG, PNG or WebP; an unreadable header; too many pixels; a strip.
    """
    _, info = _open(data, max_pixels)
    return info


def check_image(data: bytes, max_pixels: int) -> ImageInfo:
    """Check that an image is of an accepted format and size, and whole: it is decoded to its end.

    Raises:
        ImageProblem: As `read_header`, or truncated or damaged.
    """
    image, info = _open(data, max_pixels)
    image.draft(None, (1, 1))  # JPEG: every coefficient is read, an eighth of the pixels computed
    _load(image)
    return info


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image as upright RGB, transparency on white: what the model sees, served or tuned.

    Raises:
        ImageProblem: As `check_image`.
    """
    image, _ = _open(data, max_pixels)
    _load(image)
    with contextlib.suppress(*_UNREADABLE):  # a damaged EXIF block: the pixels are sound
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _open(data: bytes, max_pixels: int) -> tuple[Image.Image, ImageInfo]:
    """Open lazily and check what the header says."""
    claimed = _webp_size(data)
    if claimed is not None:  # Pillow's WebP reader allocates the canvas as it opens
        _check_size(*claimed, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(f"more pixels than the {max_pixels:,} allowed") from error
    except _UNREADABLE as error:
        raise ImageProblem(Quarantine.BROKEN_IMAGE, "not a readable JPEG, PNG or WebP") from error
    _check_size(image.width, image.height, max_pixels)
    return image, ImageInfo(image.format or "", image.width, image.height)


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _UNREADABLE as error:
        raise ImageProblem(Quarantine.BROKEN_IMAGE, "truncated or damaged image") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageProblem(Quarantine.BROKEN_IMAGE, "an image without pixels")
    if width * height > max_pixels:
        raise _too_large(f"{width} × {height} pixels, over the {max_pixels:,} allowed")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise _too_large(
            f"{width} × {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other"
        )


def _too_large(message: str) -> ImageProblem:
    return ImageProblem(Quarantine.IMAGE_TOO_LARGE, message)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a WebP header; None for other files and for cut-off headers."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":  # extended: two 24-bit numbers, each one less than the side
            return (
                int.from_bytes(data[24:27], "little") + 1,
                int.from_bytes(data[27:30], "little") + 1,
            )
        case b"VP8L":  # lossless: two 14-bit numbers, each one less than the side
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":  # lossy: two 14-bit numbers
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
        case _:
            return None
