"""The training loop, whole and visible."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from histill.distill import checkpoint
from histill.distill.average import update_average
from histill.distill.parts import Parts
from histill.distill.progress import Stopwatch, TrainingProgress
from histill.distill.record import MetricsLog, Stop
from histill.distill.schedules import scheduled
from histill.distill.task import Step
from histill.distill.views import make_views
from histill.errors import RunError
from histill.tiles.loader import Batch, batches

LEAST_TILES = 2  # damaged files may leave fewer; KoLeo and Sinkhorn need two, and the step is then passed over

__all__ = ["LEAST_TILES", "positions_of_step", "step_batches", "train", "train_step"]


def positions_of_step(step: int, batch_tiles: int) -> NDArray[np.int64]:
    """Places in the endless shuffled stream of tiles that a step takes, (batch_tiles,)."""
    return np.arange(step * batch_tiles, (step + 1) * batch_tiles, dtype=np.int64)


def step_batches(parts: Parts, first_step: int, last_step: int) -> Generator[Batch]:
    """The batches of a range of steps, decoded ahead."""
    config = parts.config
    return batches(
        parts.source,
        lambda step: positions_of_step(step, config.batch_tiles),
        first_step,
        last_step,
        config.seed,
        workers=config.loader_threads,
    )


def train_step(parts: Parts, batch: Batch, step: int, steps: int, watch: Stopwatch) -> dict[str, float]:
    """One step: views, targets, losses, gradient, optimizer, average. Returns what is logged."""
    config, now = parts.config, scheduled(parts.config, step, steps)
    views = make_views(batch.tiles_BCHW.to(parts.device), batch.sizes_B2, batch.positions_B, config.views, config.seed)
    watch.mark("views")
    grid = config.views.global_px // parts.student.patch_px
    with parts.autocast:
        targets = parts.teacher.targets(views.clean_GBCHW.flatten(0, 1), grid)
    watch.mark("teacher")
    terms = Step(positions_B=batch.positions_B, teacher_temperature=now.teacher_temperature, autocast=parts.autocast)
    outcome = parts.task(parts.student, views, targets, terms)
    values = {name: float(value.detach()) for name, value in {"loss": outcome.loss, **outcome.terms}.items()}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise RunError(
            "a loss is not finite; the optimizer has not stepped",
            where=f"step {step}, terms {', '.join(broken)}",
            got=", ".join(f"{name}={value}" for name, value in values.items()),
            remedy="lower --optimiser.base-lr, or use --precision fp32; the last checkpoint is good",
        )
    outcome.loss.backward()
    for group in parts.optimiser.param_groups:
        group["lr"] = now.last_layer_lr if group["last_layer"] else now.lr
        group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
    parameters = [parameter for group in parts.optimiser.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimiser.clip or math.inf)
    if not math.isfinite(float(norm)):
        raise RunError(
            "the gradient is not finite; the optimizer has not stepped",
            where=f"step {step}",
            got=", ".join(f"{name}={value}" for name, value in values.items()),
            remedy="lower --optimiser.base-lr, or use --precision fp32; the last checkpoint is good",
        )
    parts.optimiser.step()
    parts.optimiser.zero_grad(set_to_none=True)
    update_average(parts.average, parts.student, now.ema_momentum)
    watch.mark("student")
    values |= {name: float(value) for name, value in outcome.monitors.items()}
    return values | {
        "lr": now.lr,
        "weight_decay": now.weight_decay,
        "teacher_temperature": now.teacher_temperature,
        "ema_momentum": now.ema_momentum,
        "gradient_norm": float(norm),
    }


def train(
    parts: Parts,
    folder: Path,
    *,
    first_step: int,
    steps: int,
    check_every: int,
    check: Callable[[int], dict[str, Any]],
    stop: Stop,
    console: Console,
) -> int:
    """Train from ``first_step`` to ``steps``; checkpoint now and then, at the end, and when asked to stop.

    Returns the step that would come next: ``steps`` when the run is finished.
    """
    config = parts.config
    checkpoints, saved = folder / "checkpoints", time.monotonic()
    watch, step = Stopwatch(parts.device), first_step

    def save(next_step: int) -> None:
        checkpoint.save(checkpoints, next_step, parts.modules, parts.optimiser, keep=config.keep_checkpoints)

    with (
        closing(step_batches(parts, first_step, steps)) as stream,
        MetricsLog(folder, first_step, config.tensorboard) as log,
        TrainingProgress(console, first_step, steps) as bar,
    ):
        while step < steps and not stop.asked:
            watch.start()
            batch = next(stream)
            watch.mark("data")
            row: dict[str, Any] = {"step": step, "tiles": len(batch.positions_B)}
            if len(batch.positions_B) >= LEAST_TILES:
                row |= train_step(parts, batch, step, steps, watch)
                row["seconds"] = {name: round(seconds, 4) for name, seconds in watch.step_seconds.items()}
                bar.update(step, row["loss"], len(batch.positions_B), watch)
            log.write(row | ({"unreadable": batch.unreadable} if batch.unreadable else {}))
            step += 1
            if step % check_every == 0 and step < steps:
                log.write({"step": step - 1, "check": check(step)})
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save(step)
                saved = time.monotonic()
        save(step)
    return step
