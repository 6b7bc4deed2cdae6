"""Tiles for training, whatever they lie in: a tile set, a set without pixels, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from histill.errors import ConfigError
from histill.tiles.images import ImageFolder
from histill.tiles.online import OnlineTiles
from histill.tiles.tile_set import Sampling, TileSet, TileSource

__all__ = ["is_tile_set", "open_set", "open_tiles"]


def is_tile_set(root: Path) -> bool:
    """Whether a folder is what ``histill tile`` makes."""
    return (root / "tileset.json").is_file()


def open_set(
    root: Path, *, sampling: Sampling = "uniform", hold_out_slides: Iterable[str] = ()
) -> TileSet | OnlineTiles:
    """Open a tile set: from its shards, or from the slides when it has none.

    Raises
    ------
    DataError
        As :meth:`histill.tiles.tile_set.TileSelection.open`.
    """
    if _is_index_only(root):
        return OnlineTiles.open(root, sampling=sampling, hold_out_slides=hold_out_slides)
    return TileSet.open(root, sampling=sampling, hold_out_slides=hold_out_slides)


def open_tiles(
    root: Path,
    *,
    table: Path | None = None,
    hold_out: Iterable[str] = (),
    sampling: Sampling = "uniform",
    hold_out_slides: Iterable[str] = (),
) -> TileSource:
    """Open whatever ``--tiles`` names.

    Parameters
    ----------
    root
        A tile set, or a folder of images.
    table, hold_out
        For a folder of images: as in :meth:`histill.tiles.images.ImageFolder.scan`.
    sampling, hold_out_slides
        For a tile set: as in :meth:`histill.tiles.tile_set.TileSelection.open`.

    Raises
    ------
    ConfigError
        An option of the one kind is given for the other.
    DataError
        The folder cannot be used.
    """
    if is_tile_set(root):
        if table is not None:
            raise ConfigError(
                "a table of tiles is for a folder of images", where="--table", got=table, remedy="leave it out"
            )
        return open_set(root, sampling=sampling, hold_out_slides=hold_out_slides)
    if sampling != "uniform":
        raise ConfigError(
            "sampling by slide needs a tile set", where="--sampling", got=root, remedy="make one with histill tile"
        )
    return ImageFolder.scan(root, table=table, hold_out=hold_out)


def _is_index_only(root: Path) -> bool:
    from histill.tiles.folder import SetFolder

    return bool(SetFolder(root).settings()["codec"] == "none")
