"""Benchmarks for one's own tiles: ``tiles`` (any labelled table) and ``paired`` (the same fields, several scanners).

A *labelled* table has the columns ``path,label,slide,split`` (and, where known, ``patient``), a *paired* one
``path,slide,scanner,x,y`` (:mod:`histill.evaluate.paired`); paths are relative to its folder. Tiles are resized as a
whole to the encoder's side (bilinear, antialiased), as the checks during training do.

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

from histill.errors import DataError
from histill.evaluate.checks import COLUMNS
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.features import Array, as_features, unit_rows
from histill.evaluate.paired import run_paired
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.probes import (
    ProbeResult,
    balanced_accuracy,
    cluster_bootstrap,
    inner_splits,
    knn_probe,
    linear_probe,
    macro_auc,
)
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.statistics import RESAMPLES, SEED, Clusters, accuracy_clusters, estimate
from histill.evaluate.table_tiles import TableTiles, embed_tiles, open_tiles

__all__ = ["DRAWS", "SHOTS", "few_shot", "run_paired", "run_tiles"]

SHOTS = (1, 4, 16)
"""Training tiles per class of the few-shot scores."""
DRAWS = 20
"""Draws of them that are averaged; their seeds are 0 to 19."""
_NEIGHBOURS = 20
_PROTOCOL = "tiles 1"
"""Changes when a part's number would."""


def few_shot(
    train_x_ND: Array, train_y_N: Array, test_x_MD: Array, *, shots: int, seed: int
) -> tuple[NDArray[np.float64], Array]:
    """Classify by the nearest class mean of a few training tiles (SimpleShot, Wang et al. 2019, arXiv 1911.04623).

    ``shots`` tiles of each class are drawn (all of a class that has fewer). Features are centred by the mean of these,
    scaled to length 1, and averaged per class; a test tile, treated alike, gets the class of the nearest mean.

    Returns
    -------
    tuple
        Scores (M, C), minus squared distances to the means, and the classes (C,) of the columns.
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
    csv_path
        The table; see the top of this module.
    embedder, cache
        Who embeds, and where features are kept (``out/features`` if the cache has no folder).
    input_px
        Side that tiles are resized to, the embedder's own.
    out
        Gets ``parts/`` and ``results.json``.
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
    tiles = open_tiles(csv_path, COLUMNS["labelled"], input_px, out / "parts", console)
    unit = "patient" if "patient" in tiles.columns else "slide"
    _refuse_unusable(csv_path, tiles, unit)
    labelled = _Labelled(tiles, embed_tiles(tiles, embedder, cache, console), unit)
    parts = _parts(labelled, tiles, embedder, shots, seeds, out / "parts", console)
    clusters = {_named(name, "balanced_accuracy"): part["clusters"] for name, part in parts.items()}
    asked = {"clusters": unit, "shots": list(shots), "seeds": list(range(seeds)), "protocol": _PROTOCOL}
    result = Result(
        benchmark="tiles",
        encoder=embedder.name,
        encoder_key=embedder.key,
        pooling=embedder.pooling,
        headline="linear_balanced_accuracy",
        scores=tuple(score for name, part in parts.items() for score in _scores(name, part, labelled.notes())),
        data=tiles.describe(csv_path) | asked,
        details={"parts": parts, "clusters": clusters},
        seconds=time.monotonic() - begun,
    )
    write_result(result, out)
    return result


def _refuse_unusable(csv_path: Path, tiles: TableTiles, unit: str) -> None:
    """Find now, before any tile is embedded, what would make a probe fail."""
    label, split = tiles.columns["label"], tiles.columns["split"]
    if wrong := sorted(set(split.tolist()) - {"train", "val", "test"}):
        raise DataError("an unknown split", where=csv_path, got=", ".join(wrong), allowed="train, val, test")
    train, test = (set(label[split == side].tolist()) for side in ("train", "test"))
    if not test <= train or len(test) < 2:
        raise DataError(
            "a probe needs two classes among the test tiles, and training tiles of each of them",
            where=csv_path,
            got=f"train: {', '.join(sorted(train))}; test: {', '.join(sorted(test))}",
        )
    if (split == "train").sum() < _NEIGHBOURS:
        raise DataError(
            f"a probe needs at least {_NEIGHBOURS} training tiles", where=csv_path, got=int((split == "train").sum())
        )
    inner_splits(label[split == "train"], tiles.columns[unit][split == "train"])


def _parts(
    labelled: _Labelled,
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
        ("linear", {}, labelled.linear),
        ("knn", {"k": _NEIGHBOURS}, labelled.knn),
        *((f"few_shot/{n}", {"shots": n, "seeds": seeds}, partial(labelled.few, n, seeds)) for n in shots),
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


class _Labelled:
    """Features and columns of the two splits, and the probes on them."""

    def __init__(self, tiles: TableTiles, features_ND: NDArray[np.float32], unit: str) -> None:
        split = tiles.columns["split"]
        self._notes = tiles.notes()
        self._y = {side: tiles.columns["label"][split == side] for side in ("train", "test")}
        self._groups = {side: tiles.columns[unit][split == side] for side in ("train", "test")}
        self._unit = unit
        x_train_ND, x_test_MD = (np.asarray(features_ND)[split == side] for side in ("train", "test"))
        self.data = (x_train_ND, self._y["train"], x_test_MD, self._y["test"])

    def notes(self) -> list[str]:
        """What a reader of every score must know."""
        shared = sorted(set(self._groups["train"].tolist()) & set(self._groups["test"].tolist()))
        if not shared:
            return self._notes
        return [
            *self._notes,
            f"{len(shared)} {self._unit}s are in train and test, first {shared[0]}: scores are inflated",
        ]

    def _part(self, scores: Sequence[ProbeResult]) -> dict[str, Any]:
        """Plain values of one probe, or of the mean over several draws."""
        y_M, groups_M = self._y["test"], self._groups["test"]
        right = [np.asarray(p.classes)[p.scores_MC.argmax(axis=1)] == y_M for p in scores]
        part: dict[str, Any] = {
            "balanced_accuracy": [p.balanced_accuracy for p in scores],
            "auc": [p.auc for p in scores],
            "clusters": accuracy_clusters(y_M, np.mean(right, axis=0), groups_M).to_plain(),
            "auc_interval": None,
        }
        if len(np.unique(groups_M)) > 1 and len(scores) == 1:
            ends = cluster_bootstrap(
                y_M, scores[0].scores_MC, scores[0].classes, groups_M, resamples=RESAMPLES, seed=SEED
            )
            part["auc_interval"] = [ends.low, ends.high]
        return part

    def linear(self) -> dict[str, Any]:
        found = linear_probe(*self.data, train_groups_N=self._groups["train"])
        return self._part([found]) | {"c": found.c}

    def knn(self) -> dict[str, Any]:
        return self._part([knn_probe(*self.data, k=_NEIGHBOURS)])

    def few(self, shots: int, seeds: int) -> dict[str, Any]:
        x_train_ND, y_train_N, x_test_MD, y_M = self.data
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
        return self._part(found)


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
