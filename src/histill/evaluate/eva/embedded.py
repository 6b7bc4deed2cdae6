"""A task's set with its features: of patches, of the tiles of slides, or of patch tokens.

Shapes: N rows of the set, P and Q rows and columns of patches, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from histill import files
from histill.errors import DataError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.eva.layouts import PatchSet
from histill.evaluate.eva.layouts_segmentation import SegmentationSet
from histill.evaluate.eva.layouts_slides import SlideSet
from histill.evaluate.eva.parts import Parts
from histill.evaluate.eva.protocols import (
    Report,
    Rows,
    Schedule,
    patch_runs,
    quick_rows,
    segmentation_runs,
    slide_runs,
)
from histill.evaluate.eva.scoring import drawn_groups
from histill.evaluate.eva.tasks import Task
from histill.evaluate.features import Array
from histill.evaluate.statistics import Clusters, accuracy_clusters, clusters_of
from histill.models.encoder import Embedding

__all__ = ["EmbedSlide", "EmbeddedSet"]

_PROTOCOL = "kaiko eva 0.4.5"


class EmbedSlide(Protocol):
    """Features of a slide's tiles."""

    def __call__(self, path: Path, *, mpp: float, tile_px: int, max_tiles: int) -> NDArray[np.float32]:
        """(tiles, D) float32 of at most ``max_tiles`` tiles with tissue, ``tile_px`` wide at ``mpp``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddedSet:
    """A set with its features, whatever its kind."""

    task: Task
    split_N: Array
    label_N: Array | None
    group_N: Array | None
    group: str
    """What the bootstrap draws."""
    key: str
    notes: tuple[str, ...]
    features: Any
    """(N, D); bags per slide; tokens (N, P, Q, D)."""
    tiles: SegmentationSet | None = None

    @classmethod
    def read(
        cls,
        task: Task,
        root: Path,
        embedder: Embedder,
        cache: FeatureCache,
        quick: bool,
        embed_slide: EmbedSlide | None,
        bars: Progress,
    ) -> EmbeddedSet:
        """Read the set, and embed the rows that the task uses (``quick``: some of them).

        Parameters
        ----------
        task, root
            The task, and the folder of its data.
        embedder, cache
            Who embeds, and what keeps the features.
        quick
            Only some rows of each class.
        embed_slide
            For a task of slides.
        bars
            Gets a bar.
        """
        data: Any = task.read(root) if task.kind == "slide" else task.read(root, task.tile_px)  # type: ignore[call-arg]
        notes = _count_notes(task, data)
        used = np.flatnonzero(np.isin(data.split_N, ("train", "val", task.scored)))
        data = data.take(used)
        if quick:
            chosen = quick_rows(task, data.split_N, _labels(data))
            data = data.take(chosen)
            notes += (f"quick: {len(chosen)} of {len(used)} rows, a shorter training",)
        bar = bars.add_task(f"embedding {task.name}", total=len(data))

        def told(further: int) -> None:
            bars.advance(bar, further)

        if isinstance(data, PatchSet):
            found: Any = cache.features(embedder, data.key, len(data), data.read, progress=told)
        elif isinstance(data, SegmentationSet):
            found = _tokens(data, embedder, cache, told)
        else:
            assert embed_slide is not None
            found = _bags(data, task, embedder, cache, embed_slide, told)
            notes += data.notes
        return cls(
            task=task,
            split_N=data.split_N,
            label_N=_labels(data),
            group_N=None if isinstance(data, SlideSet) else data.group_N,
            group="slide" if isinstance(data, SlideSet) else data.group or "image",
            key=data.key,
            notes=notes,
            features=found,
            tiles=data if isinstance(data, SegmentationSet) else None,
        )

    def facts(self) -> dict[str, Any]:
        """Give what a result says of its data."""
        counts = {str(split): int((self.split_N == split).sum()) for split in np.unique(self.split_N)}
        facts = {"task": self.task.name, "protocol": _PROTOCOL, "counts": counts, "key": self.key}
        return facts | {"notes": list(self.notes)}

    def clusters(self, rows: Rows, runs: list[dict[str, Any]]) -> Clusters:
        """Give what a bootstrap draws: patients, slides or images of the scored rows, of the mean over runs."""
        group_M = None if self.group_N is None else self.group_N[rows.score]
        group_M = drawn_groups(group_M, len(rows.score))
        if self.label_N is not None:
            label_M = self.label_N[rows.score]
            right_RM = np.array([run["predicted"] for run in runs]) == label_M
            return accuracy_clusters(label_M, right_RM.mean(axis=0), group_M)
        dice_RMC = np.array([run["dice"] for run in runs], dtype=np.float64)
        classes_M = np.isfinite(dice_RMC[0]).sum(axis=1)  # an image has the same classes in every run
        mean_M = np.nansum(dice_RMC, axis=2).mean(axis=0) / np.maximum(classes_M, 1)
        return clusters_of(mean_M * (classes_M > 0), (classes_M > 0).astype(np.float64), group_M)

    def train(
        self, rows: Rows, schedule: Schedule, parts: Parts, seeds: list[int], device: str, report: Report
    ) -> None:
        """Train the runs of these seeds and keep them; arguments as of ``patch_runs``."""
        more = (rows, self.task, schedule, parts, seeds, device, report)
        if self.tiles is not None:
            segmentation_runs(self.features, self.tiles.images_NHW3, self.tiles.masks_NHW, *more)
        elif self.task.kind == "slide":
            assert self.label_N is not None
            slide_runs(self.features, self.label_N, *more)
        else:
            assert self.label_N is not None
            patch_runs(self.features, self.label_N, *more)


def _labels(data: PatchSet | SegmentationSet | SlideSet) -> Array | None:
    return None if isinstance(data, SegmentationSet) else data.label_N


def _count_notes(task: Task, data: PatchSet | SegmentationSet | SlideSet) -> tuple[str, ...]:
    """Say where the number of images differs from the published one: a subset is no error, but its reader must know."""
    if isinstance(data, SegmentationSet):
        found = data.sources
    else:
        found = {split: int((data.split_N == split).sum()) for split in task.published}
    return tuple(
        f"{split}: {found.get(split, 0):,} of {count:,} published"
        for split, count in task.published.items()
        if found.get(split, 0) != count
    )


def _bags(
    slides: SlideSet,
    task: Task,
    embedder: Embedder,
    cache: FeatureCache,
    embed_slide: EmbedSlide,
    told: Callable[[int], None],
) -> list[Array]:
    assert task.mpp is not None
    assert task.max_tiles is not None
    bags: list[Array] = []
    for path in slides.paths:
        named = f"{embedder.key} {path.name} {path.stat().st_size} {task.mpp} {task.tile_px} {task.max_tiles}"
        file = cache.folder and cache.folder / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.npy"
        if file is None or not file.exists():
            bag = embed_slide(path, mpp=task.mpp, tile_px=task.tile_px, max_tiles=task.max_tiles)
            if bag.ndim != 2 or not len(bag) or len(bag) > task.max_tiles or not np.isfinite(bag).all():
                raise DataError(
                    "the embedding of a slide cannot be used",
                    where=path,
                    got=f"shape {bag.shape}, {'finite' if np.isfinite(bag).all() else 'not finite'}",
                    allowed=f"(1 to {task.max_tiles} tiles, features), finite",
                )
            if file is not None:
                with files.atomic_path(file) as temporary:
                    np.save(temporary, bag.astype(np.float32))
        bags.append(bag.astype(np.float32) if file is None else np.load(file, mmap_mode="r"))
        told(1)
    return bags


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenEmbedder:
    """Patch tokens as an embedding, so that the cache of features keeps them."""

    embedder: Embedder
    shape: tuple[int, int, int]
    """(P, Q, D) of a tile."""

    @property
    def name(self) -> str:
        return self.embedder.name

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.embedder.key} patch tokens".encode()).hexdigest()

    @property
    def pooling(self) -> Embedding:
        return self.embedder.pooling

    @property
    def dim(self) -> int:
        return int(np.prod(self.shape))

    def embed(self, tiles_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.patch_tokens(tiles_NHW3).reshape(len(tiles_NHW3), -1)

    def patch_tokens(self, tiles_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.embedder.patch_tokens(tiles_NHW3)


def _tokens(tiles: SegmentationSet, embedder: Embedder, cache: FeatureCache, told: Callable[[int], None]) -> Array:
    _, rows, columns, dim = embedder.patch_tokens(tiles.read(0, 1)).shape
    wrapped = _TokenEmbedder(embedder=embedder, shape=(rows, columns, dim))
    found = cache.features(wrapped, tiles.key, len(tiles), tiles.read, progress=told)
    return found.reshape(len(tiles), rows, columns, dim)
