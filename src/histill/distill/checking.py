"""Is the student learning? Agreement with the teacher, collapse, and scores on labelled and paired tables.

The scores are those of ``histill evaluate tiles`` and ``paired`` with ``--pooling cls`` and the same side and
precision: the same functions read and embed the tiles and measure.

Shapes: N tiles, D and E channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from histill import files
from histill.errors import DataError
from histill.evaluate.agreement import collapse_warning, effective_rank, knn_overlap, linear_cka, mean_pairwise_cosine
from histill.evaluate.checks import Check, find_checks, kind_of, load_check
from histill.evaluate.embedding import EncoderEmbedder
from histill.evaluate.retention import report
from histill.models.encoder import Encoder
from histill.tiles.images import UnreadableTileError, paths_of_table, read_table
from histill.tiles.open import is_tile_set
from histill.tiles.tile_set import TileSource

__all__ = ["Checker", "Scores", "check_tables", "held_out_paths", "retentions", "sample_tiles"]

_BATCH = 64

Scores = dict[str, dict[str, float]]
"""Table -> metric -> value."""


def check_tables(tiles: Path) -> tuple[Path, ...]:
    """The labelled and paired tables that lie directly in a folder of tile images; a tile set has none of its own."""
    return tuple(find_checks(tiles)) if tiles.is_dir() and not is_tile_set(tiles) else ()


def held_out_paths(tiles: Path, tables: tuple[Path, ...]) -> set[str]:
    """Tiles that the labelled tables mark as split = test, relative to the folder of tiles."""
    found: set[str] = set()
    for table in tables:
        if kind_of(table) == "labelled":
            rows = [row for row in read_table(table, ["path", "split"]) if row["split"] == "test"]
            found.update(paths_of_table(table, rows, tiles))
    return found


class Checker:
    """Scores the student during a run; the teacher and an untrained student are scored once.

    Parameters
    ----------
    tables
        Labelled and paired tables.
    source
        The training set, for the agreement.
    image_px
        Side to which every tile is resized.
    agreement_tiles
        Number of tiles for the agreement.
    autocast
        Precision of the networks.
    lenient
        Leave out a table that cannot be scored, with a note, instead of raising: for tables that nobody asked for.

    Raises
    ------
    DataError
        No tile can be read, or a table cannot be scored.
    """

    def __init__(
        self,
        tables: tuple[Path, ...],
        source: TileSource,
        image_px: int,
        agreement_tiles: int,
        autocast: torch.autocast,
        *,
        lenient: bool = False,
    ) -> None:
        self.image_px, self._autocast = image_px, autocast
        self.checks: dict[str, Check] = {}
        self._left_out: list[str] = []
        for table in tables:
            try:
                self.checks[table.stem] = load_check(table, image_px)
            except DataError as error:
                if not lenient:
                    raise
                self._left_out.append(f"{table.name} is not scored: {' '.join(str(error).split())}")
        self._tiles_NCHW = sample_tiles(source, agreement_tiles, image_px)
        self._teachers_ND: dict[str, NDArray[np.float32]] = {}

    def scores(self, encoder: Encoder) -> Scores:
        """Every metric of every table, for one encoder."""
        embed = self._embedding(encoder)
        return {name: check.score(check.features(embed, batch=_BATCH)) for name, check in self.checks.items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 over the tables: scores before and after a change of theirs cannot be compared."""
        digest = hashlib.sha256()
        for name, check in sorted(self.checks.items()):
            digest.update(f"{name} {files.sha256_file(check.path)}\n".encode())
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """What a reader of the scores should know, such as tiles of a table that cannot be read."""
        return self._left_out + [f"{name}: {note}" for name, check in self.checks.items() for note in check.notes]

    def agreement(self, student: Encoder, teacher: Encoder) -> tuple[dict[str, float], str | None]:
        """Linear CKA, neighbour overlap and effective ranks on tiles of the training set, and a warning on collapse."""
        if teacher.name not in self._teachers_ND:
            self._teachers_ND[teacher.name] = self._features(self._embedding(teacher))
        teacher_ND, student_NE = self._teachers_ND[teacher.name], self._features(self._embedding(student))
        ranks = {"student_rank": effective_rank(student_NE), "teacher_rank": effective_rank(teacher_ND)}
        warning = collapse_warning(
            ranks["student_rank"],
            ranks["teacher_rank"],
            student_NE.shape[1],
            mean_cosine=mean_pairwise_cosine(student_NE),
        )
        return {
            "cka": linear_cka(student_NE, teacher_ND),
            "knn_overlap": knn_overlap(student_NE, teacher_ND, k=min(10, len(student_NE) - 1)),
            **ranks,
        }, warning

    def rank(self, encoder: Encoder) -> float:
        """Effective rank of an encoder's class tokens on tiles of the training set."""
        return effective_rank(self._features(self._embedding(encoder)))

    def _embedding(self, encoder: Encoder) -> Callable[[torch.Tensor], torch.Tensor]:
        """The class token of uint8 tiles, at the nearest size that the encoder can take."""
        side = max(1, round(self.image_px / encoder.patch_px)) * encoder.patch_px
        embedder = EncoderEmbedder(
            encoder=encoder, name=encoder.name, pooling="cls", input_px=side, autocast=self._autocast, batch=_BATCH
        )
        return lambda tiles_BCHW: torch.from_numpy(embedder.embed(tiles_BCHW.permute(0, 2, 3, 1).numpy()))

    def _features(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> NDArray[np.float32]:
        return torch.cat([embed(tiles_BCHW) for tiles_BCHW in self._tiles_NCHW.split(_BATCH)]).numpy()


def retentions(student: Scores, teacher: Scores, untrained: Scores) -> Scores:
    """(student - untrained) / (teacher - untrained) of each metric where the teacher is the better one."""
    found: Scores = {}
    for table, scores in student.items():
        for row in report(teacher[table], scores, untrained[table]):
            if row.retention is not None:
                found.setdefault(table, {})[row.metric] = row.retention
    return found


def sample_tiles(source: TileSource, wanted: int, image_px: int) -> torch.Tensor:
    """The first readable tiles of a shuffled order that is the same in every run, uint8 (N, 3, px, px).

    Parameters
    ----------
    source
        The tiles; unreadable ones are passed over.
    wanted
        Tiles at most; fewer when the source has no more.
    image_px
        Side to which they are resized (bilinear, antialiased).

    Raises
    ------
    DataError
        Not one tile can be read.
    """
    tiles: list[torch.Tensor] = []
    lost = ""
    for position in range(len(source)):
        if len(tiles) == wanted:
            break
        (index,) = source.tile_at(np.array([position]), 0)
        try:
            tile_CHW = torch.from_numpy(source.read(int(index)).copy()).permute(2, 0, 1)
        except UnreadableTileError as error:
            lost = str(error).replace("\n", "; ")
            continue  # counted and named when its turn comes in training
        resized_1CHW = F.interpolate(
            tile_CHW[None].float(), size=(image_px, image_px), mode="bilinear", antialias=True, align_corners=False
        )
        tiles.append(resized_1CHW.round().clamp(0, 255).to(torch.uint8))
    if not tiles:
        raise DataError(
            "none of the tiles can be read", where=source.root, got=f"{len(source)} tried, the last: {lost}"
        )
    return torch.cat(tiles)
