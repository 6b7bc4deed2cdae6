"""Tiling on a Ray cluster: one slide, one task, tried again on another node when a node dies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from histill.errors import MissingExtraError, RunError
from histill.tiles.cutting import SlideJob
from histill.tiles.folder import SetFolder, SlideRecord
from histill.tiles.pool import InProcess
from histill.tiles.progress import TilingProgress
from histill.tiles.slide_writer import failed, tile_slide

if TYPE_CHECKING:
    from histill.tiles.write import Outcome

__all__ = ["tile_on_ray"]

_RETRIES = 3
_CRASHED = f"the worker that read this slide died, {_RETRIES + 1} times: a damaged file, or too little memory"


def _one_slide(job: SlideJob, folder: SetFolder) -> SlideRecord | None:
    """What a Ray task does; None when another process has the slide."""
    with folder.taken(job.id) as work:
        if work is None or folder.is_done(job.id):
            return None
        return tile_slide(job, folder, work, InProcess(), lambda found, done: None)


def tile_on_ray(
    address: str, workers: int, todo: Sequence[SlideJob], folder: SetFolder, outcome: Outcome, console: Console
) -> None:
    """Cut slides as tasks of a Ray cluster; all its nodes must see the slides and the set under the same paths.

    Parameters
    ----------
    address
        Of the cluster, as ``ray.init`` takes it (``auto``, ``ray://host:10001``); ``local`` starts one here.
    workers
        Processes of a local cluster; 0: one a core. A cluster that is there has its own number.
    todo
        The slides.
    folder
        The set.
    outcome
        Is told of each slide.
    console
        For progress.

    Raises
    ------
    MissingExtraError
        Ray is not installed.
    RunError
        The cluster cannot be reached.
    """
    ray = _joined(address, workers)
    try:
        # Numerical libraries inside a task must not each take all cores of a node.
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_one_slide)
        where = ray.put(folder)
        waiting: dict[Any, SlideJob] = {task.remote(job, where): job for job in todo}
        with TilingProgress(console, len(todo)) as bar:
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                job = waiting.pop(ready[0])
                try:
                    record = ray.get(ready[0])
                except ray.exceptions.WorkerCrashedError:
                    with folder.taken(job.id) as work:
                        record = None if work is None else failed(job, folder, work, _CRASHED)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                if record is None:
                    outcome.elsewhere.append(job.id)
                    continue
                bar.tell(record.tissue_tiles, record.tissue_tiles)
                outcome.add(record)
                bar.slide(record)
    finally:
        ray.shutdown()


def _joined(address: str, workers: int) -> Any:
    """The module ``ray``, connected to the cluster."""
    try:
        import ray
    except ImportError:
        remedy = "pip install 'histill[cluster]'"
        raise MissingExtraError("Ray is not installed", where="--ray", remedy=remedy) from None
    try:
        num_cpus = workers if address == "local" and workers else None
        ray.init(address=address, num_cpus=num_cpus, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        raise RunError("the Ray cluster cannot be reached", where=f"--ray {address}", got=error) from None
    return ray
