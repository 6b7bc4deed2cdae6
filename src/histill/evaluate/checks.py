"""Tables of real tiles that tell during training what an encoder is worth, with the tiles held in memory.

A *labelled* table (``path,label,slide,split`` and, where known, ``patient``) is scored by probes, a *paired* one
(``path,slide,scanner,x,y``) by retrieval between scanners. Paths are relative to the table's folder. Columns, tiles and
scores come from the functions of ``histill evaluate tiles`` and ``paired``: the same encoder at the same side has the
same numbers there.

Shapes: N tiles, B tiles of a batch, C = 3 colours, H and W pixels, D features.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from histill.errors import DataError
from histill.evaluate.features import Array
from histill.evaluate.labelled import Labelled, refuse_unscorable, shared_note
from histill.evaluate.retrieval import fields_of, paired_retrieval, twins
from histill.evaluate.table_tiles import AT_ONCE, COLUMNS, Kind, none_readable, read_columns, resized, unreadable_note
from histill.tiles.images import UnreadableTileError, decode

__all__ = ["COLUMNS", "Check", "Unreadable", "find_checks", "kind_of", "load_check"]


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

        Raises
        ------
        DataError
            ``embed`` gives something else than a row for each image.
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

        Parameters
        ----------
        features_ND
            Any float type, a row for each tile.

        Returns
        -------
        dict
            Labelled: ``linear_auc`` with the ends of its 95 % interval over the test patients, or slides where the
            table has no patients (``linear_auc_low`` and ``linear_auc_high``; absent with a single one),
            ``linear_balanced_accuracy``, ``knn_auc``, ``knn_balanced_accuracy``: fitted on the split ``train``, scored
            on ``test``; ``val`` is not used.
            Paired: ``top_1``, ``top_10``, ``cosine`` of :func:`~histill.evaluate.retrieval.paired_retrieval`.

        Raises
        ------
        DataError
            Another number of rows, or a feature that is not finite.
        """
        if len(features_ND) != len(self.images_NCHW):
            raise DataError(
                "one feature row per tile is needed",
                where=self.path,
                got=f"{len(features_ND)} rows, {len(self.images_NCHW)} tiles",
            )
        return self._score_labelled(features_ND) if self.kind == "labelled" else self._score_paired(features_ND)

    def _score_labelled(self, features_ND: Array) -> dict[str, float]:
        labelled = Labelled.of(self.columns, features_ND)
        linear, knn = labelled.linear(), labelled.knn()
        scores = {"linear_auc": linear.auc}
        if interval := labelled.auc_interval(linear):
            scores |= {"linear_auc_low": interval.low, "linear_auc_high": interval.high}
        return scores | {
            "linear_balanced_accuracy": linear.balanced_accuracy,
            "knn_auc": knn.auc,
            "knn_balanced_accuracy": knn.balanced_accuracy,
        }

    def _score_paired(self, features_ND: Array) -> dict[str, float]:
        found = paired_retrieval(features_ND, self.columns["scanner"], fields_of(self.columns))
        return {"top_1": found.top_1, "top_10": found.top_10, "cosine": found.cosine}


def _first_row(csv_path: Path) -> list[str]:
    # the needed names are ASCII; that the rest is UTF-8 is asked when the rows are read
    with csv_path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return next(csv.reader(file), [])


def _header(csv_path: Path) -> list[str]:
    try:
        return _first_row(csv_path)
    except FileNotFoundError:
        raise DataError("this table does not exist", where=csv_path, remedy="check the path") from None
    except (OSError, csv.Error) as error:
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
    return sorted(path for path in tiles_folder.glob("*.csv") if path.is_file() and _is_check(path))


def _is_check(csv_path: Path) -> bool:
    try:
        return _kind(_first_row(csv_path)) is not None
    except csv.Error:  # whatever it is, it is no table of tiles
        return False
    except OSError as error:  # it may be one, and name tiles that must not be learnt from
        raise DataError("this table cannot be read", where=csv_path, got=error) from None


def _read_tiles(folder: Path, paths: Sequence[str], input_px: int) -> tuple[torch.Tensor, Array, list[Unreadable]]:
    """Decode each tile once and resize it: uint8 (N, 3, px, px), which of the paths these are, and the others."""
    images_NCHW = torch.empty((len(paths), 3, input_px, input_px), dtype=torch.uint8)
    readable_N = np.zeros(len(paths), dtype=bool)
    unreadable = []
    for start in range(0, len(paths), AT_ONCE):
        tiles = []
        for row, path in enumerate(paths[start : start + AT_ONCE], start):
            try:
                tiles.append(decode((folder / path).read_bytes(), path))
                readable_N[row] = True
            except (UnreadableTileError, OSError) as error:
                unreadable.append(Unreadable(path=path, reason=" ".join(str(error).split())))
        rows = start + np.flatnonzero(readable_N[start : start + AT_ONCE])
        images_NCHW[rows] = torch.from_numpy(resized(tiles, input_px)).permute(0, 3, 1, 2)
    return images_NCHW[torch.from_numpy(readable_N)] if unreadable else images_NCHW, readable_N, unreadable


def _refuse_unscorable(csv_path: Path, kind: Kind, columns: Mapping[str, Array]) -> None:
    """Find now, before any model has run, what would make :meth:`Check.score` fail."""
    if kind == "labelled":
        refuse_unscorable(csv_path, columns)
        return
    try:
        found = twins(columns["scanner"], fields_of(columns))
    except DataError as error:
        raise DataError(f"this table cannot be scored: {error}", where=csv_path) from error
    if not found:
        raise DataError("no field (slide, x, y) was seen by two scanners", where=csv_path)


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
    columns = read_columns(csv_path, kind)
    images_NCHW, readable_N, unreadable = _read_tiles(csv_path.parent, columns["path"].tolist(), input_px)
    if not len(images_NCHW):
        raise none_readable(csv_path, len(unreadable), unreadable[0].path, unreadable[0].reason)
    columns = {name: values[readable_N] for name, values in columns.items()}
    _refuse_unscorable(csv_path, kind, columns)
    notes = unreadable_note([tile.path for tile in unreadable])
    if kind == "labelled":
        notes += shared_note(columns)
    return Check(
        path=csv_path,
        kind=kind,
        input_px=input_px,
        images_NCHW=images_NCHW,
        columns=columns,
        unreadable=tuple(unreadable),
        notes=tuple(notes),
    )
