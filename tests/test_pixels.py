"""Images as files hold them and as networks see them."""

import numpy as np

from npedit_jax.pixels import to_pixels, to_uint8


def test_every_value_survives_the_round_trip():
    image = np.arange(256, dtype=np.uint8)
    pixels = to_pixels(image)
    assert (float(pixels[0]), float(pixels[-1])) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(pixels), image)


def test_pixels_out_of_range_are_clipped_and_others_rounded():
    np.testing.assert_array_equal(to_uint8(np.float32([-3.0, 1.5, 0.001, -0.003])), [0, 255, 128, 127])
