"""Tiles for training, whatever they lie in: a tile set, a set without pixels, slides, or a folder of images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

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

    Parameters
    ----------
    root
        Folder that ``histill tile`` made.
    sampling, hold_out_slides
        As in :meth:`histill.tiles.tile_set.TileSelection.open`.

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
    kind = _kind_of(root)
    if table is not None and kind != "images":
        raise ConfigError(
            "a table of tiles is for a folder of images", where="--table", got=table, remedy="leave it out"
        )
    if kind == "images" and (sampling != "uniform" or tuple(hold_out_slides)):
        raise ConfigError(
            "a folder of images knows no slides",
            where="--sampling" if sampling != "uniform" else "--hold-out-slides",
            got=root,
            remedy="make a tile set with histill tile, or choose the images with --table",
        )
    if kind == "slides":
        if index_folder is None:
            raise ConfigError("these are slides", where=root, remedy="make a tile set of them with histill tile")
        root, kind = _index_of(root, index_folder), "set"
    if kind == "set":
        return open_set(root, sampling=sampling, hold_out_slides=hold_out_slides)
    return ImageFolder.scan(root, table=table, hold_out=hold_out)


def _kind_of(root: Path) -> Literal["set", "slides", "images"]:
    """What ``--tiles`` names. A TIFF may be a picture or a slide: below a folder it counts as a picture.

    Raises
    ------
    ConfigError
        Pictures and slides together, or a tile set further down: what is meant is not clear.
    """
    if is_tile_set(root):
        return "set"
    if root.is_file():
        return "slides" if root.suffix.lower() in SLIDE_SUFFIXES else "images"
    pictures: Path | None = None
    slides: Path | None = None
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if "tileset.json" in names:
            raise ConfigError(
                "there is a tile set inside this folder", where=root, got=folder, remedy="give --tiles the set itself"
            )
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                pictures = pictures or Path(folder, name)
            elif suffix in SLIDE_SUFFIXES and not name.startswith("."):
                slides = slides or Path(folder, name)
    if pictures and slides:
        raise ConfigError(
            "this folder holds pictures and slides",
            where=root,
            got=f"{pictures.name} and {slides.name}",
            remedy="put one of them elsewhere, or cut the slides first: histill tile",
        )
    return "slides" if slides else "images"


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
