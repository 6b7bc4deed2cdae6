"""Slides through OpenSlide: the widest choice of formats, and the reference for the fast path.

Three habits of OpenSlide are dealt with here. A handle keeps its first error and gives nothing more, so it is opened
anew after each. Pixels that were never stored come back transparent; they raise. And a region's corner is given in
level-0 pixels and divided by a downsample that is the mean of two ratios of cut sizes (4.00012 for a level that is 4
times smaller); where that does not give a whole level pixel, OpenSlide interpolates (openslide issues 256 and 417).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from histill.slides.overview import overview, overview_level
from histill.slides.slide import (
    Level,
    ScaleFacts,
    SlideError,
    Thumbnail,
    UnreadableRegionError,
    check_region,
    level_downsample,
)

__all__ = ["EXACT_PX", "OpenSlideReader", "level0_start"]

EXACT_PX = 1 / 1024
"""A region's corner this near to a whole level pixel gives that level's stored pixels (tested; OpenSlide paints with
7 bits of a pixel)."""
_ANCHOR_REACH = 64
_WITHOUT_HOLES = ("aperio", "generic-tiff")
_CACHE_BYTES = 128 * 2**20
_UNIT_UM = {"inch": 25400.0, "centimeter": 10000.0}


def level0_start(start: int, downsample: float, reach: int = _ANCHOR_REACH) -> tuple[int, int]:
    """Find where along one axis OpenSlide can begin to read without interpolating.

    Parameters
    ----------
    start
        First wanted pixel of the level.
    downsample
        OpenSlide's own downsample of the level.
    reach
        How many pixels more may be read before ``start``.

    Returns
    -------
    begin
        Level pixel, at most ``reach`` before ``start``; ``start`` itself when none near it falls on a whole pixel (the
        pixels are then shifted by up to half a level-0 pixel).
    location
        The level-0 pixel to ask for.
    """
    for begin in range(start, max(start - reach, 0) - 1, -1):
        location = round(begin * downsample)
        if abs(location / downsample - begin) < EXACT_PX:
            return begin, location
    return start, round(start * downsample)


class OpenSlideReader:
    """A slide that OpenSlide reads. See :class:`histill.slides.slide.Slide` for what its members mean.

    Parameters
    ----------
    path
        The slide's file; of a DICOM series or an MRXS slide, the file that OpenSlide expects.

    Raises
    ------
    SlideError
        When OpenSlide does not know the format or cannot read its structure.
    """

    reader: str = "openslide"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._handle: openslide.OpenSlide | None = None
        handle = self._open()
        found = {name: handle.properties.get(name) for name in handle.properties}  # a damaged file lists some it lacks
        self.properties: Mapping[str, str] = {name: value for name, value in found.items() if value is not None}
        self.vendor: str = self.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
        (full_width, full_height), sizes = handle.dimensions, handle.level_dimensions
        self.levels: tuple[Level, ...] = tuple(
            Level(
                width=width,
                height=height,
                downsample_x=level_downsample(full_width, width),
                downsample_y=level_downsample(full_height, height),
            )
            for width, height in sizes
        )
        self.downsamples: tuple[float, ...] = tuple(handle.level_downsamples)
        """OpenSlide's own downsample of each level, which its locations are divided by."""
        self.scale_facts: ScaleFacts = _scale_facts(self.vendor, self.properties)

    def __reduce__(self) -> tuple[type[OpenSlideReader], tuple[Path]]:
        return OpenSlideReader, (self.path,)

    def _open(self) -> openslide.OpenSlide:
        if self._handle is None:
            try:
                self._handle = openslide.OpenSlide(self.path)
            except openslide.OpenSlideUnsupportedFormatError:
                raise SlideError(
                    "OpenSlide does not know this file's format",
                    where=self.path,
                    remedy="check that it is the scanner's own file and that the copy is complete",
                ) from None
            except (openslide.OpenSlideError, OSError) as error:
                raise SlideError(
                    "OpenSlide cannot open this slide",
                    where=self.path,
                    got=error,
                    remedy="copy it again from its source; it is damaged or incomplete",
                ) from None
            self._handle.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        return self._handle

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a region; see ``Slide.read``.

        Levels whose size is not a whole fraction of level 0 are read from up to 64 pixels further left and up when
        that avoids interpolation; where it does not, pixels are shifted by up to half a level-0 pixel.
        """
        check_region(self.levels[level], x, y, width, height)
        pixels_HW4 = self._read_rgba(level, x, y, width, height)
        if not pixels_HW4[..., 3].all():
            raise UnreadableRegionError("no pixels are stored there", where=self._place(level, x, y, width, height))
        return np.ascontiguousarray(pixels_HW4[..., :3])

    def _read_rgba(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        downsample = self.downsamples[level]
        (left, x0), (top, y0) = level0_start(x, downsample), level0_start(y, downsample)
        handle = self._open()
        try:
            image = handle.read_region((x0, y0), level, (x + width - left, y + height - top))
        except openslide.OpenSlideError as error:
            self.close()  # the handle would repeat this error for every other region
            where = self._place(level, x, y, width, height)
            raise UnreadableRegionError("a region cannot be decoded", where=where, got=error) from None
        return np.asarray(image)[y - top :, x - left :]

    def _place(self, level: int, x: int, y: int, width: int, height: int) -> str:
        return f"{self.path}, level {level}, x {x}, y {y}, {width} x {height} px"

    def thumbnail(self, longest_px: int) -> Thumbnail:
        """Give the whole slide, small; see ``Slide.thumbnail``. A block that cannot be read is marked damaged."""
        index = overview_level(self.levels, longest_px)

        def read(x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
            try:
                pixels_hw4 = self._read_rgba(index, x, y, width, height)
            except UnreadableRegionError:
                return None
            exists_hw = pixels_hw4[..., 3] != 0
            # A scanner that skips glass leaves holes on purpose; in a TIFF a block without bytes is a lost one.
            if self.vendor in _WITHOUT_HOLES and not exists_hw.all():
                return None
            return pixels_hw4[..., :3], exists_hw

        return overview(self.levels[0], self.levels[index], self.block_px(index), longest_px, read)

    def block_px(self, level: int) -> tuple[int, int]:
        """Width and height of the level's blocks as stored, or 512 where the format has none of a handy size."""
        sides = [self.properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height")]
        width, height = (int(side) if side.isdecimal() and 64 <= int(side) <= 2048 else 512 for side in sides)
        return width, height

    def close(self) -> None:
        """Release the file; it is opened again when something is read."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _scale_facts(vendor: str, properties: Mapping[str, str]) -> ScaleFacts:
    vendor_mpp_xy = _pair(
        _positive(properties.get(openslide.PROPERTY_NAME_MPP_X)),
        _positive(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
    )
    unit_um = _UNIT_UM.get(properties.get("tiff.ResolutionUnit", ""))
    tiff_mpp_xy = None
    if unit_um is not None:
        per_unit = [_positive(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
        tiff_mpp_xy = _pair(*(unit_um / value if value else None for value in per_unit))
    if vendor == "generic-tiff":  # its mpp comes from nothing but the resolution tags
        tiff_mpp_xy = tiff_mpp_xy or vendor_mpp_xy
        vendor_mpp_xy = None
    return ScaleFacts(
        vendor_mpp_xy=vendor_mpp_xy,
        objective_power=_positive(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)),
        tiff_mpp_xy=tiff_mpp_xy,
    )


def _pair(x: float | None, y: float | None) -> tuple[float, float] | None:
    return (x, y) if x is not None and y is not None else None


def _positive(text: str | None) -> float | None:
    try:
        value = float(text) if text else 0.0
    except ValueError:
        return None
    return value if value > 0 and math.isfinite(value) else None
