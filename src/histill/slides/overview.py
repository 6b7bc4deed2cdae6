"""A whole slide, small: area averages of one level, block by block, with the pixels that are not there marked.

Shapes: H and W of the picture, h and w of one block of the level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from histill.slides.slide import Level, Thumbnail

__all__ = ["ReadBlock", "overview", "overview_level"]

ReadBlock = Callable[[int, int, int, int], tuple[NDArray[np.uint8], NDArray[np.bool_] | None] | None]
"""(x, y, width, height) in level pixels -> RGB (h, w, 3) and which pixels exist (None: all); None when damaged."""

_WHOLE = 1 - 1e-4


def overview_level(levels: Sequence[Level], longest_px: int) -> int:
    """Find the coarsest level whose longer side has at least ``longest_px`` pixels; level 0 when none has."""
    fitting = [index for index, level in enumerate(levels) if max(level.width, level.height) >= longest_px]
    return max(fitting, default=0)


def overview(full: Level, level: Level, block_px: tuple[int, int], longest_px: int, read: ReadBlock) -> Thumbnail:
    """Average a level by area to a picture whose longer side is ``longest_px``.

    Parameters
    ----------
    full
        Level 0; the picture has its proportions and is never larger.
    level
        The level that is read.
    block_px
        Width and height of the blocks in which it is read; a block that cannot be read leaves a hole of that size.
    longest_px
        Longer side of the picture.
    read
        Gives one block, or None when it is damaged.

    Returns
    -------
    Thumbnail
        The picture, uint8 RGB, white where no pixels are; and which are present, and which damaged.

    Raises
    ------
    ValueError
        When ``longest_px`` is below 1.
    """
    if longest_px < 1:
        raise ValueError(f"a thumbnail needs at least one pixel, got {longest_px}")
    longest = min(longest_px, max(full.width, full.height))
    width, height = (max(1, round(side * longest / max(full.width, full.height))) for side in (full.width, full.height))
    total_HW3 = np.zeros((height, width, 3), np.float32)
    covered_HW = np.zeros((height, width), np.float32)
    damaged_HW = np.zeros((height, width), bool)
    across = [_shares(x, block_px[0], level.width, width) for x in range(0, level.width, block_px[0])]
    for y in range(0, level.height, block_px[1]):
        rows, down_Hh = _shares(y, block_px[1], level.height, height)
        for x, (columns, across_Ww) in zip(range(0, level.width, block_px[0]), across, strict=True):
            block = read(x, y, across_Ww.shape[1], down_Hh.shape[1])
            if block is None:
                damaged_HW[rows, columns] = True
                continue
            image_hw3, exists_hw = block
            if exists_hw is None:
                covered_HW[rows, columns] += np.outer(down_Hh.sum(1), across_Ww.sum(1))
            else:
                covered_HW[rows, columns] += down_Hh @ exists_hw.astype(np.float32) @ across_Ww.T
                image_hw3 = image_hw3 * exists_hw[..., None]
            high = image_hw3.shape[0]
            squeezed_Hw3 = (down_Hh @ image_hw3.reshape(high, -1).astype(np.float32)).reshape(len(down_Hh), -1, 3)
            total_HW3[rows, columns] += across_Ww @ squeezed_Hw3
    present_HW = covered_HW >= _WHOLE * (level.width / width) * (level.height / height)
    image_HW3 = np.full((height, width, 3), 255, np.uint8)
    image_HW3[present_HW] = np.rint(total_HW3[present_HW] / covered_HW[present_HW][:, None])
    return Thumbnail(image_HW3=image_HW3, present_HW=present_HW, damaged_HW=damaged_HW)


def _shares(start: int, size: int, level_px: int, out_px: int) -> tuple[slice, NDArray[np.float32]]:
    """Along one axis: which picture pixels a block touches, and how much of each level pixel each of them takes.

    Returns
    -------
    touched
        Slice of the picture's axis.
    share_Oi
        float32, (picture pixels touched, level pixels of the block), in level pixels.
    """
    stop = min(start + size, level_px)
    first, last = start * out_px // level_px, -(-stop * out_px // level_px)
    edges_O = np.arange(first, last + 1) * (level_px / out_px)
    pixels_i = np.arange(start, stop)
    share_Oi = np.minimum(edges_O[1:, None], pixels_i + 1) - np.maximum(edges_O[:-1, None], pixels_i)
    return slice(first, last), np.clip(share_Oi, 0, 1).astype(np.float32)
