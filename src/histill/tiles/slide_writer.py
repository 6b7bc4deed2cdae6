"""One slide -> its shards, rows, thumbnail and record, committed as a whole."""

from __future__ import annotations

import dataclasses
import io
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from histill import files
from histill.slides.slide import SlideError
from histill.tiles.cutting import Cell, SlideJob, SlidePlan, cells, cut, plan_slide
from histill.tiles.folder import SetFolder
from histill.tiles.index import SCHEMA, write_index
from histill.tiles.pool import BrokenProcessPool, Workers
from histill.tiles.shards import ShardWriter, slide_key
from histill.tiles.slide_folder import SlideFolder, SlideRecord

__all__ = ["FailedSlideError", "Progress", "commit", "failed", "path_text", "result_of", "tile_slide"]

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (further tiles found, further tiles done)."""

_KEPT_RGB = (0, 120, 70)
_THUMBNAIL_QUALITY = 85


class FailedSlideError(Exception):
    """A slide cannot be used; the others go on."""


@dataclass(slots=True)
class _Tally:
    """What became of a slide's tiles."""

    chosen: list[int] = field(default_factory=list)  # rows of the plan that are in the set
    places: list[tuple[str | None, int | None, int | None]] = field(default_factory=list)  # shard, offset, length
    rejected: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[int, int, str]] = field(default_factory=list)


def tile_slide(job: SlideJob, folder: SetFolder, work: Path, workers: Workers, progress: Progress) -> SlideRecord:
    """Cut one slide and commit it; a slide that cannot be used gets a record with the status ``failed``.

    Parameters
    ----------
    job
        The slide.
    folder
        The set.
    work
        An empty folder on the set's disk, for files that are not whole yet.
    workers
        Who cuts.
    progress
        Told of tiles found and done.

    Raises
    ------
    DataError
        The set cannot be written (a full disk): that concerns all slides.
    BrokenProcessPool
        A worker process died; nothing was committed.
    """
    began = time.monotonic()
    found = done = 0

    def tell(further_found: int, further_done: int) -> None:
        nonlocal found, done
        found, done = found + further_found, done + further_done
        progress(further_found, further_done)

    folder.forget(job.id)
    try:
        plan = result_of(workers.submit(plan_slide, job))
        tell(len(plan.origins_N2), 0)
        record = _write(job, plan, folder, work, workers, tell)
    except FailedSlideError as error:
        return failed(job, folder, work, str(error), time.monotonic() - began)
    finally:
        tell(done - found, 0)  # of a slide that fails midway the rest will not come
    record = dataclasses.replace(record, seconds=round(time.monotonic() - began, 2))
    commit(folder, work, record)
    return record


def failed(job: SlideJob, folder: SlideFolder, work: Path, error: str, seconds: float = 0.0) -> SlideRecord:
    """Record that a slide cannot be used, and why."""
    record = SlideRecord(
        slide=job.id,
        path=path_text(job.path),
        patient=job.patient,
        status="failed",
        error=error,
        seconds=round(seconds, 2),
    )
    commit(folder, work, record)
    return record


def path_text(path: Path) -> str:
    """A path as text that JSON and CSV can hold, also where its name is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def commit(folder: SlideFolder, work: Path, record: SlideRecord) -> None:
    """Write a slide's record: with it the slide is finished."""
    with folder.writing():
        files.write_json(work / "record", dataclasses.asdict(record))
        folder.place(work / "record", folder.record(record.slide))


def result_of(future: Future[T]) -> T:
    """Wait for a worker; what it makes of a broken file concerns this slide alone."""
    try:
        return future.result()
    except (BrokenProcessPool, CancelledError):
        raise
    except SlideError as error:
        raise FailedSlideError(str(error)) from error
    except Exception as error:
        raise FailedSlideError(f"{type(error).__name__}: {error}") from error


def _cells_in_order(job: SlideJob, plan: SlidePlan, workers: Workers) -> Iterator[tuple[slice, Cell]]:
    """Cut the cells with all workers, a few ahead of the one that is asked for."""
    waiting: deque[tuple[slice, Future[Cell]]] = deque()
    try:
        for rows in cells(plan):
            waiting.append((rows, workers.submit(cut, job, plan.reader, plan.mpp, plan.origins_N2[rows])))
            if len(waiting) > 2 * workers.count:
                rows, future = waiting.popleft()
                yield rows, result_of(future)
        while waiting:
            rows, future = waiting.popleft()
            yield rows, result_of(future)
    finally:
        for _, future in waiting:
            future.cancel()


def _write(
    job: SlideJob, plan: SlidePlan, folder: SetFolder, work: Path, workers: Workers, tell: Progress
) -> SlideRecord:
    tally, shards = _Tally(), list[Path]()

    def shard_path(number: int) -> Path:
        shards.append(work / folder.shard(job.id, number).name)
        return shards[-1]

    with ShardWriter(shard_path, job.config.shard_mb * 10**6) as writer:
        for rows, cell in _cells_in_order(job, plan, workers):
            _take(tally, rows, cell, plan, job, writer)
            tell(0, rows.stop - rows.start)
    with folder.writing():
        present = [path for path in dict.fromkeys(shards) if path.exists()]
        set_bytes = sum(path.stat().st_size for path in present)
        write_index(work / "rows", _table(job, plan, tally), job.config.settings())
        (work / "thumbnail").write_bytes(_thumbnail(plan, tally))
        for path in present:
            folder.place(path, folder.shards / path.name)
        folder.place(work / "rows", folder.rows(job.id))
        folder.place(work / "thumbnail", folder.thumbnail(job.id))
    return SlideRecord(
        slide=job.id,
        path=path_text(job.path),
        patient=job.patient,
        status="done",
        tiles=len(tally.chosen),
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
        white=tally.rejected["white"],
        black=tally.rejected["black"],
        blur=tally.rejected["blur"],
        pen=tally.rejected["pen"],
        unreadable=len(tally.unreadable),
        unreadable_tiles=tuple(tally.unreadable),
        slide_bytes=plan.slide_bytes,
        set_bytes=set_bytes,
        shards=tuple(path.name for path in present),
    )


def _take(tally: _Tally, rows: slice, cell: Cell, plan: SlidePlan, job: SlideJob, writer: ShardWriter) -> None:
    """Put one cell's tiles into the shard, and count the others."""
    suffix, key = "png" if job.config.lossless else "jpg", slide_key(job.id)
    for number, data in zip(cell.kept, cell.images, strict=True):
        row = rows.start + number
        x, y = plan.origins_N2[row].tolist()
        tally.chosen.append(row)
        if job.config.index_only:
            tally.places.append((None, None, None))
        else:
            tally.places.append((*writer.add(f"{key}_{x}_{y}.{suffix}", data), len(data)))
    tally.rejected.update(cell.rejected)
    for number, reason in cell.unreadable:
        x, y = plan.origins_N2[rows.start + number].tolist()
        tally.unreadable.append((x, y, reason))


def _table(job: SlideJob, plan: SlidePlan, tally: _Tally) -> pa.Table:
    count = len(tally.chosen)
    chosen = np.array(tally.chosen, dtype=np.int64)
    columns = {
        "shard": [shard for shard, _, _ in tally.places],
        "offset": [offset for _, offset, _ in tally.places],
        "length": [length for _, _, length in tally.places],
        "slide": [job.id] * count,
        "patient": [job.patient] * count,
        "x": plan.origins_N2[chosen, 0].astype(np.int32),
        "y": plan.origins_N2[chosen, 1].astype(np.int32),
        "level": np.full(count, plan.level, dtype=np.int8),
        "mpp": np.full(count, job.config.mpp, dtype=np.float32),
        "tissue": plan.tissue_N[chosen].astype(np.float32),
    }
    arrays = [pa.array(columns[entry.name], type=_plain(entry.type)) for entry in SCHEMA]
    return pa.Table.from_arrays(arrays, names=SCHEMA.names)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _thumbnail(plan: SlidePlan, tally: _Tally) -> bytes:
    """Draw the slide with the outline of each kept tile, as JPEG."""
    image = Image.fromarray(plan.thumbnail_HW3)
    scale_x, scale_y = image.width / plan.width, image.height / plan.height
    draw = ImageDraw.Draw(image)
    for x, y in plan.origins_N2[np.array(tally.chosen, dtype=np.int64)].tolist():
        right, bottom = (x + plan.extent_px) * scale_x - 1, (y + plan.extent_px) * scale_y - 1
        left, top = x * scale_x, y * scale_y
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=_KEPT_RGB)
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=_THUMBNAIL_QUALITY)
    return encoded.getvalue()
