"""Where a tiled TIFF, SVS or OME-TIFF keeps its levels and blocks, read once with tifffile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tifffile

from histill.slides.slide import ScaleFacts, SlideError
from histill.slides.tiff_blocks import (
    DEFLATE,
    JPEG,
    JPEG2000_RGB,
    JPEG2000_YCBCR,
    LZW,
    PHOTOMETRIC_YCBCR,
    UNCOMPRESSED,
    Decode,
    jpeg2000_decoder,
    jpeg_decoder,
    lossless_decoder,
)
from histill.slides.tiff_scale import scale_facts

__all__ = ["Blocks", "Layout", "read_layout", "tiling_remedy"]

_PHOTOMETRIC_RGB = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """One level as it is stored: a grid of blocks of one size, row by row, padded at the right and the bottom."""

    width: int
    """Pixels of the level."""
    height: int
    """Pixels of the level."""
    block_width: int
    """Pixels."""
    block_height: int
    """Pixels."""
    across: int
    """Blocks in a row."""
    down: int
    """Blocks in a column."""
    offsets: tuple[int, ...]
    """Place of each block in the file, bytes."""
    counts: tuple[int, ...]
    """Length of each block, bytes; 0 where none was stored."""
    decode: Decode
    """Turns a block's bytes into pixels."""
    lossless: bool
    """Whether two decoders must give the same pixels: any compression here but JPEG2000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that reading needs to know of a file."""

    vendor: str
    """``aperio``, ``ome-tiff`` or ``generic-tiff``."""
    levels: tuple[Blocks, ...]
    """From the finest to the coarsest."""
    scale_facts: ScaleFacts
    properties: Mapping[str, str]


def tiling_remedy(path: Path) -> str:
    """Say how to make a file that can be read."""
    return (
        f"make a tiled pyramid of it, for instance: vips tiffsave {path.name} {path.stem}-tiled.tif "
        "--tile --pyramid --compression jpeg --Q 90"
    )


def read_layout(path: Path) -> Layout:
    """Read a file's structure.

    Raises
    ------
    SlideError
        When it is not a TIFF, its directories are damaged, or its largest image is not tiled 8-bit RGB in one of the
        compressions known here (none, LZW, Deflate, JPEG, Aperio's JPEG2000).
    """
    try:
        with tifffile.TiffFile(path) as tif:
            return _layout(tif, path)
    except (SlideError, OSError):
        raise
    except Exception as error:  # a damaged directory makes tifffile raise almost anything
        raise SlideError(
            "the TIFF structure of this file cannot be read",
            where=path,
            got=str(error) or repr(error),
            remedy="copy it again from its source; it is damaged, incomplete or not a TIFF",
        ) from None


def _layout(tif: tifffile.TiffFile, path: Path) -> Layout:
    series = max(tif.series, key=lambda one: one.levels[0].size if one.levels else 0)
    vendor = "aperio" if tif.is_svs else "ome-tiff" if tif.is_ome else "generic-tiff"
    pages = [_page(tif, level, f"{path}, level {number}") for number, level in enumerate(series.levels)]
    levels = [_blocks(page, vendor, path, number) for number, page in enumerate(pages)]
    sizes = [(level.width, level.height) for level in levels]
    if any(wide < narrow or high < low for (wide, high), (narrow, low) in pairwise(sizes)):
        raise SlideError("the levels of this TIFF do not shrink", where=path, got=sizes)
    ome_xml = tif.ome_metadata if vendor == "ome-tiff" else None
    facts, properties = scale_facts(pages[0], vendor, ome_xml, series.name)
    return Layout(vendor=vendor, levels=tuple(levels), scale_facts=facts, properties=properties)


def _page(tif: tifffile.TiffFile, level: tifffile.TiffPageSeries, where: str) -> tifffile.TiffPage:
    pages = [page for page in level.pages if page is not None]
    if len(pages) != 1 or pages[0].parent is not tif:
        raise SlideError(
            "this TIFF is a stack of planes, not one RGB image",
            where=where,
            got=f"axes {level.axes} of {level.shape}",
            allowed="one RGB plane for each level",
        )
    return pages[0].aspage()


def _blocks(page: tifffile.TiffPage, vendor: str, path: Path, number: int) -> Blocks:
    where = f"{path}, level {number}"
    if not page.is_tiled:
        raise SlideError(
            "this TIFF is stored in strips, not in tiles, so that no part of it can be read alone",
            where=where,
            remedy=tiling_remedy(path),
        )
    kind = f"{page.samplesperpixel} samples of {page.dtype}, photometric {int(page.photometric)}"
    rgb = (_PHOTOMETRIC_RGB, PHOTOMETRIC_YCBCR) if page.compression == JPEG else (_PHOTOMETRIC_RGB,)
    if page.dtype != "uint8" or page.samplesperpixel != 3 or page.planarconfig != 1 or page.photometric not in rgb:
        raise SlideError(
            "the pixels of this TIFF are not 8-bit RGB",
            where=where,
            got=kind + (", in separate planes" if page.planarconfig != 1 else ""),
            allowed="3 samples of uint8, stored together",
            remedy=tiling_remedy(path),
        )
    across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    if not len(page.dataoffsets) == len(page.databytecounts) == across * down:
        raise SlideError(
            "the table of blocks of this TIFF is damaged",
            where=where,
            got=f"{len(page.dataoffsets)} places and {len(page.databytecounts)} lengths",
            allowed=f"{across * down} of each",
            remedy="copy it again from its source",
        )
    return Blocks(
        width=page.imagewidth,
        height=page.imagelength,
        block_width=page.tilewidth,
        block_height=page.tilelength,
        across=across,
        down=down,
        offsets=tuple(page.dataoffsets),
        counts=tuple(page.databytecounts),
        decode=_decoder(page, vendor, path, where),
        lossless=page.compression not in (JPEG2000_RGB, JPEG2000_YCBCR),
    )


def _decoder(page: tifffile.TiffPage, vendor: str, path: Path, where: str) -> Decode:
    compression = int(page.compression)
    if compression == JPEG:
        return jpeg_decoder(page.jpegtables, int(page.photometric))
    if compression in (JPEG2000_RGB, JPEG2000_YCBCR) and vendor == "aperio":
        return jpeg2000_decoder(compression == JPEG2000_YCBCR)
    if compression in (UNCOMPRESSED, LZW, *DEFLATE) and page.predictor in (1, 2):
        return lossless_decoder(compression, int(page.predictor))
    raise SlideError(
        "the compression of this TIFF is not known here",
        where=where,
        got=f"{page.compression!r}, predictor {int(page.predictor)}",
        allowed="none, LZW, Deflate or JPEG, and JPEG2000 in an Aperio SVS",
        remedy=tiling_remedy(path),
    )
