"""The area under the ROC curve as a measure whose slides or patients can be drawn again.

The area of a resample is a ratio of forms in the counts w of the clusters, ``w' W w / w' P w``, with ``W`` the
wins of positives of one cluster over negatives of another (ties half) and ``P`` their pairs: exact, and cheap for any
number of images. Where images were scored by several classifiers, as the folds of a cross-validation are, only pairs of
the same classifier can be meant to count: scores of two of them share no scale.

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
    pairs_CSS: NDArray[np.float64]
    """Pairs that could be won."""
    strata: None = None

    @classmethod
    def of(
        cls, y_M: Array, scores_MC: Array, classes: Sequence[Any], groups_M: Array, folds_M: Array | None = None
    ) -> RocArea:
        """Count wins.

        Parameters
        ----------
        y_M, scores_MC, classes
            Labels, class scores and the classes of their columns.
        groups_M
            Slide (or patient) of each image.
        folds_M
            Which classifier scored it: pairs of two are left out then.
        """
        names, code_M = np.unique(np.asarray(groups_M).astype(str), return_inverse=True)
        folds_M = np.zeros(len(code_M), int) if folds_M is None else np.asarray(folds_M)
        wins, pairs = [], []
        for column, name in enumerate(classes):
            positive_M = np.asarray(y_M) == name
            if not positive_M.any() or positive_M.all():
                continue
            wins_SS, pairs_SS = np.zeros((2, len(names), len(names)))
            for fold in np.unique(folds_M):
                rows = folds_M == fold
                own = (positive_M & rows, ~positive_M & rows)
                wins_SS += _wins(scores_MC[:, column], *own, code_M, len(names))
                pairs_SS += np.outer(*(np.bincount(code_M[side], minlength=len(names)) for side in own))
            wins.append(wins_SS)
            pairs.append(pairs_SS)
        shape = -1, len(names), len(names)
        return cls(
            names=tuple(names.tolist()),
            wins_CSS=np.array(wins, np.float64).reshape(shape),
            pairs_CSS=np.array(pairs, np.float64).reshape(shape),
        )

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RocArea:
        """Take ``label``, ``scores``, ``classes``, ``group``, ``fold`` of a result; DataError where they do not fit."""
        try:
            label, group, fold = (np.array(plain[name]) for name in ("label", "group", "fold"))
            scores = np.array(plain["scores"], np.float64)
            if scores.shape != (len(label), len(plain["classes"])) or not len(group) == len(label) == len(fold):
                raise ValueError(f"scores {scores.shape}, {len(label)} labels, {len(plain['classes'])} classes")
            return cls.of(label, scores, plain["classes"], group, fold)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("these are no scores of slides", got=repr(error)) from None

    @property
    def shape(self) -> tuple[int, ...]:
        """Classes and clusters."""
        return self.pairs_CSS.shape[:2]

    @property
    def value(self) -> float:
        """The area itself: every cluster once."""
        return float(self.values(np.ones((1, len(self.names))))[0])

    def values(self, drawn_BS: Array) -> NDArray[np.float64]:
        """(B,) areas when cluster s counts ``drawn_BS[b, s]`` times; NaN where a resample holds one class only."""
        drawn_BS = drawn_BS.astype(np.float64)
        total_B, defined_B = np.zeros(len(drawn_BS)), np.zeros(len(drawn_BS))
        for wins_SS, pairs_SS in zip(self.wins_CSS, self.pairs_CSS, strict=True):
            won_B, pairs_B = (((drawn_BS @ form_SS) * drawn_BS).sum(axis=1) for form_SS in (wins_SS, pairs_SS))
            total_B += np.divide(won_B, pairs_B, out=np.zeros_like(won_B), where=pairs_B > 0)
            defined_B += pairs_B > 0
        values_B: NDArray[np.float64] = np.divide(
            total_B, defined_B, out=np.full(len(drawn_BS), np.nan), where=defined_B > 0
        )
        return values_B


def _wins(score_M: Array, positive_M: Array, negative_M: Array, code_M: Array, groups: int) -> Array:
    """How often positives of slide s score above negatives of slide t, ties half: (S, S)."""
    wins_SS = np.zeros((groups, groups))
    positive_scores, positive_codes = score_M[positive_M], code_M[positive_M]
    for t in np.unique(code_M[negative_M]):
        negatives = np.sort(score_M[negative_M & (code_M == t)])
        below = np.searchsorted(negatives, positive_scores, side="left")
        not_above = np.searchsorted(negatives, positive_scores, side="right")
        wins_SS[:, t] = np.bincount(positive_codes, weights=(below + not_above) / 2, minlength=groups)
    return wins_SS
