"""Resolution buckets: every picture is cropped to one of a few sizes, so that a few programs train on all of them."""

from collections.abc import Sequence

import numpy as np

# Height x width, all of about 512 x 512 pixels or a little less: those of the NP-Edit release; the paper trained
# at 512 x 512.
BUCKETS = ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (512, 384), (384, 512))


def choose(height: np.ndarray, width: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket that keeps the most of each picture when it is cropped to its shape.

    Args:
      height: [n], pixels of the pictures as they are seen.
      width: [n].
      buckets: (height, width) each.

    Returns:
      int32 [n], index into the buckets; of equally good ones the one of more pixels, then the first.

    Raises:
      ValueError: no buckets, or one given twice.
    """
    if not buckets or len(set(map(tuple, buckets))) < len(buckets):
        raise ValueError(f"expected buckets (height, width), each once; found {buckets}")
    sizes = np.array(buckets, np.float64)
    shape = np.log(np.asarray(height, np.float64)) - np.log(np.asarray(width, np.float64))
    # Of the picture, exp(-lost) is kept. Rounded, so that ties are ties.
    lost = np.abs(shape[:, None] - np.log(sizes[:, 0] / sizes[:, 1])).round(9)
    order = np.argsort(-sizes.prod(axis=1), kind="stable")
    return order[lost[:, order].argmin(axis=1)].astype(np.int32)
