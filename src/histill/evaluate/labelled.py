"""What a labelled table says of features: the probes of the benchmark ``tiles`` and of the checks during training.

Both call the same functions here, so that a number of a training's log is that of ``histill evaluate tiles`` on the
same features.

Shapes: N tiles, M test tiles, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histill.errors import DataError
from histill.evaluate.features import Array
from histill.evaluate.probes import Interval, ProbeResult, cluster_bootstrap, inner_splits, knn_probe, linear_probe
from histill.evaluate.statistics import RESAMPLES, SEED

__all__ = ["NEIGHBOURS", "Labelled", "refuse_unscorable", "shared_note", "unit_of"]

NEIGHBOURS = 20
"""Training tiles that vote in the nearest-neighbour probe."""
_SPLITS = ("train", "val", "test")


def unit_of(columns: Mapping[str, Array]) -> str:
    """What is drawn again for an interval and kept whole when the strength is chosen: ``patient`` where known."""
    return "patient" if "patient" in columns else "slide"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelled:
    """Features of the splits ``train`` and ``test``, with what their rows mean; ``val`` is not used."""

    x_train_ND: Array
    y_train_N: Array
    groups_train_N: Array
    """Patients or slides."""
    x_test_MD: Array
    y_test_M: Array
    groups_test_M: Array

    @classmethod
    def of(cls, columns: Mapping[str, Array], features_ND: Array) -> Labelled:
        """Take the rows of both splits.

        Parameters
        ----------
        columns
            ``label``, ``slide``, ``split`` and, where known, ``patient``, one entry per tile.
        features_ND
            One row per tile, any float type.
        """
        train, test = (columns["split"] == side for side in ("train", "test"))
        label, groups = columns["label"], columns[unit_of(columns)]
        return cls(
            x_train_ND=features_ND[train],
            y_train_N=label[train],
            groups_train_N=groups[train],
            x_test_MD=features_ND[test],
            y_test_M=label[test],
            groups_test_M=groups[test],
        )

    @property
    def data(self) -> tuple[Array, Array, Array, Array]:
        """The arguments of a probe."""
        return self.x_train_ND, self.y_train_N, self.x_test_MD, self.y_test_M

    def linear(self) -> ProbeResult:
        """Fit the linear probe; its strength is chosen on training patients or slides that the fit has not seen."""
        return linear_probe(*self.data, train_groups_N=self.groups_train_N)

    def knn(self) -> ProbeResult:
        """Let the nearest training tiles vote."""
        return knn_probe(*self.data, k=NEIGHBOURS)

    def auc_interval(self, probe: ProbeResult) -> Interval | None:
        """Give the 95 % interval of a probe's AUC over test patients or slides; None when there is only one."""
        if len(np.unique(self.groups_test_M)) < 2:
            return None
        return cluster_bootstrap(
            self.y_test_M, probe.scores_MC, probe.classes, self.groups_test_M, resamples=RESAMPLES, seed=SEED
        )


def refuse_unscorable(csv_path: Path, columns: Mapping[str, Array]) -> None:
    """Find now, before any tile is embedded, what would make a probe fail.

    Raises
    ------
    DataError
        An unknown split, a class that is missing on one side, or too few training tiles, patients or slides.
    """
    label, split = columns["label"], columns["split"]
    if wrong := sorted(set(split.tolist()) - set(_SPLITS)):
        raise DataError("an unknown split", where=csv_path, got=", ".join(wrong), allowed=", ".join(_SPLITS))
    train, test = (set(label[split == side].tolist()) for side in ("train", "test"))
    if not test <= train or len(test) < 2:
        raise DataError(
            "a probe needs two classes among the test tiles, and training tiles of each of them",
            where=csv_path,
            got=f"train: {', '.join(sorted(train))}; test: {', '.join(sorted(test))}",
        )
    fitted_N = split == "train"
    if fitted_N.sum() < NEIGHBOURS:
        raise DataError(f"a probe needs at least {NEIGHBOURS} training tiles", where=csv_path, got=int(fitted_N.sum()))
    try:
        inner_splits(label[fitted_N], columns[unit_of(columns)][fitted_N])
    except DataError as error:
        raise DataError(f"this table cannot be scored: {error}", where=csv_path) from error


def shared_note(columns: Mapping[str, Array]) -> list[str]:
    """Say which patients or slides are on both sides of the split, if any."""
    unit = unit_of(columns)
    train, test = (set(columns[unit][columns["split"] == side].tolist()) for side in ("train", "test"))
    shared = sorted(train & test)
    return [f"{len(shared)} {unit}s are in train and test, first {shared[0]}: scores are inflated"] if shared else []
