"""The tasks of the EVA protocol, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from histill.errors import ConfigError, nearest
from histill.evaluate.eva import layouts, layouts_segmentation, layouts_slides

__all__ = ["TASKS", "Kind", "Task", "find_task"]

Kind = Literal["patch", "slide", "segmentation"]

Reader = (
    Callable[[Path, int], layouts.PatchSet]
    | Callable[[Path, int], layouts_segmentation.SegmentationSet]
    | Callable[[Path], layouts_slides.SlideSet]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task."""

    name: str
    kind: Kind
    read: Reader
    """(root, tile_px) or, for slides, (root) -> the set."""
    classes: int
    """Background of a segmentation among them."""
    scored: str
    """The split that is scored."""
    published: Mapping[str, int]
    """Images (segmentation: before they are cut into tiles) or slides of each split, as published."""
    runs: int
    batch: int
    steps: int
    """Steps (slides: epochs) at most."""
    tile_px: int = 224
    """Side of the tiles that the original gives an encoder."""
    mpp: float | None = None
    """Microns per pixel of the tiles of a slide."""
    max_tiles: int | None = None
    """Tiles of a slide at most."""

    @property
    def metric(self) -> str:
        """Name of the score."""
        return "dice" if self.kind == "segmentation" else "balanced_accuracy"

    @property
    def stops_on_scored(self) -> bool:
        """Whether the original scores the split that it also stops on."""
        return self.scored == "val"


def _patch(name: str, read: Reader, classes: int, scored: str, **published: int) -> Task:
    return Task(
        name=name,
        kind="patch",
        read=read,
        classes=classes,
        scored=scored,
        published=MappingProxyType(published),
        runs=5,
        batch=256,
        steps=12_500,
    )


def _slide(name: str, read: Reader, classes: int, *, mpp: float, max_tiles: int, **published: int) -> Task:
    return Task(
        name=name,
        kind="slide",
        read=read,
        classes=classes,
        scored="test",
        published=MappingProxyType(published),
        runs=20,
        batch=32,
        steps=100,
        mpp=mpp,
        max_tiles=max_tiles,
    )


def _segmentation(name: str, read: Reader, **published: int) -> Task:
    return Task(
        name=name,
        kind="segmentation",
        read=read,
        classes=5,
        scored="val",
        published=MappingProxyType(published),
        runs=5,
        batch=64,
        steps=2_000,
    )


_ROWS = (
    _patch("bach", layouts.read_bach, 4, "val", train=268, val=132),
    _patch("breakhis", layouts.read_breakhis, 4, "val", train=1132, val=339),
    _patch("crc", layouts.read_crc, 9, "val", train=100_000, val=7180),
    _patch("gleason", layouts.read_gleason, 4, "val", train=15_303, val=2482, test=4967),
    _patch("mhist", layouts.read_mhist, 2, "val", train=2175, val=977),
    _patch("pcam", layouts.read_pcam, 2, "test", train=262_144, val=32_768, test=32_768),
    _slide("cam16", layouts_slides.read_camelyon16, 2, mpp=0.25, max_tiles=1000, train=216, val=54, test=129),
    _slide("panda", layouts_slides.read_panda_small, 6, mpp=0.5, max_tiles=200, train=955, val=477, test=477),
    _slide("panda_full", layouts_slides.read_panda, 6, mpp=0.5, max_tiles=200, train=6685, val=1419, test=1451),
    _segmentation("consep", layouts_segmentation.read_consep, train=27, val=14),
    _segmentation("monusac", layouts_segmentation.read_monusac, train=209, val=85),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ROWS})
"""All tasks by name."""


def find_task(name: str) -> Task:
    """Look a task up.

    Raises
    ------
    ConfigError
        There is none of this name.
    """
    if name not in TASKS:
        raise ConfigError(
            "unknown task of the EVA protocol", got=name, allowed=", ".join(TASKS), remedy=nearest(name, TASKS)
        )
    return TASKS[name]
