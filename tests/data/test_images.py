"""Decoding of real photographs in every state a data set may hold them in, and of files that only pretend."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from npedit_jax import pictures
from npedit_jax.data import buckets, images
from tests.data.photographs import PHOTOGRAPHS, picture, psnr, read, save

SIZES = [(512, 512), (576, 448), (384, 640), (100, 93), (61, 250)]


def expected(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Full decode, bicubic resize of the centred box of the bucket's shape."""
    (height, width), (w, h) = size, image.size
    scale = min(w / width, h / height)
    left, top = max(0, (w - scale * width) / 2), max(0, (h - scale * height) / 2)
    box = (left, top, w - left, h - top)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_scaled_and_cropped_about_the_centre(name, size):
    pixels, whole = images.decode(read(name), size), picture(name)
    assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
    if PHOTOGRAPHS[name].suffix == ".jpg" and min(whole.width / size[1], whole.height / size[0]) >= 2:
        assert psnr(pixels, expected(whole, size)) > 33  # its scaled decode filters a little differently
    else:
        assert abs(pixels.astype(int) - expected(whole, size)).max() <= 1


def test_scaled_decoding_costs_no_quality():
    """At exactly a half, libjpeg's scaled decode stands for the whole resize: it stays close to the full one."""
    large = picture("china").resize((1024, 1024), Image.Resampling.LANCZOS)
    file = save(large)
    pixels = images.decode(file, (512, 512))
    with Image.open(io.BytesIO(file)) as decoded:
        full = decoded.convert("RGB")
    lanczos, bicubic = (np.asarray(full.resize((512, 512), kind)) for kind in (Image.LANCZOS, Image.BICUBIC))
    assert psnr(pixels, lanczos) > 37 and psnr(pixels, bicubic) > 37
    # Its sharpness, the energy of differences between neighbours, lies between theirs.
    drafted, *full = [np.mean(np.diff(x.astype(np.float64), axis=1) ** 2) for x in (pixels, lanczos, bicubic)]
    assert min(full) < drafted < max(full)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = picture("coffee").resize((301, 200))
    turned = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }.get(orientation, [])
    stored = upright
    for step in turned:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(stored, "PNG", exif=exif)
    assert images.read_size(file) == (200, 301)
    for size in [(96, 160), (200, 301), (160, 96)]:
        difference = images.decode(file, size).astype(int) - images.decode(save(upright, "PNG"), size)
        assert abs(difference).mean() < 0.3 and abs(difference).max() <= 8  # the two passes of a resize swap places


def test_a_turned_jpeg_is_decoded_at_a_smaller_size():
    upright = picture("china").resize((640, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = save(upright), save(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    for size in [(200, 320), (100, 130), (96, 60)]:
        assert psnr(images.decode(turned, size), images.decode(plain, size)) > 40
    assert images.read_size(turned) == (400, 640)


def test_an_orientation_that_is_no_number_is_none():
    """A FLOAT of infinity (TIFF 6.0, type 11) under the tag."""
    tiff = b"II*\0" + struct.pack("<IHHHIfI", 8, 1, 0x0112, 11, 1, float("inf"), 0)
    for format in ("JPEG", "PNG", "WEBP"):
        file = save(picture("coffee").resize((60, 40)), format, exif=b"Exif\0\0" + tiff)
        assert images.read_size(file) == (40, 60) and images.decode(file, (40, 60)).shape == (40, 60, 3)


def test_exif_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = save(picture("coffee").resize((60, 40)), "PNG", exif=exif)
    begin = file.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(file[begin : begin + 4], "big")
    late = file[:begin] + file[end:-12] + file[begin:end] + file[-12:]  # before IEND
    assert images.read_size(late) == images.read_size(file) == (60, 40)
    np.testing.assert_array_equal(images.decode(late, (60, 40)), images.decode(file, (60, 40)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_formats(format):
    file = save(picture("chelsea"), format, **({"lossless": True} if format == "WEBP" else {}))
    assert images.read_size(file) == (300, 451)
    assert psnr(images.decode(file, (150, 200)), images.decode(read("chelsea"), (150, 200))) > 36


def test_cmyk():
    cmyk = picture("flower").convert("CMYK")
    wanted = np.asarray(cmyk.convert("RGB").resize((320, 213), Image.Resampling.BICUBIC))
    assert psnr(images.decode(save(cmyk), (213, 320)), wanted) > 30


def test_sixteen_bit_grey_and_colour():
    grey = np.asarray(picture("camera").convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    pixels = images.decode(save(deep, "PNG"), (512, 512))
    np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], 3, -1))
    color = np.asarray(picture("astronaut"))[:64, :64]
    np.testing.assert_array_equal(images.decode(_png16(color.astype(np.uint16) * 257), (64, 64)), color)
    deep = np.random.default_rng(0).integers(0, 2**16, (64, 64, 3)).astype(np.uint16)
    np.testing.assert_array_equal(images.decode(_png16(deep), (64, 64)), deep >> 8)  # colour is cut


def test_users_pictures_are_rounded_and_limited_as_those_of_records_are():
    every = save(Image.fromarray(np.arange(2**16, dtype=np.uint16).reshape(256, 256)), "PNG")
    grey = images.decode(every, (256, 256))
    assert (grey[0, :129] == 0).all() and (grey[0, 129:] == 1).all()  # to the nearest: 65535 is 255
    np.testing.assert_array_equal(np.asarray(pictures.decode(every)), grey)
    assert images.read_size(_claiming(8192, 8192)) == (8192, 8192)
    for decode in (images.read_size, pictures.decode):
        with pytest.raises(ValueError, match="67108864"):
            decode(_claiming(8192, 8193))


def _png16(pixels: np.ndarray) -> bytes:
    """A PNG file of 16-bit colour, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA-ish", "RGB-key", "1"])
def test_transparency_shows_white_and_palettes_their_colours(mode):
    photograph = picture("astronaut").resize((64, 64))
    alpha = Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 64, 32))  # the upper half is clear
    options = {}
    if mode == "RGBA":
        image = photograph.copy()
        image.putalpha(alpha)
    elif mode == "LA":
        image = Image.merge("LA", (photograph.convert("L"), alpha))
    elif mode == "RGB-key":
        image, options = photograph.copy(), {"transparency": (1, 2, 3)}
        image.paste((1, 2, 3), (0, 0, 64, 32))
    elif mode == "1":
        image = photograph.convert("1")
    else:
        rgba = photograph.copy()
        rgba.putalpha(alpha)
        image = rgba.quantize(64, method=Image.Quantize.FASTOCTREE) if mode == "PA-ish" else photograph.quantize(64)
    pixels = images.decode(save(image, "PNG", **options), (64, 64))
    lower = np.asarray(photograph)[32:]
    if mode in ("RGBA", "LA", "PA-ish", "RGB-key"):
        assert (pixels[:32] == 255).all()
    if mode in ("RGBA", "RGB-key"):
        np.testing.assert_array_equal(pixels[32:], lower)
    elif mode in ("P", "PA-ish"):
        assert psnr(pixels[32:], lower) > 22
    elif mode == "1":
        assert set(np.unique(pixels)) == {0, 255}
    else:
        np.testing.assert_array_equal(pixels[32:, :, 0], np.asarray(photograph.convert("L"))[32:])


def _claiming(width: int, height: int) -> bytes:
    """A PNG file whose header announces so many pixels."""
    small = _png16(np.zeros((1, 1, 3), np.uint16))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    "file, reason",
    [
        (b"", "empty"),
        (b"\0" * 5000, "unknown"),
        (b"<html>404 Not Found</html>", "unknown"),
        (save(Image.new("RGB", (9, 9)), "GIF"), "unknown"),
        (read("china")[:-40_000], "truncated"),
        (read("chelsea")[:50_000], "truncated"),
        (read("china")[:400], "broken|truncated"),
        (_claiming(100_000, 100_000), "bomb"),
        (save(Image.new("L", (10_000, 8_100)), "PNG"), "bomb"),
        (read("chelsea")[:30_000] + b"\xff" * 2000 + read("chelsea")[32_000:], "broken"),
    ],
    ids=["empty", "zeros", "html", "gif", "cut jpeg", "cut png", "cut header", "huge header", "huge", "overwritten"],
)
def test_files_that_cannot_be_used_say_why(file, reason):
    with pytest.raises(images.BadImage) as error:
        images.decode(file, (64, 64))
    assert error.value.reason in reason.split("|")
    assert len(str(error.value)) < 300


def test_every_cut_of_a_file_is_either_refused_or_whole():
    file = save(picture("china").resize((80, 60)), "PNG")
    for length in range(0, len(file) - 12, 97):
        with pytest.raises(images.BadImage):
            images.decode(file[:length], (32, 32))


def test_buckets_keep_the_most_of_a_picture():
    sizes = {(512, 512): 0, (1000, 1000): 0, (2000, 1500): 5, (1500, 2000): 6, (1290, 1000): 1, (900, 1600): 4}
    height, width = np.array(list(sizes)).T
    assert buckets.choose(height, width, buckets.BUCKETS).tolist() == list(sizes.values())
    rng = np.random.default_rng(0)
    height, width = rng.integers(100, 3000, (2, 500))
    chosen = buckets.choose(height, width, buckets.BUCKETS)
    kept = []
    for h, w in buckets.BUCKETS:
        scale = np.minimum(height / h, width / w)
        kept.append(scale**2 * h * w / (height * width))
    np.testing.assert_allclose(np.array(kept)[chosen, np.arange(500)], np.max(kept, axis=0))


def test_equally_good_buckets_give_the_larger_and_bad_ones_an_error():
    assert buckets.choose(np.array([100]), np.array([100]), [(64, 64), (128, 128), (32, 32)]).tolist() == [1]
    for wrong in [[], [(64, 64), (64, 64)]]:
        with pytest.raises(ValueError, match="each once"):
            buckets.choose(np.array([1]), np.array([1]), wrong)
