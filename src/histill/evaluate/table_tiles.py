"""The tiles of a table: its columns, and its tiles as a benchmark reads them, resized to the encoder's side, in blocks.

The checks during training read columns and tiles by the same functions.

Shapes: N tiles, H and W pixels, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console

from histill.errors import DataError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.features import Array
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.statistics import RESAMPLES, SEED
from histill.tiles.images import UnreadableTileError, decode, read_table

__all__ = [
    "AT_ONCE",
    "COLUMNS",
    "Kind",
    "TableTiles",
    "embed_tiles",
    "none_readable",
    "open_tiles",
    "read_columns",
    "resized",
    "unreadable_note",
]

Kind = Literal["labelled", "paired"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "labelled": ("path", "label", "slide", "split"),
    "paired": ("path", "slide", "scanner", "x", "y"),
}
"""The columns that a table needs; ``patient`` is taken besides, where there is one, and others are passed over."""

AT_ONCE = 16
"""Tiles that are held as they are on the disk, which may be much larger than resized."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableTiles:
    """The readable tiles of a table."""

    folder: Path
    columns: dict[str, Array]
    """Text (N,)."""
    input_px: int
    key: str
    """Hex digest of the tiles' bytes, their order and their side."""
    unreadable: dict[str, str]
    """Path -> reason."""

    def describe(self, csv_path: Path) -> dict[str, Any]:
        """What a result says of its tiles."""
        return {
            "root": str(csv_path),
            "tiles": len(self.columns["path"]),
            "input_px": self.input_px,
            "unreadable": self.unreadable,
            "bootstrap": {"resamples": RESAMPLES, "seed": SEED},
        }

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Tiles ``first`` to ``last`` (excluded), resized: uint8 (n, px, px, 3)."""
        paths = self.columns["path"][first:last].tolist()
        found_NHW3 = np.empty((len(paths), self.input_px, self.input_px, 3), np.uint8)
        for start in range(0, len(paths), AT_ONCE):
            some = paths[start : start + AT_ONCE]
            tiles = [decode((self.folder / path).read_bytes(), path) for path in some]
            found_NHW3[start : start + AT_ONCE] = resized(tiles, self.input_px)
        return found_NHW3


def resized(tiles: Sequence[Array], px: int) -> NDArray[np.uint8]:
    """Resize tiles as a whole (bilinear, antialiased); one that is not square is stretched.

    Parameters
    ----------
    tiles
        uint8 (H, W, 3), of any sizes.
    px
        Side of the result.

    Returns
    -------
    ndarray
        uint8 (N, px, px, 3).
    """
    found_NHW3 = np.empty((len(tiles), px, px, 3), np.uint8)
    for size in {tile.shape for tile in tiles}:
        rows = [row for row, tile in enumerate(tiles) if tile.shape == size]
        same_BHW3 = np.stack([tiles[row] for row in rows])
        if size[:2] != (px, px):
            pixels_BCHW = torch.from_numpy(same_BHW3).permute(0, 3, 1, 2).contiguous().float()
            pixels_BCHW = F.interpolate(pixels_BCHW, (px, px), mode="bilinear", antialias=True)
            same_BHW3 = pixels_BCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        found_NHW3[rows] = same_BHW3
    return found_NHW3


def unreadable_note(paths: Sequence[str]) -> list[str]:
    """What a reader of the scores must know: tiles that are missing from them."""
    return [f"{len(paths)} tiles unreadable and left out, first {paths[0]}"] if paths else []


def none_readable(csv_path: Path, count: int, path: str, reason: str) -> DataError:
    """Make the error for a table of which no tile can be read; of one it is said why."""
    return DataError(
        f"none of the {count} tiles can be read",
        where=csv_path,
        got=f"{path}: {reason}",
        remedy="paths are relative to the table's folder",
    )


def read_columns(csv_path: Path, kind: Kind) -> dict[str, Array]:
    """Read what a table says of its tiles, as text (N,).

    Parameters
    ----------
    csv_path
        In UTF-8; paths relative to its folder.
    kind
        Which columns must be there.

    Raises
    ------
    DataError
        The table is missing or damaged, or a field is empty.
    """
    rows = read_table(csv_path, COLUMNS[kind])
    optional = ["patient"] if "patient" in rows[0] else []
    columns = {name: np.array([row[name] for row in rows]) for name in [*COLUMNS[kind], *optional]}
    for name, values in columns.items():
        if (values == "").any():
            raise DataError(
                f"the column {name} has empty fields",
                where=f"{csv_path}, line {int(np.argmax(values == '')) + 2}",
                got=f"{(values == '').sum()} of {len(values)} rows",
                remedy="fill them in; scores depend on which tiles share a slide, a class or a place",
            )
    return columns


def _survey(folder: Path, paths: Sequence[str], tell: Callable[[], None]) -> dict[str, Any]:
    """Read and decode every tile once: a digest of each readable one, and why the others are not."""
    digests: list[str | None] = []
    unreadable = {}
    for path in paths:
        try:
            data = (folder / path).read_bytes()
            decode(data, path)
            digests.append(hashlib.sha256(data).hexdigest())
        except (UnreadableTileError, OSError) as error:
            digests.append(None)
            unreadable[path] = " ".join(str(error).split())
        tell()
    return {"digests": digests, "unreadable": unreadable}


def _stamp(path: Path) -> list[int]:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def open_tiles(csv_path: Path, kind: Kind, input_px: int, parts: Path, console: Console) -> TableTiles:
    """Read a table and look through its tiles; no tile takes the place of one that cannot be decoded.

    Parameters
    ----------
    csv_path, kind
        See :func:`read_columns`.
    input_px
        Side that tiles are resized to, in pixels. A tile that is not square is stretched.
    parts
        Keeps what was found, until a file changes its size or date.
    console
        For the progress bar.

    Raises
    ------
    DataError
        The table is missing or damaged, a field is empty, or no tile can be read.
    """
    columns = read_columns(csv_path, kind)
    paths = columns["path"].tolist()
    with progress(console) as bar:
        step = bar.add_task("looking through the tiles", total=len(paths))
        stamps = [[path, *_stamp(csv_path.parent / path)] for path in paths]
        found = kept(parts, "survey", stamps, lambda: _survey(csv_path.parent, paths, lambda: bar.advance(step)))
    readable_N = np.array([each is not None for each in found["digests"]])
    if not readable_N.any():
        raise none_readable(csv_path, len(paths), *next(iter(found["unreadable"].items())))
    return TableTiles(
        folder=csv_path.parent,
        columns={name: values[readable_N] for name, values in columns.items()},
        input_px=input_px,
        key=digest([input_px, [each for each in found["digests"] if each is not None]]),
        unreadable=found["unreadable"],
    )


def embed_tiles(tiles: TableTiles, embedder: Embedder, cache: FeatureCache, console: Console) -> NDArray[np.float32]:
    """Embed the readable tiles, in the table's order: (N, D).

    Parameters
    ----------
    tiles
        Of a table.
    embedder
        Who embeds.
    cache
        Keeps the features by encoder and tiles.
    console
        For the progress bar.
    """
    count = len(tiles.columns["path"])
    with progress(console) as bar:
        step = bar.add_task("embedding", total=count)
        return cache.features(embedder, tiles.key, count, tiles.read, progress=lambda n: bar.advance(step, n))
