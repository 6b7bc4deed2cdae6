"""The fast path: tiled TIFF, SVS and OME-TIFF by exact byte ranges, with a cache of decoded blocks.

Shapes: H and W of the region, h and w of a block.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.slides.overview import overview, overview_level
from histill.slides.slide import Level, ScaleFacts, Thumbnail, UnreadableRegionError, check_region, level_downsample
from histill.slides.tiff_blocks import BlockError
from histill.slides.tiff_layout import Blocks, read_layout

__all__ = ["TiffReader"]

_SLAB_BLOCKS = 32
_CACHE_BYTES = 128 * 2**20
"""Blocks whose memory is asked for at once: large enough for numpy to ask the system for huge pages."""


class TiffReader:
    """A tiled TIFF, read without OpenSlide. See :class:`histill.slides.slide.Slide` for what its members mean.

    Parameters
    ----------
    path
        The file.
    cache_blocks
        Decoded blocks that are kept, the latest used ones, as far as 128 MB hold them: 512 of 256 px take 100 MB.
        Tiles that are read row by row decode each block once when two rows of blocks fit.

    Raises
    ------
    SlideError
        When the file is not a tiled 8-bit RGB TIFF in a compression that is known here.
    """

    reader: str = "tiff"

    def __init__(self, path: Path, cache_blocks: int = 512) -> None:
        if cache_blocks < 1:
            raise ValueError(f"the cache needs room for one block, got {cache_blocks}")
        self.path = Path(path)
        layout = read_layout(self.path)
        full = layout.levels[0]
        self.blocks: tuple[Blocks, ...] = layout.levels
        """How each level is stored."""
        self.levels: tuple[Level, ...] = tuple(
            Level(
                width=level.width,
                height=level.height,
                downsample_x=level_downsample(full.width, level.width),
                downsample_y=level_downsample(full.height, level.height),
            )
            for level in layout.levels
        )
        self.vendor: str = layout.vendor
        self.scale_facts: ScaleFacts = layout.scale_facts
        self.properties: Mapping[str, str] = layout.properties
        self._file: int | None = None
        largest = max(blocks.block_width * blocks.block_height * 3 for blocks in self.blocks)
        self._cache_blocks = max(1, min(cache_blocks, _CACHE_BYTES // largest))
        self._unused: list[NDArray[np.uint8]] = []
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()

    def __reduce__(self) -> tuple[type[TiffReader], tuple[Path, int]]:
        return TiffReader, (self.path, self._cache_blocks)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a region; see ``Slide.read``."""
        check_region(self.levels[level], x, y, width, height)
        stored = self.blocks[level]
        wide, high = stored.block_width, stored.block_height
        image_HW3 = np.empty((height, width, 3), np.uint8)
        for row in range(y // high, (y + height - 1) // high + 1):
            above = row * high - y
            top, bottom = max(above, 0), min(above + high, height)
            for column in range(x // wide, (x + width - 1) // wide + 1):
                before = column * wide - x
                left, right = max(before, 0), min(before + wide, width)
                block_hw3 = self._block(level, row * stored.across + column)
                image_HW3[top:bottom, left:right] = block_hw3[
                    top - above : bottom - above, left - before : right - before
                ]
        return image_HW3

    def _block(self, level: int, index: int) -> NDArray[np.uint8]:
        """Give a decoded block, (h, w, 3), padding included; it is overwritten when it leaves the cache."""
        key = level, index
        cache = self._cache
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
        stored = self.blocks[level]
        shape = stored.block_height, stored.block_width, 3
        # Decoding into the memory of the block that leaves saves a third of a JPEG's time: fresh pages are slow.
        block_hw3 = cache.popitem(last=False)[1] if len(cache) >= self._cache_blocks else None
        if block_hw3 is None or block_hw3.shape != shape:
            block_hw3 = self._fresh(shape)
        try:
            stored.decode(self._bytes(stored, index), block_hw3)
        except BlockError as error:
            row, column = divmod(index, stored.across)
            raise UnreadableRegionError(
                "a block of the slide is damaged or absent",
                where=f"{self.path}, level {level}, block column {column}, row {row}",
                got=error,
            ) from None
        cache[key] = block_hw3
        return block_hw3

    def _fresh(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        if not self._unused or self._unused[0].shape != shape:
            self._unused = list(np.empty((_SLAB_BLOCKS, *shape), np.uint8))
        return self._unused.pop()

    def _bytes(self, stored: Blocks, index: int) -> bytes:
        count, offset = stored.counts[index], stored.offsets[index]
        if count == 0 or offset == 0:
            raise BlockError("no pixels are stored there")
        if count > 65536 + 8 * stored.block_width * stored.block_height * 3:
            raise BlockError(f"its length cannot be {count} bytes")
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        try:
            data = os.pread(self._file, count, offset)
        except (OSError, OverflowError) as error:
            raise BlockError(str(error)) from None
        if len(data) != count:
            raise BlockError("the file ends before the block does")
        return data

    def thumbnail(self, longest_px: int) -> Thumbnail:
        """Give the whole slide, small; see ``Slide.thumbnail``. Damaged and absent blocks are marked."""
        index = overview_level(self.levels, longest_px)
        stored = self.blocks[index]

        def read(x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], None] | None:
            block = y // stored.block_height * stored.across + x // stored.block_width
            try:
                return self._block(index, block)[:height, :width], None
            except UnreadableRegionError:
                return None

        size = stored.block_width, stored.block_height
        return overview(self.levels[0], self.levels[index], size, longest_px, read)

    def close(self) -> None:
        """Release the file and the cache; both come back when something is read."""
        self._cache.clear()
        self._unused.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()
