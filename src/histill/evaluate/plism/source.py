"""Where a benchmark's features come from: a feature folder, or an encoder and the data set.

Shapes: N tiles, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from histill.errors import DataError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.plism import layout
from histill.evaluate.plism.engine import check_features
from histill.evaluate.plism.layout import SlideName
from histill.evaluate.plism.progress import bar

__all__ = ["NOT_STATED", "Source", "from_features", "from_tiles", "look_through"]

NOT_STATED = "as stored"
"""The pooling of a feature folder that does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where features come from."""

    encoder: str
    encoder_key: str | None
    """None: by the features themselves."""
    pooling: str
    root: Path
    slides: tuple[SlideName, ...]
    tiles_in_slide: int
    places_N3: layout.Places
    """Of the chosen tiles."""
    load: Callable[[SlideName, Callable[[int], None] | None], NDArray[np.float32]]
    """(slide, told the number of further tiles) -> (N, D)."""


def from_features(folder: Path, n_tiles: int | Literal["all"]) -> Source:
    """Open the feature folder of one encoder.

    Raises
    ------
    DataError
        Damaged files, other names, slides with other places than most.
    """
    paths = layout.find_features(folder)
    places_N3 = layout.check_places({slide.name: layout.read_feature_places(path) for slide, path in paths.items()})
    rows_N = layout.choose_tiles(len(places_N3), n_tiles)
    return Source(
        encoder=folder.resolve().name,
        encoder_key=None,
        pooling=NOT_STATED,
        root=folder,
        slides=tuple(paths),
        tiles_in_slide=len(places_N3),
        places_N3=places_N3[rows_N],
        load=lambda slide, _: layout.read_features(paths[slide], rows_N),
    )


def from_tiles(root: Path, embedder: Embedder, cache: FeatureCache, n_tiles: int | Literal["all"]) -> Source:
    """Open the data set's folder; a slide's tiles are embedded when it is first loaded.

    Parameters
    ----------
    root
        Folder of the data set.
    embedder, cache
        Who embeds, and what keeps the features.
    n_tiles
        Tiles of each slide, or all.

    Raises
    ------
    DataError
        Damaged files, other names, slides with other places than most.
    """
    paths = layout.find_tiles(root)
    all_places = layout.check_places({slide.name: layout.read_tile_places(path) for slide, path in paths.items()})
    places_N3 = all_places[layout.choose_tiles(len(all_places), n_tiles)]
    keys: dict[SlideName, str] = {}

    def load(slide: SlideName, progress: Callable[[int], None] | None) -> NDArray[np.float32]:
        if slide not in keys:
            keys[slide] = layout.tiles_key(paths[slide], places_N3)
        read = layout.tile_reader(paths[slide], places_N3)
        return cache.features(embedder, keys[slide], len(places_N3), read, progress=progress)

    return Source(
        encoder=embedder.name,
        encoder_key=embedder.key,
        pooling=embedder.pooling,
        root=root,
        slides=tuple(paths),
        tiles_in_slide=len(all_places),
        places_N3=places_N3,
        load=load,
    )


def look_through(source: Source, console: Console) -> tuple[dict[SlideName, str], int]:
    """Read (or embed) every slide once: refuse what is not finite before hours of work, and name what is there.

    Returns
    -------
    tuple
        Hex digest of each slide's places and features; the width D.

    Raises
    ------
    DataError
        Features that are not finite, or not as wide as those of the first slide.
    """
    digests, tiles, width = {}, len(source.places_N3), 0
    with bar("reading slides", len(source.slides) * tiles, console) as (progress, task):
        for number, slide in enumerate(source.slides):
            progress.update(task, completed=number * tiles)
            features_ND = np.array(source.load(slide, lambda count: progress.advance(task, count)))
            check_features(torch.from_numpy(features_ND), slide.name)
            width = width or features_ND.shape[1]
            if features_ND.shape[1] != width:
                raise DataError(
                    "slides have features of different widths",
                    where=f"{source.slides[0].name}, {slide.name}",
                    got=f"{width} and {features_ND.shape[1]}",
                    remedy="extract all slides with one encoder",
                )
            digest = hashlib.sha256(source.places_N3.tobytes())
            digest.update(features_ND.data)
            digests[slide] = digest.hexdigest()
        progress.update(task, completed=len(source.slides) * tiles)
    return digests, width
