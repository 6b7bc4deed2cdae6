"""The PLISM benchmark: slides in, a result out, pair by pair."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from histill import files
from histill.errors import ConfigError, RunError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.plism import groups, layout
from histill.evaluate.plism.journal import Journal
from histill.evaluate.plism.layout import SlideName
from histill.evaluate.plism.source import Source, from_features, from_tiles, look_through
from histill.evaluate.plism.work import Compat, Work
from histill.evaluate.results import Result, write_result
from histill.evaluate.statistics import RESAMPLES, SEED

__all__ = ["DEFAULT_TILES", "Compat", "run_plism"]

DEFAULT_TILES = 8139
"""Half of a slide's 16,278 tiles, as in the original."""


def run_plism(
    *,
    features: Path | None,
    root: Path | None,
    embedder: Embedder | None,
    cache: FeatureCache,
    out: Path,
    n_tiles: int | Literal["all"] = DEFAULT_TILES,
    compat: Compat = "none",
    memory_gb: float = 1.0,
    device: str | torch.device = "cpu",
    console: Console,
) -> Result:
    """Compare every pair of slides; finished pairs in ``out`` are not computed again.

    Parameters
    ----------
    features
        Folder of one encoder's feature files, see :mod:`histill.evaluate.plism.layout`; or else:
    root, embedder, cache
        The data set's folder, who embeds its tiles, and where features are kept (``out/features`` if the cache has no
        folder, since slides are needed more than once).
    out
        Gets ``pairs.jsonl`` (finished pairs), ``metrics.csv``, ``results.csv`` and ``results.json``.
    n_tiles
        Tiles per slide, see :func:`histill.evaluate.plism.layout.choose_tiles`.
    compat
        ``none``: exact. ``fp16``: the original's numbers with its defects.
    memory_gb
        Limit (10^9 bytes) on slides held at once and working memory, on the device where pairs are compared.
    device
        Where pairs are compared.
    console
        For the progress bar, when it is a terminal.

    Raises
    ------
    ConfigError
        Options that do not go together; a memory limit below two slides.
    DataError
        Slides with other tiles than the others, features that are not finite, damaged files; slides are named.
    RunError
        Another process is at work in ``out``.
    """
    source = _source(features, root, embedder, cache if cache.folder else FeatureCache(out / "features"), n_tiles)
    with files.lock(out / ".lock", wait=False) as alone:
        if not alone:
            raise RunError("another process computes PLISM here", where=out, remedy="wait, or choose another --out")
        digests, dim = look_through(source, console)
        with Journal(out / "pairs.jsonl") as journal:
            work = Work(
                source=source, digests=digests, dim=dim, compat=compat, device=torch.device(device), journal=journal
            )
            work.run(memory_gb * 1e9, console)
            pairs, seconds = work.pairs()
        result = _result(source, pairs, seconds, _data(source, compat, dim), digests)
        _write_tables(pairs, out)
        write_result(result, out)
        (out / ".lock").unlink(missing_ok=True)
    return result


def _source(
    features: Path | None,
    root: Path | None,
    embedder: Embedder | None,
    cache: FeatureCache,
    n_tiles: int | Literal["all"],
) -> Source:
    if features is not None and root is None and embedder is None:
        return from_features(features, n_tiles)
    if features is None and root is not None and embedder is not None:
        return from_tiles(root, embedder, cache, n_tiles)
    raise ConfigError("PLISM needs either a feature folder, or an encoder and the data set's folder")


def _result(
    source: Source, pairs: list[groups.Pair], seconds: float, data: dict[str, Any], digests: dict[SlideName, str]
) -> Result:
    key = source.encoder_key or hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return Result(
        benchmark="plism",
        encoder=source.encoder,
        encoder_key=key,
        pooling=source.pooling,
        headline="score",
        scores=groups.scores(pairs),
        data=data,
        details=groups.details(pairs),
        seconds=seconds,
    )


def _data(source: Source, compat: Compat, dim: int) -> dict[str, Any]:
    return {
        "root": str(source.root),
        "slides": len(source.slides),
        "tiles": len(source.places_N3),
        "tiles_in_slide": source.tiles_in_slide,
        "tile_subset_seed": layout.SUBSET_SEED,
        "features": dim,
        "compat": compat,
        "bootstrap": {"by": "slide", "resamples": RESAMPLES, "seed": SEED},
    }


def _write_tables(pairs: list[groups.Pair], out: Path) -> None:
    """``metrics.csv``: a row per pair; ``results.csv``: a row per group; no number is an empty field."""
    rows: list[dict[str, Any]] = []
    for pair, row in zip(pairs, groups.pair_rows(pairs), strict=True):
        sides = {"staining_a": pair.a.staining, "scanner_a": pair.a.scanner}
        sides |= {"staining_b": pair.b.staining, "scanner_b": pair.b.scanner}
        rows.append(row | sides)
    _write_csv(out / "metrics.csv", rows)
    table: dict[str, dict[str, Any]] = {}
    for summary in groups.summarise(pairs):
        row_of = table.setdefault(summary.group, {"group": summary.group, "pairs": summary.pairs})
        for name in ("mean", "std", "median", "iqr"):
            row_of[f"{summary.metric}_{name}"] = getattr(summary, name)
    _write_csv(out / "results.csv", list(table.values()))


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())
