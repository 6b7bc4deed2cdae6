"""Slides -> a tile set: which slides are still to do, who does them, and what is written at the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from histill.errors import HistillError
from histill.tiles.config import TileConfig
from histill.tiles.cutting import SlideJob
from histill.tiles.folder import SetFolder
from histill.tiles.index import merge_indexes
from histill.tiles.jobs import jobs_of, refuse_changes
from histill.tiles.pool import BrokenProcessPool, Pool, cores
from histill.tiles.progress import TilingProgress
from histill.tiles.slide_folder import SlideFolder, SlideRecord
from histill.tiles.slide_writer import failed, tile_slide

__all__ = ["CRASHED", "Outcome", "claim", "finish", "write_tiles"]

CRASHED = (
    "a worker process died while it read this slide, and again when it read it alone: a damaged file, or too little "
    "memory (dmesg tells)"
)
"""The error of a slide that kills its reader."""


@dataclass(slots=True)
class Outcome:
    """What a run did."""

    done: list[SlideRecord] = field(default_factory=list)
    failed: list[SlideRecord] = field(default_factory=list)
    there: int = 0
    """Slides that an earlier run had finished."""
    elsewhere: list[str] = field(default_factory=list)
    """Slides that another process has taken."""

    def add(self, record: SlideRecord) -> None:
        """Count one slide."""
        (self.failed if record.status == "failed" else self.done).append(record)


def write_tiles(config: TileConfig, console: Console) -> Outcome:
    """Make or complete a tile set.

    Raises
    ------
    ConfigError, RunError, DataError
        The command line, the folder, or the disk is at fault. A slide at fault gets a row with its error instead.
    """
    assert config.out is not None
    folder = SetFolder(config.out)
    jobs = jobs_of(config, console)
    cluster = _cluster(config)
    finished = claim(folder, config.settings(), jobs)
    outcome = Outcome(there=sum(job.id in finished for job in jobs))
    todo = [job for job in jobs if job.id not in finished]
    try:
        _tile(config, todo, folder, outcome, console, cluster)
        # Another process had these. Unless it has finished them meanwhile, it may be gone.
        left = [job for job in todo if job.id in set(outcome.elsewhere) and not folder.is_done(job.id)]
        if left:
            outcome.elsewhere.clear()
            _tile(config, left, folder, outcome, console, cluster)
    except BaseException:
        with suppress(OSError, HistillError):  # the first error is the one to show
            finish(folder)
        raise
    finish(folder)
    return outcome


def claim(folder: SlideFolder, settings: dict[str, Any], jobs: Sequence[SlideJob]) -> dict[str, SlideRecord]:
    """Make the folder ours, and give the records of finished slides; a refusal leaves it as it was.

    Parameters
    ----------
    folder
        Made where it does not exist.
    settings
        Of this run; those of an older one must be the same.
    jobs
        Slides that are wanted.

    Returns
    -------
    dict
        Slide id -> record of each slide that is done.

    Raises
    ------
    RunError
        The folder holds something else or has other settings, or a finished slide is not what it was.
    """
    new = not folder.root.exists()
    try:
        with folder.writing():
            folder.root.mkdir(parents=True, exist_ok=True)
            folder.claim(settings)
        done = [record for record in folder.records() if record.status == "done"]
        finished = {record.slide: record for record in done if folder.holds(record)}
        for job in jobs:
            if job.id in finished:
                refuse_changes(job, finished[job.id])
    except HistillError:
        folder.tidy()
        if new:
            with suppress(OSError):
                folder.root.rmdir()
        raise
    return finished


def _cluster(config: TileConfig) -> Any:
    """Connect to Ray before anything is written; None without it."""
    if config.ray is None:
        return None
    from histill.tiles.cluster import join_cluster

    return join_cluster(config.ray, config.workers)


def _tile(
    config: TileConfig,
    todo: Sequence[SlideJob],
    folder: SetFolder,
    outcome: Outcome,
    console: Console,
    cluster: Any,
) -> None:
    if cluster is not None:
        from histill.tiles.cluster import tile_on_ray

        tile_on_ray(cluster, todo, folder, outcome, console)
    elif todo:
        _tile_here(config, todo, folder, outcome, console)


def finish(folder: SetFolder) -> None:
    """Write the index and the tables of all slides that are finished, by whichever process."""
    with folder.index_lock():
        folder.sweep()
        records = folder.records()
        parts = [folder.rows(record.slide) for record in records if record.status == "done"]
        merge_indexes(parts, folder.index, folder.settings())
        folder.write_tables(records)
    folder.tidy()


def _tile_here(
    config: TileConfig, todo: Sequence[SlideJob], folder: SetFolder, outcome: Outcome, console: Console
) -> None:
    """Cut with processes of this machine.

    A thread a slide hands out its cells and writes what comes back, so that all processes are busy with many small
    slides as well as with one large one.
    """
    pool = Pool(config.workers or cores())
    crashed: list[SlideJob] = []
    stop = threading.Event()

    def one(job: SlideJob, bar: TilingProgress) -> None:
        if stop.is_set():
            return
        with folder.taken(job.id) as work:
            if work is None or folder.is_done(job.id):
                outcome.elsewhere.append(job.id)
                return
            try:
                record = tile_slide(job, folder, work, pool, bar.tell)
            except BrokenProcessPool:
                crashed.append(job)
                return
            except BaseException:
                stop.set()
                raise
        outcome.add(record)
        bar.slide(record)

    try:
        with TilingProgress(console, len(todo)) as bar:
            threads = ThreadPoolExecutor(min(pool.count, len(todo)), thread_name_prefix="slide")
            try:
                futures = [threads.submit(one, job, bar) for job in todo]
                for future in futures:
                    future.result()
            except BaseException:
                stop.set()
                pool.close()  # what is in flight ends now, and with it the threads
                raise
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
            _retry_alone(crashed, folder, outcome, bar, pool.count)
    finally:
        pool.close()


def _retry_alone(
    crashed: Sequence[SlideJob], folder: SetFolder, outcome: Outcome, bar: TilingProgress, count: int
) -> None:
    """Slides that were in flight when a process died: one at a time, so that the guilty one is known."""
    for job in sorted(crashed, key=lambda job: job.id):
        pool = Pool(count)
        try:
            with folder.taken(job.id) as work:
                if work is None or folder.is_done(job.id):
                    outcome.elsewhere.append(job.id)
                    continue
                try:
                    record = tile_slide(job, folder, work, pool, bar.tell)
                except BrokenProcessPool:
                    record = failed(job, folder, work, CRASHED)
        finally:
            pool.close()
        outcome.add(record)
        bar.slide(record)
