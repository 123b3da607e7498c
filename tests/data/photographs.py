"""Real photographs for tests, those that scikit-image and scikit-learn ship, and files made of them."""

import io
import pathlib

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

SKIMAGE = pathlib.Path(skimage.data.__file__).parent
PHOTOGRAPHS = {
    "china": pathlib.Path(sklearn.datasets.__file__).parent / "images" / "china.jpg",  # 427 x 640 pixels
    "flower": pathlib.Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg",  # 427 x 640
    "astronaut": SKIMAGE / "astronaut.png",  # 512 x 512
    "chelsea": SKIMAGE / "chelsea.png",  # 300 x 451
    "coffee": SKIMAGE / "coffee.png",  # 400 x 600
    "motorcycle": SKIMAGE / "motorcycle_left.png",  # 500 x 741
    "hubble": SKIMAGE / "hubble_deep_field.jpg",  # 872 x 1000
    "camera": SKIMAGE / "camera.png",  # 512 x 512, grey
}


def read(name: str) -> bytes:
    """The file as it is shipped."""
    return PHOTOGRAPHS[name].read_bytes()


def picture(name: str) -> Image.Image:
    """The photograph as RGB."""
    return Image.open(PHOTOGRAPHS[name]).convert("RGB")


def save(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format, **({"quality": 95} if format == "JPEG" else {}) | options)
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))
