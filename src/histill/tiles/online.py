"""Tiles that are rendered from the slides when they are asked for, through the index of a set without pixels."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError
from histill.slides.open import open_slide
from histill.slides.render import TileRenderer
from histill.slides.slide import Slide, SlideError, UnreadableRegionError
from histill.tiles.folder import SetFolder, SlideRecord
from histill.tiles.images import UnreadableTileError
from histill.tiles.tile_set import Sampling, TileSelection

__all__ = ["OnlineTiles", "online_notice"]

_TIMED_TILES = 24
_OPEN_SLIDES = 8
"""Slides that a thread holds open; each has a cache of decoded blocks."""


class _ThreadSlides(threading.local):
    """Open slides of one thread (a slide is not safe for two), the least used one closed first."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, tuple[Slide, TileRenderer]] = OrderedDict()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnlineTiles:
    """A tile set whose pixels stay in the slides: a :class:`histill.tiles.tile_set.TileSource`."""

    selection: TileSelection
    """Which tiles, in which order."""
    records: dict[str, SlideRecord]
    """Slide id -> its record: file and scale."""
    x_N: NDArray[np.int32]
    """Of all rows of the index."""
    y_N: NDArray[np.int32]
    _slides: _ThreadSlides = field(default_factory=_ThreadSlides)

    @classmethod
    def open(cls, folder: Path, *, sampling: Sampling = "uniform", hold_out_slides: Iterable[str] = ()) -> OnlineTiles:
        """Open a set that was made with ``--index-only``.

        Raises
        ------
        DataError
            As :meth:`TileSelection.open`, and when a slide's file is gone or has another size than it had.
        """
        selection = TileSelection.open(folder, sampling=sampling, hold_out_slides=hold_out_slides)
        records = {record.slide: record for record in SetFolder(folder).records()}
        for number in selection.slides:
            slide = selection.index.slides[number]
            if slide not in records:
                raise DataError(
                    "this set does not say where its slides are",
                    where=folder / "parts",
                    got=f"no record of {slide}",
                    remedy="copy the folder parts too",
                )
            path = Path(records[slide].path)
            size = path.stat().st_size if path.is_file() else None
            if not path.exists() or (size is not None and size != records[slide].slide_bytes):
                raise DataError(
                    "a slide of this set is not what it was",
                    where=path,
                    got="no such file" if not path.exists() else f"{size} bytes",
                    allowed=f"{records[slide].slide_bytes} bytes",
                    remedy="bring it back, or run histill tile --index-only again into a new folder",
                )
        index = selection.index
        return cls(selection=selection, records=records, x_N=index.column("x"), y_N=index.column("y"))

    @property
    def root(self) -> Path:
        """Folder of the set."""
        return self.selection.root

    @property
    def held_out(self) -> int:
        """Tiles of the slides that are left out."""
        return self.selection.held_out

    def __len__(self) -> int:
        return len(self.selection)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Render one tile: uint8, (tile_px, tile_px, 3); UnreadableTileError when its pixels are damaged."""
        row = self.selection.row(index)
        try:
            renderer = self._renderer(self._slide_of(row))
            return renderer.read(int(self.x_N[row]), int(self.y_N[row]))
        except (UnreadableRegionError, SlideError) as error:
            reason = str(error).replace("\n ", ";")
            raise UnreadableTileError("a tile cannot be read", where=self.name(index), got=reason) from None

    def _slide_of(self, row: int) -> str:
        return self.selection.index.slides[int(self.selection.index.slide_of(np.array([row]))[0])]

    def _renderer(self, slide: str) -> TileRenderer:
        held = self._slides.open
        if slide in held:
            held.move_to_end(slide)
            return held[slide][1]
        settings, record = self.selection.settings, self.records[slide]
        assert record.mpp is not None
        opened = open_slide(Path(record.path), reader="tiff" if record.reader == "tiff" else "openslide")
        renderer = TileRenderer(
            opened, record.mpp, settings["mpp"], settings["tile_px"], settings["tolerance"], settings["upsample"]
        )
        held[slide] = (opened, renderer)
        if len(held) > _OPEN_SLIDES:
            held.popitem(last=False)[1][0].close()
        return renderer

    def name(self, index: int) -> str:
        """Slide and place of a tile."""
        row = self.selection.row(index)
        return f"slide {self._slide_of(row)}, x {self.x_N[row]}, y {self.y_N[row]}"

    def median_side_px(self, sample: int = 256) -> int:
        """Side of all tiles, in pixels."""
        return self.selection.tile_px

    def fingerprint(self) -> str:
        """Hex SHA-256 over settings, slides and their sizes, places of the tiles, and sampling."""
        digest = hashlib.sha256(self.selection.fingerprint().encode())
        for number in self.selection.slides:
            record = self.records[self.selection.index.slides[number]]
            digest.update(f"{record.slide}\0{record.slide_bytes}\0{record.mpp}\n".encode())
        digest.update(self.x_N.tobytes())
        digest.update(self.y_N.tobytes())
        return digest.hexdigest()

    def tile_at(self, positions_B: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Which tile stands at each position of the endless stream, int64 (B,)."""
        return self.selection.tile_at(positions_B, seed)


def online_notice(source: OnlineTiles) -> str:
    """Say what reading from slides costs, measured on this source."""
    positions_B = np.arange(min(len(source), _TIMED_TILES), dtype=np.int64)
    began, count = time.perf_counter(), 0
    for index in source.tile_at(positions_B, 0).tolist():
        with suppress(UnreadableTileError):
            source.read(index)
            count += 1
    cost_ms = 1e3 * (time.perf_counter() - began) / max(count, 1)
    return (
        f"Tiles are rendered from the slides: {cost_ms:.0f} ms each, where a tile set's shards take about 0.3 ms. "
        "For more than a trial make one: histill tile SLIDES --out SET"
    )
