"""The training loop, whole and visible."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from histill.distill import checkpoint
from histill.distill.parts import Parts
from histill.distill.progress import Stopwatch, TrainingProgress
from histill.distill.record import MetricsLog, Stop
from histill.distill.share import StepShare
from histill.distill.step import train_step
from histill.errors import RunError
from histill.tiles.loader import Batch, batches
from histill.tiles.order import positions_of

__all__ = ["step_batches", "train"]


def step_batches(parts: Parts, first_step: int, last_step: int) -> Generator[tuple[Batch, list[Batch]]]:
    """Decode ahead this rank's tiles of a range of steps, and those of each labelled set.

    Parameters
    ----------
    parts
        The run.
    first_step, last_step
        From 0; the last one is not taken.

    Yields
    ------
    Batch, list of Batch
        Of each step: the tiles, and those of each labelled set.
    """
    config, ranks = parts.config, parts.ranks

    def share_of(tiles: int) -> Callable[[int], NDArray[np.int64]]:
        return lambda step: positions_of(step * tiles, tiles, rank=ranks.rank, world=ranks.world)

    workers = config.loader_threads
    with ExitStack() as stack:
        own = batches(parts.source, share_of(config.batch_tiles), first_step, last_step, config.seed, workers=workers)
        labelled = [
            each.batches(share_of(config.labelled_tiles), first_step, last_step, config.seed, workers)
            for each in parts.labelled
        ]
        for stream in (own, *labelled):
            stack.enter_context(closing(stream))
        for batch in own:
            yield batch, [next(stream) for stream in labelled]


def train(
    parts: Parts,
    folder: Path,
    *,
    first_step: int,
    steps: int,
    check_every: int,
    check: Callable[[int], dict[str, dict[str, Any]]],
    stop: Stop,
    console: Console,
) -> int:
    """Train from ``first_step`` to ``steps``; checkpoint now and then, at the end, and when asked to stop.

    Returns the step that would come next: ``steps`` when the run is finished.

    Raises
    ------
    RunError
        When no student is left whose losses are finite.
    """
    config, ranks = parts.config, parts.ranks
    watch, step, saved = Stopwatch(parts.device), first_step, time.monotonic()
    with ExitStack() as stack:
        stream = stack.enter_context(closing(step_batches(parts, first_step, steps)))
        logs = {
            learner.name: stack.enter_context(
                MetricsLog(learner.folder, first_step, config.tensorboard, writes=ranks.first)
            )
            for learner in parts.learners
        }
        bar = stack.enter_context(TrainingProgress(console, first_step, steps))
        while step < steps and parts.alive:
            watch.start()
            batch, labelled = next(stream)
            watch.mark("data")
            due = time.monotonic() - saved > 60 * config.checkpoint_minutes
            share = StepShare.agreed(parts, batch, labelled, asked=stop.asked, due=due)
            if share.asked:
                break
            rows: dict[str, dict[str, float]] = {}
            if share.enough:
                rows = train_step(parts, batch, labelled, share, step, steps, watch)
                bar.update(step, {name: row["loss"] for name, row in rows.items()}, share.tiles, watch)
            _log(parts, logs, rows, share, watch, step, console)
            step += 1
            if step % check_every == 0 and step < steps and parts.alive:
                for name, found in check(step).items():
                    logs[name].write({"step": step - 1, "check": found})
            if share.due and parts.alive:
                checkpoint.save(folder / "checkpoints", step, parts.state, keep=config.keep_checkpoints, ranks=ranks)
                saved = time.monotonic()
        if parts.alive:
            checkpoint.save(folder / "checkpoints", step, parts.state, keep=config.keep_checkpoints, ranks=ranks)
    if not parts.alive:
        raise RunError(
            "a loss or its gradient is not finite; the optimizer has not stepped",
            where=parts.learners[-1].failed,
            remedy="lower --optimiser.base-lr, or use --precision fp32; the same settings lead here again",
        )
    return step


def _log(
    parts: Parts,
    logs: dict[str, MetricsLog],
    rows: dict[str, dict[str, float]],
    share: StepShare,
    watch: Stopwatch,
    step: int,
    console: Console,
) -> None:
    """Write a row for every student that the step was for, also when the step was passed over."""
    if not share.enough:
        console.print(f"[bold yellow]step {step} is passed over: {share.tiles} readable tiles are too few[/]")
    common: dict[str, Any] = {"step": step, "tiles": share.tiles}
    timed = {"seconds": {name: round(seconds, 4) for name, seconds in watch.step_seconds.items()}} if rows else {}
    for learner in parts.alive_before(rows):
        row = common | rows.get(learner.name, {}) | timed
        if learner.failed:
            row = common | {"failed": learner.failed}
            console.print(f"[bold red]{learner.name} learns no more: {learner.failed}[/]")
        logs[learner.name].write(row | ({"unreadable": share.unreadable} if share.unreadable else {}))
