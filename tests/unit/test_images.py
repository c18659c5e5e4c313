"""The image rules: formats, sizes from the header, wholeness, and what the model sees."""

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from sima_ray.images import ImageProblem, check_image, decode_image, read_header
from sima_ray.records import Quarantine

LIMIT = 1_000_000
JPEGS: dict[str, dict[str, object]] = {
    "colour": {},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "progressive": {"progressive": True, "quality": 90},
    "restarts": {"subsampling": 0, "restart_marker_blocks": 4},
    "two": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (75, 50))]},
}


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_accepted_formats(format: str) -> None:
    data = encoded(noise(), format)
    info = check_image(data, LIMIT)
    assert (info.format, info.width, info.height, info.pixels) == (format, 64, 48, 64 * 48)
    assert read_header(data, LIMIT) == info
    assert decode_image(data, LIMIT).size == (64, 48)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(format: str) -> None:
    with pytest.raises(ImageProblem) as problem:
        check_image(encoded(noise(), format), LIMIT)
    assert problem.value.reason is Quarantine.BROKEN_IMAGE


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"x" * 99])
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ImageProblem) as problem:
        check_image(data, LIMIT)
    assert problem.value.reason is Quarantine.BROKEN_IMAGE


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(format: str, keep: float) -> None:
    data = encoded(noise(256, 256), format)
    with pytest.raises(ImageProblem) as problem:
        check_image(data[: int(len(data) * keep)], LIMIT)
    assert problem.value.reason is Quarantine.BROKEN_IMAGE


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on damaged EXIF
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_check_accepts_what_decodes_and_nothing_else(options: dict[str, object]) -> None:
    """A JPEG is checked with an eighth of its pixels: damage must show as it does in all of them."""
    mode = str(options.get("mode", "RGB"))
    whole = encoded(noise(75, 50).convert(mode), **{"format": "JPEG", **options})
    assert check_image(whole, LIMIT).width == 75
    draw, accepted = random.Random(0), 0
    for number in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3, 20))):
            data[draw.randrange(2, draw.choice((min(700, len(data)), len(data))))] = draw.randrange(
                256
            )
        data = bytes(data if number % 3 else data[: draw.randrange(len(data))])
        checked, decoded = (_reason(check, data) for check in (check_image, decode_image))
        assert checked == decoded
        accepted += checked is None
    assert 10 < accepted < 140


def _reason(check: Callable[[bytes, int], object], data: bytes) -> Quarantine | None:
    try:
        check(data, LIMIT)
    except ImageProblem as problem:
        return problem.reason
    return None


@pytest.mark.parametrize("size", [(1001, 1000), (10_000, 10_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_by_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageProblem) as problem:
        read_header(claims(*size), LIMIT)
    assert problem.value.reason is Quarantine.IMAGE_TOO_LARGE


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}])
def test_webp_headers_are_read_before_pillow_opens_them(options: dict[str, object]) -> None:
    data = encoded(noise(300, 200), "WEBP", **options)
    assert read_header(data, 60_000).pixels == 60_000
    with pytest.raises(ImageProblem, match="300 × 200"):
        read_header(data, 59_999)


def test_strips_are_refused() -> None:
    """A processor that scales the shorter side to 336 would make 5 gigapixels of this."""
    with pytest.raises(ImageProblem) as problem:
        read_header(claims(50_000, 1), LIMIT)
    assert problem.value.reason is Quarantine.IMAGE_TOO_LARGE


def test_what_the_model_sees_is_upright_rgb_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(clear, "PNG"), LIMIT).getpixel((0, 0)) == (255, 255, 255)
    assert (
        decode_image(encoded(Image.new("L", (4, 4), 7), "PNG"), LIMIT).getpixel((0, 0)) == (7,) * 3
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(noise(64, 48), "JPEG", exif=exif)
    assert decode_image(turned, LIMIT).size == (48, 64)
