"""The tiles of a table as a benchmark reads them: looked through once, resized to the encoder's side, in blocks.

Shapes: N tiles, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

__all__ = ["TableTiles", "embed_tiles", "open_tiles"]


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

    def notes(self) -> list[str]:
        """What a reader of the scores must know: tiles that are missing from them."""
        if not self.unreadable:
            return []
        return [f"{len(self.unreadable)} tiles unreadable and left out, first {next(iter(self.unreadable))}"]

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Tiles ``first`` to ``last`` (excluded), resized: uint8 (n, px, px, 3)."""
        side = (self.input_px, self.input_px)
        block = []
        for path in self.columns["path"][first:last].tolist():
            pixels = torch.from_numpy(decode((self.folder / path).read_bytes(), path).copy())
            if pixels.shape[:2] != side:
                resized = F.interpolate(pixels.permute(2, 0, 1)[None].float(), side, mode="bilinear", antialias=True)
                pixels = resized.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0)
            block.append(pixels.numpy())
        return np.stack(block)


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


def open_tiles(csv_path: Path, needed: Sequence[str], input_px: int, parts: Path, console: Console) -> TableTiles:
    """Read a table and look through its tiles; no tile takes the place of one that cannot be decoded.

    Parameters
    ----------
    csv_path
        In UTF-8; paths relative to its folder.
    needed
        Columns that must be there; ``patient`` is taken besides, where there is one.
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
    rows = read_table(csv_path, needed)
    optional = ["patient"] if "patient" in rows[0] else []
    columns = {name: np.array([row[name] for row in rows]) for name in [*needed, *optional]}
    for name, values in columns.items():
        if (values == "").any():
            where = f"{csv_path}, line {int(np.argmax(values == '')) + 2}"
            raise DataError(
                f"the column {name} has empty fields", where=where, got=f"{(values == '').sum()} of {len(rows)} rows"
            )
    paths = columns["path"].tolist()
    with progress(console) as bar:
        step = bar.add_task("looking through the tiles", total=len(paths))
        stamps = [[path, *_stamp(csv_path.parent / path)] for path in paths]
        found = kept(parts, "survey", stamps, lambda: _survey(csv_path.parent, paths, lambda: bar.advance(step)))
    readable_N = np.array([each is not None for each in found["digests"]])
    if not readable_N.any():
        path, reason = next(iter(found["unreadable"].items()))
        raise DataError(
            f"none of the {len(rows)} tiles can be read",
            where=csv_path,
            got=f"{path}: {reason}",
            remedy="paths are relative to the table's folder",
        )
    return TableTiles(
        folder=csv_path.parent,
        columns={name: values[readable_N] for name, values in columns.items()},
        input_px=input_px,
        key=digest([input_px, [each for each in found["digests"] if each is not None]]),
        unreadable=found["unreadable"],
    )


def embed_tiles(tiles: TableTiles, embedder: Embedder, cache: FeatureCache, console: Console) -> NDArray[np.float32]:
    """Embed the readable tiles, in the table's order: (N, D)."""
    count = len(tiles.columns["path"])
    with progress(console) as bar:
        step = bar.add_task("embedding", total=count)
        return cache.features(embedder, tiles.key, count, tiles.read, progress=lambda n: bar.advance(step, n))
