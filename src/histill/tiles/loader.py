"""Batches of uint8 tiles, decoded ahead of the training step.

Shapes: B tiles of the batch that could be read, H and W the largest height and width among them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from histill.tiles.images import UnreadableTileError
from histill.tiles.tile_set import TileSource

__all__ = ["Batch", "batches"]


@dataclass(frozen=True, slots=True)
class Batch:
    """The tiles of one step; none at all when not one of them could be read."""

    tiles_BCHW: torch.Tensor
    """uint8, (B, 3, H, W), colours last in memory; smaller tiles stand at the top left, the rest is zero."""
    sizes_B2: NDArray[np.int64]
    """(B, 2): true height and width of each tile, in pixels."""
    positions_B: NDArray[np.int64]
    """Place of each tile in the endless shuffled stream; all draws for its views depend on it alone."""
    unreadable: dict[str, str]
    """Path -> reason, of the tiles of this step that could not be read."""


def _read_batch(source: TileSource, positions_B: NDArray[np.int64], seed: int) -> Batch:
    # Tiles stay as the decoder writes them, colours last: turning each round would cost a fifth of its decoding.
    tiles_BHWC = np.zeros((len(positions_B), 0, 0, 3), dtype=np.uint8)
    sizes: list[tuple[int, int]] = []
    positions: list[int] = []
    unreadable: dict[str, str] = {}
    for position, index in zip(positions_B.tolist(), source.tile_at(positions_B, seed).tolist(), strict=True):
        try:
            tile_HWC = source.read(index)
        except UnreadableTileError as error:
            unreadable[source.name(index)] = str(error).replace("\n", "; ")
            continue
        height, width = tile_HWC.shape[:2]
        tiles_BHWC = _with_room(tiles_BHWC, height, width)
        tiles_BHWC[len(sizes), :height, :width] = tile_HWC
        sizes.append((height, width))
        positions.append(position)
    return Batch(
        tiles_BCHW=torch.from_numpy(tiles_BHWC[: len(sizes)]).permute(0, 3, 1, 2),
        sizes_B2=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        positions_B=np.array(positions, dtype=np.int64),
        unreadable=unreadable,
    )


def _with_room(tiles_BHWC: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The same batch, if need be padded at the right and bottom so that a tile of this size fits."""
    more = max(0, height - tiles_BHWC.shape[1]), max(0, width - tiles_BHWC.shape[2])
    return np.pad(tiles_BHWC, ((0, 0), (0, more[0]), (0, more[1]), (0, 0))) if any(more) else tiles_BHWC


def batches(
    source: TileSource,
    positions_of_step: Callable[[int], NDArray[np.int64]],
    first_step: int,
    last_step: int,
    seed: int,
    *,
    workers: int = 1,
    ahead: int = 4,
) -> Generator[Batch]:
    """Yield one batch for each step from ``first_step`` up to but not including ``last_step``.

    Worker threads decode up to ``ahead`` batches before they are asked for (libjpeg-turbo runs outside the
    interpreter's lock). Each batch is a pure function of its step, so that the number of workers changes nothing.

    Parameters
    ----------
    source
        Where tiles are read.
    positions_of_step
        Step -> positions in the shuffled stream, int64 (B,).
    first_step, last_step
        Range of steps.
    seed
        Seed of the order.
    workers
        Decoding threads; 0 decodes in the caller, when a batch is asked for.
    ahead
        Batches in flight.
    """
    if workers == 0:
        for step in range(first_step, last_step):
            yield _read_batch(source, positions_of_step(step), seed)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    queue: deque[Future[Batch]] = deque()
    try:
        for step in range(first_step, last_step + ahead):
            if step < last_step:
                queue.append(pool.submit(_read_batch, source, positions_of_step(step), seed))
            if step >= first_step + ahead:
                yield queue.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
