"""Where another tool placed its tiles: the coordinate files of TRIDENT and CLAM.

Both are HDF5 with a dataset ``coords`` (N, 2): x, y of the top left corner in level-0 pixels. They differ in how its
attributes tell the size of a tile. TRIDENT (``<slide>_patches.h5``): ``patch_size`` pixels at ``target_magnification``,
that is ``patch_size_level0`` pixels of level 0. CLAM (``<slide>.h5``): ``patch_size`` pixels of level ``patch_level``.

Shapes: N tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.slides.slide import Slide, SlideError

__all__ = ["Coordinates", "read_coordinates"]

_SAME = 0.01  # share by which a level's downsample may differ between the file and the slide
_NEEDED = "patch_size_level0 (TRIDENT), or patch_size and patch_level (CLAM)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coordinates:
    """Tiles of one slide, as another tool placed them."""

    origins_N2: NDArray[np.int64]
    """x and y in level-0 pixels, in the file's order."""
    extent_px: float
    """Side of a tile in level-0 pixels."""
    overlap: float
    """Share of a tile's side that it has in common with its neighbour, as far as the file tells; else 0."""


def read_coordinates(path: Path, slide: Slide) -> Coordinates:
    """Read the coordinates that TRIDENT or CLAM wrote, and check that they are of this slide.

    Parameters
    ----------
    path
        The HDF5 file.
    slide
        The open slide.

    Raises
    ------
    SlideError
        The file is missing or damaged, holds no coordinates, does not tell the size of a tile, or was made from a slide
        of another size.
    """
    import h5py  # a tenth of a second, for the few who come with coordinates

    try:
        with h5py.File(path, "r") as file:
            if "coords" not in file:
                raise SlideError("this file holds no dataset coords", where=path, got=", ".join(file) or "nothing")
            told = file["coords"]
            values, attributes = told[()], {name: _plain(value) for name, value in told.attrs.items()}
    except OSError as error:
        raise SlideError("a file of coordinates cannot be read", where=path, got=error) from None
    if values.ndim != 2 or values.shape[1] != 2 or values.dtype.kind not in "iu":
        raise SlideError(
            "these coordinates are not whole pixels x, y",
            where=path,
            got=f"{values.dtype}, shape {values.shape}",
            allowed="integers, shape (N, 2)",
        )
    _check_slide(attributes, slide, path)
    extent_px = _extent(attributes, slide, path)
    origins_N2 = values.astype(np.int64)
    full = slide.levels[0]
    if len(origins_N2) and not ((origins_N2 >= 0) & (origins_N2 < (full.width, full.height))).all():
        raise SlideError(
            "coordinates lie outside the slide",
            where=path,
            got=f"x {origins_N2[:, 0].min()} to {origins_N2[:, 0].max()}, "
            f"y {origins_N2[:, 1].min()} to {origins_N2[:, 1].max()}",
            allowed=f"0 to {full.width}, 0 to {full.height}",
            remedy="check that the file belongs to this slide, and that its coordinates are level-0 pixels",
        )
    overlap = 0.0
    if attributes.get("overlap") is not None and "patch_size" in attributes:
        overlap = _number(attributes, "overlap", path) / max(_number(attributes, "patch_size", path), 1.0)
    return Coordinates(origins_N2=origins_N2, extent_px=extent_px, overlap=overlap)


def _plain(value: Any) -> Any:
    """An attribute without its HDF5 type: text, a number, or a tuple of numbers."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return tuple(value.ravel().tolist())
    return value.item() if isinstance(value, np.generic) else value


def _number(attributes: Mapping[str, Any], name: str, path: Path) -> float:
    value: Any = attributes.get(name)
    if isinstance(value, tuple) and value:
        value = value[0]
    try:
        number = float(value) if value is not None else float("nan")
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        where = f"{path}, attribute {name} of coords"
        raise SlideError("coordinates do not tell the size of their tiles", where=where, got=value, allowed=_NEEDED)
    return number


def _extent(attributes: Mapping[str, Any], slide: Slide, path: Path) -> float:
    """Side of a tile in level-0 pixels."""
    if "patch_size_level0" in attributes:
        extent_px = _number(attributes, "patch_size_level0", path)
    elif {"level0_magnification", "target_magnification"} <= set(attributes):
        full, target = (_number(attributes, f"{name}_magnification", path) for name in ("level0", "target"))
        extent_px = _number(attributes, "patch_size", path) * full / max(target, 1e-9)
    else:
        level = round(_number(attributes, "patch_level", path))
        if level >= len(slide.levels):
            got, allowed = f"patch_level {level}", f"0 to {len(slide.levels) - 1}"
            raise SlideError("coordinates are of a level that the slide lacks", where=path, got=got, allowed=allowed)
        downsample = slide.levels[level].downsample_x
        if "downsample" in attributes:
            told = _number(attributes, "downsample", path)
            if abs(told - downsample) > _SAME * downsample:
                got, allowed = f"downsample {told:g} of level {level}", f"{downsample:g}"
                raise SlideError("coordinates are of another slide", where=path, got=got, allowed=allowed)
        extent_px = _number(attributes, "patch_size", path) * downsample
    if not extent_px >= 1:
        raise SlideError(
            "coordinates do not tell the size of their tiles", where=path, got=f"{extent_px:g} px", allowed=_NEEDED
        )
    return extent_px


def _check_slide(attributes: Mapping[str, Any], slide: Slide, path: Path) -> None:
    """The slide's size, where the file states it, must be this slide's."""
    full = slide.levels[0]
    told = None
    if {"level0_width", "level0_height"} <= set(attributes):
        told = tuple(round(_number(attributes, f"level0_{side}", path)) for side in ("width", "height"))
    elif isinstance(attributes.get("level_dim"), tuple) and attributes.get("patch_level") == 0:
        told = tuple(attributes["level_dim"])
    if told is not None and told != (full.width, full.height):
        raise SlideError(
            "coordinates are of another slide",
            where=path,
            got=f"a slide of {told[0]} x {told[1]} px",
            allowed=f"{full.width} x {full.height} px",
        )
