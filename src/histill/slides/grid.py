"""Where a slide's tiles stand, and how much tissue lies below each: pure functions of sizes and a mask.

Shapes: N tiles, H and W of the mask.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["tile_origins", "tissue_shares"]

_ROUNDING_PX = 1e-6  # a tile that ends this far beyond the slide ends on its edge


def _origins(length: int, extent_px: float, stride_px: float) -> NDArray[np.int64]:
    count = max(0, int((length - extent_px) / stride_px) + 2)
    origins = np.rint(np.arange(count) * stride_px)
    inside: NDArray[np.int64] = origins[origins + extent_px <= length + _ROUNDING_PX].astype(np.int64)
    return inside


def tile_origins(width: int, height: int, extent_px: float, stride_px: float) -> NDArray[np.int64]:
    """Left and top of every tile that lies wholly inside the slide, row by row.

    Tile i of an axis starts at i * stride, rounded to a whole pixel (halves to even): the rounding never adds up.

    Parameters
    ----------
    width, height
        Size of level 0 in pixels.
    extent_px
        Side of a tile in level-0 pixels; may be a fraction.
    stride_px
        Step from tile to tile in level-0 pixels, at least 1; equal to ``extent_px`` when tiles meet.

    Returns
    -------
    ndarray
        int64, shape (N, 2): x, y in level-0 pixels, sorted by y, then x.

    Raises
    ------
    ValueError
        When ``extent_px`` is not positive, or ``stride_px`` is below 1.
    """
    if not (extent_px > 0 and stride_px >= 1):
        raise ValueError(f"a grid needs a positive extent and a stride of 1 or more, got {extent_px} and {stride_px}")
    x, y = _origins(width, extent_px, stride_px), _origins(height, extent_px, stride_px)
    return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)


def tissue_shares(
    mask_HW: NDArray[np.bool_], width: int, height: int, origins_N2: NDArray[np.int64], extent_px: float
) -> NDArray[np.float32]:
    """Share of each tile's area that is tissue, float32, shape (N,), 0 to 1.

    Exact for a mask whose pixels are squares on the slide: the mask's integral is bilinear inside each of them, so
    interpolating it at a tile's fractional corners loses nothing.

    Parameters
    ----------
    mask_HW
        True where there is tissue; covers the whole slide.
    width, height
        Size of level 0 in pixels.
    origins_N2
        x, y of the tiles in level-0 pixels.
    extent_px
        Side of a tile in level-0 pixels.
    """
    mask_height, mask_width = mask_HW.shape
    integral = np.zeros((mask_height + 1, mask_width + 1))
    np.cumsum(np.cumsum(mask_HW, axis=0, dtype=np.float64), axis=1, out=integral[1:, 1:])

    def below(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        column = np.minimum(x.astype(np.int64), mask_width - 1)
        row = np.minimum(y.astype(np.int64), mask_height - 1)
        dx, dy = x - column, y - row
        upper = integral[row, column] * (1 - dx) + integral[row, column + 1] * dx
        lower = integral[row + 1, column] * (1 - dx) + integral[row + 1, column + 1] * dx
        corner: NDArray[np.float64] = upper * (1 - dy) + lower * dy
        return corner

    left, right = (np.clip((origins_N2[:, 0] + d) * (mask_width / width), 0, mask_width) for d in (0.0, extent_px))
    top, bottom = (np.clip((origins_N2[:, 1] + d) * (mask_height / height), 0, mask_height) for d in (0.0, extent_px))
    tissue = below(right, bottom) - below(left, bottom) - below(right, top) + below(left, top)
    area = extent_px**2 * (mask_width / width) * (mask_height / height)
    shares_N: NDArray[np.float32] = np.clip(tissue / area, 0, 1).astype(np.float32)
    return shares_N
