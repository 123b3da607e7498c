"""SSIM and PSNR: what they must be where that is known, and that the mask decides what counts."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from npedit_jax.evaluation.preservation import preservation


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(data.astronaut()).resize((96, 64))


def test_equal_pictures(photograph):
    assert preservation(photograph, photograph) == {"ssim": pytest.approx(1.0), "psnr": 100.0}


def test_psnr_of_a_known_error(photograph):
    pixels = np.asarray(photograph).astype(int)
    shifted = np.where(pixels < 200, pixels + 10, pixels - 10).astype(np.uint8)
    found = preservation(photograph, Image.fromarray(shifted))
    assert found["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-6)
    assert 0.5 < found["ssim"] < 1.0


def test_mask_leaves_the_edit_out(photograph):
    edited, mask = np.array(photograph), np.zeros((64, 96), np.uint8)
    edited[10:30, 10:30], mask[4:36, 4:36] = 255, 255  # wider than the edit by the window of SSIM
    whole = preservation(photograph, Image.fromarray(edited))
    outside = preservation(photograph, Image.fromarray(edited), Image.fromarray(mask))
    assert outside["psnr"] == 100.0 and outside["ssim"] == pytest.approx(1.0)
    assert whole["psnr"] < 20 and whole["ssim"] < 0.97


def test_what_cannot_be_compared_is_told(photograph):
    with pytest.raises(ValueError, match="one size"):
        preservation(photograph, photograph.resize((64, 96)))
    with pytest.raises(ValueError, match="leaves nothing"):
        preservation(photograph, photograph, Image.new("L", (96, 64), "white"))


def test_pictures_smaller_than_the_window():
    small = Image.new("RGB", (4, 4), "red")
    assert preservation(small, small)["psnr"] == 100.0
