"""What a worker process does for one slide: plan its tiles, and cut a cell of them. Pure functions of the slide.

Shapes: N tiles of a slide or a cell, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from histill.slides.coordinates import Coordinates, read_coordinates
from histill.slides.grid import tile_origins, tissue_shares
from histill.slides.masks import read_mask
from histill.slides.open import open_slide
from histill.slides.outlines import Polygon, mask_polygons
from histill.slides.quality import Fault, rejected
from histill.slides.render import TileRenderer
from histill.slides.resample import area_resample
from histill.slides.scale import resolve_scale
from histill.slides.slide import Level, Slide, UnreadableRegionError
from histill.slides.tissue import tissue_mask
from histill.tiles.config import TileConfig

__all__ = ["Cell", "Reader", "Rendered", "SlideJob", "SlidePlan", "cells", "cut", "mask_name", "plan_slide", "rendered"]

Reader = Literal["auto", "openslide", "tiff"]

# A cell is a square patch of the grid: what one task cuts. Its blocks fit the reader's cache, so that only those on
# its rim are decoded twice; a whole row of a wide slide would not fit, and nearly every block would be.
_CELL_SIDE = 14
_THUMBNAIL_PX = 1024
_PNG_LEVEL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideJob:
    """One slide and all that its tiles depend on."""

    id: str
    path: Path
    config: TileConfig
    override_mpp: float | None = None
    """Microns per level-0 pixel in place of the slide's own."""
    mask: Path | None = None
    """A tissue mask in place of Otsu's."""
    patient: str | None = None
    coords: Path | None = None
    """Coordinates that another tool made, in place of the grid and the share of tissue."""
    outline: bool = False
    """Whether the outline of the tissue is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidePlan:
    """A slide's scale, and the tiles that have tissue."""

    width: int
    """Of level 0, pixels."""
    height: int
    slide_bytes: int
    """Size of the slide's files."""
    mpp: float
    """Of level 0."""
    mpp_source: str
    level: int
    """Level that tiles are read from."""
    extent_px: float
    """Side of a tile in level-0 pixels."""
    tile_mpp: float
    """Scale of the tiles: the one that was asked for, or what coordinates made elsewhere come to."""
    reader: Reader
    vendor: str
    mask: str
    """What settled the tiles: otsu, or the name and the start of the SHA-256 of a mask or of coordinates."""
    grid_tiles: int
    """Tiles of the grid, with and without tissue."""
    origins_N2: NDArray[np.int64]
    """x and y of the tiles with tissue in level-0 pixels, cell by cell, row by row in a cell."""
    tissue_N: NDArray[np.float32]
    """Their shares of tissue."""
    cell_N: NDArray[np.int64]
    """Number of the cell that each lies in, ascending."""
    overlap: float
    """Share of a tile's side that it has in common with its neighbour: of the grid, or as coordinates tell."""
    order_N: NDArray[np.int64]
    """Place of each in the grid's order (row by row), or in that of the coordinates that were given."""
    thumbnail_HW3: NDArray[np.uint8]
    outline: list[Polygon]
    """Of the tissue in mask pixels, where it was asked for."""
    mask_width: int
    """Size of the mask, pixels."""
    mask_height: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """One tile, or why there is none."""

    number: int
    """Which of the tiles that were asked for."""
    tile_HW3: NDArray[np.uint8] | None = None
    fault: Fault | None = None
    """The quality filter that leaves it out."""
    unreadable: str | None = None
    """Why its pixels cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The tiles that were cut from one cell."""

    kept: tuple[int, ...]
    """Which of the cell's tiles, ascending."""
    images: tuple[bytes, ...]
    """Their files; empty files in an index-only set."""
    rejected: dict[str, int]
    """Quality filter -> tiles that it left out."""
    unreadable: tuple[tuple[int, str], ...]
    """(which tile, reason) of those whose pixels are damaged."""


class _Opened:
    """The slide that this process worked on last: the next cell is mostly of the same one."""

    def __init__(self) -> None:
        self.key: tuple[Path, str] | None = None
        self.slide: Slide | None = None

    def get(self, path: Path, reader: Reader) -> Slide:
        if self.slide is None or self.key != (path, reader):
            self.close()
            self.slide = open_slide(path, reader=reader)
            self.key = (path, self.slide.reader)  # what "auto" found serves the cells, without another comparison
        return self.slide

    def close(self) -> None:
        if self.slide is not None:
            self.slide.close()
        self.slide = self.key = None


_opened = _Opened()


def plan_slide(job: SlideJob) -> SlidePlan:
    """Open a slide, settle its scale, find its tissue and lay the grid.

    Raises
    ------
    SlideError
        The slide cannot be opened, has no scale, is coarser than wanted, or its mask or coordinates do not fit.
    """
    config, slide = job.config, _opened.get(job.path, job.config.reader)
    scale = resolve_scale(
        slide.scale_facts, override=job.override_mpp, trust_tiff=config.trust_tiff_resolution, where=job.path
    )
    given = read_coordinates(job.coords, slide) if job.coords is not None else None
    tile_mpp = config.mpp if given is None else scale.mpp * given.extent_px / config.tile_px
    renderer = TileRenderer(slide, scale.mpp, tile_mpp, config.tile_px, config.tolerance, config.upsample)
    full = slide.levels[0]
    longest = max(full.width, full.height)
    small = slide.thumbnail(max(1, round(longest * scale.mpp / config.tissue.mpp)))
    height, width = small.present_HW.shape
    if job.mask is None:
        mpp = scale.mpp * longest / max(height, width)
        mask_HW = tissue_mask(small.image_HW3, small.present_HW, mpp, config.tissue)
        mask_HW |= small.damaged_HW  # whether tissue stood there is unknown: its tiles are tried, counted and named
        told = "otsu"
    else:
        mask_HW = read_mask(job.mask, full.width, full.height, width, height)
        told = mask_name(job.mask)
    if job.coords is not None:
        told = mask_name(job.coords)
    stride_px = renderer.extent_px * config.stride / config.tile_px
    grid_tiles, chosen_N2, tissue_N = _places(config, given, mask_HW, full, renderer.extent_px, stride_px)
    column_N, row_N = np.rint(chosen_N2 / stride_px).astype(np.int64).T // _CELL_SIDE
    cell_N = row_N * (1 << 32) + column_N
    order_N = np.argsort(cell_N, kind="stable")
    return SlidePlan(
        width=full.width,
        height=full.height,
        slide_bytes=_bytes_of(job.path),
        mpp=scale.mpp,
        mpp_source=scale.source,
        level=renderer.level,
        extent_px=renderer.extent_px,
        tile_mpp=tile_mpp,
        reader=cast(Reader, slide.reader),
        vendor=slide.vendor,
        mask=told,
        grid_tiles=grid_tiles,
        origins_N2=chosen_N2[order_N],
        tissue_N=tissue_N[order_N],
        cell_N=cell_N[order_N],
        overlap=1 - config.stride / config.tile_px if given is None else given.overlap,
        order_N=order_N,
        thumbnail_HW3=_picture(slide, small.image_HW3),
        outline=mask_polygons(mask_HW) if job.outline else [],
        mask_width=width,
        mask_height=height,
    )


def _places(
    config: TileConfig,
    given: Coordinates | None,
    mask_HW: NDArray[np.bool_],
    full: Level,
    extent_px: float,
    stride_px: float,
) -> tuple[int, NDArray[np.int64], NDArray[np.float32]]:
    """How many tiles there are, and place and share of tissue of those to cut: all that were given, in their order."""
    if given is not None:
        tissue_N = tissue_shares(mask_HW, full.width, full.height, given.origins_N2, extent_px)
        return len(given.origins_N2), given.origins_N2, tissue_N
    origins_N2 = tile_origins(full.width, full.height, extent_px, stride_px)
    tissue_N = tissue_shares(mask_HW, full.width, full.height, origins_N2, extent_px)
    with_tissue_N = (tissue_N >= config.tissue_min) & (tissue_N > 0)
    return len(origins_N2), origins_N2[with_tissue_N], tissue_N[with_tissue_N]


def _picture(slide: Slide, small_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The slide at the size of a thumbnail; from what was read for the mask where that is large enough."""
    full, height, width = slide.levels[0], *small_HW3.shape[:2]
    longest = min(max(full.width, full.height), _THUMBNAIL_PX)
    if max(height, width) < longest:
        return slide.thumbnail(longest).image_HW3
    step = max(height, width) / longest
    size = max(1, round(width / step)), max(1, round(height / step))
    return area_resample(small_HW3, 0, 0, width / size[0], height / size[1], *size)


def mask_name(mask: Path) -> str:
    """How a record names a mask: its file name and the start of its SHA-256."""
    return f"{mask.name} {hashlib.sha256(mask.read_bytes()).hexdigest()[:12]}"


def _bytes_of(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    return path.stat().st_size


def cells(plan: SlidePlan) -> list[slice]:
    """The rows of ``origins_N2`` of each cell, in order."""
    if not len(plan.cell_N):
        return []
    starts = np.flatnonzero(np.diff(plan.cell_N, prepend=-1))
    ends = [*starts[1:], len(plan.cell_N)]
    return [slice(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def rendered(job: SlideJob, reader: Reader, mpp: float, origins_N2: NDArray[np.int64]) -> Iterator[Rendered]:
    """Render and judge the tiles at some origins, one by one; ``reader`` and ``mpp`` are the plan's.

    Tiles that were placed by another tool are not judged, and may reach beyond the slide: what is there cannot be read.

    Parameters
    ----------
    job
        The slide, and the settings.
    reader, mpp
        Of the plan: which reader, and microns per level-0 pixel.
    origins_N2
        x, y of the tiles in level-0 pixels, int64.

    Yields
    ------
    Rendered
        A tile, its fault, or why it cannot be read.
    """
    config, slide = job.config, _opened.get(job.path, reader)
    renderer = TileRenderer(slide, mpp, config.mpp, config.tile_px, config.tolerance, config.upsample)
    for number, (x, y) in enumerate(origins_N2.tolist()):
        if job.coords is not None and not renderer.holds(x, y):
            yield Rendered(number=number, unreadable="the tile reaches beyond the slide")
            continue
        try:
            tile_HW3 = renderer.read(x, y)
        except UnreadableRegionError as error:
            yield Rendered(number=number, unreadable=str(error).replace("\n", ";"))
            continue
        fault = None if job.coords is not None else rejected(tile_HW3, config.quality, config.mpp)
        yield Rendered(number=number, tile_HW3=None if fault else tile_HW3, fault=fault)


def cut(job: SlideJob, reader: Reader, mpp: float, origins_N2: NDArray[np.int64]) -> Cell:
    """Render, judge and encode the tiles at some origins; ``reader`` and ``mpp`` are the plan's.

    Parameters
    ----------
    job, reader, mpp, origins_N2
        As in :func:`rendered`.

    Returns
    -------
    Cell
        Numbers and bytes of the kept tiles (JPEG or PNG; none for an index alone), and what became of the others.
    """
    kept, images, reasons, unreadable = [], [], Counter[str](), []
    for tile in rendered(job, reader, mpp, origins_N2):
        if tile.unreadable is not None:
            unreadable.append((tile.number, tile.unreadable))
        elif tile.fault is not None:
            reasons[tile.fault] += 1
        else:
            assert tile.tile_HW3 is not None
            kept.append(tile.number)
            images.append(_encode(tile.tile_HW3, job.config))
    return Cell(kept=tuple(kept), images=tuple(images), rejected=dict(reasons), unreadable=tuple(unreadable))


def _encode(tile_HW3: NDArray[np.uint8], config: TileConfig) -> bytes:
    if config.index_only:
        return b""
    if config.lossless:
        return bytes(imagecodecs.png_encode(tile_HW3, level=_PNG_LEVEL))
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(tile_HW3),
        quality=config.jpeg_quality,
        colorspace="RGB",
        colorsubsampling=config.jpeg_chroma,
        fastdct=False,
    )
    return encoded
