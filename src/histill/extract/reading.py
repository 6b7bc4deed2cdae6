"""The reader, ahead of the model: plans and tiles of several slides in flight, in order, in bounded memory.

Shapes: N tiles of a slide or a piece of it, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.extract.blocks import Blocks, Place, tiles_at
from histill.tiles.cutting import Reader, SlideJob, SlidePlan, cells, plan_slide, rendered
from histill.tiles.pool import Workers
from histill.tiles.slide_writer import result_of

__all__ = ["FATES", "KEPT", "Ahead", "Piece", "Reading", "fill"]

FATES = ("kept", "white", "black", "blur", "pen", "unreadable")
"""What becomes of a tile; its number here is its code."""
KEPT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a reader process made of some tiles of a slide; the kept ones stand in its slot, one after the other."""

    fates: bytes
    """Code of each tile."""
    reasons: tuple[str, ...]
    """Why, of the unreadable ones, in order."""


def fill(job: SlideJob, reader: Reader, mpp: float, origins_N2: NDArray[np.int64], place: Place) -> Piece:
    """Render tiles into a slot; the task of a reader process."""
    tiles_NHW3, fates, reasons = tiles_at(place), bytearray(), []
    kept = 0
    for tile in rendered(job, reader, mpp, origins_N2):
        if tile.tile_HW3 is not None:
            tiles_NHW3[kept] = tile.tile_HW3
            kept += 1
            fates.append(KEPT)
        elif tile.unreadable is not None:
            fates.append(FATES.index("unreadable"))
            reasons.append(tile.unreadable)
        else:
            assert tile.fault is not None
            fates.append(FATES.index(tile.fault))
    return Piece(fates=bytes(fates), reasons=tuple(reasons))


@dataclass(slots=True, eq=False)
class Reading:
    """A slide that is being planned or read."""

    job: SlideJob
    plan_future: Future[SlidePlan]
    pieces: deque[slice] = field(default_factory=deque)
    """Rows of the plan that no process has been given yet."""
    flying: deque[tuple[int, Future[Piece]]] = field(default_factory=deque)
    """Slot and result of what is being read."""
    began: bool = False
    """Whether ``pieces`` is known."""


class Ahead:
    """Gives slides and their tiles in order, and keeps the reader processes busy with what comes next.

    Parameters
    ----------
    workers
        Who reads.
    blocks
        Where tiles are handed over; its number of slots bounds the memory.
    next_job
        Gives the next slide that is to be read, None when there is none.
    first_row
        Says from which row of its plan a slide is to be read; may be asked long before its turn.
    """

    def __init__(
        self,
        workers: Workers,
        blocks: Blocks,
        next_job: Callable[[], SlideJob | None],
        first_row: Callable[[SlideJob, SlidePlan], int],
    ) -> None:
        self._workers, self._blocks = workers, blocks
        self._next_job, self._first_row = next_job, first_row
        self._readings: deque[Reading] = deque()
        self._window = 2 * workers.count + 2
        self._dry = False

    def slides(self) -> Iterator[Reading]:
        """Each slide in order, planned or failed (``plan_future`` is done); read it before asking for the next."""
        while True:
            self._pump()
            if not self._readings:
                return
            reading = self._readings[0]
            self._until(reading.plan_future)
            yield reading
            self.drop(reading)

    def tiles(self, reading: Reading) -> Iterator[tuple[Piece, NDArray[np.uint8]]]:
        """The pieces of a slide in order: what became of its tiles, and the slot with the kept ones (N, H, W, 3).

        A slot is used again when the next piece is asked for.
        """
        while True:
            self._pump()
            if not reading.flying:
                return
            slot, future = reading.flying[0]
            self._until(future)
            piece = result_of(future)
            yield piece, tiles_at(self._blocks.place(slot))
            reading.flying.popleft()
            self._blocks.give(slot)

    def drop(self, reading: Reading) -> None:
        """Let go of a slide that is finished or failed."""
        reading.pieces.clear()
        for slot, future in reading.flying:
            if not future.cancel():
                wait([future])  # its process may still write into the slot
            self._blocks.give(slot)
        reading.flying.clear()
        if reading in self._readings:
            self._readings.remove(reading)

    def _until(self, future: Future[Any]) -> None:
        """Wait for a result, and meanwhile hand out further work as plans come in."""
        while not future.done():
            plans: list[Future[Any]] = [each.plan_future for each in self._readings if not each.plan_future.done()]
            wait({future, *plans}, return_when=FIRST_COMPLETED)
            self._pump()

    def _pump(self) -> None:
        """Plan slides as far as the window goes, and give out pieces in order as long as slots are free."""
        while not self._dry and len(self._readings) < self._window:
            job = self._next_job()
            if job is None:
                self._dry = True
                break
            self._readings.append(Reading(job, self._workers.submit(plan_slide, job)))
        for reading in self._readings:
            if not reading.plan_future.done():
                return  # later slides would take the slots that this one needs
            if reading.plan_future.exception() is not None:
                continue
            plan = reading.plan_future.result()
            if not reading.began:
                reading.began = True
                reading.pieces.extend(_pieces(plan, self._first_row(reading.job, plan), self._blocks.capacity))
            while reading.pieces and self._blocks.free:
                self._give_out(reading, plan)
            if reading.pieces:
                return

    def _give_out(self, reading: Reading, plan: SlidePlan) -> None:
        rows, slot = reading.pieces.popleft(), self._blocks.take()
        config = dataclasses.replace(reading.job.config, mpp=plan.tile_mpp)  # of coordinates made elsewhere
        job, place = dataclasses.replace(reading.job, config=config), self._blocks.place(slot)
        try:
            future = self._workers.submit(fill, job, plan.reader, plan.mpp, plan.origins_N2[rows], place)
        except BaseException:
            self._blocks.give(slot)
            raise
        reading.flying.append((slot, future))


def _pieces(plan: SlidePlan, first: int, most: int) -> Iterator[slice]:
    """The plan's cells from a row on, cut to what a slot holds."""
    for cell in cells(plan):
        for start in range(max(cell.start, first), cell.stop, most):
            yield slice(start, min(start + most, cell.stop))
