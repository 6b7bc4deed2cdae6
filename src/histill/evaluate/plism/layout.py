"""The data set and its feature folders as they are distributed.

::

    <root>/<slide>.h5                            one dataset per tile, tile_<level>_<x>_<y>, uint8 (H, W, 3)
    <root>/<encoder>/<slide>/features.npy        float32 (N, 3 + D): level, x, y, then the features
    <slide> = <STAINING>_<SCANNER>_to_GMH_S60.tif

Any subset of the 91 slides will do. Tiles are put in order of (level, x, y) whatever the file's order, so that row i is
the same place in every slide; slides with other places are refused.

Shapes: N tiles, D features, H and W pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from histill.errors import ConfigError, DataError
from histill.evaluate.embedding import ReadTiles

__all__ = [
    "SCANNERS",
    "STAININGS",
    "SlideName",
    "check_places",
    "choose_tiles",
    "find_features",
    "find_tiles",
    "read_feature_places",
    "read_features",
    "read_tile_places",
    "tile_reader",
    "tiles_key",
]

STAININGS = ("GIV", "GIVH", "GM", "GMH", "GV", "GVH", "HR", "HRH", "KR", "KRH", "LM", "LMH", "MY")
SCANNERS = ("AT2", "GT450", "P", "S210", "S360", "S60", "SQ")
SUBSET_SEED = 0
"""Of the tiles that a smaller number takes."""

_SLIDE = re.compile(r"([A-Z]+)_([A-Z0-9]+)_to_GMH_S60\.tif")
_TILE = re.compile(r"tile_(\d+)_(\d+)_(\d+)")

Places = NDArray[np.int64]
"""(N, 3): level, x, y; in rising order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideName:
    """What a slide's name says."""

    name: str
    """``GMH_S60_to_GMH_S60.tif``."""
    staining: str
    scanner: str

    @classmethod
    def of(cls, name: str, where: Path) -> SlideName:
        """Take a name apart.

        Raises
        ------
        DataError
            It is no name of the data set.
        """
        match = _SLIDE.fullmatch(name)
        if match is None:
            raise DataError(
                "this is no slide of PLISM", where=where, got=name, allowed="<STAINING>_<SCANNER>_to_GMH_S60.tif"
            )
        for kind, got, known in (("staining", match[1], STAININGS), ("scanner", match[2], SCANNERS)):
            if got not in known:
                raise DataError(f"unknown {kind}", where=where, got=got, allowed=", ".join(known))
        return cls(name=name, staining=match[1], scanner=match[2])


def _at_least_two(found: dict[SlideName, Path], folder: Path, remedy: str) -> dict[SlideName, Path]:
    if len(found) < 2:
        raise DataError("PLISM compares at least two slides", where=folder, got=f"{len(found)} slides", remedy=remedy)
    return dict(sorted(found.items(), key=lambda entry: entry[0].name))


def find_features(folder: Path) -> dict[SlideName, Path]:
    """Find ``<slide>/features.npy`` in the feature folder of one encoder, by slide name.

    Raises
    ------
    DataError
        No such folder, fewer than two slides, a folder with another name.
    """
    if not folder.is_dir():
        raise DataError("there is no such feature folder", where=folder)
    found = {SlideName.of(path.parent.name, path): path for path in folder.glob("*/features.npy")}
    encoders = sorted({path.parent.parent.name for path in folder.glob("*/*/features.npy")})
    above = f"this holds the folders of several encoders, name one: {', '.join(encoders)}" if encoders else None
    return _at_least_two(found, folder, above or "name the folder that holds <slide>/features.npy")


def find_tiles(root: Path) -> dict[SlideName, Path]:
    """Find ``<slide>.h5`` in the data set's folder, by slide name.

    Raises
    ------
    DataError
        No such folder, fewer than two slides, a file with another name.
    """
    if not root.is_dir():
        raise DataError("there is no such folder", where=root)
    found = {SlideName.of(path.stem, path): path for path in root.glob("*.h5")}
    return _at_least_two(found, root, "name the folder that holds <slide>.tif.h5")


def _in_order(places_N3: Places, path: Path) -> NDArray[np.intp]:
    """Row numbers in order of place; a place twice is refused."""
    order_N = np.lexsort(places_N3.T[::-1])
    sorted_N3 = places_N3[order_N]
    twice = np.flatnonzero((sorted_N3[1:] == sorted_N3[:-1]).all(axis=1))
    if len(twice):
        raise DataError("a slide holds one place twice", where=path, got=f"level, x, y = {sorted_N3[twice[0]]}")
    return order_N


def _open_features(path: Path) -> NDArray[np.float32]:
    try:
        table: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            "this feature file cannot be read", where=path, got=str(error), remedy="extract it again"
        ) from None
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] < 4 or table.dtype != np.float32:
        raise DataError(
            "this feature file has another layout",
            where=path,
            got=f"{table.dtype} {table.shape}",
            allowed="float32 (tiles, 3 + features): level, x, y, then the features",
        )
    return table


def read_feature_places(path: Path) -> Places:
    """(N, 3) places of a feature file, in order.

    Raises
    ------
    DataError
        Another layout, a place that is no whole number, a place twice.
    """
    raw_N3 = np.asarray(_open_features(path)[:, :3])
    if not (np.isfinite(raw_N3).all() and (raw_N3 == np.floor(raw_N3)).all()):
        raise DataError("level, x and y must be whole numbers", where=path, remedy="are columns missing?")
    places_N3 = raw_N3.astype(np.int64)
    return places_N3[_in_order(places_N3, path)]


def read_features(path: Path, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Read features (len(rows), D) of a feature file; ``rows`` count the places in order.

    Raises
    ------
    DataError
        As :func:`read_feature_places`.
    """
    table = _open_features(path)
    order_N = _in_order(np.asarray(table[:, :3]).astype(np.int64), path)
    return np.asarray(table[order_N[rows], 3:])


def read_tile_places(path: Path) -> Places:
    """(N, 3) places of the tiles in an HDF5 file, in order; no pixel is read.

    Raises
    ------
    DataError
        No HDF5 file, no tiles, a data set with another name.
    """
    try:
        with h5py.File(path, "r") as file:
            names = list(file)
    except OSError as error:
        raise DataError(
            "this tile file cannot be opened", where=path, got=str(error), remedy="download it again"
        ) from None
    matches = [(name, _TILE.fullmatch(name)) for name in names]
    strange = [name for name, match in matches if match is None]
    if strange or not matches:
        raise DataError("tiles are called tile_<level>_<x>_<y>", where=path, got=strange[0] if strange else "no tiles")
    places_N3 = np.array([[int(part) for part in match.groups()] for _, match in matches if match], dtype=np.int64)
    return places_N3[_in_order(places_N3, path)]


def tile_reader(path: Path, places_N3: Places) -> ReadTiles:
    """Make the function that reads blocks of these tiles.

    Raises (the function)
    ---------------------
    DataError
        A tile that is missing, damaged, of another size than the others of its block, or not uint8 RGB.
    """

    def read(first: int, last: int) -> NDArray[np.uint8]:
        tiles: list[NDArray[np.uint8]] = []
        with h5py.File(path, "r") as file:
            for level, x, y in places_N3[first:last]:
                name = f"tile_{level}_{x}_{y}"
                try:
                    tile = file[name][()]
                except (KeyError, OSError) as error:
                    raise DataError("a tile cannot be read", where=f"{path}, {name}", got=str(error)) from None
                shape = tiles[0].shape if tiles else (*tile.shape[:2], 3)
                if tile.dtype != np.uint8 or tile.ndim != 3 or tile.shape != shape:
                    raise DataError(
                        "a tile is no RGB image of the others' size",
                        where=f"{path}, {name}",
                        got=f"{tile.dtype} {tile.shape}",
                        allowed=f"uint8 {shape}",
                    )
                tiles.append(tile)
        return np.stack(tiles)

    return read


def tiles_key(path: Path, places_N3: Places) -> str:
    """Hex digest of a slide's tiles for the cache: name, size, places and the pixels of eight tiles.

    Not of all bytes: a slide is 2.5 GB.
    """
    digest = hashlib.sha256(f"{path.name} {path.stat().st_size}".encode())
    digest.update(places_N3.tobytes())
    read = tile_reader(path, places_N3)
    for row in np.unique(np.linspace(0, len(places_N3) - 1, 8).astype(int)):
        digest.update(read(int(row), int(row) + 1).tobytes())
    return digest.hexdigest()


def check_places(places: Mapping[str, Places]) -> Places:
    """Return the places that all slides share.

    Raises
    ------
    DataError
        Some slides have other places than most; they are named.
    """
    keys = {name: hashlib.sha256(places_N3.tobytes()).hexdigest() for name, places_N3 in places.items()}
    usual = Counter(keys.values()).most_common(1)[0][0]
    other = [name for name, key in keys.items() if key != usual]
    most_N3 = next(places[name] for name, key in keys.items() if key == usual)
    if other:
        raise DataError(
            f"{len(other)} of {len(places)} slides do not have the same tiles as the others",
            where=", ".join(other),
            got=f"{len(places[other[0]])} tiles in the first of them",
            allowed=f"the same (level, x, y) in all slides: {len(most_N3)} tiles",
            remedy="extract or download these slides again, or leave them out",
        )
    return most_N3


def choose_tiles(total: int, n_tiles: int | Literal["all"]) -> NDArray[np.intp]:
    """Choose a fixed subset of tiles, the same for all slides.

    The tiles in order of place are cut into ``n_tiles`` runs of equal length, and one tile is drawn of each (seed
    ``SUBSET_SEED``): evenly spread, without the stripes that every second tile of a grid would make. The subset of
    the original is not published with its numbers; ours differs from it within the error of sampling. Where there
    are no more than ``n_tiles``, all are taken.

    Raises
    ------
    ConfigError
        ``n_tiles`` is less than 2.
    """
    if n_tiles == "all" or n_tiles >= total:
        return np.arange(total)
    if n_tiles < 2:
        raise ConfigError("too few tiles to look for a twin among", where="n_tiles", got=n_tiles, allowed="2 or more")
    edges = np.arange(n_tiles + 1) * total // n_tiles
    return np.random.default_rng(SUBSET_SEED).integers(edges[:-1], edges[1:]).astype(np.intp)
