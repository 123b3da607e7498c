"""Pictures as people have them: read upright as RGB whatever the file, brought to a size, written with their origin."""

import io
import math
import warnings
from collections.abc import Mapping

from etils import epath
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from npedit_jax.data import images

# What people have beside the formats of records. Pillow reads others by running programs, such as EPS by Ghostscript.
FORMATS = (*images.FORMATS, "GIF", "BMP", "TIFF", "PPM")
Size = tuple[int, int]  # (width, height), as PIL has it


def read(file: epath.PathLike) -> Image.Image:
    """A picture file, upright, in RGB; raises ValueError where there is none, or as `decode`."""
    file = epath.Path(file)
    if not file.is_file():
        raise ValueError(f"image {file} is not there, or is no file")
    return decode(file.read_bytes(), f"image {file}")


def decode(data: bytes, name: str = "the image") -> Image.Image:
    """The picture that a file holds, upright, in RGB.

    Raises:
      ValueError: no picture of FORMATS, a damaged one, or more than `images.MAX_PIXELS`; `name` begins the message.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        # Pillow's own limit is higher, and a TIFF is decoded a whole tile at a time, however small the picture is.
        tags = getattr(image, "tag_v2", {})
        tile = tuple(int(tags.get(tag, 1)) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        for size in (image.size, tile):
            if math.prod(size) > images.MAX_PIXELS:
                raise Image.DecompressionBombError(f"{size[0]}x{size[1]}")
        with image:
            return upright(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than {images.MAX_PIXELS} pixels; scale it down ({error})") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} does not decode: it is of no known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # the decoders raise whatever they stumble over: SyntaxError, struct.error, ...
        raise ValueError(f"{name} does not decode: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """The picture in RGB, turned as its EXIF orientation says; 16 bits become 8, what is see-through lies on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return images.eight_bit_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def nearest_multiple(size: Size, multiple: int, largest: Size, area: int | None = None) -> Size:
    """Sides that are multiples of `multiple`, of about the picture's own shape, at most `largest`.

    Args:
      area: pixels that the result should have; None keeps the picture's own where `largest` allows.
    """
    scale = math.sqrt(area / math.prod(size)) if area else 1.0
    scale = min(scale, largest[0] / size[0], largest[1] / size[1])
    width, height = (
        min(max(multiple, multiple * round(scale * side / multiple)), limit)
        for side, limit in zip(size, largest, strict=True)
    )
    return width, height


def resize(image: Image.Image, size: Size) -> Image.Image:
    """The picture at another size, antialiased; the same picture where it has it already."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def write_png(image: Image.Image, file: epath.PathLike, notes: Mapping[str, object]) -> None:
    """Writes a PNG with text fields; the file appears whole or not at all."""
    texts = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        texts.add_itxt(key, str(value))
    data = io.BytesIO()
    image.save(data, format="PNG", pnginfo=texts)
    file = epath.Path(file)
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_bytes(data.getvalue())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
