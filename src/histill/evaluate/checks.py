"""Tables of real tiles that tell, during training and after it, what an encoder is worth.

A *labelled* table (``path,label,slide,split``) is scored by probes, a *paired* one (``path,slide,scanner,x,y``) by
retrieval between scanners. Paths are relative to the table's folder.

Shapes: N tiles, B tiles of a batch, C = 3 colours, H and W pixels, D features.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from histill.errors import DataError
from histill.evaluate.features import Array
from histill.evaluate.probes import cluster_bootstrap, inner_splits, knn_probe, linear_probe
from histill.evaluate.retrieval import paired_retrieval, twins
from histill.tiles.images import UnreadableTileError, decode, read_table

__all__ = ["COLUMNS", "Check", "Unreadable", "find_checks", "kind_of", "load_check"]

Kind = Literal["labelled", "paired"]

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "labelled": ("path", "label", "slide", "split"),
    "paired": ("path", "slide", "scanner", "x", "y"),
}
"""The columns that make a table a check; others are ignored."""

_SPLITS = ("train", "val", "test")
_NEIGHBOURS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A tile of the table that could not be used; no other tile takes its place."""

    path: str
    """As written in the table."""
    reason: str
    """What went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Check:
    """A table with its tiles, decoded and resized once and held in memory. Made by :func:`load_check`."""

    path: Path
    """The table."""
    kind: Kind
    """What it measures."""
    input_px: int
    """Side of the tiles, in pixels."""
    images_NCHW: torch.Tensor
    """uint8, RGB; N x 3 x input_px^2 bytes (3,720 tiles of 112 px: 140 MB)."""
    columns: Mapping[str, Array]
    """The needed columns, as text, one entry per readable tile."""
    unreadable: tuple[Unreadable, ...]
    """Tiles that are missing from ``images_NCHW``."""
    notes: tuple[str, ...]
    """What a reader of the scores should know (unreadable tiles, a slide on both sides of the split)."""

    def features(self, embed: Callable[[torch.Tensor], torch.Tensor], batch: int = 64) -> Array:
        """Embed all tiles, in the table's order.

        Parameters
        ----------
        embed
            uint8 (B, 3, H, W) on the CPU -> (B, D) of any float type, on any device. It runs without gradients.
        batch
            Tiles per call.

        Returns
        -------
        ndarray
            (N, D) float32.
        """
        blocks = []
        with torch.no_grad():
            for start in range(0, len(self.images_NCHW), batch):
                images_BCHW = self.images_NCHW[start : start + batch]
                features_BD = embed(images_BCHW)
                if features_BD.ndim != 2 or len(features_BD) != len(images_BCHW):
                    raise DataError(
                        "an encoder gives one row of features per image",
                        where=self.path,
                        got=f"shape {tuple(features_BD.shape)} for {len(images_BCHW)} images",
                    )
                blocks.append(features_BD.float().cpu().numpy())
        return np.concatenate(blocks)

    def score(self, features_ND: Array) -> dict[str, float]:
        """Score the features of :meth:`features`; all scores lie in -1 to 1, and higher is better.

        Returns
        -------
        dict
            Labelled: ``linear_auc`` with the ends of its 95 % interval clustered by test slide (``linear_auc_low`` and
            ``linear_auc_high``; absent with one test slide), ``linear_balanced_accuracy``, ``knn_auc``,
            ``knn_balanced_accuracy``: fitted on the split ``train``, scored on ``test``; ``val`` is not used.
            Paired: ``top_1``, ``top_10``, ``cosine`` of :func:`~histill.evaluate.retrieval.paired_retrieval`.
        """
        if len(features_ND) != len(self.images_NCHW):
            raise DataError(
                "one feature row per tile is needed",
                where=self.path,
                got=f"{len(features_ND)} rows, {len(self.images_NCHW)} tiles",
            )
        return self._score_labelled(features_ND) if self.kind == "labelled" else self._score_paired(features_ND)

    def _score_labelled(self, features_ND: Array) -> dict[str, float]:
        label, slide, split = (self.columns[name] for name in ("label", "slide", "split"))
        train, test = split == "train", split == "test"
        data = (features_ND[train], label[train], features_ND[test], label[test])
        linear = linear_probe(*data, train_groups_N=slide[train])
        knn = knn_probe(*data, k=_NEIGHBOURS)
        scores = {"linear_auc": linear.auc}
        if len(np.unique(slide[test])) > 1:
            interval = cluster_bootstrap(label[test], linear.scores_MC, linear.classes, slide[test])
            scores |= {"linear_auc_low": interval.low, "linear_auc_high": interval.high}
        return scores | {
            "linear_balanced_accuracy": linear.balanced_accuracy,
            "knn_auc": knn.auc,
            "knn_balanced_accuracy": knn.balanced_accuracy,
        }

    def _score_paired(self, features_ND: Array) -> dict[str, float]:
        found = paired_retrieval(features_ND, self.columns["scanner"], _fields(self.columns))
        return {"top_1": found.top_1, "top_10": found.top_10, "cosine": found.cosine}


def _fields(columns: Mapping[str, Array]) -> Array:
    """Write out the place of each tile: slide, x, y."""
    return np.array([f"{s} x={x} y={y}" for s, x, y in zip(*(columns[n] for n in ("slide", "x", "y")), strict=True)])


def _header(csv_path: Path) -> list[str]:
    try:
        # the needed names are ASCII; that the rest is UTF-8 is asked when the rows are read
        with csv_path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return next(csv.reader(file), [])
    except FileNotFoundError:
        raise DataError("this table does not exist", where=csv_path, remedy="check the path") from None
    except csv.Error as error:
        raise DataError("this table cannot be read", where=csv_path, got=error, allowed="CSV in UTF-8") from None


def _kind(header: list[str]) -> Kind | None:
    """``labelled`` goes first: a labelled table may tell the scanner and the place of its tiles besides."""
    for kind, needed in COLUMNS.items():
        if set(needed) <= set(header):
            return kind
    return None


def kind_of(csv_path: Path) -> Kind:
    """Tell by its columns what a table measures; one that has both sets of columns is ``labelled``.

    Raises
    ------
    DataError
        When the table does not exist or has neither set of columns.
    """
    header = _header(csv_path)
    kind = _kind(header)
    if kind is None:
        raise DataError(
            "the columns of this table make it neither a labelled nor a paired one",
            where=csv_path,
            got=", ".join(header) or "no columns",
            allowed=" or ".join(f"{','.join(needed)} ({kind})" for kind, needed in COLUMNS.items()),
        )
    return kind


def find_checks(tiles_folder: Path) -> list[Path]:
    """List the labelled and paired tables directly in a folder, by name; other CSV files are passed over."""
    return sorted(path for path in tiles_folder.glob("*.csv") if path.is_file() and _kind(_header(path)) is not None)


def _read_tiles(folder: Path, paths: list[str], input_px: int) -> tuple[torch.Tensor, Array, list[Unreadable]]:
    """Decode and resize: uint8 (N, 3, px, px), which of the paths these are, and the others."""
    images_NCHW = torch.empty((len(paths), 3, input_px, input_px), dtype=torch.uint8)
    readable_N = np.ones(len(paths), dtype=bool)
    unreadable = []
    by_size: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}

    def resize(size: tuple[int, ...]) -> None:
        rows, tiles = zip(*by_size.pop(size), strict=True)
        pixels = F.interpolate(torch.stack(tiles).float(), (input_px, input_px), mode="bilinear", antialias=True)
        images_NCHW[list(rows)] = pixels.round().clamp(0, 255).to(torch.uint8)

    for row, path in enumerate(paths):
        try:
            image = torch.from_numpy(decode((folder / path).read_bytes(), path).copy()).permute(2, 0, 1)
        except (UnreadableTileError, OSError) as error:
            readable_N[row] = False
            unreadable.append(Unreadable(path=path, reason=" ".join(str(error).split())))
            continue
        same_size = by_size.setdefault(tuple(image.shape), [])
        same_size.append((row, image))
        if len(same_size) == 64:  # decoded tiles may be much larger than resized ones: never hold them all
            resize(tuple(image.shape))
    for size in list(by_size):
        resize(size)
    return images_NCHW[torch.from_numpy(readable_N)] if unreadable else images_NCHW, readable_N, unreadable


def _refuse_blanks(csv_path: Path, columns: Mapping[str, Array]) -> None:
    for name, values in columns.items():
        if (values == "").any():
            raise DataError(
                f"the column {name} has empty fields",
                where=f"{csv_path}, line {int(np.argmax(values == '')) + 2}",
                got=f"{(values == '').sum()} of {len(values)} rows",
                remedy="fill them in; scores depend on which tiles share a slide, a class or a place",
            )
    wrong = [split for split in np.unique(columns.get("split", [])) if split not in _SPLITS]
    if wrong:
        raise DataError("an unknown split", where=csv_path, got=", ".join(wrong), allowed=", ".join(_SPLITS))


def _refuse_unusable(csv_path: Path, kind: Kind, columns: Mapping[str, Array]) -> None:
    """Find now, before any model has run, what would make :meth:`Check.score` fail."""
    try:
        if kind == "paired":
            if not twins(columns["scanner"], _fields(columns)):
                raise DataError("no field (slide, x, y) was seen by two scanners")
            return
        train, test = columns["split"] == "train", columns["split"] == "test"
        labels, tested = columns["label"][train], columns["label"][test]
        if not set(tested) <= set(labels) or len(set(tested)) < 2:
            raise DataError(
                "a probe needs two classes among the test tiles, and training tiles of each of them",
                got=f"train: {', '.join(sorted(set(labels)))}; test: {', '.join(sorted(set(tested)))}",
            )
        if train.sum() < _NEIGHBOURS:
            raise DataError(f"a probe needs at least {_NEIGHBOURS} training tiles", got=int(train.sum()))
        inner_splits(labels, columns["slide"][train])
    except DataError as error:
        raise DataError(f"this table cannot be scored: {error}", where=csv_path) from error


def load_check(csv_path: Path, input_px: int) -> Check:
    """Read a table, decode its tiles and resize each, as a whole, to ``input_px`` (antialiased, bilinear).

    Everything stays in memory as uint8: N x 3 x ``input_px``^2 bytes.

    Parameters
    ----------
    csv_path
        A labelled or paired table in UTF-8; paths relative to its folder.
    input_px
        Side of the square tiles that the encoders get, in pixels. A tile that is not square is stretched.

    Raises
    ------
    DataError
        When the table is missing, of neither kind or ragged; has an empty field, an unknown split, or one
        field twice under a scanner; or when its readable tiles cannot be scored (a class missing on one side, no
        twins).
    """
    kind = kind_of(csv_path)
    rows = read_table(csv_path, COLUMNS[kind])
    columns = {name: np.array([row[name] for row in rows]) for name in COLUMNS[kind]}
    _refuse_blanks(csv_path, columns)
    images_NCHW, readable_N, unreadable = _read_tiles(csv_path.parent, columns["path"].tolist(), input_px)
    if not len(images_NCHW):
        raise DataError(
            f"none of the {len(rows)} tiles can be read",
            where=csv_path,
            got=f"{unreadable[0].path}: {unreadable[0].reason}",
            remedy="paths are relative to the table's folder",
        )
    columns = {name: values[readable_N] for name, values in columns.items()}
    _refuse_unusable(csv_path, kind, columns)
    notes = []
    if unreadable:
        notes.append(f"{len(unreadable)} of {len(rows)} tiles are unreadable and left out, first {unreadable[0].path}")
    if kind == "labelled":
        slide, split = columns["slide"], columns["split"]
        shared = sorted(set(slide[split == "train"]) & set(slide[split == "test"]))
        if shared:
            notes.append(f"{len(shared)} slides are in both train and test, first {shared[0]}: scores are inflated")
    return Check(
        path=csv_path,
        kind=kind,
        input_px=input_px,
        images_NCHW=images_NCHW,
        columns=columns,
        unreadable=tuple(unreadable),
        notes=tuple(notes),
    )
