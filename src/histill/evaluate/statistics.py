"""How sure a number is: bootstrap over slides or patients, for one encoder, between two, and of a retention.

Tiles of one slide are alike, so that slides (or patients) are drawn again, with all that belongs to them. Nearly every
measure is a mean of ratios of sums: ``mean over c of (sum over s of a_sc) / (sum over s of b_sc)``, with cluster
s and component c. A plain mean has one component; balanced accuracy has one per class (right answers over images); a
mean over tasks has one per task. So a resample costs two small products, whatever the number of tiles, and what has to
be kept for a later comparison is small enough for a JSON file. Others say themselves what they are on a resample
(:class:`Measure`; PLISM's medians: :mod:`histill.evaluate.plism.groups`; areas under the ROC curve:
:mod:`histill.evaluate.areas`).

Shapes: N images, S clusters, C components, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError
from histill.evaluate.features import Array

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "SEED",
    "Clusters",
    "Comparison",
    "Estimate",
    "Measure",
    "accuracy_clusters",
    "clusters_of",
    "draws",
    "estimate",
    "paired_test",
    "retention_percent",
]

RESAMPLES = 2000
"""Bootstrap resamples."""
SEED = 0
"""Of the resamples: the same clusters are drawn for every encoder."""
LEVEL = 0.95
"""Coverage of an interval."""
FEWEST = 2
"""Clusters that an interval needs at least; with under about 10 it is known to be too narrow."""


class Measure(Protocol):
    """A number of some clusters that can be computed again when they are drawn again."""

    @property
    def names(self) -> tuple[str, ...]:
        """Clusters (S): slides or patients."""
        ...

    @property
    def strata(self) -> tuple[str, ...] | None:
        """Where clusters are drawn within groups of them: the group of each."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """What two encoders on the same data have in common besides the names."""
        ...

    @property
    def value(self) -> float:
        """The number itself."""
        ...

    def values(self, drawn_BS: Array) -> NDArray[np.float64]:
        """(B,) numbers when cluster s counts ``drawn_BS[b, s]`` times; NaN where there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clusters:
    """A measure's sums per cluster."""

    names: tuple[str, ...]
    """Slides or patients (S)."""
    numerator_SC: NDArray[np.float64]
    denominator_SC: NDArray[np.float64]
    """The sums a and b above."""
    strata: tuple[str, ...] | None = None
    """Where clusters are drawn within groups of them (folds within a task): the group of each cluster."""

    def values(self, drawn_BS: Array) -> NDArray[np.float64]:
        """Compute the measure when cluster s counts ``drawn_BS[b, s]`` times: (B,).

        A component without images in a resample is left out of its mean; NaN when all are.
        """
        below_BC = drawn_BS @ self.denominator_SC
        ratio_BC = np.divide(drawn_BS @ self.numerator_SC, below_BC, out=np.zeros_like(below_BC), where=below_BC > 0)
        present_B = (below_BC > 0).sum(axis=1)
        values_B: NDArray[np.float64] = np.full(len(drawn_BS), np.nan)
        np.divide(ratio_BC.sum(axis=1), present_B, out=values_B, where=present_B > 0)
        return values_B

    @property
    def shape(self) -> tuple[int, ...]:
        """Clusters and components."""
        return self.denominator_SC.shape

    @property
    def value(self) -> float:
        """The measure itself: every cluster once."""
        return float(self.values(np.ones((1, len(self.names))))[0])

    def to_plain(self) -> dict[str, Any]:
        """Plain values for JSON, from which :meth:`from_plain` makes the same object."""
        return {
            "names": list(self.names),
            "numerator": self.numerator_SC.tolist(),
            "denominator": self.denominator_SC.tolist(),
            "strata": None if self.strata is None else list(self.strata),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Clusters:
        """Read what :meth:`to_plain` wrote; DataError when it is something else."""
        try:
            names, strata = tuple(plain["names"]), plain["strata"]
            above, below = (np.array(plain[side], np.float64) for side in ("numerator", "denominator"))
            if above.ndim != 2 or above.shape != below.shape or len(above) != len(names):
                raise ValueError(f"shapes {above.shape} and {below.shape} for {len(names)} names")
            return cls(
                names=names,
                numerator_SC=above,
                denominator_SC=below,
                strata=None if strata is None else tuple(strata),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("these are no sums per cluster", got=repr(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its percentile bootstrap interval, and how it was drawn."""

    value: float
    low: float | None
    high: float | None
    """The ends; None with fewer than two clusters, or when less than half of the resamples have a number."""
    clusters: int
    resamples: int
    """Resamples on which the number was defined."""
    seed: int
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Encoder A minus encoder B on the same clusters."""

    difference: float
    low: float | None
    high: float | None
    """Interval of the difference; None as in :class:`Estimate`."""
    p: float | None
    """Two-sided."""
    clusters: int
    resamples: int
    seed: int
    level: float


def clusters_of(numerator_NC: Array, denominator_NC: Array, groups_N: Sequence[Any] | Array) -> Clusters:
    """Sum per cluster.

    Parameters
    ----------
    numerator_NC, denominator_NC
        What each image adds to both sums; one-dimensional arrays are one component.
    groups_N
        Slide or patient of each image.

    Raises
    ------
    DataError
        Lengths differ, there are no images, or a value is not finite.
    """
    above_NC, below_NC = (np.asarray(x, np.float64) for x in (numerator_NC, denominator_NC))
    above_NC, below_NC = (x[:, None] if x.ndim == 1 else x for x in (above_NC, below_NC))
    groups_N = np.asarray(groups_N).astype(str)
    if above_NC.shape != below_NC.shape or len(groups_N) != len(above_NC) or not len(groups_N):
        raise DataError(
            "sums per cluster need two values and a group per image",
            got=f"{above_NC.shape}, {below_NC.shape}, {len(groups_N)} groups",
        )
    if not (np.isfinite(above_NC) & np.isfinite(below_NC)).all():
        raise DataError("sums per cluster need finite values", got="NaN or infinity")
    names, code_N = np.unique(groups_N, return_inverse=True)
    sums = [np.zeros((len(names), above_NC.shape[1])) for _ in range(2)]
    for total, values in zip(sums, (above_NC, below_NC), strict=True):
        np.add.at(total, code_N, values)
    return Clusters(names=tuple(names.tolist()), numerator_SC=sums[0], denominator_SC=sums[1])


def accuracy_clusters(y_N: Array, right_N: Array, groups_N: Array) -> Clusters:
    """Balanced accuracy, the mean recall over the classes that occur in ``y_N``.

    Parameters
    ----------
    y_N
        Labels.
    right_N
        Whether each answer is right; or, for a mean over several fits, how often (0 to 1).
    groups_N
        Slide or patient.
    """
    member_NC = (np.asarray(y_N)[:, None] == np.unique(y_N)[None]).astype(np.float64)
    return clusters_of(member_NC * np.asarray(right_N, np.float64)[:, None], member_NC, groups_N)


def draws(
    count: int, *, resamples: int = RESAMPLES, seed: int = SEED, strata: Sequence[str] | None = None
) -> NDArray[np.float64]:
    """How often each of ``count`` clusters is in each resample: (B, S).

    As many clusters are drawn with replacement as there are; within each stratum, where there are any.

    Parameters
    ----------
    count
        S.
    resamples, seed
        B, and the seed: equal arguments give equal draws.
    strata
        Stratum of each cluster; None for a single one.

    Returns
    -------
    ndarray
        float64 (B, S), whole numbers; rows add up to S.
    """
    generator = np.random.default_rng(seed)
    drawn_BS = np.zeros((resamples, count))
    labels_S = np.zeros(count, int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    for stratum in range(labels_S.max() + 1):
        member_S = np.flatnonzero(labels_S == stratum)
        share = np.full(len(member_S), 1 / len(member_S))
        drawn_BS[:, member_S] = generator.multinomial(len(member_S), share, size=resamples)
    return drawn_BS


def _drawn(measure: Measure, resamples: int, seed: int) -> NDArray[np.float64] | None:
    """None when a resample could only be the sample itself."""
    labels = measure.strata or ("",) * len(measure.names)
    if max(labels.count(label) for label in set(labels)) < FEWEST:
        return None
    return draws(len(measure.names), resamples=resamples, seed=seed, strata=measure.strata)


def _ends(values_B: Array, level: float) -> tuple[float | None, float | None, int]:
    """Percentiles of the resamples that have a number, and how many these are."""
    defined = values_B[np.isfinite(values_B)]
    if 2 * len(defined) < len(values_B):
        return None, None, len(defined)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), len(defined)


def estimate(measure: Measure, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL) -> Estimate:
    """Value and percentile interval of one measure (Efron and Tibshirani 1993, chapter 13).

    Parameters
    ----------
    measure
        What is estimated.
    resamples, seed, level
        Number of resamples, their seed, and the coverage (0 to 1). Equal arguments give equal intervals.
    """
    drawn_BS = _drawn(measure, resamples, seed)
    low, high, defined = (None, None, 0) if drawn_BS is None else _ends(measure.values(drawn_BS), level)
    return Estimate(
        value=measure.value,
        low=low,
        high=high,
        clusters=len(measure.names),
        resamples=defined,
        seed=seed,
        level=level,
    )


def _same_data(a: Measure, b: Measure) -> None:
    if a.names != b.names or a.strata != b.strata or a.shape != b.shape:
        odd = sorted(set(a.names) ^ set(b.names))
        raise DataError(
            "two encoders can be compared on the same slides only",
            got=f"{len(a.names)} and {len(b.names)} clusters" + (f", first that differs {odd[0]}" if odd else ""),
            remedy="score both on the same data",
        )


def paired_test(
    a: Measure, b: Measure, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> Comparison:
    """Compare two encoders on the same slides: both see the same resamples, so that what slides share cancels.

    The interval is the percentile interval of the resampled differences. The p-value asks how often the resampled
    difference lies as far from the observed one as that lies from 0:
    ``(1 + #{|d* - d| >= |d|}) / (1 + B)`` (Davison and Hinkley 1997, sections 4.2.3 and 4.4), so that it is never 0.

    Parameters
    ----------
    a, b
        The same measure of both encoders.
    resamples, seed, level
        See :func:`estimate`.

    Raises
    ------
    DataError
        The clusters are not the same.
    """
    _same_data(a, b)
    difference, p, low, high, defined = a.value - b.value, None, None, None, 0
    drawn_BS = _drawn(a, resamples, seed)
    if drawn_BS is not None:
        found_B = a.values(drawn_BS) - b.values(drawn_BS)
        low, high, defined = _ends(found_B, level)
        found_B = found_B[np.isfinite(found_B)]
        # equal distances count as equal, though they differ by rounding
        rounding = 8 * np.finfo(np.float64).eps * max(abs(a.value), abs(b.value))
        far_B = np.abs(found_B - difference) >= abs(difference) - rounding
        p = None if low is None else float(1 + far_B.sum()) / (1 + defined)
    return Comparison(
        difference=difference,
        low=low,
        high=high,
        p=p,
        clusters=len(a.names),
        resamples=defined,
        seed=seed,
        level=level,
    )


def retention_percent(
    student: Measure, teacher: Measure, *, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL
) -> Estimate:
    """100 x student / teacher, with the interval of the ratio on the same resamples.

    Parameters
    ----------
    student, teacher
        The same measure of both on the same data.
    resamples, seed, level
        See :func:`estimate`.

    Returns
    -------
    Estimate
        In percent; 100 is as good as the teacher.

    Raises
    ------
    DataError
        The clusters are not the same, or the teacher's value is not above 0.
    """
    _same_data(student, teacher)
    if not teacher.value > 0:
        raise DataError("a retention needs a teacher that scores above 0", got=teacher.value)
    low, high, defined = None, None, 0
    drawn_BS = _drawn(student, resamples, seed)
    if drawn_BS is not None:
        below_B = teacher.values(drawn_BS)
        ratio_B = np.divide(
            100 * student.values(drawn_BS), below_B, out=np.full(len(below_B), np.nan), where=below_B > 0
        )
        low, high, defined = _ends(ratio_B, level)
    return Estimate(
        value=100 * student.value / teacher.value,
        low=low,
        high=high,
        clusters=len(student.names),
        resamples=defined,
        seed=seed,
        level=level,
    )
