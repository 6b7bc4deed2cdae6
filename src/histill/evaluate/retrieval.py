"""Scanner robustness: whether the same field, scanned by another scanner, stays the nearest.

Shapes: N tiles, D features; A and B tiles of two scanners, P twins of one pair of scanners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from histill.errors import DataError
from histill.evaluate.features import Array, as_features, unit_rows

__all__ = ["COSINE_RESOLUTION", "RetrievalResult", "paired_retrieval", "twins"]

COSINE_RESOLUTION = 2.0**-23
"""Cosines nearer than this (the spacing of float32 above 1) are equal: no lead that vanishes in float32 is a lead."""


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


def _ahead(similarity_PM: Array, twin_P: Array) -> tuple[Array, Array]:
    """Per row, how many entries are nearer than the twin, and how many are as near."""
    lead_PM = similarity_PM - twin_P[:, None]
    nearer_P = (lead_PM > COSINE_RESOLUTION).sum(axis=1)
    return nearer_P, (lead_PM >= -COSINE_RESOLUTION).sum(axis=1) - nearer_P


def _hits(own_PA: Array, other_PB: Array, twin_P: Array, top: Sequence[int]) -> list[float]:
    """Share of twins found, per k: ``own`` and ``other`` hold the query's and the other scanner's tiles."""
    own_nearer, own_equal = _ahead(own_PA, twin_P)
    other_nearer, other_equal = _ahead(other_PB, twin_P)
    nearer, equal = own_nearer + other_nearer, own_equal + other_equal  # the twin itself is among the equal ones
    return [float(np.clip((k - nearer) / equal, 0.0, 1.0).mean()) for k in top]


def paired_retrieval(
    features_ND: Array, scanner_N: Array, key_N: Array, top: Sequence[int] = (1, 10)
) -> RetrievalResult:
    """Find each tile's twin under another scanner (the protocol of PLISM's top-k accuracy).

    For two scanners a and b, for each tile of a that has a twin in b: is the twin among the k nearest by cosine of
    *all tiles of both scanners except the tile itself*, from whatever slide, with a twin or without? The shares of
    the two directions are averaged, and then those of the scanner pairs, each pair with the same weight. ``cosine``
    is the mean over the twins of a pair, and then over the pairs. Without ties this equals plismbench's exact
    numbers.

    Tiles as near as the twin (within ``COSINE_RESOLUTION``) share their ranks: what counts is the chance that
    the twin is found when ties are drawn at random, so that a collapsed encoder scores k / (tiles - 1), neither 0 nor
    1. Exact, in float64; one product per pair and one per scanner.

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
    unit_ND = unit_rows(as_features(features_ND, "features"))
    if not len(unit_ND) == len(scanner_N) == len(key_N):
        raise DataError(
            "one scanner and one key per feature row are needed",
            got=f"{len(unit_ND)} rows, {len(scanner_N)} scanners, {len(key_N)} keys",
        )
    scanners_N = scanner_N.astype(str)
    pairs = twins(scanner_N, key_N)
    if not pairs:
        raise DataError("no field was seen by two scanners", got=f"scanners {', '.join(sorted(set(scanners_N)))}")
    members = {scanner: np.flatnonzero(scanners_N == scanner) for scanner in sorted(set(scanners_N))}
    place_N = np.empty(len(unit_ND), dtype=np.intp)  # a tile's number within its scanner
    own = {}
    for scanner, rows in members.items():
        place_N[rows] = np.arange(len(rows))
        own[scanner] = unit_ND[rows] @ unit_ND[rows].T
        np.fill_diagonal(own[scanner], -np.inf)  # the tile itself is no candidate
    shares, cosines = [], []
    for (a, b), (rows_a, rows_b) in pairs.items():
        cross_AB = unit_ND[members[a]] @ unit_ND[members[b]].T
        in_a, in_b = place_N[rows_a], place_N[rows_b]
        twin_P = cross_AB[in_a, in_b]
        forth = _hits(own[a][in_a], cross_AB[in_a], twin_P, top)
        back = _hits(own[b][in_b], cross_AB[:, in_b].T, twin_P, top)
        shares.append([(x + y) / 2 for x, y in zip(forth, back, strict=True)])
        cosines.append(float(twin_P.mean()))
    means = dict(zip(top, np.mean(shares, axis=0).tolist(), strict=True))
    return RetrievalResult(top=means, cosine=float(np.mean(cosines)), pairs=len(pairs))
