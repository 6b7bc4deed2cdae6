"""One step of training, for every student.

Shapes: B tiles of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from histill.distill.average import update_average
from histill.distill.labelled import LabelledBatch, labelled_batch
from histill.distill.learner import Learner
from histill.distill.parallel import gradients_wait, whole
from histill.distill.parts import Parts
from histill.distill.progress import Stopwatch
from histill.distill.schedules import Scheduled, scheduled
from histill.distill.share import StepShare
from histill.distill.targets import Said, balance, images_of
from histill.distill.task import Step
from histill.distill.views import Views, make_views
from histill.tiles.loader import Batch

__all__ = ["train_step"]


def train_step(
    parts: Parts,
    batch: Batch,
    labelled: Sequence[Batch],
    share: StepShare,
    step: int,
    steps: int,
    watch: Stopwatch,
) -> dict[str, dict[str, float]]:
    """One step: views, targets, and for each student losses, gradient, optimizer, average. Returns what is logged.

    Parameters
    ----------
    parts
        The run; its learners are changed.
    batch, labelled, share
        This rank's tiles, those of each labelled set, and what the ranks agreed on.
    step, steps
        From 0, and the run's length.
    watch
        Books the time of each part.

    Returns
    -------
    dict
        Student -> name -> what is logged, the losses over all ranks; a student that failed before has no row.
    """
    config, now = parts.config, scheduled(parts.config, step, steps)
    views = make_views(batch.tiles_BCHW.to(parts.device), batch.sizes_B2, batch.positions_B, config.views, config.seed)
    extra = [
        labelled_batch(each, its, config.views, config.seed, parts.device, tiles)
        for each, its, tiles in zip(parts.labelled, labelled, share.labelled_tiles, strict=True)
    ]
    watch.mark("views")
    said = []
    for teacher in parts.teachers:
        with parts.autocast:
            targets = teacher.targets(views.clean_GBCHW.flatten(0, 1), parts.grid)
        said.append(
            balance(
                teacher,
                targets,
                config.objective,
                batch.positions_B,
                now.teacher_temperature,
                seed=config.seed,
                reduce=parts.ranks.sum_ if parts.ranks.world > 1 else None,
            )
        )
    watch.mark("teacher")
    rows = {}
    for learner in parts.learners:
        if not learner.failed:
            rows[learner.name] = _learn(parts, learner, batch.positions_B, views, said, extra, share, now, step)
    watch.mark("student")
    return rows


def _learn(
    parts: Parts,
    learner: Learner,
    positions_B: NDArray[np.int64],
    views: Views,
    said: Sequence[Said],
    extra: Sequence[LabelledBatch],
    share: StepShare,
    now: Scheduled,
    step: int,
) -> dict[str, float]:
    """One student's step; where a value is not finite, on any rank, its optimizer does not step."""
    ranks, optimiser, names = parts.ranks, learner.optimiser, []
    logged: torch.Tensor | float = 0.0
    for number, tiles in enumerate(share.parts):
        last = number == len(share.parts) - 1
        seen, words = views, said
        if len(share.parts) > 1:
            images = images_of(tiles, len(positions_B), parts.config.views.n_global, parts.device)
            seen = Views(**{name: getattr(views, name)[:, tiles] for name in Views.__slots__})
            words = [each.of(images) for each in said]
        terms = Step(
            positions_B=positions_B[tiles],
            autocast=parts.autocast,
            share=share.of_part[number],
            pair_share=share.of_pairs[number] / ranks.world,
            gather=ranks.gather,
        )
        with gradients_wait(learner.wrapped, waiting=not last):
            outcome = learner.wrapped(seen, words, terms, extra if last else ())
            (outcome.loss * ranks.world).backward()  # the ranks' gradients are averaged, and belong added up
        values = {"loss": outcome.loss, **outcome.terms, **outcome.monitors}
        names += [name for name in values if name not in names]
        found = [values[name].detach().float() if name in values else outcome.loss.new_zeros(()) for name in names]
        logged = torch.nn.functional.pad(logged, (0, len(names) - len(logged))) if number else 0.0  # type: ignore[arg-type]
        logged = logged + torch.stack(found)
    assert isinstance(logged, torch.Tensor)
    row = dict(zip(names, ranks.sum_(logged.double()).tolist(), strict=True))
    for group in optimiser.param_groups:
        group["lr"] = now.last_layer_lr if group["last_layer"] else now.lr
        group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, parts.config.optimiser.clip or math.inf))
    row["gradient_norm"] = float(norm)
    broken = [name for name, value in row.items() if not math.isfinite(value)]
    if broken:
        learner.failed = f"step {step}: {', '.join(f'{name}={row[name]}' for name in broken)}"
    else:
        optimiser.step()
        update_average(learner.average, learner.student, now.ema_momentum)
    optimiser.zero_grad(set_to_none=True)
    return row | {
        "lr": now.lr,
        "weight_decay": now.weight_decay,
        "teacher_temperature": now.teacher_temperature,
        "ema_momentum": now.ema_momentum,
    }
