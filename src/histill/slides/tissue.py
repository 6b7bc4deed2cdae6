"""Where there is tissue: saturation of colour on a small picture of the slide, cleaned by size.

Shapes: H and W of the small picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histill.slides.options import TissueOptions
from histill.slides.quality import pen_pixels

__all__ = ["otsu_threshold", "tissue_mask"]

_BLACK = 40  # a pixel whose every channel is below this has no colour: borders of a scan, black marker
_SMOOTH_PX = 3  # side of the square over which the picture is averaged first: grains of dust and of JPEG
_LEVELS = 256


def otsu_threshold(counts_K: NDArray[np.int64]) -> int:
    """First bin of the upper class: the cut of a histogram with the largest variance between the two classes.

    Source: Otsu, *A threshold selection method from gray-level histograms*, IEEE Trans. SMC 9(1), 1979. Where several
    cuts are equally good (empty bins between two classes), the middle one. 0 for an empty or single-valued histogram.
    """
    weights_K = counts_K.astype(np.float64)
    below = np.cumsum(weights_K)[:-1]
    above = weights_K.sum() - below
    sums = np.cumsum(weights_K * np.arange(len(counts_K)))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    between = np.where((below > 0) & (above > 0), between, 0.0)
    if not between.any():
        return 0
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return int(best[len(best) // 2]) + 1


def tissue_mask(
    image_HW3: NDArray[np.uint8], present_HW: NDArray[np.bool_], mpp: float, options: TissueOptions
) -> NDArray[np.bool_]:
    """Find the tissue on a small picture of a slide.

    A pixel is tissue when its saturation, after averaging over 3 x 3 pixels, reaches Otsu's threshold for this slide,
    held between ``saturation_floor`` and ``saturation_ceiling``. Then gaps are closed, small pieces dropped and small
    holes filled. Absent pixels, black and marker ink are never tissue and have no part in the threshold.

    Parameters
    ----------
    image_HW3
        uint8 RGB.
    present_HW
        False where the slide has no pixels.
    mpp
        Scale of the picture, microns per pixel (near ``options.mpp``).
    options
        The limits.

    Returns
    -------
    ndarray
        bool, shape (H, W).
    """
    smooth_HW3 = ndimage.uniform_filter(image_HW3, size=(_SMOOTH_PX, _SMOOTH_PX, 1), mode="nearest")
    red, green, blue = (np.ascontiguousarray(smooth_HW3[..., channel]) for channel in range(3))
    most = np.maximum(np.maximum(red, green), blue)
    least = np.minimum(np.minimum(red, green), blue)
    usable_HW = present_HW & (most >= _BLACK) & ~pen_pixels(smooth_HW3)
    # HSV saturation in whole steps of 1 / 255
    saturation_HW = ((most - least).astype(np.uint16) * np.uint16(_LEVELS - 1) // np.maximum(most, 1)).astype(np.uint8)
    counts_K = np.bincount(saturation_HW[usable_HW], minlength=_LEVELS)
    low, high = (round(limit * (_LEVELS - 1)) for limit in (options.saturation_floor, options.saturation_ceiling))
    threshold = min(max(otsu_threshold(counts_K), low), high)
    found_HW = (saturation_HW >= threshold) & usable_HW
    tissue_HW: NDArray[np.bool_] = _cleaned(found_HW, mpp, options) & usable_HW
    return tissue_HW


def _cleaned(found_HW: NDArray[np.bool_], mpp: float, options: TissueOptions) -> NDArray[np.bool_]:
    """Close gaps, drop small pieces, fill small holes."""
    side = 2 * round(options.closing_um / mpp) + 1
    # squares, since their filters take the same time at any size; "nearest": the slide's edge is no gap
    grown = ndimage.maximum_filter(found_HW.astype(np.uint8), size=side, mode="nearest")
    closed_HW = ndimage.minimum_filter(grown, size=side, mode="nearest").astype(bool)
    pieces_HW = _large(closed_HW, options.piece_min_um2 / mpp**2)
    rest_HW, _ = ndimage.label(~pieces_HW)
    keep_K = np.bincount(rest_HW.ravel()) >= options.hole_min_um2 / mpp**2
    for edge in (rest_HW[0], rest_HW[-1], rest_HW[:, 0], rest_HW[:, -1]):
        keep_K[edge] = True  # what reaches the slide's edge is no hole
    keep_K[0] = False  # label 0: the tissue itself
    filled_HW: NDArray[np.bool_] = ~keep_K[rest_HW]
    return filled_HW


def _large(mask_HW: NDArray[np.bool_], least_px: float) -> NDArray[np.bool_]:
    """Keep the pieces (joined by edges or corners) of at least so many pixels."""
    label_HW, _ = ndimage.label(mask_HW, structure=np.ones((3, 3), dtype=int))
    keep_K = np.bincount(label_HW.ravel()) >= least_px
    keep_K[0] = False
    kept_HW: NDArray[np.bool_] = keep_K[label_HW]
    return kept_HW
