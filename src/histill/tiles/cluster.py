"""Work on a Ray cluster: one slide, one task, tried again on another node when a node dies."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from histill.errors import MissingExtraError, RunError
from histill.tiles.cutting import SlideJob
from histill.tiles.folder import SetFolder, SlideRecord
from histill.tiles.pool import InProcess
from histill.tiles.progress import TilingProgress
from histill.tiles.slide_folder import SlideFolder
from histill.tiles.slide_writer import failed, tile_slide

if TYPE_CHECKING:
    from histill.tiles.write import Outcome

__all__ = ["OneSlide", "join_cluster", "slides_on_ray", "tile_on_ray"]

OneSlide = Callable[[SlideJob, Any], SlideRecord | None]
"""What a task does, in a folder; None when another process has the slide."""

_RETRIES = 3
_CONNECT_SECONDS = 10
_CRASHED = f"the worker that read this slide died, {_RETRIES + 1} times: a damaged file, or too little memory"


def _one_slide(job: SlideJob, folder: SetFolder) -> SlideRecord | None:
    """What a Ray task does; None when another process has the slide."""
    with folder.taken(job.id) as work:
        if work is None or folder.is_done(job.id):
            return None
        return tile_slide(job, folder, work, InProcess(), lambda found, done: None)


def join_cluster(address: str, workers: int) -> Any:
    """Connect to a Ray cluster.

    Parameters
    ----------
    address
        Of the cluster, as ``ray.init`` takes it (``auto``, ``10.0.0.1:6379``, ``ray://10.0.0.1:10001``); ``local``
        starts one here.
    workers
        Processes of a local cluster; 0: one a core. A cluster that is there has its own number.

    Returns
    -------
    module
        ``ray``, connected.

    Raises
    ------
    MissingExtraError
        Ray is not installed.
    RunError
        The cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        remedy = "pip install 'histill[cluster]'"
        raise MissingExtraError("Ray is not installed", where="--ray", remedy=remedy) from None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for ever
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
        num_cpus = workers if address == "local" and workers else None
        ray.init(address=address, num_cpus=num_cpus, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:
        raise RunError("the Ray cluster cannot be reached", where=f"--ray {address}", got=error) from None
    return ray


def tile_on_ray(ray: Any, todo: Sequence[SlideJob], folder: SetFolder, outcome: Outcome, console: Console) -> None:
    """Cut slides as tasks of a Ray cluster; all its nodes must see the slides and the set under the same paths.

    Parameters
    ----------
    ray
        What :func:`join_cluster` gave.
    todo
        The slides.
    folder
        The set.
    outcome
        Is told of each slide.
    console
        For progress.
    """
    with TilingProgress(console, len(todo)) as bar:
        slides_on_ray(ray, _one_slide, todo, folder, outcome, bar)


def slides_on_ray(
    ray: Any,
    one_slide: OneSlide,
    todo: Sequence[SlideJob],
    folder: SlideFolder,
    outcome: Outcome,
    bar: TilingProgress,
    *,
    num_cpus: int = 1,
    num_gpus: int = 0,
) -> None:
    """Do something to slides as tasks of a Ray cluster.

    Parameters
    ----------
    ray
        What :func:`join_cluster` gave.
    one_slide
        What each task does.
    todo, folder, outcome
        As for :func:`tile_on_ray`.
    bar
        For progress.
    num_cpus, num_gpus
        What a task needs. Numerical libraries inside it take no more threads than that: Ray sees to it.
    """
    task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=_RETRIES)(one_slide)
    where = ray.put(folder)
    waiting: dict[Any, SlideJob] = {task.remote(job, where): job for job in todo}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        job = waiting.pop(ready[0])
        try:
            record = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:  # raised by our own code
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the worker, its node or its memory is gone
            with folder.taken(job.id) as work:
                record = None if work is None else failed(job, folder, work, f"{_CRASHED} ({error})")
        if record is None:
            outcome.elsewhere.append(job.id)
            continue
        bar.tell(record.tissue_tiles, record.tissue_tiles)
        outcome.add(record)
        bar.slide(record)
