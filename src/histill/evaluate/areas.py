"""The area under the ROC curve as a measure whose slides or patients can be drawn again.

The area of a resample is a quadratic form in the counts w of the clusters, ``w' W w / (w'p w'n)``, with ``W`` the wins
of positives of one cluster over negatives of another (ties half), p and n positives and negatives: exact, and cheap for
any number of images.

Shapes: M images, C classes, S clusters, B resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError
from histill.evaluate.features import Array

__all__ = ["RocArea"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RocArea:
    """Mean one-versus-rest area over the classes that occur and do not fill a resample; a ``Measure``."""

    names: tuple[str, ...]
    """Slides or patients (S)."""
    wins_CSS: NDArray[np.float64]
    positive_CS: NDArray[np.float64]
    negative_CS: NDArray[np.float64]
    """Images of the class and of the others."""
    strata: None = None

    @classmethod
    def of(cls, y_M: Array, scores_MC: Array, classes: Sequence[Any], groups_M: Array) -> RocArea:
        """Count wins.

        Parameters
        ----------
        y_M, scores_MC, classes
            Labels, class scores and the classes of their columns.
        groups_M
            Slide (or patient) of each image.
        """
        names, code_M = np.unique(np.asarray(groups_M).astype(str), return_inverse=True)
        wins, positive, negative = [], [], []
        for column, name in enumerate(classes):
            positive_M = np.asarray(y_M) == name
            if positive_M.any() and not positive_M.all():
                wins.append(_wins(scores_MC[:, column], positive_M, code_M, len(names)))
                positive.append(np.bincount(code_M[positive_M], minlength=len(names)))
                negative.append(np.bincount(code_M[~positive_M], minlength=len(names)))
        shape = -1, len(names)
        return cls(
            names=tuple(names.tolist()),
            wins_CSS=np.array(wins, np.float64).reshape(*shape, len(names)),
            positive_CS=np.array(positive, np.float64).reshape(shape),
            negative_CS=np.array(negative, np.float64).reshape(shape),
        )

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RocArea:
        """Take ``label``, ``scores``, ``classes`` and ``group`` of a result; DataError when they are something else."""
        try:
            label, group = np.array(plain["label"]), np.array(plain["group"])
            scores = np.array(plain["scores"], np.float64)
            if scores.shape != (len(label), len(plain["classes"])) or len(group) != len(label):
                raise ValueError(f"scores {scores.shape}, {len(label)} labels, {len(plain['classes'])} classes")
            return cls.of(label, scores, plain["classes"], group)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("these are no scores of slides", got=repr(error)) from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Classes and clusters."""
        return self.positive_CS.shape

    @property
    def value(self) -> float:
        """The area itself: every cluster once."""
        return float(self.values(np.ones((1, len(self.names))))[0])

    def values(self, drawn_BS: Array) -> NDArray[np.float64]:
        """(B,) areas when cluster s counts ``drawn_BS[b, s]`` times; NaN where a resample holds one class only."""
        drawn_BS = drawn_BS.astype(np.float64)
        total_B, defined_B = np.zeros(len(drawn_BS)), np.zeros(len(drawn_BS))
        for wins_SS, positive_S, negative_S in zip(self.wins_CSS, self.positive_CS, self.negative_CS, strict=True):
            pairs_B = (drawn_BS @ positive_S) * (drawn_BS @ negative_S)
            won_B = ((drawn_BS @ wins_SS) * drawn_BS).sum(axis=1)
            total_B += np.divide(won_B, pairs_B, out=np.zeros_like(won_B), where=pairs_B > 0)
            defined_B += pairs_B > 0
        values_B: NDArray[np.float64] = np.divide(
            total_B, defined_B, out=np.full(len(drawn_BS), np.nan), where=defined_B > 0
        )
        return values_B


def _wins(score_M: Array, positive_M: Array, code_M: Array, groups: int) -> Array:
    """How often positives of slide s score above negatives of slide t, ties half: (S, S)."""
    wins_SS = np.zeros((groups, groups))
    positive_scores, positive_codes = score_M[positive_M], code_M[positive_M]
    for t in np.unique(code_M[~positive_M]):
        negatives = np.sort(score_M[~positive_M & (code_M == t)])
        below = np.searchsorted(negatives, positive_scores, side="left")
        not_above = np.searchsorted(negatives, positive_scores, side="right")
        wins_SS[:, t] = np.bincount(positive_codes, weights=(below + not_above) / 2, minlength=groups)
    return wins_SS
