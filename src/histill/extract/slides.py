"""Slides through one model: each is read ahead, encoded, and committed as a whole.

Shapes: K tiles with a feature, D features, M failed tiles.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from histill import __version__, files
from histill.errors import ModelError
from histill.extract.batches import Batches
from histill.extract.blocks import Blocks
from histill.extract.config import ExtractConfig
from histill.extract.feature_file import SlideFeatures, write_h5, write_pt, write_zarr
from histill.extract.folder import FeatureFolder
from histill.extract.model import FeatureModel, check_tile_mpp
from histill.extract.partial import BatchResult, Partial
from histill.extract.reading import FATES, Ahead, Reading
from histill.models.known import short_name
from histill.slides.outlines import geojson
from histill.slides.slide import SlideError
from histill.tiles.cutting import SlideJob, SlidePlan
from histill.tiles.pool import BrokenProcessPool, Pool
from histill.tiles.progress import TilingProgress
from histill.tiles.slide_folder import SlideRecord
from histill.tiles.slide_writer import FailedSlideError, commit, failed, path_text, result_of
from histill.tiles.write import CRASHED, Outcome

__all__ = ["Extraction"]

_MICRONS_AT_1X = 10.0


@dataclass(slots=True, eq=False)
class _Held:
    """A slide that this process has taken."""

    stack: ExitStack
    work: Path
    began: float = field(default_factory=time.monotonic)
    partial: Partial | None = None
    found: int = 0
    done: int = 0


class Extraction:
    """One process's share of the slides.

    Parameters
    ----------
    config
        The command.
    model
        Opened.
    folder
        Claimed.
    allowed_mpp
        Scales that tiles may have; () for any.
    workers
        Reader processes.
    outcome, bar
        Are told of each slide.
    """

    def __init__(
        self,
        config: ExtractConfig,
        model: FeatureModel,
        folder: FeatureFolder,
        allowed_mpp: tuple[float, ...],
        workers: int,
        outcome: Outcome,
        bar: TilingProgress,
    ) -> None:
        self._config, self._model, self._folder = config, model, folder
        self._allowed_mpp, self._workers = allowed_mpp, workers
        self._outcome, self._bar = outcome, bar
        self._held: dict[str, _Held] = {}
        self._todo: deque[SlideJob] = deque()
        self._hash = model.engine.content_hash()

    def run(self, jobs: Sequence[SlideJob]) -> None:
        """Do slides; those in flight when a reader process dies are done again, one at a time."""
        self._todo.extend(jobs)
        suspects: list[SlideJob] = []
        while self._todo:
            suspects += self._pass()
        for job in suspects:
            self._todo.append(job)
            if self._pass():
                with self._folder.taken(job.id) as work:
                    if work is not None:
                        self._told(failed(job, self._folder, work, CRASHED))

    def _pass(self) -> list[SlideJob]:
        """Do slides with one pool until it breaks; returns those that were in flight then."""
        pool, blocks = Pool(self._workers), Blocks(2 * self._workers + 2, self._model.engine.input_px)
        ahead = Ahead(pool, blocks, self._next, self._first_row)
        flying: dict[str, SlideJob] = {}
        self._flying = flying
        try:
            for reading in ahead.slides():
                self._told(self._slide(ahead, reading))
                flying.pop(reading.job.id)
            return []
        except BrokenProcessPool:
            return list(flying.values())
        finally:
            pool.close()  # before the memory goes that its processes write to
            blocks.close()
            for slide in list(self._held):
                self._let_go(slide)

    def _next(self) -> SlideJob | None:
        """Take the next slide that no other process has."""
        while self._todo:
            job = self._todo.popleft()
            stack = ExitStack()
            work = stack.enter_context(self._folder.taken(job.id))
            if work is None or self._folder.is_done(job.id):
                stack.close()
                self._outcome.elsewhere.append(job.id)
                continue
            self._folder.forget(job.id)
            self._held[job.id] = _Held(stack, work)
            self._flying[job.id] = job
            return job
        return None

    def _first_row(self, job: SlideJob, plan: SlidePlan) -> int:
        held = self._held[job.id]
        held.partial = Partial(held.work, plan, self._model.width, self._model.tokens_shape)
        self._tell(held, len(plan.origins_N2), held.partial.rows)
        return held.partial.rows

    def _tell(self, held: _Held, found: int, done: int) -> None:
        held.found, held.done = held.found + found, held.done + done
        self._bar.tell(found, done)

    def _told(self, record: SlideRecord) -> None:
        self._outcome.add(record)
        self._bar.slide(record)

    def _let_go(self, slide: str) -> None:
        """Release a slide; of an unfinished one what is done is kept for the next run."""
        held = self._held.pop(slide)
        if held.partial is not None:
            if not self._folder.record(slide).exists():
                with suppress(OSError):  # a full disk: the last commit counts
                    held.partial.commit()
            held.partial.close()
        held.stack.close()

    def _slide(self, ahead: Ahead, reading: Reading) -> SlideRecord:
        """Encode and write one slide."""
        job, held = reading.job, self._held[reading.job.id]
        held.began = time.monotonic()  # of its turn: it may have been read ahead for long
        try:
            plan = result_of(reading.plan_future)
            if job.coords is not None:
                check_tile_mpp(plan.tile_mpp, self._allowed_mpp, self._model.engine.input_px, job.coords)
            with self._folder.writing():
                self._encode(ahead, reading, held)
                record = self._write(job, plan, held)
        except (FailedSlideError, SlideError, ModelError) as error:
            ahead.drop(reading)
            record = failed(job, self._folder, held.work, str(error), time.monotonic() - held.began)
        self._tell(held, held.done - held.found, 0)  # of a slide that fails midway the rest will not come
        self._let_go(job.id)
        return record

    def _encode(self, ahead: Ahead, reading: Reading, held: _Held) -> None:
        partial = held.partial
        assert partial is not None

        def take(result: BatchResult) -> None:
            partial.add(result)
            self._tell(held, 0, len(result.fates))

        batches = Batches(self._model, self._config.batch, take)
        for piece, tiles_NHW3 in ahead.tiles(reading):
            batches.add(piece, tiles_NHW3)
        batches.end()

    def _write(self, job: SlideJob, plan: SlidePlan, held: _Held) -> SlideRecord:
        """Write a slide's files, and last its record."""
        partial, folder = held.partial, self._folder
        assert partial is not None
        slide = self._features(job, plan, partial)
        written = [folder.features(job.id)]
        write_h5(written[0], slide)
        if self._config.format == "pt":
            written.append(folder.pt(job.id))
            write_pt(written[1], slide)
        elif self._config.format == "zarr":
            write_zarr(folder.zarr(job.id), slide)
        scale = plan.width / plan.mask_width, plan.height / plan.mask_height
        files.write_json(folder.tissue(job.id), geojson(plan.outline, *scale, "Tissue"))
        counts = Counter(FATES[code] for code in partial.fates().tolist())
        record = SlideRecord(
            slide=job.id,
            path=path_text(job.path),
            status="done",
            tiles=counts["kept"],
            mpp=plan.mpp,
            mpp_source=plan.mpp_source,
            level=plan.level,
            width=plan.width,
            height=plan.height,
            vendor=plan.vendor,
            reader=plan.reader,
            mask=plan.mask,
            grid_tiles=plan.grid_tiles,
            tissue_tiles=len(plan.origins_N2),
            white=counts["white"],
            black=counts["black"],
            blur=counts["blur"],
            pen=counts["pen"],
            unreadable=counts["unreadable"],
            unreadable_tiles=tuple(
                (int(x), int(y), reason) for (x, y), reason in zip(slide.failed_M2, partial.reasons, strict=True)
            ),
            slide_bytes=plan.slide_bytes,
            set_bytes=sum(path.stat().st_size for path in written),
            seconds=round(time.monotonic() - held.began, 2),
        )
        commit(folder, held.work, record)
        return record

    def _features(self, job: SlideJob, plan: SlidePlan, partial: Partial) -> SlideFeatures:
        """All that is written of a slide, in the order of its coordinates."""
        engine, rows_K = self._model.engine, partial.kept_rows()
        order_K = np.argsort(plan.order_N[rows_K], kind="stable")
        unreadable_M = np.flatnonzero(partial.fates() == FATES.index("unreadable"))
        where = {"name": job.id, "savetodir": path_text(self._folder.features(job.id).parent)}
        return SlideFeatures(
            features_KD=partial.features(),
            tokens_KHWD=partial.tokens(),
            order_K=order_K,
            coords_K2=plan.origins_N2[rows_K][order_K],
            failed_M2=plan.origins_N2[unreadable_M],
            coords_attributes=where
            | {
                "patch_size": job.config.tile_px,
                "patch_size_level0": round(plan.extent_px),
                "level0_magnification": round(_MICRONS_AT_1X / plan.mpp),
                "target_magnification": round(_MICRONS_AT_1X / plan.tile_mpp),
                "overlap": round(job.config.tile_px * plan.overlap),
                "level0_width": plan.width,
                "level0_height": plan.height,
            },
            features_attributes=where | {"encoder": short_name(engine.name)},
            provenance={
                "histill_version": __version__,
                "model": short_name(engine.name),
                "model_hash": self._hash,
                "licence": engine.licence or "unknown",
                "engine": engine.engine,
                "embedding": self._model.embedding,
                "batch": self._config.batch,
                "mpp": plan.tile_mpp,
                "slide_mpp": plan.mpp,
                "mpp_source": plan.mpp_source,
                "tile_px": job.config.tile_px,
                "tile_extent_px": plan.extent_px,
                "level": plan.level,
                "reader": plan.reader,
                "tiles_by": plan.mask,
            },
        )
