"""PathoROB's files as they are distributed: metadata, images in Parquet, and the original's feature files.

::

    <root>/metadata/<name>.csv                 subset,slide_id,patch_id,biological_class,medical_center
                                               (or <root>/data/metadata: a checkout of the original's repository)
    <root>/PathoROB-<dataset>/data/*.parquet   columns image {bytes}, slide_id, patch_id (the published data sets;
                                               or <root>/<dataset>/data/*.parquet)
    <features>/<dataset>/<centre>.npz          one array (D,) per tile, named <slide_id>-<patch_id>; spaces in the
                                               name of a centre are underscores

A tile may stand in many rows (TCGA's paired subsets); it is embedded once.

Shapes: N rows of a metadata file, T different tiles, D features, B tiles of a block.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from histill import files
from histill.errors import ConfigError, DataError, nearest
from histill.evaluate.features import Array
from histill.evaluate.parts import digest
from histill.evaluate.pathorob.index import COLUMNS
from histill.tiles.images import decode, read_table

__all__ = ["DATASETS", "Dataset", "Images", "Table", "find_datasets", "find_images", "read_features", "read_metadata"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One data set of the benchmark."""

    name: str
    index_metadata: str
    """Rows of the robustness index."""
    drop_metadata: str
    """Rows of the performance drop."""
    k: int
    """Neighbours of the robustness index."""
    levels: int
    """Levels of the performance drop."""


DATASETS = (
    Dataset(name="camelyon", index_metadata="camelyon", drop_metadata="camelyon", k=11, levels=8),
    Dataset(name="tolkach_esca", index_metadata="tolkach_esca_reduced", drop_metadata="tolkach_esca", k=46, levels=4),
    Dataset(name="tcga", index_metadata="tcga_2x2", drop_metadata="tcga_4x4", k=61, levels=7),
)
"""In the order of the benchmark's tables."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """A metadata file."""

    columns: dict[str, Array]
    """``subset``, ``slide_id``, ``biological_class``, ``medical_center``: text (N,)."""
    tiles: tuple[str, ...]
    """``<slide_id>-<patch_id>`` of each row (N)."""
    key: str
    """Hex digest of the file."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Images:
    """Different tiles in Parquet, in the order of the files, so that reading goes through them once."""

    groups: tuple[tuple[Path, int], ...]
    """File and number of each row group."""
    starts: NDArray[np.int64]
    """Row, over all files, at which each row group starts."""
    rows_T: NDArray[np.int64]
    """Row, over all files, of each tile; ascending."""
    tiles: tuple[str, ...]
    """``<slide_id>-<patch_id>`` (T)."""
    key: str
    """Hex digest of the files' names and sizes and of the tiles' names."""

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Tiles ``first`` to ``last`` (excluded): uint8 (B, H, W, 3), RGB.

        Raises
        ------
        DataError
            A tile cannot be decoded, or they differ in size.
        """
        rows = self.rows_T[first:last]
        group_of = np.searchsorted(self.starts, rows, side="right") - 1
        encoded = []
        for group in np.unique(group_of):
            path, number = self.groups[group]
            column = parquet.ParquetFile(path).read_row_group(number, columns=["image"])["image"]
            encoded += column.take(pa.array(rows[group_of == group] - self.starts[group])).to_pylist()
        decoded = [decode(image["bytes"], name) for image, name in zip(encoded, self.tiles[first:last], strict=True)]
        if len({tile.shape for tile in decoded}) > 1:
            raise DataError("the tiles of a data set differ in size", where=self.groups[0][0])
        return np.stack(decoded)


def _metadata_path(root: Path, name: str) -> Path | None:
    for folder in (root / "metadata", root / "data" / "metadata"):
        if (folder / f"{name}.csv").is_file():
            return folder / f"{name}.csv"
    return None


def _parquet_files(root: Path, name: str) -> list[Path]:
    for folder in (root / f"PathoROB-{name}", root / name):
        found = sorted((folder / "data").glob("*.parquet"))
        if found:
            return found
    return []


def find_datasets(
    root: Path, names: Sequence[str] | None = None, *, features: Path | None = None
) -> tuple[list[Dataset], dict[str, str]]:
    """Tell which data sets are on the disk, with their metadata and either images or features.

    Parameters
    ----------
    root
        Holds the metadata and, unless ``features`` is given, the images.
    names
        The data sets that are wanted; all three if None.
    features
        The folder of one encoder's feature files.

    Returns
    -------
    tuple
        The data sets that are there, and of each other one what is missing.

    Raises
    ------
    ConfigError
        A name is no data set of the benchmark.
    DataError
        None is there.
    """
    known = [dataset.name for dataset in DATASETS]
    for name in names or ():
        if name not in known:
            raise ConfigError(
                "PathoROB has no such data set", got=name, allowed=", ".join(known), remedy=nearest(name, known)
            )
    present, missing = [], {}
    for dataset in DATASETS:
        if names is not None and dataset.name not in names:
            continue
        if _metadata_path(root, dataset.index_metadata) is None:
            missing[dataset.name] = f"no metadata/{dataset.index_metadata}.csv"
        elif features is not None and not (features / dataset.name).is_dir():
            missing[dataset.name] = f"no features in {features / dataset.name}"
        elif features is None and not _parquet_files(root, dataset.name):
            missing[dataset.name] = f"no PathoROB-{dataset.name}/data/*.parquet"
        else:
            present.append(dataset)
    if not present:
        raise DataError(
            "no data set of PathoROB is here",
            where=root,
            got="; ".join(f"{name}: {what}" for name, what in missing.items()),
            remedy="give the folder that holds metadata/ and the published PathoROB-<dataset> folders",
        )
    return present, missing


def read_metadata(root: Path, name: str) -> Table | None:
    """Read ``<name>.csv``; None when it is not there.

    Raises
    ------
    DataError
        It is damaged, lacks a column, or holds a tile twice in one subset.
    """
    path = _metadata_path(root, name)
    if path is None:
        return None
    rows = read_table(path, [*COLUMNS, "patch_id"])
    tiles = tuple(f"{row['slide_id']}-{row['patch_id']}" for row in rows)
    places = [(row["subset"], tile) for row, tile in zip(rows, tiles, strict=True)]
    if len(set(places)) < len(places):
        raise DataError("a tile is twice in one subset", where=path, got=f"{len(places) - len(set(places))} rows")
    return Table(
        columns={column: np.array([row[column] for row in rows]) for column in COLUMNS},
        tiles=tiles,
        key=files.sha256_file(path),
    )


def find_images(root: Path, dataset: Dataset, tiles: Iterable[str]) -> Images:
    """Find tiles in a data set's Parquet files.

    Parameters
    ----------
    root, dataset
        The benchmark's folder and which of its data sets.
    tiles
        ``<slide_id>-<patch_id>``; a repeated one counts once.

    Raises
    ------
    DataError
        A file is damaged or lacks a column, or a tile is not there.
    """
    paths = _parquet_files(root, dataset.name)
    groups: list[tuple[Path, int]] = []
    starts: list[int] = []
    place: dict[str, int] = {}
    row = 0
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
            ids = file.read(columns=["slide_id", "patch_id"])
            slides, patches = (ids[column].to_pylist() for column in ("slide_id", "patch_id"))
            lacks_image = "image" not in file.schema_arrow.names
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(
                "these images cannot be read", where=path, got=error, remedy="download them again"
            ) from None
        if lacks_image:
            raise DataError("a file of images has no column image", where=path, got=", ".join(file.schema_arrow.names))
        for number in range(file.num_row_groups):
            groups.append((path, number))
            starts.append(row)
            row += file.metadata.row_group(number).num_rows
        place |= {f"{s}-{p}": row - len(slides) + i for i, (s, p) in enumerate(zip(slides, patches, strict=True))}
    wanted = set(tiles)
    missing = sorted(wanted - set(place))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} tiles of the metadata have no image",
            where=paths[0].parent if paths else root,
            got=", ".join(missing[:3]),
            remedy="download the images again",
        )
    ordered = tuple(sorted(wanted, key=place.__getitem__))
    return Images(
        groups=tuple(groups),
        starts=np.array(starts, np.int64),
        rows_T=np.array([place[tile] for tile in ordered], np.int64),
        tiles=ordered,
        key=digest(["pathorob", [[path.name, path.stat().st_size] for path in paths], list(ordered)]),
    )


def read_features(folder: Path, tiles: Sequence[str], centres: Sequence[str]) -> NDArray[np.float32]:
    """Read the original's feature files of one data set.

    Parameters
    ----------
    folder
        ``<features>/<dataset>``.
    tiles, centres
        ``<slide_id>-<patch_id>`` and the centre of each tile (T).

    Returns
    -------
    ndarray
        (T, D) float32, in the order of ``tiles``.

    Raises
    ------
    DataError
        A centre's file is missing or damaged, lacks a tile, or widths differ.
    """
    rows: list[NDArray[np.float32] | None] = [None] * len(tiles)
    for centre in sorted(set(centres)):
        path = folder / f"{centre.replace(' ', '_')}.npz"
        wanted = [row for row, other in enumerate(centres) if other == centre]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                for row in wanted:
                    rows[row] = np.asarray(arrays[tiles[row]], np.float32).reshape(-1)
        except FileNotFoundError:
            raise DataError("the features of a centre are missing", where=path, remedy="extract them again") from None
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise DataError("the features of a centre cannot be read", where=path, got=error) from None
    found = [row for row in rows if row is not None]
    if len({len(row) for row in found}) > 1:
        raise DataError("features differ in width", where=folder, got=sorted({len(row) for row in found}))
    return np.stack(found)
