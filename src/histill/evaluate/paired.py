"""The benchmark ``paired``: PLISM's metrics on any set that shows the same fields under several scanners.

Shapes: N tiles, D features, A and B tiles of two scanners, P twins, Q queries, R rows of a chunk, S slides, C pairs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from histill.errors import DataError
from histill.evaluate.checks import COLUMNS
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.features import Array, as_features, unit_rows
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.retrieval import COSINE_RESOLUTION, twins
from histill.evaluate.statistics import Clusters, clusters_of, estimate
from histill.evaluate.table_tiles import TableTiles, embed_tiles, open_tiles

__all__ = ["TOP", "pair_hits", "run_paired"]

TOP = (1, 3, 5, 10)
"""The values of k of retrieval."""
_ENTRIES = 2**24  # similarities at once: 128 MiB in float64
_PROTOCOL = "paired 1"
"""Changes when a part's number would."""


def _ranks(query_QD: Array, own_AD: Array, own_Q: Array, other_BD: Array, twin_Q: Array) -> tuple[Array, Array]:
    """How many tiles of both scanners are nearer to a query than its twin, and how many are as near (with the twin)."""
    nearer_Q, equal_Q = np.zeros(len(query_QD)), np.zeros(len(query_QD))
    step = max(1, _ENTRIES // max(len(own_AD), len(other_BD)))
    for start in range(0, len(query_QD), step):
        rows = slice(start, start + step)
        cross_RB = query_QD[rows] @ other_BD.T
        self_RA = query_QD[rows] @ own_AD.T
        here = np.arange(len(cross_RB))
        self_RA[here, own_Q[rows]] = -np.inf  # the tile itself is no candidate
        twin_R1 = cross_RB[here, twin_Q[rows], None]
        for near in (cross_RB, self_RA):
            lead = near - twin_R1
            nearer_Q[rows] += (lead > COSINE_RESOLUTION).sum(axis=1)
            equal_Q[rows] += (np.abs(lead) <= COSINE_RESOLUTION).sum(axis=1)
    return nearer_Q, equal_Q


def pair_hits(
    a_AD: Array, b_BD: Array, twin_a_P: Array, twin_b_P: Array, top: Sequence[int] = TOP
) -> tuple[NDArray[np.float64], dict[int, NDArray[np.float64]]]:
    """Cosine of each pair of twins, and how far each is found among the k nearest: the terms of PLISM's means.

    The same numbers as :func:`histill.evaluate.retrieval.paired_retrieval` (pool: all tiles of both scanners; ties
    share their ranks), before the mean over the twins, and in chunks of rows.

    Parameters
    ----------
    a_AD, b_BD
        Features of all tiles of two scanners.
    twin_a_P, twin_b_P
        Row numbers of twins.
    top
        The values of k.

    Returns
    -------
    tuple
        Cosines (P,), and per k the mean of both directions' hits (P,), 0 to 1.
    """
    a_AD, b_BD = (unit_rows(as_features(x, "features")) for x in (a_AD, b_BD))
    cosine_P = np.einsum("pd,pd->p", a_AD[twin_a_P], b_BD[twin_b_P])
    forth = _ranks(a_AD[twin_a_P], a_AD, twin_a_P, b_BD, twin_b_P)
    back = _ranks(b_BD[twin_b_P], b_BD, twin_b_P, a_AD, twin_a_P)
    hits = {
        k: np.mean([np.clip((k - nearer) / equal, 0.0, 1.0) for nearer, equal in (forth, back)], axis=0) for k in top
    }
    return cosine_P, hits


def run_paired(
    *, csv_path: Path, embedder: Embedder, input_px: int, cache: FeatureCache, out: Path, console: Console
) -> Result:
    """Measure PLISM's cosine and top-k accuracy between scanners; finished pairs in ``out`` are not computed again.

    Parameters
    ----------
    csv_path
        A paired table; the same slide, x and y under two scanners are twins.
    embedder, input_px, cache, out, console
        See :func:`histill.evaluate.tables.run_tiles`.

    Returns
    -------
    Result
        ``top_10`` (headline), ``top_1``, ``top_3``, ``top_5`` and ``cosine``: means over the pairs of scanners, with
        intervals clustered by slide. ``details["pairs"]`` has each pair under PLISM's names.

    Raises
    ------
    DataError
        The table cannot be used, no field was seen by two scanners, or a feature is not finite.
    """
    begun = time.monotonic()
    cache = cache if cache.folder else FeatureCache(out / "features")
    tiles = open_tiles(csv_path, COLUMNS["paired"], input_px, out / "parts", console)
    slide, scanner, x, y = (tiles.columns[name] for name in ("slide", "scanner", "x", "y"))
    field_N = np.array([f"{s} x={i} y={j}" for s, i, j in zip(slide, x, y, strict=True)])
    pairs = twins(scanner, field_N)
    if not pairs:
        raise DataError("no field (slide, x, y) was seen by two scanners", where=csv_path)
    features_ND = embed_tiles(tiles, embedder, cache, console)
    parts = _parts(tiles, pairs, features_ND, embedder, digest([scanner.tolist(), field_N.tolist()]), out, console)
    clusters = {name: _pair_clusters(parts, name) for name in ("top_10", "top_5", "top_3", "top_1", "cosine")}
    result = Result(
        benchmark="paired",
        encoder=embedder.name,
        encoder_key=embedder.key,
        pooling=embedder.pooling,
        headline="top_10",
        scores=tuple(_paired_score(name, found, len(parts), tiles) for name, found in clusters.items()),
        data=tiles.describe(csv_path) | {"scanners": sorted(set(scanner.tolist())), "protocol": _PROTOCOL},
        details={
            "pairs": [_plain_pair(a, b, part) for (a, b), part in zip(pairs, parts, strict=True)],
            "clusters": {name: found.to_plain() for name, found in clusters.items()},
        },
        seconds=time.monotonic() - begun,
    )
    write_result(result, out)
    return result


def _parts(
    tiles: TableTiles,
    pairs: dict[tuple[str, str], tuple[Array, Array]],
    features_ND: NDArray[np.float32],
    embedder: Embedder,
    fields: str,
    out: Path,
    console: Console,
) -> list[dict[str, Any]]:
    """Compare every pair of scanners, or read what was found."""
    scanner, slide = tiles.columns["scanner"], tiles.columns["slide"]
    decides = {"protocol": _PROTOCOL, "encoder": embedder.key, "data": tiles.key, "fields": fields}
    parts: list[dict[str, Any]] = []
    with progress(console) as bar:
        for (a, b), rows in bar.track(list(pairs.items()), description="pairs"):
            members = [np.flatnonzero(scanner == name) for name in (a, b)]

            def compute(members: list[Array] = members, rows: tuple[Array, Array] = rows) -> dict[str, Any]:
                local = [np.searchsorted(member, row) for member, row in zip(members, rows, strict=True)]
                cosine_P, hits = pair_hits(features_ND[members[0]], features_ND[members[1]], local[0], local[1])
                return _pair_part(cosine_P, hits, slide[rows[0]])

            parts.append(kept(out / "parts", f"{a}-{b}", decides | {"pair": [a, b]}, compute))
    return parts


def _pair_part(cosine_P: Array, hits: dict[int, Array], slide_P: Array) -> dict[str, Any]:
    """Sums per slide."""
    measures = {"cosine": cosine_P} | {f"top_{k}": hits_P for k, hits_P in hits.items()}
    found = clusters_of(np.stack(list(measures.values()), axis=1), np.ones((len(slide_P), len(measures))), slide_P)
    sums = {name: found.numerator_SC[:, i].tolist() for i, name in enumerate(measures)}
    return {"slides": list(found.names), "twins": found.denominator_SC[:, 0].tolist(), "sums": sums}


def _pair_clusters(parts: Sequence[dict[str, Any]], name: str) -> Clusters:
    """Slides as clusters, one component per pair of scanners."""
    slides = sorted({slide for part in parts for slide in part["slides"]})
    above_SC, below_SC = np.zeros((2, len(slides), len(parts)))
    for column, part in enumerate(parts):
        rows = [slides.index(slide) for slide in part["slides"]]
        above_SC[rows, column], below_SC[rows, column] = part["sums"][name], part["twins"]
    return Clusters(names=tuple(slides), numerator_SC=above_SC, denominator_SC=below_SC)


def _plain_pair(a: str, b: str, part: dict[str, Any]) -> dict[str, Any]:
    count = sum(part["twins"])
    means = {name: sum(sums) / count for name, sums in part["sums"].items()}
    tops = {f"top_{k}_accuracy": means[f"top_{k}"] for k in TOP}
    return {"scanner_a": a, "scanner_b": b, "twins": int(count), "cosine_similarity": means["cosine"], **tops}


def _paired_score(name: str, clusters: Clusters, pairs: int, tiles: TableTiles) -> Score:
    found = estimate(clusters)
    notes = [f"mean over {pairs} pairs of scanners", *tiles.notes()]
    return Score(name=name, value=found.value, low=found.low, high=found.high, note="; ".join(notes))
