"""Tiles in, batches through the model, results out in order; on a GPU the next batch starts before the last is fetched.

Shapes: B tiles of a batch, H and W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from histill.extract.model import FeatureModel
from histill.extract.partial import BatchResult
from histill.extract.reading import FATES, KEPT, Piece

__all__ = ["Batches"]

_UNREADABLE = FATES.index("unreadable")


class Batches:
    """One slide's way through the model.

    Parameters
    ----------
    model
        The model.
    batch
        B: every batch but the slide's last has so many tiles.
    sink
        Is given each result, in order.
    """

    def __init__(self, model: FeatureModel, batch: int, sink: Callable[[BatchResult], None]) -> None:
        self._model, self._batch, self._sink = model, batch, sink
        side = model.engine.input_px
        # Pinned, so that the copy to the device runs beside the model; the second one is filled meanwhile.
        self._buffers = deque(
            torch.empty((batch, side, side, 3), dtype=torch.uint8, pin_memory=model.on_gpu)
            for _ in range(2 if model.on_gpu else 1)
        )
        self._filled: list[NDArray[np.uint8]] = [buffer.numpy() for buffer in self._buffers]
        self._count = 0
        self._fates, self._reasons = bytearray(), list[str]()
        self._started: deque[tuple[bytes, tuple[str, ...], tuple[torch.Tensor, torch.Tensor | None] | None]] = deque()

    def add(self, piece: Piece, tiles_NHW3: NDArray[np.uint8]) -> None:
        """Take what a reader made of some tiles."""
        kept, reasons = 0, iter(piece.reasons)
        for code in piece.fates:
            self._fates.append(code)
            if code == _UNREADABLE:
                self._reasons.append(next(reasons))
            elif code == KEPT:
                self._filled[0][self._count] = tiles_NHW3[kept]
                kept += 1
                self._count += 1
                if self._count == self._batch:
                    self._start()

    def end(self) -> None:
        """The slide has no further tiles."""
        if self._fates:
            self._start()
        while self._started:
            self._finish()

    def _start(self) -> None:
        started = self._model.start(self._buffers[0][: self._count]) if self._count else None
        self._started.append((bytes(self._fates), tuple(self._reasons), started))
        self._count = 0
        self._fates.clear()
        self._reasons.clear()
        self._buffers.rotate()
        self._filled.reverse()
        while len(self._started) > len(self._buffers) - 1:
            self._finish()

    def _finish(self) -> None:
        fates, reasons, started = self._started.popleft()
        if started is None:
            width, shape = self._model.width, self._model.tokens_shape
            features_BD = np.zeros((0, width), np.float32)
            tokens_BHWD = None if shape is None else np.zeros((0, *shape), np.float16)
        else:
            features_BD, tokens_BHWD = self._model.finish(started)
        self._sink(BatchResult(fates=fates, reasons=reasons, features_BD=features_BD, tokens_BHWD=tokens_BHWD))
