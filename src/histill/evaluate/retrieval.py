"""Scanner robustness: whether the same field, scanned by another scanner, stays the nearest.

The protocol is that of PLISM's top-k accuracy, for scanners of which not all have seen every field: for two scanners a
and b, for each tile of a that has a twin in b, is the twin among the k nearest by cosine of *all tiles of both
scanners except the tile itself*, from whatever slide, with a twin or without? The two directions are averaged.

Tiles as near as the twin (within :data:`COSINE_RESOLUTION`) share their ranks: what counts is the chance that the twin
is found when ties are drawn at random, so that a collapsed encoder scores k / (tiles - 1), neither 0 nor 1. (PLISM's
own definition, in :mod:`histill.evaluate.plism.engine`, counts ties for the twin and has no tiles without one.)

The checks during training and the benchmark ``paired`` both get their numbers from :func:`pair_hits`.

Shapes: N tiles, D features; A and B tiles of two scanners, P twins of one pair of scanners, R tiles of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError
from histill.evaluate.features import Array, as_features, unit_rows

__all__ = [
    "COSINE_RESOLUTION",
    "PairHits",
    "RetrievalResult",
    "ScannerTiles",
    "fields_of",
    "pair_hits",
    "paired_retrieval",
    "twins",
]

COSINE_RESOLUTION = 2.0**-23
"""Cosines nearer than this (the spacing of float32 above 1) are equal: no lead that vanishes in float32 is a lead."""

CHUNK = 2**24
"""Similarities at once: 128 MiB in float64. Those of a scanner with itself are kept where they are no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalResult:
    """Means over the scanner pairs that share at least one field."""

    top: dict[int, float]
    """k -> share of tiles whose twin is among the k nearest, 0 to 1."""
    cosine: float
    """Mean cosine of twins, -1 to 1."""
    pairs: int
    """Number of (unordered) scanner pairs."""

    @property
    def top_1(self) -> float:
        """``top[1]``."""
        return self.top[1]

    @property
    def top_10(self) -> float:
        """``top[10]``."""
        return self.top[10]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScannerTiles:
    """The tiles of one scanner, ready to be compared with those of any other."""

    unit_AD: NDArray[np.float64]
    """Rows of length 1."""
    own_AA: NDArray[np.float64] | None
    """Their cosines with one another, -inf with themselves; None where these are too many to be kept."""

    @classmethod
    def of(cls, features_AD: Array) -> ScannerTiles:
        """Scale the rows of a scanner's features (any float type), and compare them with one another.

        Raises
        ------
        DataError
            A feature is not finite.
        """
        unit_AD = unit_rows(as_features(features_AD, "features"))
        if len(unit_AD) ** 2 > CHUNK:
            return cls(unit_AD=unit_AD, own_AA=None)
        own_AA = unit_AD @ unit_AD.T
        np.fill_diagonal(own_AA, -np.inf)  # the tile itself is no candidate
        return cls(unit_AD=unit_AD, own_AA=own_AA)

    def own(self, rows_R: Array) -> NDArray[np.float64]:
        """Cosines of some tiles with all of the scanner's (R, A)."""
        if self.own_AA is not None:
            return self.own_AA[rows_R]
        own_RA: NDArray[np.float64] = self.unit_AD[rows_R] @ self.unit_AD.T
        own_RA[np.arange(len(rows_R)), rows_R] = -np.inf
        return own_RA


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairHits:
    """What is known of each twin of a pair of scanners: the terms of the means."""

    cosine_P: NDArray[np.float64]
    """-1 to 1."""
    top: dict[int, NDArray[np.float64]]
    """k -> (P,) how far the twin is among the k nearest, mean of both directions, 0 to 1."""


def fields_of(columns: Mapping[str, Array]) -> Array:
    """Write out the place of each tile of a paired table: slide, x, y."""
    return np.array([f"{s} x={x} y={y}" for s, x, y in zip(*(columns[n] for n in ("slide", "x", "y")), strict=True)])


def twins(scanner_N: Array, key_N: Array) -> dict[tuple[str, str], tuple[Array, Array]]:
    """Row numbers of the same fields under each pair of scanners.

    Parameters
    ----------
    scanner_N
        The scanner of each tile.
    key_N
        The field of each tile (slide and place); tiles with the same key under two scanners are twins.

    Returns
    -------
    dict
        (a, b), a < b -> two index arrays (P,) into the N tiles: element i of one is the twin of element i of the
        other. Pairs without twins are left out.

    Raises
    ------
    DataError
        When one scanner holds a field twice: which one the twin is would be a guess.
    """
    rows_of: dict[str, dict[str, int]] = {}
    for row, (scanner, key) in enumerate(zip(scanner_N.astype(str), key_N.astype(str), strict=True)):
        fields = rows_of.setdefault(str(scanner), {})
        if key in fields:
            raise DataError("a scanner holds one field twice", where=f"rows {fields[key]} and {row}", got=str(key))
        fields[str(key)] = row
    found = {}
    for a, b in combinations(sorted(rows_of), 2):
        shared = [key for key in rows_of[a] if key in rows_of[b]]
        if shared:
            found[a, b] = tuple(np.array([rows_of[s][key] for key in shared]) for s in (a, b))
    return found  # type: ignore[return-value]


def _ahead(similarity_PM: Array, twin_P: Array) -> NDArray[np.int64]:
    """Per row, how many entries are nearer than the twin, and how many as near: (2, P)."""
    lead_PM = similarity_PM - twin_P[:, None]
    nearer_P = (lead_PM > COSINE_RESOLUTION).sum(axis=1)
    return np.stack([nearer_P, (lead_PM >= -COSINE_RESOLUTION).sum(axis=1) - nearer_P])


def pair_hits(a: ScannerTiles, b: ScannerTiles, twin_a_P: Array, twin_b_P: Array, top: Sequence[int]) -> PairHits:
    """Rank each tile's twin under another scanner, in both directions; exact, in float64, in chunks of rows.

    Parameters
    ----------
    a, b
        All tiles of two scanners.
    twin_a_P, twin_b_P
        Row numbers of twins.
    top
        The values of k.
    """
    cosine_P = np.einsum("pd,pd->p", a.unit_AD[twin_a_P], b.unit_AD[twin_b_P])
    forth_2P, back_2P = np.zeros((2, 2, len(cosine_P)), np.int64)
    step = max(1, CHUNK // max(len(a.unit_AD), len(b.unit_AD)))
    for start in range(0, len(a.unit_AD), step):  # both directions from one product
        cross_RB = a.unit_AD[start : start + step] @ b.unit_AD.T
        here = np.flatnonzero((twin_a_P >= start) & (twin_a_P < start + step))
        forth_2P[:, here] += _ahead(cross_RB[twin_a_P[here] - start], cosine_P[here])
        back_2P += _ahead(cross_RB[:, twin_b_P].T, cosine_P)
    for tiles, twin_P, ahead_2P in ((a, twin_a_P, forth_2P), (b, twin_b_P, back_2P)):
        for start in range(0, len(cosine_P), step):
            rows = slice(start, start + step)
            ahead_2P[:, rows] += _ahead(tiles.own(twin_P[rows]), cosine_P[rows])
    shares = {
        k: [np.clip((k - nearer_P) / equal_P, 0.0, 1.0) for nearer_P, equal_P in (forth_2P, back_2P)] for k in top
    }
    return PairHits(cosine_P=cosine_P, top={k: (forth_P + back_P) / 2 for k, (forth_P, back_P) in shares.items()})


def paired_retrieval(
    features_ND: Array, scanner_N: Array, key_N: Array, top: Sequence[int] = (1, 10)
) -> RetrievalResult:
    """Find each tile's twin under another scanner: means of :func:`pair_hits` over the twins, then over the pairs.

    Each pair of scanners has the same weight. Without ties this equals plismbench's exact numbers.

    Parameters
    ----------
    features_ND
        Any float type.
    scanner_N, key_N
        See :func:`twins`.
    top
        The values of k.

    Raises
    ------
    DataError
        When lengths differ, features are not finite, a field is held twice, or no two scanners share a field.
    """
    features_ND = as_features(features_ND, "features")
    if not len(features_ND) == len(scanner_N) == len(key_N):
        raise DataError(
            "one scanner and one key per feature row are needed",
            got=f"{len(features_ND)} rows, {len(scanner_N)} scanners, {len(key_N)} keys",
        )
    scanners_N = scanner_N.astype(str)
    pairs = twins(scanner_N, key_N)
    if not pairs:
        raise DataError("no field was seen by two scanners", got=f"scanners {', '.join(sorted(set(scanners_N)))}")
    members = {scanner: np.flatnonzero(scanners_N == scanner) for scanner in sorted(set(scanners_N))}
    tiles = {scanner: ScannerTiles.of(features_ND[rows]) for scanner, rows in members.items()}
    found = []
    for (a, b), (rows_a, rows_b) in pairs.items():
        twin_a, twin_b = np.searchsorted(members[a], rows_a), np.searchsorted(members[b], rows_b)
        found.append(pair_hits(tiles[a], tiles[b], twin_a, twin_b, top))
    return RetrievalResult(
        top={k: float(np.mean([hits.top[k].mean() for hits in found])) for k in top},
        cosine=float(np.mean([hits.cosine_P.mean() for hits in found])),
        pairs=len(pairs),
    )
