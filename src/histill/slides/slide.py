"""What a slide is to the rest of the house: levels, a scale, and pixels. The seam between readers and users.

Shapes: H and W in pixels of the level that is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError

__all__ = [
    "Level",
    "ScaleFacts",
    "Slide",
    "SlideError",
    "Thumbnail",
    "UnreadableRegionError",
    "check_region",
    "level_downsample",
]


class SlideError(DataError):
    """A slide cannot be opened or used; the others go on."""


class UnreadableRegionError(DataError):
    """A region's pixels are damaged or absent. It is counted and named; it never becomes white."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One resolution of a slide."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    downsample_x: float
    """Level-0 pixels per pixel of this level, across."""
    downsample_y: float
    """The same, down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleFacts:
    """All that a file says of its own scale; the policy that chooses among them is ``histill.slides.scale``."""

    vendor_mpp_xy: tuple[float, float] | None = None
    """Microns per level-0 pixel that the scanner's own metadata state (Aperio MPP, DICOM PixelSpacing, OME-XML ...)."""
    objective_power: float | None = None
    """Magnification of the objective, as 20 or 40."""
    tiff_mpp_xy: tuple[float, float] | None = None
    """Microns per pixel from bare TIFF resolution tags: often nonsense (72 dpi), trusted only when asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thumbnail:
    """A whole slide, averaged by area from the coarsest level that is large enough."""

    image_HW3: NDArray[np.uint8]
    """RGB; white where ``present_HW`` is False."""
    present_HW: NDArray[np.bool_]
    """False where any level pixel below was never scanned, or is damaged."""
    damaged_HW: NDArray[np.bool_]
    """True where pixels should be and cannot be read: what they showed is unknown."""


class Slide(Protocol):
    """An open slide. Not safe for two threads at once; each worker process opens its own."""

    path: Path
    reader: str
    """Which reader: ``openslide`` or ``tiff``."""
    vendor: str
    """As OpenSlide names it (aperio, dicom, generic-tiff ...) or ``ome-tiff``."""
    levels: tuple[Level, ...]
    """From the finest (level 0) to the coarsest."""
    scale_facts: ScaleFacts
    properties: Mapping[str, str]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a region that lies inside the level.

        Parameters
        ----------
        level
            Index into ``levels``.
        x, y
            Left and top, in pixels **of this level** (not of level 0).
        width, height
            Size in pixels of this level.

        Returns
        -------
        ndarray
            uint8, shape (height, width, 3), RGB.

        Raises
        ------
        UnreadableRegionError
            When any pixel of it is damaged or was never stored.
        ValueError
            When the region is empty or leaves the level.
        """
        ...

    def thumbnail(self, longest_px: int) -> Thumbnail:
        """Give the whole slide, small, for tissue masks and pictures.

        Parameters
        ----------
        longest_px
            Longer side in pixels; level 0's when that is smaller.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def level_downsample(full_px: int, level_px: int) -> float:
    """Level-0 pixels per level pixel along one axis.

    Scanners cut a level's size to whole pixels: 2967 / 4 becomes 741 or 742, and the plain ratio is then off by up to
    a pixel over the slide. A ratio that such a cut of a whole number explains is that whole number.
    """
    ratio = full_px / level_px
    whole = round(ratio)
    if whole >= 1 and full_px // whole <= level_px <= -(-full_px // whole):
        return float(whole)
    return ratio


def check_region(level: Level, x: int, y: int, width: int, height: int) -> None:
    """Check that a region is not empty and lies inside a level.

    Parameters
    ----------
    level
        Its size counts.
    x, y, width, height
        Left, top and size in pixels of that level.

    Raises
    ------
    ValueError
        It is empty or leaves the level.
    """
    if width < 1 or height < 1 or x < 0 or y < 0 or x + width > level.width or y + height > level.height:
        size = f"{level.width} x {level.height} px"
        raise ValueError(f"region x {x}, y {y}, {width} x {height} px is empty or leaves the level, {size}")
