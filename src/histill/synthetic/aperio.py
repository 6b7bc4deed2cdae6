"""Write an image as a pyramidal slide in Aperio's layout (SVS), which OpenSlide and other readers open.

The file is a TIFF: the full image in tiles, a thumbnail in one strip, then the reduced levels in tiles. The first
page's description carries the scale (``|AppMag = ..|MPP = ..``). Nothing in it depends on time or machine.

Shapes: H height, W width, C colours (red, green, blue).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histill.errors import ConfigError
from histill.files import atomic_path

__all__ = ["Compression", "check_options", "default_levels", "write_aperio"]

Compression = Literal["jpeg", "jpeg2000"]
"""JPEG (4:2:2), or JPEG 2000 code streams in Aperio's own compression 33005."""

_BANNER = "Aperio Image Library v12.0.15"
_THUMBNAIL_PX = 768
_JPEG2000_LEVEL = 38  # dB of PSNR
_SUBSAMPLING = (2, 1)

Image3 = NDArray[np.uint8]


def default_levels(width_px: int, height_px: int) -> tuple[int, ...]:
    """Downsample of each level: 1, 4, 16 ... until the longer side is under 1,500 pixels, at most four levels."""
    levels = [1]
    while max(width_px, height_px) / levels[-1] > 1500 and len(levels) < 4:
        levels.append(4 * levels[-1])
    return tuple(levels)


def write_aperio(
    path: Path,
    image_HWC: Image3,
    *,
    mpp: float,
    levels: Sequence[int] | None = None,
    jpeg_quality: int = 90,
    tile_px: int = 240,
    compression: Compression = "jpeg",
) -> None:
    """Write a slide, whole or not at all; the same arguments give the same bytes.

    Parameters
    ----------
    path
        The file, commonly ``*.svs``.
    image_HWC
        Level 0, uint8 RGB.
    mpp
        Microns per pixel of level 0, as the description states it.
    levels
        Downsample of each level, the first 1, rising; :func:`default_levels` if None. A level's pixels are means
        of whole squares of level 0; what is left at the right and bottom is cut off, as Aperio does.
    jpeg_quality
        1 to 100; the thumbnail has it also where the levels are JPEG 2000.
    tile_px
        Side of the file's tiles, a multiple of 16.
    compression
        ``jpeg`` or ``jpeg2000``.

    Raises
    ------
    ConfigError
        A wrong option.
    """
    height, width = image_HWC.shape[:2]
    levels = tuple(levels or default_levels(width, height))
    check_options(
        width, height, mpp=mpp, levels=levels, jpeg_quality=jpeg_quality, tile_px=tile_px, compression=compression
    )
    codec = "J2K/KDU" if compression == "jpeg2000" else f"JPEG/YCC Q={jpeg_quality}"
    head = f"{_BANNER}\r\n{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px})"
    power = min((5, 10, 20, 40, 80), key=lambda value: abs(math.log(value * mpp / 10)))
    facts = f"|AppMag = {power}|MPP = {mpp:.6g}"
    common: dict[str, Any] = {"dtype": np.uint8, "subfiletype": 0, "metadata": None, "software": False}
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as tif:
        for number, level_HWC in enumerate(_pyramid(image_HWC, levels)):
            size = f" -> {level_HWC.shape[1]}x{level_HWC.shape[0]}" if number else ""
            tif.write(
                _encoded(level_HWC, tile_px, jpeg_quality, compression),
                shape=level_HWC.shape,
                tile=(tile_px, tile_px),
                description=f"{head}{size} {codec}{facts}",
                **_coding(compression),
                **common,
            )
            if not number:
                _write_thumbnail(tif, image_HWC, f"{_BANNER}\r\n{width}x{height}", jpeg_quality, common)


def check_options(
    width_px: int,
    height_px: int,
    *,
    mpp: float,
    levels: Sequence[int] | None,
    jpeg_quality: int,
    tile_px: int,
    compression: str,
) -> None:
    """Refuse what :func:`write_aperio` would refuse, before anything is drawn; arguments as there.

    Raises
    ------
    ConfigError
        A wrong option.
    """
    levels = tuple(levels or default_levels(width_px, height_px))
    if compression not in ("jpeg", "jpeg2000"):
        raise ConfigError("unknown compression", where="compression", got=compression, allowed="jpeg, jpeg2000")
    if not 0.05 <= mpp <= 5.0:
        raise ConfigError("this is no scale of a slide", where="mpp", got=mpp, allowed="0.05 to 5 microns per pixel")
    if levels[0] != 1 or any(after <= before for before, after in pairwise(levels)):
        raise ConfigError("levels begin with 1 and rise", where="levels", got=levels)
    if min(width_px, height_px) // levels[-1] < 1:
        raise ConfigError(
            "a level would be empty", where="levels", got=levels[-1], allowed=f"up to {min(width_px, height_px)}"
        )
    if not 1 <= jpeg_quality <= 100:
        raise ConfigError("this is no JPEG quality", where="jpeg_quality", got=jpeg_quality, allowed="1 to 100")
    if tile_px < 16 or tile_px % 16:
        raise ConfigError("tiles of a TIFF are multiples of 16", where="tile_px", got=tile_px, allowed="16, 32, 48 ...")


def _coding(compression: Compression) -> dict[str, Any]:
    """What tifffile must write into the tags; the tiles come to it encoded."""
    if compression == "jpeg2000":
        return {"compression": 33005, "photometric": "rgb"}
    return {"compression": "jpeg", "photometric": "ycbcr", "subsampling": _SUBSAMPLING}


def _pyramid(image_HWC: Image3, levels: Sequence[int]) -> Iterator[Image3]:
    """Make each level, of the one before where that has whole squares to give."""
    level_HWC, before = image_HWC, 1
    for factor in levels:
        level_HWC = _reduce(level_HWC, factor // before) if factor % before == 0 else _reduce(image_HWC, factor)
        before = factor
        yield level_HWC


def _reduce(image_HWC: Image3, factor: int) -> Image3:
    """Mean of squares of ``factor`` pixels."""
    height, width = (size // factor * factor for size in image_HWC.shape[:2])
    return np.asarray(Image.fromarray(image_HWC).reduce(factor, box=(0, 0, width, height)))


def _encoded(image_HWC: Image3, tile_px: int, jpeg_quality: int, compression: Compression) -> Iterator[bytes]:
    """Tiles row by row; those at the right and bottom are filled up with their last pixels, so that none rings."""
    height, width = image_HWC.shape[:2]
    for top in range(0, height, tile_px):
        for left in range(0, width, tile_px):
            tile_HWC = image_HWC[top : top + tile_px, left : left + tile_px]
            missing = [(0, tile_px - size) for size in tile_HWC.shape[:2]]
            if any(after for _, after in missing):
                tile_HWC = np.pad(tile_HWC, [*missing, (0, 0)], mode="edge")
            yield _encode(np.ascontiguousarray(tile_HWC), jpeg_quality, compression)


def _encode(tile_HWC: Image3, jpeg_quality: int, compression: Compression) -> bytes:
    if compression == "jpeg2000":
        return bytes(
            imagecodecs.jpeg2k_encode(tile_HWC, level=_JPEG2000_LEVEL, codecformat="j2k", mct=True, numthreads=1)
        )
    return bytes(simplejpeg.encode_jpeg(tile_HWC, quality=jpeg_quality, colorspace="RGB", colorsubsampling="422"))


def _write_thumbnail(
    tif: tifffile.TiffWriter, image_HWC: Image3, head: str, jpeg_quality: int, common: dict[str, Any]
) -> None:
    """Write the small picture that is the second page of Aperio's files: strips, not tiles."""
    factor = max(1, math.ceil(max(image_HWC.shape[:2]) / _THUMBNAIL_PX))
    small_HWC = _reduce(image_HWC, factor)
    height, width = small_HWC.shape[:2]
    tif.write(
        iter([_encode(np.ascontiguousarray(small_HWC), jpeg_quality, "jpeg")]),
        shape=small_HWC.shape,
        rowsperstrip=height,
        description=f"{head} -> {width}x{height} - ",
        **_coding("jpeg"),
        **common,
    )
