"""What all benchmark folders are made of: one field of tissue, scanned under some looks, and its nuclei.

Shapes: H height, W width, 3 colours (red, green, blue).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.synthetic.scanners import SCANNERS, render
from histill.synthetic.scene import slide_effects
from histill.synthetic.stains import STAINS
from histill.synthetic.tissue import draw_field

__all__ = ["TILE_PX", "Drawn", "Look", "Map", "Plan", "draw", "mapper", "save_image", "seed_of", "write_datasets"]

TILE_PX = 224
"""Side of the tiles of PLISM, HEST and PathoROB, pixels of 0.5 microns."""

Image3 = NDArray[np.uint8]
Look = tuple[str, str]
"""Keys of :data:`~histill.synthetic.STAINS` and :data:`~histill.synthetic.SCANNERS`."""
A = TypeVar("A")
B = TypeVar("B")


class Map(Protocol):
    """``map`` of one process or of several."""

    def __call__(self, function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
        """Results in the order of the items."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One field to draw; the same plan gives the same pixels."""

    kind: str
    """One of :data:`~histill.synthetic.KINDS`."""
    tile_px: int
    seed: int
    slide_seed: int
    """Fields with the same one come from the same slide, and look like it."""
    looks: tuple[Look, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """A field that was drawn."""

    images: tuple[Image3, ...]
    """(H, W, 3) under each look, registered to the pixel."""
    nuclei_HW: NDArray[np.uint8]
    """As :class:`histill.synthetic.Field` has them."""
    cells: dict[str, int]
    """Cell type -> nuclei with their centre in the field."""


def draw(plan: Plan) -> Drawn:
    """Draw a field and scan it under each look."""
    field = draw_field(plan.kind, plan.tile_px, plan.seed, slide_effects(plan.slide_seed))
    images = tuple(
        render(field.concentrations_HWS, STAINS[stain], SCANNERS[scanner], seed_of(plan.seed, number))
        for number, (stain, scanner) in enumerate(plan.looks)
    )
    return Drawn(images=images, nuclei_HW=field.nuclei_HW, cells=field.cells)


def seed_of(*path: int) -> int:
    """Make a seed for one thing, independent of those of all others."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


@contextmanager
def mapper(workers: int) -> Iterator[Map]:
    """Yield ``map``; with more than one worker, over processes that are spawned once."""
    if workers == 1:
        yield _in_turn
        return
    # spawned, not forked: the caller may hold threads (torch), and a fork of those can hang
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def spread(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
        return pool.map(function, items, chunksize=4)

    try:
        yield spread
    finally:
        pool.shutdown(cancel_futures=True)


def _in_turn(function: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    return map(function, items)


def save_image(path: Path, image_HW3: Image3) -> None:
    """Write an image in the format of its suffix, without loss, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HW3).save(path)


def write_datasets(path: Path, **arrays: object) -> None:
    """Write arrays into an HDF5 file, one data set each, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
