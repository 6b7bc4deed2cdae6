"""Label-based measures on frozen features: a linear probe, a nearest-neighbour probe, and their uncertainty.

Shapes: N training and M test images, D features, C classes, S groups (slides), B bootstrap resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histill.errors import DataError
from histill.evaluate.areas import RocArea
from histill.evaluate.features import Array, as_features, unit_rows
from histill.evaluate.statistics import draws

__all__ = [
    "C_GRID",
    "Interval",
    "ProbeResult",
    "balanced_accuracy",
    "cluster_bootstrap",
    "fit_linear",
    "inner_splits",
    "knn_probe",
    "linear_probe",
    "macro_auc",
]

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse L2 strengths that a linear probe tries."""

_MAX_ITERATIONS = 5000
_FOLDS = 3
_CHUNK = 2**24  # entries of one block of the similarity matrix: 128 MiB in float64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeResult:
    """A probe's skill on the test images."""

    balanced_accuracy: float
    """Mean recall over the classes of the test images, 0 to 1 (chance: 1 / C)."""
    auc: float
    """Area under the ROC curve, 0 to 1; with more than two classes the macro mean of one-versus-rest."""
    scores_MC: Array
    """Class scores of the test images, rows sum to 1."""
    classes: tuple[Any, ...]
    """The classes in the order of the columns of ``scores_MC``."""
    c: float | None = None
    """The chosen inverse L2 strength of a linear probe."""
    unconverged: tuple[float, ...] = ()
    """Strengths that were left out since the solver did not converge on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float
    """Its ends."""
    resamples: int
    """Resamples on which the measure was defined."""


def balanced_accuracy(y_M: Array, scores_MC: Array, classes: Sequence[Any]) -> float:
    """Mean recall over the classes that occur in ``y_M``, the highest score taken as the prediction.

    Parameters
    ----------
    y_M
        Labels.
    scores_MC
        Class scores, any scale; the first of equal ones is the prediction.
    classes
        The classes of the columns.

    Returns
    -------
    float
        0 to 1.
    """
    predicted_M = np.asarray(classes)[scores_MC.argmax(axis=1)]
    return float(np.mean([(predicted_M[y_M == name] == name).mean() for name in np.unique(y_M)]))


def macro_auc(y_M: Array, scores_MC: Array, classes: Sequence[Any]) -> float:
    """Mean one-versus-rest area under the ROC curve over the classes that occur in ``y_M``.

    With two classes it is the ordinary area. A class of the training set that no test image has is left out.

    Parameters
    ----------
    y_M, scores_MC, classes
        As in :func:`balanced_accuracy`; within a column only the order of the scores counts.

    Returns
    -------
    float
        0 to 1; 0.5 by chance.

    Raises
    ------
    DataError
        When ``y_M`` holds one class only.
    """
    present = [column for column, name in enumerate(classes) if (y_M == name).any()]
    if len(present) < 2:
        raise DataError("an area under the ROC curve needs two classes among the test images", got=sorted(set(y_M)))
    return float(np.mean([roc_auc_score(y_M == classes[column], scores_MC[:, column]) for column in present]))


def _checked(
    train_x_ND: Array, train_y_N: Array, test_x_MD: Array, test_y_M: Array
) -> tuple[Array, Array, Array, Array]:
    train_x_ND, test_x_MD = as_features(train_x_ND, "training features"), as_features(test_x_MD, "test features")
    train_y_N, test_y_M = np.asarray(train_y_N), np.asarray(test_y_M)
    if len(train_x_ND) != len(train_y_N) or len(test_x_MD) != len(test_y_M):
        raise DataError(
            "one label per feature row is needed",
            got=f"train {len(train_x_ND)} rows and {len(train_y_N)} labels, test {len(test_x_MD)} and {len(test_y_M)}",
        )
    known, asked = set(train_y_N.tolist()), set(test_y_M.tolist())
    if asked - known:
        raise DataError(
            "the test images have classes that no training image has",
            got=", ".join(map(str, sorted(asked - known))),
            allowed=", ".join(map(str, sorted(known))),
            remedy="split the slides so that every class is on both sides",
        )
    if len(asked) < 2:
        raise DataError("a probe needs two classes among the test images", got=", ".join(map(str, asked)))
    return train_x_ND, train_y_N, test_x_MD, test_y_M


def _result(y_M: Array, scores_MC: Array, classes_C: Array) -> ProbeResult:
    classes = tuple(classes_C.tolist())
    return ProbeResult(
        balanced_accuracy=balanced_accuracy(y_M, scores_MC, classes),
        auc=macro_auc(y_M, scores_MC, classes),
        scores_MC=scores_MC,
        classes=classes,
    )


def inner_splits(y_N: Array, groups_N: Array | None, *, seed: int = 0) -> list[tuple[Array, Array]]:
    """Up to three (fit, validation) splits of the training images for the choice of C.

    Parameters
    ----------
    y_N
        Labels.
    groups_N
        Slides: none is on both sides of a split (StratifiedGroupKFold). Without groups the splits are stratified.
    seed
        Of the shuffle.

    Raises
    ------
    DataError
        When no split has every class in its fit part and two classes in its validation part.
    """
    y_N = np.asarray(y_N)
    rarest = int(np.unique(y_N, return_counts=True)[1].min())
    folds = min(_FOLDS, rarest) if groups_N is None else min(_FOLDS, rarest, len(np.unique(groups_N)))
    splits: list[tuple[Array, Array]] = []
    if folds >= 2:
        kind = StratifiedKFold if groups_N is None else StratifiedGroupKFold
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed)
        classes = len(np.unique(y_N))
        splits = [
            (fit, validation)
            for fit, validation in splitter.split(np.zeros((len(y_N), 1)), y_N, groups_N)
            if len(np.unique(y_N[fit])) == classes and len(np.unique(y_N[validation])) > 1
        ]
    if not splits:
        raise DataError(
            "the training images cannot be split again to choose the strength of the probe",
            got=f"{len(y_N)} images, {rarest} of the rarest class"
            + ("" if groups_N is None else f", {len(np.unique(groups_N))} slides"),
            allowed="every class on at least two training slides",
            remedy="add training slides, or give a single strength",
        )
    return splits


def _fit(x_ND: Array, y_N: Array, c: float) -> Any | None:
    """Fit one probe; None when the solver does not converge."""
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=_MAX_ITERATIONS, tol=1e-4)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(x_ND, y_N)
        except ConvergenceWarning:
            return None


def _inner_auc(x_ND: Array, y_N: Array, splits: list[tuple[Array, Array]], c: float) -> float | None:
    """Mean validation AUC of one strength; None when it did not converge."""
    found = []
    for fit, validation in splits:
        model = _fit(x_ND[fit], y_N[fit], c)
        if model is None:
            return None
        found.append(macro_auc(y_N[validation], model.predict_proba(x_ND[validation]), model.classes_))
    return float(np.mean(found))


def linear_probe(
    train_x_ND: Array,
    train_y_N: Array,
    test_x_MD: Array,
    test_y_M: Array,
    *,
    train_groups_N: Array | None = None,
    c_grid: Sequence[float] = C_GRID,
    seed: int = 0,
) -> ProbeResult:
    """Logistic regression (L2, lbfgs, balanced class weights) on features standardised by the training images.

    Parameters
    ----------
    train_x_ND, test_x_MD
        Features, any float type.
    train_y_N, test_y_M
        Labels of any sortable type.
    train_groups_N
        Slides of the training images: C is then chosen on slides that the fit has not seen.
    c_grid
        Inverse strengths. The one with the highest mean AUC of :func:`inner_splits` is taken (the stronger
        regularisation among equals), and the probe is fitted again on all training images. A single one is taken
        as it is.
    seed
        Of the inner splits. Equal arguments give equal results.

    Raises
    ------
    DataError
        Rows and labels differ in number, features are not finite, a test class is absent among the training labels,
        the test labels hold one class, no inner split is possible, or no strength converges.
    """
    train_x_ND, train_y_N, test_x_MD, test_y_M = _checked(train_x_ND, train_y_N, test_x_MD, test_y_M)
    model, c, unconverged = fit_linear(train_x_ND, train_y_N, train_groups_N, c_grid=c_grid, seed=seed)
    result = _result(test_y_M, model.predict_proba(test_x_MD), model.classes_)
    return replace(result, c=c, unconverged=unconverged)


def fit_linear(
    x_ND: Array, y_N: Array, groups_N: Array | None, *, c_grid: Sequence[float] = C_GRID, seed: int = 0
) -> tuple[Any, float, tuple[float, ...]]:
    """Fit the model of :func:`linear_probe`, which also scores it.

    The log loss of an image weighs N / (C x images of its class) (scikit-learn's ``balanced``); features are
    standardised by the images of the fit, in each inner split anew.

    Parameters
    ----------
    x_ND
        Features of the training images, finite, any float type.
    y_N
        Their labels, an array of any sortable type.
    groups_N
        Their slides, which no inner split cuts; None stratifies by class alone.
    c_grid, seed
        As in :func:`linear_probe`.

    Returns
    -------
    tuple
        The model (``predict_proba``, ``classes_``), its inverse strength, and those that did not converge, ascending.

    Raises
    ------
    DataError
        No inner split is possible, or no strength converges.
    """
    ranked = sorted(c_grid)
    unconverged: list[float] = []
    if len(ranked) > 1:
        splits = inner_splits(y_N, groups_N, seed=seed)
        found = {c: _inner_auc(x_ND, y_N, splits, c) for c in ranked}
        unconverged = [c for c, score in found.items() if score is None]
        scored = {c: score for c, score in found.items() if score is not None}
        ranked = sorted(scored, key=lambda c: -scored[c])  # stable: the smaller C first among equals
    for c in ranked:
        model = _fit(x_ND, y_N, c)
        if model is not None:
            return model, c, tuple(sorted(unconverged))
        unconverged.append(c)
    raise DataError(
        f"the linear probe did not converge in {_MAX_ITERATIONS} iterations",
        got=f"C = {', '.join(map(str, c_grid))}",
        remedy="try smaller values of C",
    )


def knn_probe(train_x_ND: Array, train_y_N: Array, test_x_MD: Array, test_y_M: Array, *, k: int = 20) -> ProbeResult:
    """Vote of the ``k`` nearest training images by cosine on the raw features.

    A vote weighs 1 / (share of its class among the training images): a class's score is how much more often it occurs
    among the neighbours than in the training set, so that a rare class can win. Scores are normalised to sum 1.

    Source: 20 neighbours as in Caron et al., DINO, ICCV 2021, section 3.2, whose votes weigh by cosine and not by
    class.

    Parameters
    ----------
    train_x_ND, test_x_MD
        Features, any float type; computed in float64.
    train_y_N, test_y_M
        Labels of any sortable type.
    k
        Neighbours that vote, 1 to N.

    Returns
    -------
    ProbeResult
        Without ``c`` and ``unconverged``.

    Raises
    ------
    DataError
        As :func:`linear_probe`, and when there are fewer than ``k`` training images.
    """
    train_x_ND, train_y_N, test_x_MD, test_y_M = _checked(train_x_ND, train_y_N, test_x_MD, test_y_M)
    if not 1 <= k <= len(train_x_ND):
        raise DataError("too few training images for this many neighbours", got=f"k = {k}, {len(train_x_ND)} images")
    classes_C, code_N, count_C = np.unique(train_y_N, return_inverse=True, return_counts=True)
    unit_DN = unit_rows(train_x_ND).T
    unit_MD = unit_rows(test_x_MD)
    votes_NC = np.eye(len(classes_C))[code_N] / count_C
    step = max(1, _CHUNK // len(train_x_ND))
    blocks = []
    for start in range(0, len(unit_MD), step):
        similarity = unit_MD[start : start + step] @ unit_DN
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        blocks.append(votes_NC[nearest].sum(axis=1))
    scores_MC = np.concatenate(blocks)
    scores_MC /= scores_MC.sum(axis=1, keepdims=True)
    return _result(test_y_M, scores_MC, classes_C)


def cluster_bootstrap(
    y_M: Array,
    scores_MC: Array,
    classes: Sequence[Any],
    groups_M: Array,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of :func:`macro_auc` when slides, not images, are drawn again (percentile bootstrap).

    A slide that is drawn w times counts w times with all of its images. The area of a resample is a ratio of forms in
    these counts: exact, and cheap for any number of images (:class:`histill.evaluate.areas.RocArea`).

    Parameters
    ----------
    y_M, scores_MC, classes
        Labels, class scores and the classes of their columns.
    groups_M
        Slide (or patient) of each image.
    resamples, level, seed
        Number of resamples, coverage (0 to 1), and the seed: equal arguments give equal intervals.

    Returns
    -------
    Interval
        Resamples that hold one class only are left out; ``resamples`` says how many stayed.

    Raises
    ------
    DataError
        With fewer than two slides, or when no resample holds two classes.
    """
    area = RocArea.of(y_M, scores_MC, classes, groups_M)
    if len(area.names) < 2:
        raise DataError("an interval clustered by slide needs two slides", got=f"{len(area.names)} slide")
    mean_B = area.values(draws(len(area.names), resamples=resamples, seed=seed))
    mean_B = mean_B[~np.isnan(mean_B)]
    if not len(mean_B):
        raise DataError("no resample of the slides holds two classes", got=f"{len(area.names)} slides")
    low, high = np.quantile(mean_B, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), resamples=len(mean_B))
