"""Image files to pixels of a bucket: decode, turn upright, scale and crop, each file on its own terms.

A picture is scaled until it covers the bucket and cut about its centre, never padded. One antialiased bicubic resize
does both, from a box of the picture; a JPEG is first decoded at a half, a quarter or an eighth of its size where that
still covers the bucket (libjpeg's scaled inverse transform, Pillow's draft mode).
"""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
MAX_PIXELS = 64 * 2**20  # 8192 x 8192; a picture of more is taken for a decompression bomb, earlier than Pillow does
MAX_BYTES = 64 * 2**20
_BACKGROUND = (255, 255, 255)  # what shows through transparent pixels

# What undoes an EXIF orientation (CIPA DC-008, table 6), and those that swap height and width.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
# Everything that Pillow's readers of these formats raise on damaged files.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, ArithmeticError,
    struct.error, zlib.error,
)  # fmt: skip


class BadImage(ValueError):
    """An image file that cannot be used; `reason` is one word to count by: empty, unknown, bomb, truncated, broken."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Size(NamedTuple):
    """Pixels of a picture as it is seen, turned upright."""

    height: int
    width: int


def read_size(data: bytes) -> Size:
    """The size of a picture from its file's headers; nothing is decoded.

    Raises:
      BadImage: empty, of another format than FORMATS, or a decompression bomb.
    """
    with _open(data) as image:
        return _upright_size(image, data)


def decode(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decodes a file and crops it to a bucket.

    Args:
      data: a JPEG, PNG or WebP file.
      size: height and width of the bucket.

    Returns:
      uint8 [H, W, 3], sRGB. CMYK and palettes are converted, 16 bits of grey are rounded to 8, of colour cut to 8,
      transparent pixels show white, and EXIF's orientation is undone.

    Raises:
      BadImage: as `read_size`, or a file that is cut short or damaged.
    """
    with _open(data) as image:
        orientation = _orientation(image, data)
        target = Size(*reversed(size)) if orientation in _SIDEWAYS else Size(*size)
        try:
            fitted = _fit(image, target)
        except Image.DecompressionBombError as error:
            raise BadImage("bomb", str(error)) from error
        except _DAMAGE as error:
            reason = "truncated" if "truncated" in str(error) else "broken"
            raise BadImage(reason, f"{image.format} file of {len(data)} bytes: {error}") from error
        if orientation in _UPRIGHT:
            fitted = fitted.transpose(_UPRIGHT[orientation])
        return np.asarray(fitted)


def _open(data: bytes) -> Image.Image:
    """Opens a file without decoding it, after the checks that need no more than its header."""
    if not data:
        raise BadImage("empty", "the image file is empty")
    if len(data) > MAX_BYTES:
        raise BadImage("bomb", f"an image file of {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage("bomb", str(error)) from error
    except _DAMAGE as error:
        reason = "broken" if data.startswith(_SIGNATURES) else "unknown"
        raise BadImage(reason, f"no readable {', '.join(FORMATS)} file: begins with {data[:12]!r}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("bomb", f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    exif, raw = Image.Exif(), image.info.get("exif", b"")
    if not raw and image.format == "PNG":
        raw = _late_exif(data)  # `image.getexif` would decode the picture for it
    try:
        exif.load(raw)
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1  # damaged metadata of a picture that may well be whole


def _late_exif(data: bytes) -> bytes:
    """EXIF of a PNG file, which may also stand behind the pixels; empty where there is none."""
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"eXIf":
            return data[place + 8 : place + 8 + length]
        place += 12 + length
    return b""


def _upright_size(image: Image.Image, data: bytes) -> Size:
    size = Size(image.height, image.width)
    return Size(*reversed(size)) if _orientation(image, data) in _SIDEWAYS else size


def _fit(image: Image.Image, target: Size) -> Image.Image:
    """The picture, not yet upright, scaled and cropped to the target as RGB."""
    width, height = image.size
    scale = min(width / target.width, height / target.height)  # picture pixels per bucket pixel
    # Rounded down: a side one pixel short of a half must not be decoded at half.
    drafted = image.draft(None, (int(width / scale), int(height / scale)))
    if drafted:
        (_, _, width, height), scale = drafted[1], scale * drafted[1][2] / width
    image = _eight_bits(image)
    # A side that fits exactly may come out a rounding error too long.
    left, top = max(0.0, (width - scale * target.width) / 2), max(0.0, (height - scale * target.height) / 2)
    box = (left, top, min(left + scale * target.width, image.width), min(top + scale * target.height, image.height))
    if image.size != (target.width, target.height) or box != (0, 0, *image.size):
        image = image.resize((target.width, target.height), Image.Resampling.BICUBIC, box=box)
    return _to_rgb(image)


def eight_bit_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, a mode that begins with I, rounded to 8: Pillow would clip it at 255."""
    return Image.fromarray(np.rint(np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pixels that can be resized: no palette, 8 bits a channel; loads the picture."""
    if image.mode.startswith("I"):  # the one deep mode that these formats have; Pillow cuts 16-bit colour to 8
        return eight_bit_grey(image)
    transparent = "transparency" in image.info
    if image.mode in ("P", "PA", "LA", "La", "RGBa") or (transparent and image.mode in ("1", "L", "RGB")):
        return image.convert("RGBA" if transparent or "a" in image.mode.lower() else "RGB")
    if image.mode == "1":
        return image.convert("L")
    image.load()
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        ground = Image.new("RGBA", image.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
