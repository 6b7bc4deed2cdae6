"""Which slides a fold trains on, stops on and is scored on.

Shapes: S slides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from histill.errors import DataError
from histill.evaluate.eva.scoring import stopping_split
from histill.evaluate.features import Array
from histill.evaluate.slide_features import LabelTable

__all__ = ["SEED", "Fold", "folds_of", "shared_groups"]

SEED = 0
"""Of the folds and of the slides that a training stops on."""
_SHUFFLES = 10
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """Row numbers of the table, ascending."""

    name: str
    fit: Array
    stop: Array
    """Decide when a training stops: of the table's ``val``, or a fifth of the training patients."""
    test: Array

    @property
    def train(self) -> Array:
        """Both that are not scored."""
        return np.sort(np.concatenate([self.fit, self.stop]))


def folds_of(csv_path: Path, table: LabelTable, count: int) -> list[Fold]:
    """Take the table's folds or its split, or make folds: whole patients (slides), stratified by class.

    Parameters
    ----------
    csv_path, table
        For errors; the table.
    count
        Folds that are made where the table has none.

    Raises
    ------
    DataError
        One class only; a fold that trains on fewer than two patients of a class; a split that is not scorable; too few
        patients for so many folds.
    """
    classes, slides = np.unique(table.label_S, return_counts=True)
    if len(classes) < 2:
        got = f"{classes[0]} for all {slides[0]} slides"
        raise DataError("an area under the ROC curve needs two classes", where=csv_path, got=got)
    if table.split_S is not None:
        return [_of_split(csv_path, table, table.split_S)]
    fold_S = table.fold_S if table.fold_S is not None else _made(csv_path, table, count)
    names = np.unique(fold_S)
    if len(names) < 2:
        raise DataError("one fold cannot be scored by another", where=csv_path, got=f"fold {names[0]} alone")
    return [_fold(csv_path, table, name, fold_S != name, fold_S == name) for name in names.tolist()]


def _made(csv_path: Path, table: LabelTable, count: int) -> Array:
    """Fold (S,) of each slide, as text: the first of some shuffles with every class in every fold."""
    groups = {name: len(np.unique(table.group_S[table.label_S == name])) for name in np.unique(table.label_S).tolist()}
    rarest = min(groups, key=lambda name: groups[name])
    if groups[rarest] >= count:
        for shuffle in range(_SHUFFLES):
            splitter = StratifiedGroupKFold(n_splits=count, shuffle=True, random_state=SEED + shuffle)
            fold_S = np.zeros(len(table.label_S), int)
            for number, (_, rows) in enumerate(splitter.split(fold_S[:, None], table.label_S, table.group_S)):
                fold_S[rows] = number
            if all(len(np.unique(table.label_S[fold_S == k])) == len(groups) for k in range(count)):
                return fold_S.astype(str)
    raise DataError(
        f"{count} folds with every class in each of them cannot be made",
        where=csv_path,
        got=f"{groups[rarest]} {table.unit}s of class {rarest}",
        remedy=f"take fewer folds (--folds {max(2, min(groups[rarest], count - 1))}), or give a column fold",
    )


def _of_split(csv_path: Path, table: LabelTable, split_S: Array) -> Fold:
    if wrong := sorted(set(split_S.tolist()) - set(_SPLITS)):
        raise DataError("an unknown split", where=csv_path, got=", ".join(wrong), allowed=", ".join(_SPLITS))
    test = split_S == "test"
    if len(np.unique(table.label_S[test])) < 2:
        got = ", ".join(np.unique(table.label_S[test])) or "no test slides"
        raise DataError("an area under the ROC curve needs two classes among the test slides", where=csv_path, got=got)
    stop = split_S == "val"
    return _fold(csv_path, table, "test", ~test, test, stop if stop.any() else None)


def _fold(
    csv_path: Path, table: LabelTable, name: str, train_S: Array, test_S: Array, stop_S: Array | None = None
) -> Fold:
    label_S, where, train = table.label_S, f"{csv_path}, fold {name}", np.flatnonzero(train_S)
    if stop_S is not None:
        train_S = train_S & ~stop_S
        if missing := sorted(set(label_S.tolist()) - set(label_S[stop_S].tolist())):
            raise DataError("val lacks a class", where=csv_path, got=missing[0], remedy="give it one, or leave val out")
    for label in np.unique(label_S).tolist():
        count = len(np.unique(table.group_S[train_S & (label_S == label)]))
        if count < 2:
            raise DataError(
                f"a fold trains on fewer than 2 {table.unit}s of a class",
                where=where,
                got=f"{count} of class {label}",
                remedy="give it more slides of this class, or take other folds",
            )
    if stop_S is not None:
        return Fold(name=name, fit=np.flatnonzero(train_S), stop=np.flatnonzero(stop_S), test=np.flatnonzero(test_S))
    try:
        fit, stop = stopping_split(label_S[train], table.group_S[train], seed=SEED)
    except DataError as error:
        raise DataError(f"this fold cannot be trained: {error}", where=where) from error
    return Fold(name=name, fit=train[fit], stop=train[stop], test=np.flatnonzero(test_S))


def shared_groups(table: LabelTable, folds: list[Fold]) -> list[str]:
    """Say which patients are trained on and scored in the same fold, if any."""
    shared = sorted(
        {each for fold in folds for each in np.intersect1d(table.group_S[fold.train], table.group_S[fold.test])}
    )
    return (
        [f"{len(shared)} {table.unit}s in training and test, first {shared[0]}: scores are inflated"] if shared else []
    )
