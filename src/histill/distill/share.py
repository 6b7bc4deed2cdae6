"""What the ranks agree on at the start of a step: how many tiles each has, and whether to stop or to save.

Shapes: R ranks, P parts of a rank's tiles (micro-batches).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from histill.distill.parts import Parts
from histill.tiles.loader import Batch

__all__ = ["StepShare"]

_LEAST_TILES = 2  # damaged files may leave fewer; KoLeo and Sinkhorn need two, and the step is then passed over


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One step, as all ranks see it."""

    tiles: int
    """Tiles of the step over all ranks."""
    parts: tuple[slice, ...]
    """This rank's tiles, part by part."""
    of_part: tuple[float, ...]
    """Tiles of each of this rank's parts / tiles of the step."""
    of_pairs: tuple[float, ...]
    """Tiles of each part over all ranks / tiles of the step."""
    enough: bool
    """Whether the step can be taken: some tiles for every rank and part."""
    labelled_tiles: tuple[int, ...]
    """Tiles of each labelled set over all ranks."""
    unreadable: dict[str, str]
    """Path -> reason, over all ranks."""
    asked: bool
    """Whether a rank was asked to stop."""
    due: bool
    """Whether the first rank wants a checkpoint after the step."""

    @classmethod
    def agreed(cls, built: Parts, batch: Batch, labelled: Sequence[Batch], *, asked: bool, due: bool) -> StepShare:
        """Exchange counts; every rank calls it once a step.

        Parameters
        ----------
        built
            The run.
        batch, labelled
            This rank's tiles of the step, and of each labelled set.
        asked, due
            Whether this rank was asked to stop, and wants a checkpoint.
        """
        ranks, config = built.ranks, built.config
        lost = {path: reason for each in (batch, *labelled) for path, reason in each.unreadable.items()}
        own = [len(batch.positions_B), asked, due, len(lost), *(len(each.positions_B) for each in labelled)]
        table = ranks.gather(torch.tensor([[int(value) for value in own]])).tolist()
        tiles_R = [row[0] for row in table]
        tiles = sum(tiles_R)
        most = -(-config.batch_tiles // ranks.world)
        count = -(-most // config.scale.micro_tiles) if config.scale.micro_tiles else 1
        # Damaged tiles, or a share that does not divide, must not leave a part with too few.
        count = max(1, min(count, min(tiles_R) if ranks.world > 1 else tiles // _LEAST_TILES))
        edges_RP = [[held * part // count for part in range(count + 1)] for held in tiles_R]
        sizes_RP = [[last - first for first, last in itertools.pairwise(edges)] for edges in edges_RP]
        pairs_P = [sum(sizes) for sizes in zip(*sizes_RP, strict=True)]
        edges = edges_RP[ranks.rank]
        if any(row[3] for row in table):
            lost = {path: reason for each in ranks.gather_json(lost) for path, reason in each.items()}
        return cls(
            tiles=tiles,
            parts=tuple(slice(first, last) for first, last in itertools.pairwise(edges)),
            of_part=tuple(size / max(tiles, 1) for size in sizes_RP[ranks.rank]),
            of_pairs=tuple(size / max(tiles, 1) for size in pairs_P),
            enough=min(pairs_P) >= _LEAST_TILES and min(min(sizes) for sizes in sizes_RP) >= 1,
            labelled_tiles=tuple(sum(held) for held in zip(*(row[4:] for row in table), strict=True)),
            unreadable=lost,
            asked=any(row[1] for row in table),
            due=bool(table[0][2]),
        )
