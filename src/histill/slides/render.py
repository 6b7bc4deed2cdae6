"""Tiles at an exact resolution from a slide that has other ones."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from histill.slides.resample import area_resample
from histill.slides.slide import Slide, SlideError

__all__ = ["TileRenderer"]

_SAME = 1e-6  # two resolutions that differ by this share are the same
_ROUNDING_PX = 1e-6  # a coordinate this far beyond a pixel's edge lies on it


def _level_for(slide: Slide, slide_mpp: float, mpp: float) -> int | None:
    """Index of the coarsest level that is not coarser than wanted along either axis; None when there is none."""
    fine_enough = [
        (max(level.downsample_x, level.downsample_y), index)
        for index, level in enumerate(slide.levels)
        if slide_mpp * max(level.downsample_x, level.downsample_y) <= mpp * (1 + _SAME)
    ]
    return max(fine_enough)[1] if fine_enough else None


class TileRenderer:
    """Reads square tiles of a slide at exactly one resolution.

    A tile is the mean of the slide's pixels by area, from the coarsest level that is not coarser than wanted.

    Parameters
    ----------
    slide
        An open slide.
    slide_mpp
        Its scale, microns per level-0 pixel.
    mpp
        The tiles' scale, microns per tile pixel.
    tile_px
        Side of a tile in its own pixels.
    tolerance
        Level 0 may be coarser than wanted by this share; the tiles are then enlarged to the exact scale.
    upsample
        Enlarge from a level 0 that is coarser by more than that.

    Attributes
    ----------
    level
        Index of the level that is read.
    extent_px
        Side of a tile in level-0 pixels, a fraction.

    Raises
    ------
    SlideError
        When level 0 is coarser than wanted by more than ``tolerance`` and ``upsample`` is off.
    """

    def __init__(
        self, slide: Slide, slide_mpp: float, mpp: float, tile_px: int, tolerance: float = 0.05, upsample: bool = False
    ) -> None:
        chosen = _level_for(slide, slide_mpp, mpp)
        if chosen is None and not upsample and slide_mpp > mpp * (1 + tolerance + _SAME):
            raise SlideError(
                "this slide is coarser than the tiles that are asked for",
                where=slide.path,
                got=f"{slide_mpp:.6g} um/px at its finest level",
                allowed=f"at most {mpp * (1 + tolerance):.6g} um/px for tiles of {mpp:.6g} um/px",
                remedy=f"ask for coarser tiles (--mpp {math.ceil(slide_mpp * 100) / 100:g}), or enlarge: --upsample",
            )
        self.slide = slide
        self.tile_px = tile_px
        self.level = chosen if chosen is not None else 0
        self.extent_px = tile_px * mpp / slide_mpp
        level = slide.levels[self.level]
        self._step_x = mpp / slide_mpp / level.downsample_x
        self._step_y = mpp / slide_mpp / level.downsample_y

    def holds(self, x: int, y: int) -> bool:
        """Whether a tile at these level-0 pixels lies wholly inside the slide."""
        full, reach = self.slide.levels[0], self.extent_px - _ROUNDING_PX
        return x >= 0 and y >= 0 and x + reach <= full.width and y + reach <= full.height

    def read(self, x: int, y: int) -> NDArray[np.uint8]:
        """Render one tile.

        A level is cut to whole pixels, so the slide's last fraction of a level pixel may not be stored; the tile's
        last pixels are then the mean of what there is.

        Parameters
        ----------
        x, y
            Left and top, in level-0 pixels.

        Returns
        -------
        ndarray
            uint8, shape (tile_px, tile_px, 3), RGB.

        Raises
        ------
        UnreadableRegionError
            When any pixel below it is damaged or was never stored.
        ValueError
            When the tile leaves the slide.
        """
        level = self.slide.levels[self.level]
        if not self.holds(x, y):
            full = self.slide.levels[0]
            raise ValueError(
                f"a tile of {self.extent_px} px at ({x}, {y}) leaves a slide of {full.width} x {full.height}"
            )
        left, top = x / level.downsample_x, y / level.downsample_y
        first_x, first_y = math.floor(left), math.floor(top)
        last_x = min(math.ceil(left + self._step_x * self.tile_px - _ROUNDING_PX), level.width)
        last_y = min(math.ceil(top + self._step_y * self.tile_px - _ROUNDING_PX), level.height)
        region_HWC = self.slide.read(self.level, first_x, first_y, last_x - first_x, last_y - first_y)
        return area_resample(
            region_HWC, left - first_x, top - first_y, self._step_x, self._step_y, self.tile_px, self.tile_px
        )
