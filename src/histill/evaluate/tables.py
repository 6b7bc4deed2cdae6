"""Benchmarks for one's own tiles: ``tiles`` (any labelled table) and ``paired`` (the same fields, several scanners).

A *labelled* table has the columns ``path,label,slide,split`` (and, where known, ``patient``), a *paired* one
``path,slide,scanner,x,y`` (:mod:`histill.evaluate.paired`); paths are relative to its folder. Tiles are resized as a
whole to the encoder's side (bilinear, antialiased). The checks during training (:mod:`histill.evaluate.checks`) call
the same probes on the same columns and tiles.

Shapes: N tiles, D features, M test tiles, C classes, S supports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.features import Array, as_features, unit_rows
from histill.evaluate.labelled import NEIGHBOURS, Labelled, refuse_unscorable, shared_note, unit_of
from histill.evaluate.paired import run_paired
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.probes import ProbeResult, balanced_accuracy, macro_auc
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.statistics import Clusters, accuracy_clusters, estimate
from histill.evaluate.table_tiles import TableTiles, embed_tiles, open_tiles, unreadable_note

__all__ = ["DRAWS", "SHOTS", "few_shot", "run_paired", "run_tiles"]

SHOTS = (1, 4, 16)
"""Training tiles per class of the few-shot scores."""
DRAWS = 20
"""Draws of them that are averaged; their seeds are 0 to 19."""
_PROTOCOL = "tiles 1"
"""Changes when a part's number would."""


def few_shot(
    train_x_ND: Array, train_y_N: Array, test_x_MD: Array, *, shots: int, seed: int
) -> tuple[NDArray[np.float64], Array]:
    """Classify by the nearest class mean of a few training tiles (SimpleShot, Wang et al. 2019, arXiv 1911.04623).

    ``shots`` tiles of each class are drawn (all of a class that has fewer). Features are centred by the mean of these,
    scaled to length 1, and averaged per class; a test tile, treated alike, gets the class of the nearest mean.

    Parameters
    ----------
    train_x_ND, test_x_MD
        Features, any float type; computed in float64.
    train_y_N
        Labels of any sortable type.
    shots
        Training tiles per class.
    seed
        Of the draw; equal arguments give equal results.

    Returns
    -------
    tuple
        Scores (M, C), minus squared distances to the means, and the classes (C,) of the columns.

    Raises
    ------
    DataError
        Features are no finite table.
    """
    rng = np.random.default_rng([seed, shots])
    classes = np.unique(train_y_N)
    drawn = [rng.permutation(np.flatnonzero(train_y_N == name))[:shots] for name in classes]
    support_SD = as_features(train_x_ND[np.concatenate(drawn)], "training features")
    centre_D = support_SD.mean(axis=0)
    unit_SD = unit_rows(support_SD - centre_D)
    ends = np.cumsum([len(rows) for rows in drawn])[:-1]
    mean_CD = np.stack([part.mean(axis=0) for part in np.split(unit_SD, ends)])
    query_MD = unit_rows(as_features(test_x_MD, "test features") - centre_D)
    scores_MC: NDArray[np.float64] = 2 * query_MD @ mean_CD.T - np.square(mean_CD).sum(axis=1)
    return scores_MC, classes


def run_tiles(
    *,
    csv_path: Path,
    embedder: Embedder,
    input_px: int,
    cache: FeatureCache,
    out: Path,
    shots: Sequence[int] = SHOTS,
    seeds: int = DRAWS,
    console: Console,
) -> Result:
    """Fit on a labelled table's split ``train``, score on ``test``; finished parts in ``out`` are not computed again.

    Parameters
    ----------
    csv_path, input_px
        The table (see the top of this module), and the side that tiles are resized to, the embedder's own.
    embedder, cache, out
        Who embeds, and where features are kept (``out/features`` if the cache has no folder); ``out`` gets ``parts/``
        and ``results.json``.
    shots, seeds
        Training tiles per class of the few-shot scores, and how many draws of them are averaged.

    Returns
    -------
    Result
        ``linear_*``, ``knn_*`` and ``few_shot_*/<shots>``: ``balanced_accuracy`` and macro ``auc``, with intervals by
        patient, or by slide where the table has no patients (none for the AUC of few shots).

    Raises
    ------
    DataError
        The table or a split cannot be used, or a feature is not finite. Unreadable tiles are left out and named.
    """
    begun = time.monotonic()
    cache = cache if cache.folder else FeatureCache(out / "features")
    tiles = open_tiles(csv_path, "labelled", input_px, out / "parts", console)
    refuse_unscorable(csv_path, tiles.columns)
    labelled = Labelled.of(tiles.columns, embed_tiles(tiles, embedder, cache, console))
    parts = _parts(labelled, tiles, embedder, shots, seeds, out / "parts", console)
    notes = [*unreadable_note(list(tiles.unreadable)), *shared_note(tiles.columns)]
    clusters = {_named(name, "balanced_accuracy"): part["clusters"] for name, part in parts.items()}
    asked = {"shots": list(shots), "seeds": list(range(seeds)), "protocol": _PROTOCOL}
    result = Result(
        benchmark="tiles",
        encoder=embedder.name,
        encoder_key=embedder.key,
        pooling=embedder.pooling,
        headline="linear_balanced_accuracy",
        scores=tuple(score for name, part in parts.items() for score in _scores(name, part, notes)),
        data=tiles.describe(csv_path) | {"clusters": unit_of(tiles.columns)} | asked,
        details={"parts": parts, "clusters": clusters},
        seconds=time.monotonic() - begun,
    )
    write_result(result, out)
    return result


def _parts(
    labelled: Labelled,
    tiles: TableTiles,
    embedder: Embedder,
    shots: Sequence[int],
    seeds: int,
    folder: Path,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Fit every probe, or read what it gave."""
    columns = ["label", "slide", "split", *(["patient"] if "patient" in tiles.columns else [])]
    decides = {
        "protocol": _PROTOCOL,
        "encoder": embedder.key,
        "data": tiles.key,
        "labels": digest([tiles.columns[name].tolist() for name in columns]),
    }
    jobs: list[tuple[str, dict[str, int], Callable[[], dict[str, Any]]]] = [
        ("linear", {}, partial(_linear, labelled)),
        ("knn", {"k": NEIGHBOURS}, lambda: _part(labelled, [labelled.knn()])),
        *((f"few_shot/{n}", {"shots": n, "seeds": seeds}, partial(_few, labelled, n, seeds)) for n in shots),
    ]
    parts: dict[str, dict[str, Any]] = {}
    with progress(console) as bar:
        for name, options, compute in bar.track(jobs, description="probes"):
            parts[name] = kept(folder, name, decides | {"part": name, "options": options}, compute)
    return parts


def _named(part: str, measure: str) -> str:
    """``few_shot/4`` and ``auc`` -> ``few_shot_auc/4``."""
    kind, slash, shots = part.partition("/")
    return f"{kind}_{measure}{slash}{shots}"


def _part(labelled: Labelled, probes: Sequence[ProbeResult]) -> dict[str, Any]:
    """Plain values of one probe, or of the mean over several draws."""
    y_M = labelled.y_test_M
    right = [np.asarray(probe.classes)[probe.scores_MC.argmax(axis=1)] == y_M for probe in probes]
    ends = labelled.auc_interval(probes[0]) if len(probes) == 1 else None
    return {
        "balanced_accuracy": [probe.balanced_accuracy for probe in probes],
        "auc": [probe.auc for probe in probes],
        "clusters": accuracy_clusters(y_M, np.mean(right, axis=0), labelled.groups_test_M).to_plain(),
        "auc_interval": [ends.low, ends.high] if ends else None,
    }


def _linear(labelled: Labelled) -> dict[str, Any]:
    probe = labelled.linear()
    return _part(labelled, [probe]) | {"c": probe.c}


def _few(labelled: Labelled, shots: int, seeds: int) -> dict[str, Any]:
    x_train_ND, y_train_N, x_test_MD, y_M = labelled.data
    found = []
    for seed in range(seeds):
        scores_MC, classes = few_shot(x_train_ND, y_train_N, x_test_MD, shots=shots, seed=seed)
        names = tuple(classes.tolist())
        found.append(
            ProbeResult(
                balanced_accuracy=balanced_accuracy(y_M, scores_MC, names),
                auc=macro_auc(y_M, scores_MC, names),
                scores_MC=scores_MC,
                classes=names,
            )
        )
    return _part(labelled, found)


def _scores(name: str, part: dict[str, Any], notes: list[str]) -> list[Score]:
    found = estimate(Clusters.from_plain(part["clusters"]))
    draws = len(part["auc"])
    spread = [f"mean of {draws} draws, std {np.std(part['balanced_accuracy']):.4f}"] if draws > 1 else []
    lone = ["one slide or patient in test: no interval"] if found.low is None else []
    low, high = part["auc_interval"] or (None, None)
    auc_note = [f"mean of {draws} draws, std {np.std(part['auc']):.4f}"] if draws > 1 else []
    return [
        Score(
            name=_named(name, "balanced_accuracy"),
            value=found.value,
            low=found.low,
            high=found.high,
            note="; ".join([*spread, *lone, *notes]) or None,
        ),
        Score(
            name=_named(name, "auc"),
            value=float(np.mean(part["auc"])),
            low=low,
            high=high,
            note="; ".join([*auc_note, *lone, *notes]) or None,
        ),
    ]
