"""What tiling would give: counts, size on disk and time, from a sample of each slide's tiles. Writes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from histill.slides.slide import SlideError
from histill.tiles.config import TileConfig
from histill.tiles.cutting import SlideJob, cut, plan_slide
from histill.tiles.jobs import jobs_of
from histill.tiles.pool import BrokenProcessPool, Pool, cores

__all__ = ["Estimate", "dry_run"]

_SAMPLE_TILES = 48
_ROW_BYTES = 24  # of the index, a tile
_BLOCK_BYTES = 512  # of a shard: a header, and on average half a block of padding
_SAMPLE_SLOWDOWN = 0.6  # scattered tiles decode blocks that neighbours would have shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of one slide."""

    slide: str
    error: str | None = None
    grid_tiles: int = 0
    tissue_tiles: int = 0
    """With enough tissue, counted."""
    kept_tiles: int = 0
    """After the filters, by the share of the sample."""
    set_bytes: int = 0
    seconds: float = 0.0
    """On one core."""
    mpp: float | None = None
    mpp_source: str | None = None
    level: int | None = None


def estimate(job: SlideJob) -> Estimate:
    """Plan one slide, and cut a sample of its tiles."""
    began = time.perf_counter()
    try:
        plan = plan_slide(job)
    except SlideError as error:
        return Estimate(slide=job.id, error=str(error))
    except Exception as error:  # a broken file concerns this slide alone
        return Estimate(slide=job.id, error=f"{type(error).__name__}: {error}")
    planned = time.perf_counter() - began
    count = len(plan.origins_N2)
    chosen = np.unique(np.linspace(0, max(count - 1, 0), min(count, _SAMPLE_TILES)).astype(np.int64))
    began = time.perf_counter()
    cell = cut(job, plan.reader, plan.mpp, plan.origins_N2[chosen]) if count else None
    per_tile = (time.perf_counter() - began) / max(len(chosen), 1) * _SAMPLE_SLOWDOWN
    share = len(cell.kept) / len(chosen) if cell else 0.0
    mean_bytes = float(np.mean([len(image) for image in cell.images])) if cell and cell.images else 0.0
    kept = round(count * share)
    pixels = 0 if job.config.index_only else round(kept * (mean_bytes + 1.5 * _BLOCK_BYTES))
    return Estimate(
        slide=job.id,
        grid_tiles=plan.grid_tiles,
        tissue_tiles=count,
        kept_tiles=kept,
        set_bytes=pixels + kept * _ROW_BYTES,
        seconds=planned + per_tile * count,
        mpp=plan.mpp,
        mpp_source=plan.mpp_source,
        level=plan.level,
    )


def dry_run(config: TileConfig, console: Console) -> tuple[list[Estimate], int]:
    """Estimates of all slides, and the number of worker processes that the time is to be divided by."""
    jobs, count = jobs_of(config, console), config.workers or cores()
    pool = Pool(min(count, max(len(jobs), 1)))
    try:
        futures = [pool.submit(estimate, job) for job in jobs]
        found = []
        for job, future in zip(jobs, futures, strict=True):
            try:
                found.append(future.result())
            except BrokenProcessPool:
                found.append(_alone(job))
        return found, count
    finally:
        pool.close()


def _alone(job: SlideJob) -> Estimate:
    """Estimate a slide that was in flight when a process died, so that the guilty one is known."""
    pool = Pool(1)
    try:
        return pool.submit(estimate, job).result()
    except BrokenProcessPool:
        return Estimate(slide=job.id, error="a worker process died while it read this slide")
    finally:
        pool.close()
