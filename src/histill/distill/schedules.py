"""Schedules: pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from histill.distill.config import DistillConfig

__all__ = ["Scheduled", "cosine", "scheduled"]

_EMA_WINDOWS = 20  # a run of N steps starts with a window of N / 20 steps at most; exp(-10) of its start is left


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1 along half a cosine.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, equation 5, without restarts.

    Parameters
    ----------
    start, end
        Any unit; either may be the larger.
    progress
        Share of the way; below 0 it counts as 0, above 1 as 1.

    Returns
    -------
    float
        ``end + (start - end) * (1 + cos(pi * progress)) / 2``.
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """What changes from step to step."""

    lr: float
    """Learning rate."""
    last_layer_lr: float
    """Learning rate of the heads' last layers: 0 while they are frozen."""
    weight_decay: float
    """Decoupled weight decay."""
    teacher_temperature: float
    """Temperature of the teacher's scores."""
    ema_momentum: float
    """Momentum of the student's moving average."""


def scheduled(config: DistillConfig, step: int, steps: int) -> Scheduled:
    """The values at ``step`` of ``steps``; the first step has a learning rate above 0.

    The learning rate is DINOv2's: a peak of ``base_lr * sqrt(batch_tiles / 1024)`` (its code's ``sqrt_wrt_1024``), up
    to it linearly, and down along a cosine to ``final_lr``, which is not scaled. Weight decay and the average's
    momentum go along a cosine over the whole run, and the teacher's temperature rises linearly (Caron et al., DINO,
    ICCV 2021, sections 3.1 and 3.2). The last layers' rate is 0 for the first share ``freeze_last_layer`` of the run.

    Parameters
    ----------
    config
        Its ``optimiser``, ``objective`` and ``batch_tiles``, the tiles of a step over all ranks.
    step
        From 0 to ``steps`` - 1.
    steps
        Length of the run, 1 or more.

    Returns
    -------
    Scheduled
        Python floats.
    """
    optimiser, objective = config.optimiser, config.objective
    peak = optimiser.base_lr * math.sqrt(config.batch_tiles / 1024)
    warmup_steps = round(optimiser.warmup * steps)
    if step < warmup_steps:
        lr = peak * (step + 1) / warmup_steps
    else:
        lr = cosine(peak, optimiser.final_lr, (step - warmup_steps) / max(1, steps - warmup_steps))
    progress = step / steps
    temperature_progress = min(1.0, step / max(1.0, objective.teacher_temperature_warmup * steps))
    start, end = objective.teacher_temperature_start, objective.teacher_temperature
    return Scheduled(
        lr=lr,
        last_layer_lr=0.0 if step < optimiser.freeze_last_layer * steps else lr,
        weight_decay=cosine(optimiser.weight_decay, optimiser.weight_decay_end, progress),
        teacher_temperature=start + (end - start) * temperature_progress,
        # 0.994 is for long runs: in a short one the average must also forget where it started.
        ema_momentum=cosine(min(optimiser.ema, max(0.0, 1.0 - _EMA_WINDOWS / steps)), 1.0, progress),
    )
