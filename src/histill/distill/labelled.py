"""Labelled sets that join a run: each has a linear head on the student's class token.

Shapes: B tiles, S student channels, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.distill.config import LabelledTask
from histill.distill.views import ViewConfig, make_views
from histill.errors import DataError
from histill.tiles.images import ImageFolder, paths_of_table, read_table
from histill.tiles.loader import Batch, batches

__all__ = ["LabelledBatch", "LabelledHead", "LabelledSet", "labelled_batch", "open_labelled"]

_STREAM = 1 << 41  # positions of labelled tiles, far from those of training and fitting


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """The tiles of one labelled set and what is known of them."""

    name: str
    task: LabelledTask
    source: ImageFolder
    targets_N: NDArray[np.float32]
    """Number of the class, or the standardised value."""
    classes: tuple[str, ...]
    """Names of the classes, sorted; empty for regression."""
    class_weights_C: NDArray[np.float32]
    """Weight of each class: all classes count the same in a mean over the set."""
    mean_std: tuple[float, float]
    """Of the values of a regression."""

    def targets_of(self, positions_B: NDArray[np.int64], seed: int) -> Tensor:
        """Targets of the tiles at these places of the shuffled stream."""
        return torch.from_numpy(self.targets_N[self.source.tile_at(positions_B, seed)])

    def batches(
        self, positions_of_step: Callable[[int], NDArray[np.int64]], first: int, last: int, seed: int, workers: int
    ) -> Generator[Batch]:
        """One batch a step, decoded ahead."""
        return batches(self.source, positions_of_step, first, last, seed, workers=workers, ahead=2)


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """One step's tiles of one labelled set, on the device."""

    name: str
    images_BCHW: Tensor
    """Float, 0 to 1."""
    targets_B: Tensor
    share: float
    """Tiles here / tiles over all ranks; 0 for the black image that stands for none, so that every head takes part."""
    seen: bool
    """Whether any rank has a tile."""


class LabelledHead(nn.Module):
    """A linear layer on the class token, and its loss."""

    class_weights_C: Tensor

    def __init__(self, dim: int, labelled: LabelledSet) -> None:
        super().__init__()
        self.weight = labelled.task.weight
        self.classification = labelled.task.kind == "classification"
        self.linear = nn.Linear(dim, len(labelled.classes) if self.classification else 1)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("class_weights_C", torch.from_numpy(labelled.class_weights_C), persistent=False)

    def forward(self, cls_BS: Tensor, targets_B: Tensor) -> Tensor:
        """Mean loss over the tiles, float32; classes weigh the same in the set, not in each batch."""
        predicted_BC: Tensor = self.linear(cls_BS).float()
        if not self.classification:
            return F.mse_loss(predicted_BC.squeeze(1), targets_B)
        entropy_B = F.cross_entropy(predicted_BC, targets_B.long(), reduction="none")
        # Not torch's own weighted mean: it divides by the weights in the batch, and two ranks would not equal one.
        return (entropy_B * self.class_weights_C[targets_B.long()]).mean()


def open_labelled(task: LabelledTask) -> LabelledSet:
    """Read a labelled set: its tiles lie beside the table, or at the table's paths.

    Raises
    ------
    DataError
        Missing columns, a single class, a value that is no number, no rows for training.
    """
    folder = task.table.parent
    rows = read_table(task.table, ["path", task.column])
    value_of: dict[str, str] = {}
    for line, (path, row) in enumerate(zip(paths_of_table(task.table, rows, folder), rows, strict=True), start=2):
        where, value = f"{task.table}, line {line}, column {task.column}", row[task.column].strip()
        if value.lower() in ("", "nan"):
            raise DataError("a label is missing", where=where, got=repr(row[task.column]), remedy="leave the row out")
        if value_of.setdefault(path, value) != value:
            raise DataError("a tile has two labels", where=where, got=f"{value_of[path]} and {value}: {path}")
    testing = [row for row in rows if row.get("split") == "test"]
    if len(testing) == len(rows):
        raise DataError(
            "a labelled set has no rows to learn from", where=task.table, got=f"{len(rows)} rows of split test"
        )
    source = ImageFolder.scan(folder, table=task.table, hold_out=paths_of_table(task.table, testing, folder))
    values = [value_of[source.name(index)] for index in range(len(source))]
    targets_N, classes, weights_C, mean_std = _targets(values, task)
    return LabelledSet(task.table.stem, task, source, targets_N, classes, weights_C, mean_std)


def _targets(
    values: Sequence[str], task: LabelledTask
) -> tuple[NDArray[np.float32], tuple[str, ...], NDArray[np.float32], tuple[float, float]]:
    if task.kind == "classification":
        classes = tuple(sorted(set(values)))
        if len(classes) < 2:
            raise DataError(
                "a classification needs two classes",
                where=f"{task.table}, column {task.column}",
                got=", ".join(classes),
            )
        number = {name: index for index, name in enumerate(classes)}
        targets_N = np.array([number[value] for value in values])
        counts_C = np.bincount(targets_N, minlength=len(classes))
        weights_C = len(values) / (len(classes) * counts_C)
        return targets_N.astype(np.float32), classes, weights_C.astype(np.float32), (0.0, 1.0)
    try:
        numbers_N = np.array([float(value) for value in values])
    except ValueError as error:
        raise DataError(
            "a value to regress is no number", where=f"{task.table}, column {task.column}", got=error
        ) from None
    mean, std = float(numbers_N.mean()), float(numbers_N.std())
    if not (math.isfinite(mean) and std > 0):
        raise DataError(
            "the values to regress are all the same, or not finite",
            where=f"{task.table}, column {task.column}",
            got=mean,
        )
    return ((numbers_N - mean) / std).astype(np.float32), (), np.ones(0, np.float32), (mean, std)


def _view_config(views: ViewConfig) -> ViewConfig:
    """How labelled tiles are shown: nearly whole and not bent, so that what the label is about stays in sight."""
    return dataclasses.replace(
        views, n_global=1, n_local=0, global_area=(0.7, 1.0), aspect=(1.0, 1.0), teacher_view="same"
    )


def labelled_batch(
    labelled: LabelledSet, batch: Batch, views: ViewConfig, seed: int, device: torch.device, all_tiles: int
) -> LabelledBatch:
    """Make a batch's views and look up its targets.

    Parameters
    ----------
    labelled, batch
        The set, and its tiles of this rank.
    views
        Colours and flips as in training; a single crop of 70 % of a tile or more, not bent.
    seed
        Of the run.
    device
        Where images and targets go.
    all_tiles
        Tiles of this set over all ranks.
    """
    if not len(batch.positions_B):
        image_1CHW = torch.zeros(1, 3, views.global_px, views.global_px, device=device)
        return LabelledBatch(labelled.name, image_1CHW, torch.zeros(1, device=device), 0.0, all_tiles > 0)
    made = make_views(
        batch.tiles_BCHW.to(device), batch.sizes_B2, batch.positions_B + _STREAM, _view_config(views), seed
    )
    targets_B = labelled.targets_of(batch.positions_B, seed).to(device)
    return LabelledBatch(labelled.name, made.global_GBCHW[0], targets_B, len(batch.positions_B) / all_tiles, True)
