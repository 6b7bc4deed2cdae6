"""The score of a run, its interval over runs, and a stopping split that the score does not see.

Shapes: N training and M scored images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy import stats
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from histill.errors import DataError
from histill.evaluate.features import Array

__all__ = ["balanced_accuracy", "drawn_groups", "run_interval", "stopping_groups", "stopping_split"]

_FOLDS = 5
_SHUFFLES = 10
_IMAGE_GROUPS = 2000


def balanced_accuracy(predicted_M: Array, label_M: Array) -> float:
    """Mean recall over the classes that occur in ``label_M``."""
    return float(np.mean([(predicted_M[label_M == k] == k).mean() for k in np.unique(label_M)]))


def run_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval (Student's t) of the mean over runs, cut to 0..1; None with fewer than two runs."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return max(0.0, float(np.mean(values) - half)), min(1.0, float(np.mean(values) + half))


def drawn_groups(group_M: Array | None, images: int) -> Array:
    """Names of what a bootstrap draws: the groups, or, where none are known, the images.

    More than 2,000 images are put into 2,000 groups at random (always the same way), which leaves their interval as
    it is and a result small.
    """
    if group_M is not None:
        return group_M
    many = images > _IMAGE_GROUPS
    place_M = np.random.default_rng(0).permutation(images) % _IMAGE_GROUPS if many else np.arange(images)
    return np.array([f"image {place:04d}" for place in place_M])


def stopping_groups(group_N: Array, *, seed: int = 0) -> tuple[Array, Array]:
    """Carve a fifth of the groups off, where there is no class to stratify by: (fit, stop) row numbers, ascending.

    Raises
    ------
    DataError
        There is one group only.
    """
    names = np.unique(group_N)
    if len(names) < 2:
        raise DataError("no stopping split can be carved off the training data", got=f"{len(names)} group")
    chosen = np.random.default_rng(seed).permutation(names)[: -(-len(names) // _FOLDS)]
    stops_N = np.isin(group_N, chosen)
    return np.flatnonzero(~stops_N), np.flatnonzero(stops_N)


def stopping_split(label_N: Array, group_N: Array | None, *, seed: int = 0) -> tuple[Array, Array]:
    """Carve a fifth of the training data off, to stop on: (fit, stop) row numbers, ascending.

    Whole groups (patients, slides) where they are known, so that none is on both sides; stratified by class either
    way. The first of five shuffled folds with every class on both sides is taken; where a class has few groups, of
    other shuffles, and of fewer folds.

    Parameters
    ----------
    label_N
        Classes of the training data.
    group_N
        Their patients or slides; None stratifies by class alone.
    seed
        Of the shuffles; equal arguments give equal splits.

    Raises
    ------
    DataError
        No fold has every class on both sides.
    """
    label_N = np.asarray(label_N)
    rarest = int(np.unique(label_N, return_counts=True)[1].min())
    most = min(_FOLDS, rarest, rarest if group_N is None else len(np.unique(group_N)))
    classes = len(np.unique(label_N))
    kind = StratifiedKFold if group_N is None else StratifiedGroupKFold
    for folds, shuffle in product(range(most, 1, -1), range(_SHUFFLES)):
        splitter = kind(n_splits=folds, shuffle=True, random_state=seed + shuffle)
        for fit, stop in splitter.split(np.zeros((len(label_N), 1)), label_N, group_N):
            if len(np.unique(label_N[fit])) == classes == len(np.unique(label_N[stop])):
                return fit, stop
    groups = "" if group_N is None else f", {len(np.unique(group_N))} groups"
    raise DataError(
        "no stopping split can be carved off the training data",
        got=f"{len(label_N)} images, {rarest} of the rarest class{groups}",
        allowed="every class in at least two groups",
        remedy="use more of the data set",
    )
