"""Features of slides as `histill extract` (or TRIDENT, CLAM) writes them, joined with a table of labels.

Shapes: S slides, N tiles of a slide, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError, nearest
from histill.evaluate.features import Array
from histill.evaluate.parts import digest
from histill.tiles.images import read_table

__all__ = ["FeatureSource", "LabelTable", "SlideBags", "find_features", "read_bags", "read_labels", "tiles_of"]

_END = ".h5"
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSource:
    """A folder of feature files, one a slide, and whose they are."""

    files: dict[str, Path]
    """Slide -> file."""
    encoder: str
    pooling: str
    """``as-extracted`` where the files do not say."""
    weights: str
    """Content hash of the encoder; empty where the files do not say."""
    facts: dict[str, Any]
    """What all files have in common, as far as they say."""

    @property
    def key(self) -> str:
        """Hex digest of whose features they are."""
        return digest([self.encoder if not self.weights else "", self.facts])


def find_features(folder: Path) -> FeatureSource:
    """Look through a folder: ``features/<slide>.h5`` or ``<slide>.h5``.

    Raises
    ------
    DataError
        There are no files, one is damaged, or they are of two encoders, poolings or sizes of tiles.
    """
    place = folder / "features" if (folder / "features").is_dir() else folder
    found = [path for path in sorted(place.glob(f"*{_END}")) if not path.name.startswith(".")]
    files = {path.name.removesuffix(_END): path for path in found}
    if not files:
        raise DataError("there are no feature files here", where=place, remedy="histill extract SLIDES --out FEATURES")
    told: dict[str, dict[str, Any]] = {slide: _facts(path) for slide, path in files.items()}
    first, facts = next(iter(told.items()))
    for slide, other in told.items():
        same_weights = facts.get("model_hash") is not None and facts["model_hash"] == other.get("model_hash")
        names = {*facts, *other} - ({"model"} if same_weights else set())  # a path may be written in several ways
        if differing := [name for name in sorted(names) if facts.get(name) != other.get(name)]:
            raise DataError(
                "this folder holds features of two kinds",
                where=f"{place}, {differing[0]}",
                got=f"{first}: {facts.get(differing[0])}; {slide}: {other.get(differing[0])}",
                remedy="keep the features of each encoder in a folder of their own",
            )
    return FeatureSource(
        files=files,
        encoder=str(facts.get("model") or folder.resolve().name),
        pooling=str(facts.get("embedding") or "as-extracted"),
        weights=str(facts.get("model_hash") or ""),
        facts={name: value for name, value in facts.items() if name != "model"},
    )


def _facts(path: Path) -> dict[str, Any]:
    """What a file says of its features: width, encoder and its hash, pooling, side of the tiles."""
    with _opened(path) as file:
        features, attributes = file["features"], dict(file.attrs)
        facts: dict[str, Any] = {"width": int(features.shape[-1])}
        facts |= {
            name: attributes[name] for name in ("model", "model_hash", "embedding", "tile_px") if name in attributes
        }
        if "model" not in facts and "encoder" in features.attrs:  # as TRIDENT writes
            facts["model"] = features.attrs["encoder"]
        return {name: int(value) if isinstance(value, np.integer) else value for name, value in facts.items()}


def _opened(path: Path) -> h5py.File:
    try:
        file = h5py.File(path)
        if "features" not in file or file["features"].ndim != 2:
            shape = file["features"].shape if "features" in file else f"only {', '.join(file)}"
            raise DataError("this is no feature file", where=path, got=shape, allowed="a data set features (N, D)")
    except OSError as error:
        raise DataError("this feature file is damaged", where=path, got=error, remedy="extract it again") from None
    return file


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelTable:
    """A table of slides, in its order; text (S,)."""

    slide_S: Array
    label_S: Array
    group_S: Array
    unit: str
    """What ``group_S`` names and an interval draws: ``patient``, or ``slide`` where the table has no patients."""
    fold_S: Array | None
    split_S: Array | None
    """As the table has it."""


def read_labels(csv_path: Path) -> LabelTable:
    """Read ``slide,label`` and, where there are, ``patient``, and ``fold`` or ``split``.

    Raises
    ------
    DataError
        The table is missing or damaged, a field is empty, a slide stands there twice, or there are a fold and a split.
    """
    rows = read_table(csv_path, ("slide", "label"))
    names: list[str] = [name for name in ("slide", "label", "patient", "fold", "split") if name in rows[0]]
    columns = {name: np.array([row[name] for row in rows]) for name in names}
    for name, values in columns.items():
        if (values == "").any():
            line = int(np.argmax(values == "")) + 2
            raise DataError(
                f"the column {name} has empty fields", where=f"{csv_path}, line {line}", remedy="fill it in"
            )
    slides, counts = np.unique(columns["slide"], return_counts=True)
    if counts.max() > 1:
        raise DataError("a slide stands in the table twice", where=csv_path, got=slides[counts.argmax()])
    if {"fold", "split"} <= set(columns):
        raise DataError("a table has a fold or a split, not both", where=csv_path, remedy="leave one column out")
    unit = "patient" if "patient" in columns else "slide"
    return LabelTable(
        slide_S=columns["slide"],
        label_S=columns["label"],
        group_S=columns[unit],
        unit=unit,
        fold_S=columns.get("fold"),
        split_S=columns.get("split"),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideBags:
    """What a training needs of the slides of a table, in its order."""

    mean_SD: NDArray[np.float32]
    """Over all tiles."""
    bags: list[NDArray[np.float32]]
    """Per slide (N, D): all tiles, or as many as were asked for."""
    tiles_S: NDArray[np.int64]
    """Tiles that each slide has."""
    key: str
    """Hex digest of all features, in the table's order."""


def tiles_of(path: Path) -> NDArray[np.float32]:
    """All features of a slide, (N, D).

    Raises
    ------
    DataError
        The file is damaged, the slide has no tiles, or a feature is not finite.
    """
    with _opened(path) as file:
        try:
            features_ND: NDArray[np.float32] = file["features"][:].astype(np.float32)
        except OSError as error:
            raise DataError("this feature file is damaged", where=path, got=error, remedy="extract it again") from None
    if not len(features_ND):
        remedy = "leave the slide out of the table, or look why no tissue was found"
        raise DataError("a slide has no tiles", where=path, remedy=remedy)
    if not np.isfinite(features_ND).all():
        raise DataError("features are not finite", where=path, remedy="extract the slide again, in float32")
    return features_ND


def read_bags(
    source: FeatureSource, slides: Sequence[str], max_tiles: int, tell: Callable[[], None] = lambda: None
) -> SlideBags:
    """Read the slides of a table.

    Parameters
    ----------
    source, slides
        Where they are, and which.
    max_tiles
        Tiles of a bag at most: of larger slides a fixed draw, the same for every encoder; 0: all.
    tell
        Called after each slide.

    Raises
    ------
    DataError
        A slide has no features, or they cannot be used.
    """
    _refuse_missing(source.files, slides)
    means, bags, counts, sums = [], [], [], []
    for slide in slides:
        features_ND = tiles_of(source.files[slide])
        sums.append(hashlib.sha256(features_ND.tobytes()).hexdigest())
        means.append(features_ND.mean(axis=0, dtype=np.float64).astype(np.float32))
        counts.append(len(features_ND))
        if max_tiles and len(features_ND) > max_tiles:
            seed = int.from_bytes(hashlib.sha256(slide.encode()).digest()[:8], "little")
            drawn = np.random.default_rng(seed).choice(len(features_ND), max_tiles, replace=False)
            features_ND = features_ND[np.sort(drawn)]
        bags.append(features_ND)
        tell()
    return SlideBags(mean_SD=np.stack(means), bags=bags, tiles_S=np.array(counts, np.int64), key=digest(sums))


def _refuse_missing(files: Mapping[str, Path], slides: Sequence[str]) -> None:
    missing = [slide for slide in slides if slide not in files]
    if missing:
        place = next(iter(files.values())).parent
        raise DataError(
            f"{len(missing)} slides of the table have no features",
            where=place,
            got=", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else ""),
            allowed="names of the feature files without .h5",
            remedy=nearest(missing[0], files) or "extract them, or leave them out of the table",
        )
