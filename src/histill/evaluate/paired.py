"""The benchmark ``paired``: PLISM's metrics on any set that shows the same fields under several scanners.

The numbers are those of :mod:`histill.evaluate.retrieval`, which the checks during training call too; here every pair
of scanners is kept as it is done, with its sums per slide.

Shapes: N tiles, D features, P twins, S slides, C pairs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from histill.errors import DataError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.features import Array
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.retrieval import PairHits, ScannerTiles, fields_of, pair_hits, twins
from histill.evaluate.statistics import Clusters, clusters_of, estimate
from histill.evaluate.table_tiles import TableTiles, embed_tiles, open_tiles, unreadable_note

__all__ = ["TOP", "run_paired"]

TOP = (1, 3, 5, 10)
"""The values of k of retrieval."""
_PROTOCOL = "paired 1"
"""Changes when a part's number would."""


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
    tiles = open_tiles(csv_path, "paired", input_px, out / "parts", console)
    scanner, field_N = tiles.columns["scanner"], fields_of(tiles.columns)
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
    ready: dict[str, ScannerTiles] = {}

    def tiles_of(name: str) -> tuple[ScannerTiles, Array]:
        """A scanner's tiles and their row numbers; prepared for the first pair that is not there yet."""
        rows_A = np.flatnonzero(scanner == name)
        if name not in ready:
            ready[name] = ScannerTiles.of(features_ND[rows_A])
        return ready[name], rows_A

    def compute(a: str, b: str) -> dict[str, Any]:
        (tiles_a, rows_A), (tiles_b, rows_B) = tiles_of(a), tiles_of(b)
        twin_a, twin_b = pairs[a, b]
        hits = pair_hits(tiles_a, tiles_b, np.searchsorted(rows_A, twin_a), np.searchsorted(rows_B, twin_b), TOP)
        return _pair_part(hits, slide[twin_a])

    with progress(console) as bar:
        return [
            kept(out / "parts", f"{a}-{b}", decides | {"pair": [a, b]}, partial(compute, a, b))
            for a, b in bar.track(list(pairs), description="pairs")
        ]


def _pair_part(hits: PairHits, slide_P: Array) -> dict[str, Any]:
    """Sums per slide."""
    measures = {"cosine": hits.cosine_P} | {f"top_{k}": hits_P for k, hits_P in hits.top.items()}
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
    notes = [f"mean over {pairs} pairs of scanners", *unreadable_note(list(tiles.unreadable))]
    return Score(name=name, value=found.value, low=found.low, high=found.high, note="; ".join(notes))
