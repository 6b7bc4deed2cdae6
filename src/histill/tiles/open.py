"""Tiles for training, whatever they lie in: a tile set, a set without pixels, slides, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from histill.errors import ConfigError, DataError
from histill.slides.find import SLIDE_SUFFIXES
from histill.tiles.config import TileConfig
from histill.tiles.folder import SetFolder
from histill.tiles.images import IMAGE_SUFFIXES, ImageFolder
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
    index_folder: Path | None = None,
) -> TileSource:
    """Open whatever ``--tiles`` names.

    Parameters
    ----------
    root
        A tile set, a folder of images, or a slide or folder of slides.
    table, hold_out
        For a folder of images: as in :meth:`histill.tiles.images.ImageFolder.scan`.
    sampling, hold_out_slides
        For a tile set or slides: as in :meth:`histill.tiles.tile_set.TileSelection.open`.
    index_folder
        For slides: where their index is kept, as ``histill tile --index-only`` with its other defaults makes it.

    Raises
    ------
    ConfigError
        An option of the one kind is given for the other.
    DataError
        The folder cannot be used.
    """
    slides = not is_tile_set(root) and _holds_slides(root)
    if table is not None and (slides or is_tile_set(root)):
        raise ConfigError(
            "a table of tiles is for a folder of images", where="--table", got=table, remedy="leave it out"
        )
    if slides:
        if index_folder is None:
            raise ConfigError("these are slides", where=root, remedy="make a tile set of them with histill tile")
        root = _index_of(root, index_folder)
    if is_tile_set(root):
        return open_set(root, sampling=sampling, hold_out_slides=hold_out_slides)
    if sampling != "uniform":
        raise ConfigError(
            "sampling by slide needs a tile set", where="--sampling", got=root, remedy="make one with histill tile"
        )
    return ImageFolder.scan(root, table=table, hold_out=hold_out)


def _holds_slides(root: Path) -> bool:
    """Whether this is a slide, or a folder with slides and without a picture (a TIFF may be either: a picture then)."""
    if root.is_file():
        return root.suffix.lower() in SLIDE_SUFFIXES
    found = False
    for path in root.rglob("*"):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            return False
        found = found or (suffix in SLIDE_SUFFIXES and not path.name.startswith("."))
    return found


def _index_of(slides: Path, folder: Path) -> Path:
    """Index slides with the defaults of ``histill tile``; an index that is there is completed."""
    from histill.tiles.write import write_tiles

    outcome = write_tiles(TileConfig(slides=(slides,), out=folder, index_only=True), Console(stderr=True))
    if outcome.failed:
        raise DataError(
            "slides cannot be used",
            where=slides,
            got="; ".join(f"{record.slide}: {record.error}" for record in outcome.failed[:3]),
            remedy=f"see {folder}/slides.csv; histill tile makes a set of the good ones with options of your own",
        )
    return folder


def _is_index_only(root: Path) -> bool:
    return bool(SetFolder(root).settings()["codec"] == "none")
