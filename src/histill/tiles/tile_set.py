"""A tile set as a source for training: which of its tiles, in which order, and their pixels.

Shapes: B positions of the stream, K slides that are not held out.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError, nearest
from histill.files import read_json
from histill.tiles.folder import SetFolder
from histill.tiles.images import UnreadableTileError, decode
from histill.tiles.index import Index, parts_digest
from histill.tiles.order import balanced_tile_at, block_tile_at
from histill.tiles.shards import BLOCK_BYTES, OpenShards

__all__ = ["Sampling", "TileSelection", "TileSet", "TileSource"]

Sampling = Literal["uniform", "slide-balanced"]
"""uniform: every tile equally often; slide-balanced: every slide equally often."""

# 512 runs of 64 tiles: at 25 KB a tile, 0.8 GB of shards are in use at a time, of at most 512 slides and a few more.
_BLOCK_TILES, _WINDOW_BLOCKS = 64, 512
_SUFFIX = {"jpeg": ".jpg", "png": ".png"}
_AGAIN = "run `histill tile` again with the same settings: finished slides stay"


class TileSource(Protocol):
    """What training needs of tiles, wherever they come from. All methods are safe for many threads."""

    @property
    def root(self) -> Path:
        """The folder, for messages."""
        ...

    @property
    def held_out(self) -> int:
        """Tiles that were left out for testing."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """One tile: uint8, shape (height, width, 3); UnreadableTileError when it is missing or damaged."""
        ...

    def name(self, index: int) -> str:
        """What a message calls a tile."""
        ...

    def median_side_px(self, sample: int = 256) -> int:
        """Median of the tiles' shorter sides, in pixels."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of all that decides which tile comes when."""
        ...

    def tile_at(self, positions_B: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Which tile stands at each position of the endless stream, int64 (B,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileSelection:
    """The tiles of a set that training takes, numbered from 0, and their order; wherever the pixels come from."""

    root: Path
    """Folder of the set."""
    settings: Mapping[str, Any]
    """What the set was made with: ``tile_px``, ``mpp``, ``codec`` and more."""
    index: Index
    sampling: Sampling
    slides: tuple[int, ...]
    """(K,): places in ``index.slides`` of the slides that are taken."""
    edges: tuple[int, ...]
    """(K + 1,): number of the first tile of each slide that is taken, and the number of tiles."""

    @classmethod
    def open(
        cls, folder: Path, *, sampling: Sampling = "uniform", hold_out_slides: Iterable[str] = ()
    ) -> TileSelection:
        """Open a set without its pixels.

        Parameters
        ----------
        folder
            What ``histill tile`` made.
        sampling
            How often each tile comes.
        hold_out_slides
            Ids of slides that are left out.

        Raises
        ------
        DataError
            When it is not a tile set, its index is missing or older than its parts, a slide to hold out is unknown,
            or no tile is left.
        """
        settings = SetFolder(folder).settings()
        index = Index.open(folder / "index.parquet")
        _check_index(folder, index, settings)
        left_out = set(hold_out_slides)
        absent = left_out - set(index.slides)  # a slide without a tile has a record, and may be named
        unknown = sorted(slide for slide in absent if not SetFolder(folder).record(slide).exists())
        if unknown:
            raise DataError(
                "a slide to hold out is not in the tile set",
                where=folder,
                got=", ".join(unknown[:5]),
                remedy=nearest(unknown[0], index.slides),
            )
        slides = tuple(place for place, slide in enumerate(index.slides) if slide not in left_out)
        if not slides:
            got = f"{len(index)} tiles in the set, all of them held out" if len(index) else "a set without tiles"
            raise DataError("there are no tiles to learn from", where=folder, got=got)
        edges = (0, *np.cumsum(np.diff(index.slide_first)[list(slides)]).tolist())
        return cls(root=folder, settings=settings, index=index, sampling=sampling, slides=slides, edges=edges)

    @property
    def held_out(self) -> int:
        """Tiles of the slides that are left out."""
        return len(self.index) - len(self)

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels."""
        return int(self.settings["tile_px"])

    def __len__(self) -> int:
        return self.edges[-1]

    def row(self, index: int) -> int:
        """Row in the index of a tile.

        Raises
        ------
        IndexError
            There is no such tile.
        """
        if not 0 <= index < self.edges[-1]:
            raise IndexError(f"tile {index} of {len(self)}")
        place = bisect_right(self.edges, index) - 1
        return int(self.index.slide_first[self.slides[place]]) + index - self.edges[place]

    def name(self, index: int) -> str:
        """Slide and place of a tile; reads a part of the index, so for messages only."""
        row = self.index.row(self.row(index))
        shard = "" if row.shard is None else f", shard {row.shard} at byte {row.offset}"
        return f"slide {row.slide}, x {row.x}, y {row.y}{shard}"

    def tile_at(self, positions_B: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Which tile stands at each position of the endless stream, int64 (B,)."""
        if self.sampling == "uniform":
            return block_tile_at(positions_B, len(self), seed, block_tiles=_BLOCK_TILES, window_blocks=_WINDOW_BLOCKS)
        edges_K = np.array(self.edges)
        return balanced_tile_at(positions_B, edges_K[:-1], np.diff(edges_K), seed)

    def fingerprint(self) -> str:
        """Hex SHA-256 over settings, slides, sizes in bytes of the tiles, and sampling."""
        about = [dict(self.settings), self.sampling, _BLOCK_TILES, _WINDOW_BLOCKS, self.edges]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        first = self.index.slide_first
        for slide in self.slides:
            digest.update(self.index.slides[slide].encode("utf-8", "surrogateescape") + b"\0")
            digest.update(self.index.lengths[first[slide] : first[slide + 1]].astype("<u4", copy=False).data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileSet:
    """A tile set with its pixels in shards.

    Built by :meth:`open`; ``len(tiles)`` tiles, ``tiles.read(index)`` decodes one. Safe for many threads.
    """

    selection: TileSelection
    """Which tiles, in which order."""
    shards: OpenShards
    shard_edges: tuple[int, ...]
    """First row of each run of tiles in one shard, and the number of rows."""
    suffix: str
    """Of the members: how they are decoded."""

    @classmethod
    def open(cls, folder: Path, *, sampling: Sampling = "uniform", hold_out_slides: Iterable[str] = ()) -> TileSet:
        """Open a set; arguments and errors as in :meth:`TileSelection.open`. One without pixels is a DataError too."""
        selection = TileSelection.open(folder, sampling=sampling, hold_out_slides=hold_out_slides)
        codec = selection.settings["codec"]
        if codec not in _SUFFIX or not selection.index.shards:
            raise DataError(
                "this tile set holds no pixels that can be read",
                where=folder,
                got=f"codec {codec}, {len(selection.index.shards)} shards",
                allowed=" or ".join(_SUFFIX),
                remedy="train from the slides, or make the set without --index-only",
            )
        return cls(
            selection=selection,
            shards=OpenShards(folder / "shards"),
            shard_edges=tuple(selection.index.shard_first.tolist()),
            suffix=_SUFFIX[codec],
        )

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
        """Decode one tile.

        Returns
        -------
        ndarray
            uint8, shape (tile_px, tile_px, 3), RGB.

        Raises
        ------
        UnreadableTileError
            When the shard is missing or too short, or its bytes there are not such a tile; says slide, x, y, shard.
        """
        selection = self.selection
        table, row = selection.index, selection.row(index)
        shard = table.shards[bisect_right(self.shard_edges, row) - 1]
        try:
            data = self.shards.read(shard, int(table.blocks[row]) * BLOCK_BYTES, int(table.lengths[row]))
            tile = decode(data, self.suffix)
            if tile.shape[0] != selection.tile_px or tile.shape[1] != selection.tile_px:
                raise UnreadableTileError("a tile has another size", got=tile.shape, allowed=selection.tile_px)
        except UnreadableTileError as error:
            reason = str(error).replace("\n ", ";")
            raise UnreadableTileError("a tile cannot be read", where=self.name(index), got=reason) from None
        return tile

    def name(self, index: int) -> str:
        """Slide, place and shard of a tile; reads a part of the index, so for messages only."""
        return self.selection.name(index)

    def median_side_px(self, sample: int = 256) -> int:
        """Side of all tiles, in pixels; nothing is sampled."""
        return self.selection.tile_px

    def fingerprint(self) -> str:
        """Hex SHA-256 over settings, slides, sizes in bytes of the tiles, and sampling."""
        return self.selection.fingerprint()

    def tile_at(self, positions_B: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """Which tile stands at each position of the endless stream, int64 (B,)."""
        return self.selection.tile_at(positions_B, seed)


def _check_index(folder: Path, index: Index, settings: Mapping[str, Any]) -> None:
    """Refuse an index of other settings, or one that was made before the newest slides were finished."""
    for name in ("tile_px", "mpp", "codec"):
        if index.settings.get(name) != settings[name]:
            raise DataError(
                f"the index and tileset.json state another {name}",
                where=folder,
                got=f"{index.settings.get(name)} and {settings[name]}",
                remedy=_AGAIN,
            )
    finished = _finished_parts(folder / "parts")
    if finished and parts_digest(finished).decode() != index.parts:
        # A slide that failed may have rows from an earlier try: its record tells, but reading them all takes a while.
        finished = [path for path in finished if read_json(path.with_name(f"{path.stem}.json"))["status"] == "done"]
        if parts_digest(finished).decode() != index.parts:
            raise DataError(
                "the index is older than the slides beside it",
                where=index.path,
                got=f"{len(index.slides)} slides with tiles in it, {len(finished)} finished",
                remedy=_AGAIN,
            )


def _finished_parts(parts: Path) -> list[Path]:
    """Rows of slides that have a record; none for a set that was copied without them."""
    names = {path.name for path in parts.iterdir()} if parts.is_dir() else set()
    stems = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
    return [parts / f"{stem}.parquet" for stem in stems if f"{stem}.json" in names]
