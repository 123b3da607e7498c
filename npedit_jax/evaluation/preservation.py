"""How much of a picture an edit left as it was: SSIM and PSNR against the reference, by scikit-image."""

import numpy as np
from PIL import Image
from skimage import metrics

WINDOW = 7  # pixels, of SSIM


def preservation(reference: Image.Image, edited: Image.Image, mask: Image.Image | None = None) -> dict[str, float]:
    """`ssim` in [-1, 1] and `psnr` in dB of two pictures of one size, 8 bits a channel.

    Equal pictures have a PSNR of 100 dB here, so that means stay finite.

    Args:
      mask: bright where the edit is; only what is dark counts. Without one the whole picture does, so that an edit
        which changes much has low figures however well it keeps the rest: compare such figures between editors only.

    Raises:
      ValueError: sizes that differ, or a mask that leaves nothing.
    """
    if reference.size != edited.size:
        raise ValueError(f"expected two pictures of one size, found {reference.size} and {edited.size}")
    before, after = (np.asarray(image.convert("RGB")) for image in (reference, edited))
    outside = kept(mask, reference.size)
    window = min(WINDOW, *before.shape[:2])
    window -= 1 - window % 2
    _, similarity = metrics.structural_similarity(before, after, win_size=window, channel_axis=-1, full=True)
    before, after = before[outside], after[outside]
    same = np.array_equal(before, after)
    psnr = 100.0 if same else min(100.0, metrics.peak_signal_noise_ratio(before, after, data_range=255))
    return {"ssim": float(similarity[outside].mean()), "psnr": float(psnr)}


def kept(mask: Image.Image | None, size: tuple[int, int]) -> np.ndarray:
    """Where a picture of that size (width, height) should stay as it is, bool [H, W]; everywhere without a mask.

    Raises:
      ValueError: the mask leaves nothing.
    """
    if mask is None:
        return np.ones(size[::-1], bool)
    outside = np.asarray(mask.convert("L").resize(size)) < 128
    if not outside.any():
        raise ValueError("the mask leaves nothing outside the edit")
    return outside
