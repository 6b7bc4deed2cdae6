"""PathoROB's robustness index: do neighbours share the biology, or the hospital.

A neighbour of a tile is SO when it has the same biological class from another centre, and OS when it has another class
from the same centre; the two other kinds say nothing. The index is SO / (SO + OS), from 0 (the hospital decides) to 1
(the biology decides).

Shapes: N tiles, D features, R tiles of a chunk, S subsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histill.errors import ConfigError, DataError
from histill.evaluate.features import Array, as_features, unit_rows
from histill.tiles.images import read_table

__all__ = ["COLUMNS", "Metadata", "columns_of", "index_of", "robustness_index", "typed_neighbours"]

COLUMNS = ("subset", "slide_id", "biological_class", "medical_center")
"""What the index needs of PathoROB's metadata."""
OUT_OF_DOMAIN = "OOD"
"""Tiles of this subset belong to the performance drop alone."""

_CHUNK = 2**23  # similarities at once: 64 MiB in float64


class Columns(Protocol):
    """Anything that gives a column by its name: a dict of arrays, a data frame, a table."""

    def __getitem__(self, name: str, /) -> Any:
        """Give one entry per tile."""
        ...


Metadata = Columns | Sequence[Mapping[str, Any]] | Path
"""Columns by name, rows, or the path of a CSV."""


def columns_of(metadata: Metadata, names: Sequence[str] = COLUMNS) -> dict[str, Array]:
    """Take some columns as text, whichever way the metadata come.

    Raises
    ------
    DataError
        A column is missing, or a row has no value in one: it would count as a class or a centre of its own.
    """
    if isinstance(metadata, str | Path):
        metadata = read_table(Path(metadata), names)
    try:
        if isinstance(metadata, Sequence):
            found = {name: np.array([row[name] for row in metadata], dtype=object) for name in names}
        else:
            found = {name: np.asarray(metadata[name]) for name in names}
    except (KeyError, ValueError) as error:
        raise DataError("the metadata lack a column", got=error, allowed=", ".join(names)) from None
    return {name: _text(values, name) for name, values in found.items()}


def _text(values: Array, name: str) -> Array:
    text = values.astype(str)
    lost = np.isin(text, ("", "<NA>", "NaT")) | (np.isin(text, ("nan", "None")) & (values.dtype.kind not in "US"))
    if lost.any():
        raise DataError(
            "the metadata have rows without a value", where=f"column {name}, row {int(lost.argmax())}", got=lost.sum()
        )
    return text


def _neighbours(
    unit_ND: NDArray[np.float64], slide_N: Array, biology_N: Array, centre_N: Array, k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count the SO and OS among the k nearest of each tile, in chunks of rows: two arrays (N,)."""
    count = len(unit_ND)
    tie = 4.0 * (unit_ND.shape[1] + 8) * 2.0**-53  # two evaluations of one cosine differ by less
    so_N, os_N = np.zeros(count), np.zeros(count)
    step = max(1, _CHUNK // count)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        # on rows of length 1 the order of Euclidean distances is that of cosines, turned round
        near_RN = unit_ND[rows] @ unit_ND.T
        near_RN[slide_N[rows, None] == slide_N] = -np.inf
        kth_R1 = np.partition(near_RN, count - k, axis=1)[:, count - k, None]
        same_biology_RN = biology_N[rows, None] == biology_N
        same_centre_RN = centre_N[rows, None] == centre_N
        above_RN, below_RN = near_RN > kth_R1 + tie, near_RN < kth_R1 - tie
        equal_RN = ~(above_RN | below_RN)
        # tiles as near as the k-th share the places that are left: the mean over all orders of them
        share_R = (k - above_RN.sum(axis=1)) / equal_RN.sum(axis=1)
        for kind_RN, found_N in ((same_biology_RN & ~same_centre_RN, so_N), (~same_biology_RN & same_centre_RN, os_N)):
            found_N[rows] = (above_RN & kind_RN).sum(axis=1) + share_R * (equal_RN & kind_RN).sum(axis=1)
    return so_N, os_N


def typed_neighbours(features_ND: Array, metadata: Metadata, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How many of the k nearest of each tile are SO, and how many OS. Arguments as :func:`robustness_index`.

    Returns
    -------
    tuple
        Two arrays (N,), float64 (fractions only where tiles tie for the k-th place); both NaN for tiles of the subset
        ``OOD``, which are no queries and no neighbours.

    Raises
    ------
    ConfigError
        ``k`` is no whole number, or below 1.
    DataError
        Lengths differ, a column or a value is missing, a feature is not finite, or a tile has fewer than k neighbours
        on other slides.
    """
    columns = columns_of(metadata)
    unit_ND = unit_rows(as_features(np.asarray(features_ND), "features"))
    subset_N, slide_N, biology_N, centre_N = (
        np.unique(columns[name], return_inverse=True)[1] if name != "subset" else columns[name] for name in COLUMNS
    )
    if len(subset_N) != len(unit_ND):
        raise DataError("one row of metadata per feature row is needed", got=f"{len(subset_N)} and {len(unit_ND)}")
    if not isinstance(k, int | np.integer) or k < 1:
        raise ConfigError("the number of neighbours is a whole number, 1 or more", got=k)
    so_N, os_N = np.full(len(unit_ND), np.nan), np.full(len(unit_ND), np.nan)
    for subset in sorted(set(subset_N.tolist()) - {OUT_OF_DOMAIN}):
        rows = np.flatnonzero(subset_N == subset)
        left = len(rows) - int(np.unique(slide_N[rows], return_counts=True)[1].max())
        if left < k:
            raise DataError(
                "some tiles have fewer neighbours on other slides than are asked for",
                where=f"subset {subset}",
                got=f"{left} tiles on other slides, k = {k}",
                remedy="use a smaller k or more slides",
            )
        so_N[rows], os_N[rows] = _neighbours(unit_ND[rows], slide_N[rows], biology_N[rows], centre_N[rows], k)
    return so_N, os_N


def index_of(so_N: Array, os_N: Array) -> float:
    """Divide: all SO by all SO and OS.

    Raises
    ------
    DataError
        No neighbour is of either kind (one class, or one centre).
    """
    so, os = float(np.nansum(so_N)), float(np.nansum(os_N))
    if so + os == 0:
        raise DataError(
            "no neighbour tells biology from centre", remedy="give tiles of two classes from each of two centres"
        )
    return so / (so + os)


def robustness_index(features_ND: Array, metadata: Metadata, k: int) -> float:
    """Robustness index, from 0 (the hospital decides) to 1 (the biology decides).

    Rows are scaled to length 1; neighbours are the k nearest by Euclidean distance that are not on the query's own
    slide, exactly and in float64, in chunks of rows. Neighbours are sought within a value of ``subset`` (the paired
    2 x 2 subsets of TCGA; Camelyon and Tolkach have one, ``ID``), tiles of ``OOD`` are left out as in the original, and
    the counts of all queries of all subsets are added up before the division. Tiles that are as near as the k-th
    neighbour, as far as float64 can tell, share its place.

    Parameters
    ----------
    features_ND
        Any float type.
    metadata
        Rows with ``subset``, ``slide_id``, ``biological_class``, ``medical_center``: a dict of columns, a data frame, a
        list of dicts, or the path of a CSV; one row per feature row.
    k
        Neighbours: 11 for Camelyon, 46 for Tolkach ESCA, 61 for TCGA 2 x 2.

    Raises
    ------
    ConfigError
        ``k`` is no whole number, or below 1.
    DataError
        Lengths differ, a column or a value is missing, a feature is not finite, a tile has fewer than k neighbours on
        other slides, or no neighbour is SO or OS.
    """
    return index_of(*typed_neighbours(features_ND, metadata, k))
