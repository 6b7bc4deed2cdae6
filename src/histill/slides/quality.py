"""Tiles that teach nothing: empty glass, black borders, out of focus, marker ink. Each filter is counted by name.

Shapes: H and W of a tile.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from histill.slides.options import QualityOptions

__all__ = ["Fault", "laplacian_variance", "pen_pixels", "rejected"]

Fault = Literal["white", "black", "blur", "pen"]

_WHITE = 215  # every channel at least this: glass (down to 222 on the scanners that were looked at)
_BLACK = 60  # every channel below this: borders, black marker; hematoxylin stays above in its blue
_BLUR_MPP = 0.5  # sharpness is judged at about this scale, whatever the tiles' own
_COLOUR_STRIDE = 2  # shares of white, black and ink are counted on every second pixel of every second row


def pen_pixels(image_HW3: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where an RGB image has the colour of blue, green or red marker ink; bool, shape (H, W).

    What tells ink from H&E: in hematoxylin and eosin green is clearly the least of the three channels (a hue of 255
    degrees and more); blue ink has a hue of up to 250 and green ink less. Red ink is bright and almost free of both
    green and blue, more than red blood cells are.
    """
    return _ink(*(image_HW3[..., channel].astype(np.int16) for channel in range(3)))


def _ink(red: NDArray[np.int16], green: NDArray[np.int16], blue: NDArray[np.int16]) -> NDArray[np.bool_]:
    most = np.maximum(np.maximum(red, green), blue)
    spread = most - np.minimum(np.minimum(red, green), blue)
    is_blue = (blue == most) & (6 * (red - green) <= spread) & (5 * spread >= 2 * most) & (most >= 80)
    is_green = (green == most) & (green - red >= 15) & (5 * spread >= most) & (most >= 40)
    is_red = (red >= 170) & (4 * spread >= 3 * most) & (np.abs(green - blue) < 50)
    ink: NDArray[np.bool_] = is_blue | is_green | is_red
    return ink


def laplacian_variance(tile_HW3: NDArray[np.uint8], mpp: float) -> float:
    """Variance of the Laplacian (4, -1 four times) of a tile's grey, 0 to 255, at about 0.5 um/px.

    A finer tile is averaged over whole blocks of pixels first: noise of the camera is no sharpness. Grey is
    (red + 2 green + blue) / 4. All sums are of whole numbers, so the value is the same on every machine.

    Parameters
    ----------
    tile_HW3
        uint8 RGB.
    mpp
        Its scale, microns per pixel.

    Returns
    -------
    float
        In squared grey levels; 0 for an even tile.

    Raises
    ------
    ValueError
        When the tile has fewer than 3 x 3 blocks of about 0.5 um.
    """
    block = max(1, round(_BLUR_MPP / mpp))
    height, width = (size // block * block for size in tile_HW3.shape[:2])
    if min(height, width) < 3 * block:
        raise ValueError(f"a tile of {tile_HW3.shape[1]} x {tile_HW3.shape[0]} px is too small to judge its sharpness")
    part_HW3 = tile_HW3[:height, :width]
    # |Laplacian| <= 4 * 4 * 255 * block**2
    grey_HW: NDArray[Any] = part_HW3[..., 1].astype(np.int16 if block <= 2 else np.int32)
    grey_HW += grey_HW
    grey_HW += part_HW3[..., 0]
    grey_HW += part_HW3[..., 2]
    if block > 1:
        rows_hW = sum((grey_HW[first::block] for first in range(1, block)), start=grey_HW[::block])
        grey_HW = sum((rows_hW[:, first::block] for first in range(1, block)), start=rows_hW[:, ::block])
    laplacian: NDArray[Any] = 4 * grey_HW[1:-1, 1:-1]
    for neighbour in (grey_HW[:-2, 1:-1], grey_HW[2:, 1:-1], grey_HW[1:-1, :-2], grey_HW[1:-1, 2:]):
        laplacian -= neighbour
    values = laplacian.astype(np.float64).ravel()
    variance = float(np.dot(values, values)) / values.size - (float(values.sum()) / values.size) ** 2
    return variance / (4 * block**2) ** 2


def rejected(tile_HW3: NDArray[np.uint8], options: QualityOptions, mpp: float) -> Fault | None:
    """Say why a tile is left out, by the first filter that finds it (white, black, pen, blur); None when it is kept.

    Parameters
    ----------
    tile_HW3
        uint8 RGB.
    options
        The limits.
    mpp
        The tile's scale, microns per pixel.

    Raises
    ------
    ValueError
        As :func:`laplacian_variance`, where sharpness is judged: ``options.blur_min`` above 0, and no fault before.
    """
    # Three planes: numpy is ten times as fast along them as across three channels.
    planes = [tile_HW3[::_COLOUR_STRIDE, ::_COLOUR_STRIDE, channel].astype(np.int16) for channel in range(3)]
    least = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    most = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    if options.white_max < 1 and _share(least >= _WHITE) > options.white_max:
        return "white"
    if options.black_max < 1 and _share(most < _BLACK) > options.black_max:
        return "black"
    if options.pen_max < 1 and _share(_ink(*planes)) > options.pen_max:
        return "pen"
    if options.blur_min > 0 and laplacian_variance(tile_HW3, mpp) < options.blur_min:
        return "blur"
    return None


def _share(found_HW: NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(found_HW)) / found_HW.size
