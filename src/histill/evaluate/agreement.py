"""Label-free measures: whether the student sees the same neighbourhoods as the teacher, or has collapsed.

Shapes: N images (the same ones, in the same order, for both models), D and E features. All in float64 on the CPU.
"""

from __future__ import annotations

import numpy as np

from histill.errors import DataError
from histill.evaluate.features import Array, as_features, unit_rows

__all__ = [
    "COLLAPSE_COSINE",
    "COLLAPSE_SHARE",
    "collapse_warning",
    "effective_rank",
    "knn_overlap",
    "linear_cka",
    "mean_pairwise_cosine",
]

COLLAPSE_SHARE = 0.25
"""A student has collapsed when its effective rank is under this share of what it could have."""
COLLAPSE_COSINE = 0.99
"""A student has collapsed when two images have a higher cosine than this on average."""

_CHUNK = 2**24  # entries of one block of the similarity matrix: 128 MiB in float64


def _pair(x_ND: Array, y_NE: Array) -> tuple[Array, Array]:
    x_ND, y_NE = as_features(x_ND, "x"), as_features(y_NE, "y")
    if len(x_ND) != len(y_NE):
        raise DataError("both models must embed the same images", got=f"{len(x_ND)} and {len(y_NE)} rows")
    return x_ND, y_NE


def _centred(x_ND: Array) -> Array:
    """Subtract the mean; what is left of constant features is rounding and becomes exactly 0."""
    centred_ND: Array = x_ND - x_ND.mean(axis=0)
    noise_D = 8 * np.finfo(np.float64).eps * np.abs(x_ND).max(axis=0)
    centred_ND[:, np.abs(centred_ND).max(axis=0) <= noise_D] = 0.0
    return centred_ND


def linear_cka(x_ND: Array, y_NE: Array) -> float:
    """Linear centred kernel alignment, from 0 to 1 (Kornblith et al. 2019, arXiv 1905.00414, section 3).

    ``||Y'X||^2 / (||X'X|| ||Y'Y||)`` with Frobenius norms and centred columns: the feature-space form, whose cost
    and memory grow with N x D x E and not with N x N. It does not change under rotation and uniform scaling of
    either side. Features without variance agree with nothing: 0.

    Parameters
    ----------
    x_ND, y_NE
        Features of the same images in the same order, any float type.

    Raises
    ------
    DataError
        When features are no finite table (N, D), or the models embed different numbers of images.
    """
    x_ND, y_NE = (_centred(x) for x in _pair(x_ND, y_NE))
    # the unit scale keeps the fourth powers inside of float64's range
    x_ND /= np.linalg.norm(x_ND) or 1.0
    y_NE /= np.linalg.norm(y_NE) or 1.0
    own = float(np.linalg.norm(x_ND.T @ x_ND) * np.linalg.norm(y_NE.T @ y_NE))
    return float(np.square(y_NE.T @ x_ND).sum()) / own if own > 0 else 0.0


def _neighbours(unit_ND: Array, rows: slice, k: int) -> Array:
    """Find the k nearest by cosine, self excluded: indices (rows, k) in no particular order."""
    similarity = unit_ND[rows] @ unit_ND.T
    index = np.arange(rows.start, rows.start + len(similarity))
    similarity[np.arange(len(similarity)), index] = -np.inf
    return np.argpartition(-similarity, k - 1, axis=1)[:, :k]


def knn_overlap(x_ND: Array, y_NE: Array, k: int = 10) -> float:
    """Mean share of common images among the k nearest (cosine, self excluded) of each image, from 0 to 1.

    The chance level of two unrelated models is k / (N - 1).

    Source: Huh et al., *The Platonic representation hypothesis*, ICML 2024, appendix A (mutual nearest neighbours).

    Parameters
    ----------
    x_ND, y_NE
        Features of the same images in the same order, any float type; rows are scaled to length 1.
    k
        Neighbours of an image, 1 to N - 1. Which of several equally near ones is among the k is not fixed.

    Returns
    -------
    float
        1 when all neighbourhoods are the same.

    Raises
    ------
    DataError
        When ``k`` is below 1, there are not more than ``k`` images, features are no finite table (N, D), or the models
        embed different numbers of images.
    """
    x_ND, y_NE = (unit_rows(x) for x in _pair(x_ND, y_NE))
    count = len(x_ND)
    if not 1 <= k < count:
        raise DataError(f"{k} neighbours need at least {k + 1} images", got=f"k = {k}, {count} images")
    step = max(1, _CHUNK // count)
    common = 0
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        member = np.zeros((rows.stop - start, count), dtype=bool)
        np.put_along_axis(member, _neighbours(x_ND, rows, k), True, axis=1)
        common += int(np.take_along_axis(member, _neighbours(y_NE, rows, k), axis=1).sum())
    return common / (count * k)


def effective_rank(x_ND: Array) -> float:
    """Effective rank of the centred features (Roy and Vetterli, EUSIPCO 2007, definitions 1 and 2).

    ``exp(-sum p ln p)`` with ``p`` the singular values (not their squares) of the mean-subtracted, otherwise
    unscaled matrix, divided by their sum. From 1 (one direction) to min(N - 1, D); 0 for constant features.

    Raises
    ------
    DataError
        When features are no finite table (N, D).
    """
    x_ND = _centred(as_features(x_ND, "x"))
    x_ND /= np.linalg.norm(x_ND) or 1.0
    gram = x_ND.T @ x_ND if x_ND.shape[0] >= x_ND.shape[1] else x_ND @ x_ND.T
    variance = np.linalg.eigvalsh(gram)
    # eigenvalues below the rounding of the largest are zeros; their roots would not look small
    singular = np.sqrt(variance[variance > len(variance) * np.finfo(np.float64).eps * variance[-1]])
    if singular.size == 0:
        return 0.0
    p = singular / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_pairwise_cosine(x_ND: Array) -> float:
    """Mean cosine over all pairs of two different images; near 1 when all images look the same to the model.

    Raises
    ------
    DataError
        With fewer than two images, or features that are no finite table (N, D).
    """
    unit_ND = unit_rows(as_features(x_ND, "x"))
    count = len(unit_ND)
    if count < 2:
        raise DataError("a pair needs two images", got=f"{count} row")
    total = float(np.square(unit_ND.sum(axis=0)).sum() - np.square(unit_ND).sum())
    return total / (count * (count - 1))


def collapse_warning(
    effective_rank_student: float, effective_rank_teacher: float, dims: int, *, mean_cosine: float | None = None
) -> str | None:
    """Loud text when the student has collapsed, else None.

    Parameters
    ----------
    effective_rank_student, effective_rank_teacher
        :func:`effective_rank` of both on the same images.
    dims
        Width of the student's embedding; a narrow student is not blamed for a wide teacher's rank.
    mean_cosine
        :func:`mean_pairwise_cosine` of the student, where known.
    """
    reachable = min(effective_rank_teacher, float(dims))
    reasons = []
    if effective_rank_student < COLLAPSE_SHARE * reachable:
        reasons.append(
            f"its effective rank is {effective_rank_student:.1f} of {dims} dimensions, the teacher's is "
            f"{effective_rank_teacher:.1f} (warned below {COLLAPSE_SHARE:.0%} of {reachable:.1f})"
        )
    if mean_cosine is not None and mean_cosine > COLLAPSE_COSINE:
        reasons.append(
            f"two different images have a cosine of {mean_cosine:.4f} on average (warned above {COLLAPSE_COSINE})"
        )
    if not reasons:
        return None
    return (
        f"COLLAPSE: the student gives nearly the same features to all images: {'; '.join(reasons)}. "
        "Standardise the targets, add the prototype losses or KoLeo, or lower the learning rate."
    )
