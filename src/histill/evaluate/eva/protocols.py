"""What a task is trained, stopped and scored on, and its runs: for patches, slides and segmentation.

Shapes: N rows of the set, M scored rows, R runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from histill.errors import DataError
from histill.evaluate.eva.mil import MilSchedule, runs_together, train_mil
from histill.evaluate.eva.parts import Parts
from histill.evaluate.eva.probe import ProbeSchedule, train_probes
from histill.evaluate.eva.scoring import balanced_accuracy, stopping_groups, stopping_split
from histill.evaluate.eva.segmentation import SegmentationSchedule, mean_dice, train_decoder
from histill.evaluate.eva.tasks import Task
from histill.evaluate.features import Array

__all__ = [
    "Report",
    "Rows",
    "Schedule",
    "patch_runs",
    "quick_rows",
    "rows_of",
    "schedule_of",
    "segmentation_runs",
    "slide_runs",
]

Schedule = ProbeSchedule | MilSchedule | SegmentationSchedule
Report = Callable[[str], None]
"""Told how far a training is, for people."""

_MEMORY = 4 * 2**30  # of the tiles and hidden values of the slide networks that are trained together
_QUICK_ROWS = {"patch": 1000, "slide": 60, "segmentation": 64}
_QUICK_STEPS = {"patch": 1000, "slide": 20, "segmentation": 100}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Rows of a set that a protocol fits, stops on, and scores."""

    protocol: Literal["original", "clean"]
    fit: Array
    stop: Array
    score: Array


def rows_of(task: Task, split_N: Array, label_N: Array | None, group_N: Array | None) -> list[Rows]:
    """Give the original's rows and, where it stops on what it scores, those with a stopping split carved off.

    The clean protocol takes a fifth of the training rows to stop on (by group where known, stratified by class), so
    that nothing of the scored split decides about the run.

    Parameters
    ----------
    task
        Which split it scores, and whether it stops on it.
    split_N
        ``train``, ``val`` or ``test`` of each row.
    label_N
        Classes; None for segmentation.
    group_N
        Patients or slides; None where they are not known.

    Raises
    ------
    DataError
        A split is empty, or no stopping split is possible.
    """
    part = {name: np.flatnonzero(split_N == name) for name in ("train", "val", task.scored)}
    empty = [name for name, rows in part.items() if not len(rows)]
    if empty:
        raise DataError(
            f"a split of {task.name} is empty",
            got=f"no {', '.join(empty)} rows among {len(split_N)}",
            allowed=f"{', '.join(part)} rows",
            remedy="use more of the data set",
        )
    train, found = part["train"], []
    found.append(Rows(protocol="original", fit=train, stop=part["val"], score=part[task.scored]))
    if task.stops_on_scored:
        if label_N is None:
            assert group_N is not None
            fit, stop = stopping_groups(group_N[train])
        else:
            fit, stop = stopping_split(label_N[train], None if group_N is None else group_N[train])
        found.append(Rows(protocol="clean", fit=train[fit], stop=train[stop], score=part[task.scored]))
    return found


def quick_rows(task: Task, split_N: Array, label_N: Array | None) -> Array:
    """Rows for a quick look: of every split the same number of each class, evenly spread, ascending."""
    chosen = []
    label_N = np.zeros(len(split_N), np.int64) if label_N is None else label_N
    for split in np.unique(split_N):
        classes = np.unique(label_N[split_N == split])
        for label in classes:
            rows = np.flatnonzero((split_N == split) & (label_N == label))
            count = min(len(rows), max(1, _QUICK_ROWS[task.kind] // len(classes)))
            chosen.append(rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)])
    return np.sort(np.concatenate(chosen))


def schedule_of(task: Task, *, quick: bool) -> Schedule:
    """Give the task's schedule, or a shorter one."""
    steps = min(task.steps, _QUICK_STEPS[task.kind]) if quick else task.steps
    if task.kind == "patch":
        return ProbeSchedule(steps=steps, batch=task.batch)
    if task.kind == "slide":
        return MilSchedule(epochs=steps, batch=task.batch)
    return SegmentationSchedule(steps=steps, batch=task.batch)


def patch_runs(
    x_ND: Array,
    label_N: Array,
    rows: Rows,
    task: Task,
    schedule: Schedule,
    parts: Parts,
    seeds: Sequence[int],
    device: str,
    report: Report,
) -> None:
    """Train and score the probes of these seeds together, and keep them.

    Parameters
    ----------
    x_ND, label_N
        Features and classes of the whole set.
    rows
        Which of them are fitted, stopped on and scored.
    task, schedule
        Number of classes; how long and how fast.
    parts
        Keeps each run.
    seeds
        One run each.
    device
        Of torch.
    report
        Told how far it is.
    """
    assert isinstance(schedule, ProbeSchedule)
    probes = train_probes(
        x_ND[rows.fit],
        label_N[rows.fit],
        x_ND[rows.stop],
        label_N[rows.stop],
        classes=task.classes,
        seeds=seeds,
        schedule=schedule,
        device=device,
        progress=lambda step: report(f"step {step} of {schedule.steps}"),
    )
    predicted_RM = probes.predict(x_ND[rows.score])
    for run, seed in enumerate(seeds):
        facts = {"best_step": probes.best_steps[run], "steps": probes.steps[run]}
        parts.write(seed, _run(seed, predicted_RM[run], label_N[rows.score], probes.stop_scores[run], facts))


def slide_runs(
    bags: Sequence[Array],
    label_N: Array,
    rows: Rows,
    task: Task,
    schedule: Schedule,
    parts: Parts,
    seeds: Sequence[int],
    device: str,
    report: Report,
) -> None:
    """Train and score the slide networks of these seeds, as many together as memory takes, and keep them.

    Parameters
    ----------
    bags
        Per slide (tiles, D), any float type.
    label_N, rows, task, schedule, parts, seeds, device, report
        As in :func:`patch_runs`.
    """
    assert isinstance(schedule, MilSchedule)
    fit, stop, score = ([bags[row] for row in some] for some in (rows.fit, rows.stop, rows.score))
    together = runs_together(max(map(len, fit)), fit[0].shape[1], len(seeds), schedule.batch, _MEMORY, device)
    for first in range(0, len(seeds), together):
        some = seeds[first : first + together]

        def told(epoch: int, some: Sequence[int] = some) -> None:
            report(f"runs {some[0]} to {some[-1]}, epoch {epoch} of {schedule.epochs}")

        trained = train_mil(
            fit,
            label_N[rows.fit],
            stop,
            label_N[rows.stop],
            classes=task.classes,
            seeds=some,
            schedule=schedule,
            device=device,
            progress=told,
        )
        predicted_RM = trained.predict(score)
        for run, seed in enumerate(some):
            facts = {"best_epoch": trained.best_epochs[run], "epochs": trained.epochs[run]}
            parts.write(seed, _run(seed, predicted_RM[run], label_N[rows.score], trained.stop_scores[run], facts))


def segmentation_runs(
    tokens_NPQD: Array,
    images_NHW3: Array,
    masks_NHW: Array,
    rows: Rows,
    task: Task,
    schedule: Schedule,
    parts: Parts,
    seeds: Sequence[int],
    device: str,
    report: Report,
) -> None:
    """Train and score one decoder after another, and keep them.

    Parameters
    ----------
    tokens_NPQD, images_NHW3, masks_NHW
        As :func:`histill.evaluate.eva.segmentation.train_decoder` takes them, of the whole set.
    rows, task, schedule, parts, seeds, device, report
        As in :func:`patch_runs`.
    """
    assert isinstance(schedule, SegmentationSchedule)

    def chosen(some: Array) -> tuple[Array, Array, Array]:
        return tokens_NPQD[some], images_NHW3[some], masks_NHW[some]

    fit, stop, score = chosen(rows.fit), chosen(rows.stop), chosen(rows.score)
    for seed in seeds:

        def told(step: int, seed: int = seed) -> None:
            report(f"run {seed}, step {step} of {schedule.steps}")

        trained = train_decoder(
            *fit,
            stop,
            classes=task.classes,
            seed=seed,
            schedule=schedule,
            device=device,
            progress=told,
        )
        dice_MC = trained.dice(*score)
        run = {
            "seed": seed,
            "score": mean_dice(dice_MC),
            "stop_score": trained.stop_score,
            "best_step": trained.best_step,
            "steps": trained.steps,
            "dice": [[None if np.isnan(value) else value for value in image] for image in dice_MC.tolist()],
        }
        parts.write(seed, run)


def _run(seed: int, predicted_M: Array, label_M: Array, stop_score: float, facts: dict[str, int]) -> dict[str, Any]:
    score = balanced_accuracy(predicted_M, label_M)
    return {"seed": seed, "score": score, "stop_score": stop_score} | facts | {"predicted": predicted_M.tolist()}
