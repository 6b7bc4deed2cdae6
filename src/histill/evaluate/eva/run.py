"""One task of the EVA protocol with one encoder: embed, train the runs, score them in two ways.

Shapes: N rows of the set, M scored rows, R runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from histill.errors import ConfigError
from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.eva.embedded import EmbeddedSet, EmbedSlide
from histill.evaluate.eva.parts import Parts
from histill.evaluate.eva.protocols import Rows, Schedule, rows_of, schedule_of
from histill.evaluate.eva.scoring import run_interval
from histill.evaluate.eva.tasks import find_task
from histill.evaluate.parts import progress
from histill.evaluate.results import Result, Score
from histill.evaluate.statistics import Clusters, estimate

__all__ = ["EmbedSlide", "run_eva"]

_Runs = dict[str, tuple[Rows, list[dict[str, Any]]]]
"""Protocol -> its rows, and its runs by seed."""

_QUICK_RUNS = 2


def run_eva(
    *,
    task: str,
    root: Path,
    embedder: Embedder,
    cache: FeatureCache,
    out: Path,
    console: Console,
    runs: int | None = None,
    quick: bool = False,
    embed_slide: EmbedSlide | None = None,
    device: str = "cpu",
) -> Result:
    """Run one task of :data:`histill.evaluate.eva.tasks.TASKS`.

    Parameters
    ----------
    task, root
        Its name, and the folder that holds the data set in its original layout.
    embedder, cache
        Who embeds, and where features are kept.
    out
        Folder for the runs; a run that is there is not trained again.
    console
        Shows progress when it is a terminal.
    runs
        The original's number if None (5, slides 20), with ``quick`` 2; seeds are 0, 1, ...
    quick
        A subset of the rows and a shorter training.
    embed_slide, device
        Embeds the tiles of a slide (slide tasks need it); where heads are trained.

    Returns
    -------
    Result
        ``balanced_accuracy/<task>`` (``dice/<task>``): as the original, with Student's t interval over the runs;
        ``balanced_accuracy_clean/<task>``: stopped on a part of the training data, so that the scored split decides
        nothing (the original's own runs where it does so too), with a bootstrap interval over patients, slides or
        images.

    Raises
    ------
    ConfigError
        Unknown task, fewer than one run, or a slide task without ``embed_slide``.
    DataError
        The data set is not in its layout, or an embedding is not finite.
    """
    row, began = find_task(task), time.perf_counter()
    count = runs if runs is not None else (_QUICK_RUNS if quick else row.runs)
    if count < 1:
        raise ConfigError("a task needs at least one run", got=count)
    if row.kind == "slide" and embed_slide is None:
        raise ConfigError(f"{task} needs slides to be embedded", remedy="pass embed_slide")
    with progress(console) as bars:
        data = EmbeddedSet.read(row, root, embedder, cache, quick, embed_slide, bars)
        schedule = schedule_of(row, quick=quick)
        protocols = _protocols(data, embedder, schedule, out, count, device, bars)
    facts = {"root": str(root), "quick": quick, "seeds": list(range(count)), "schedule": repr(schedule)}
    return _result(embedder, data, protocols, facts, time.perf_counter() - began)


def _protocols(
    data: EmbeddedSet, embedder: Embedder, schedule: Schedule, out: Path, count: int, device: str, bars: Progress
) -> _Runs:
    """Train the runs that are missing, and read all."""
    found: _Runs = {}
    for rows in rows_of(data.task, data.split_N, data.label_N, data.group_N):
        name = f"{data.task.name}-{rows.protocol}"
        decided_by = (embedder.key, embedder.pooling, data.key, data.task.name, rows.protocol, repr(schedule))
        parts = Parts(folder=out, name=name, decided_by=decided_by)
        missing = parts.missing(range(count))
        if missing:
            bar = bars.add_task(name, total=None)

            def report(text: str, bar: TaskID = bar, name: str = name) -> None:
                bars.update(bar, description=f"{name}, {text}")

            data.train(rows, schedule, parts, missing, device, report)
        found[rows.protocol] = (rows, [parts.read(seed) for seed in range(count)])
    return found


def _result(embedder: Embedder, data: EmbeddedSet, protocols: _Runs, facts: dict[str, Any], seconds: float) -> Result:
    long = ("predicted", "dice")  # these stay in the files of the runs
    details = {
        name: [{fact: value for fact, value in run.items() if fact not in long} for run in found]
        for name, (_, found) in protocols.items()
    }
    original, clean = protocols["original"], protocols.get("clean", protocols["original"])
    drawn = {"original": data.clusters(*original), "clean": data.clusters(*clean)}
    scores = (
        _original(data, [run["score"] for run in original[1]]),
        _clean(data, [run["score"] for run in clean[1]], drawn["clean"], own="clean" not in protocols),
    )
    return Result(
        benchmark="eva",
        encoder=embedder.name,
        encoder_key=embedder.key,
        pooling=embedder.pooling,
        headline=scores[0].name,
        scores=scores,
        data=facts | data.facts(),
        details={
            "runs": details,
            "clusters": {score.name: drawn[name].to_plain() for score, name in zip(scores, drawn, strict=True)},
        },
        seconds=seconds,
    )


def _original(data: EmbeddedSet, values: list[float]) -> Score:
    task, (low, high) = data.task, run_interval(values) or (None, None)
    stop = "scored on the split that it also stops on" if task.stops_on_scored else "with its own stopping split"
    spread = f"interval over {len(values)} runs" if low is not None else "no interval: one run"
    return Score(
        name=f"{task.metric}/{task.name}",
        value=float(np.mean(values)),
        low=low,
        high=high,
        note="; ".join(["as the original computes it", stop, spread, *data.notes]),
    )


def _clean(data: EmbeddedSet, values: list[float], clusters: Clusters, *, own: bool) -> Score:
    found = estimate(clusters)
    stop = "the original's own runs" if own else "stopping split carved off the training data"
    spread = f"interval over {data.group}s" if found.low is not None else f"no interval: one {data.group}"
    return Score(
        name=f"{data.task.metric}_clean/{data.task.name}",
        value=float(np.mean(values)),
        low=found.low,
        high=found.high,
        note="; ".join([stop, spread, *data.notes]),
    )
