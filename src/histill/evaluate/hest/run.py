"""The HEST benchmark: tasks on the disk in, a result out, fold by fold."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from histill.evaluate.embedding import Embedder, FeatureCache
from histill.evaluate.hest.layout import (
    TASKS,
    Fold,
    Patches,
    Sample,
    Task,
    find_tasks,
    read_counts,
    read_patches,
    read_task,
)
from histill.evaluate.hest.regression import exact_ridge_pearson, ridge_pearson
from histill.evaluate.parts import kept, progress
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.statistics import Clusters, estimate

__all__ = ["run_hest"]

_PROTOCOL = "hest ridge 1"
"""Changes when a fold's number would."""


def run_hest(
    *,
    root: Path,
    tasks: Sequence[str] | None = None,
    embedder: Embedder,
    cache: FeatureCache,
    out: Path,
    exact: bool = False,
    console: Console,
) -> Result:
    """Predict gene expression from patches; finished folds in ``out`` are not computed again.

    Parameters
    ----------
    root
        The benchmark's folder, see :mod:`histill.evaluate.hest.layout`. Tasks that are not there are named as missing.
    tasks
        The tasks that are wanted; all nine if None.
    embedder, cache
        Who embeds the patches, and where features are kept (``out/features`` if the cache has no folder, since a
        section serves in many folds).
    out
        Gets ``folds/`` (finished folds) and ``results.json``.
    exact
        Solve the ridge exactly (scores ``pearson_exact``) and not with the original's early stopped solver.
    console
        For the progress bar, when it is a terminal.

    Returns
    -------
    Result
        ``pearson``: mean over genes, then folds, then the tasks on the disk, and ``pearson/<TASK>``. Its interval
        draws the folds of each task again (each holds out other patients). A gene that is constant in a test fold
        leaves its task and the mean without a value, as in the original, and is named in the note. ``details``:
        ``folds`` with every gene, ``clusters`` for a paired test.

    Raises
    ------
    ConfigError
        An unknown task.
    DataError
        No task is there, or a file of one is missing or damaged; a feature is not finite.
    """
    begun = time.monotonic()
    present, missing = find_tasks(root, tasks)
    read = [read_task(root / name) for name in present]
    source = _Source(embedder, cache if cache.folder else FeatureCache(out / "features"))
    folds: list[dict[str, Any]] = []
    with progress(console) as bar:
        patches = source.open(read, bar)
        step = bar.add_task("HEST: folds", total=sum(len(task.folds) for task in read))
        for task in read:
            for fold in task.folds:
                folds.append(_fold(task, fold, source, patches, out / "folds", exact))
                bar.advance(step)
    result = _result(embedder, folds, present, missing, exact, root, time.monotonic() - begun)
    write_result(result, out)
    return result


class _Source:
    """Features and counts of sections, by section."""

    def __init__(self, embedder: Embedder, cache: FeatureCache) -> None:
        self.embedder, self._cache = embedder, cache
        self._tell: Callable[[int], None] | None = None

    def open(self, tasks: Sequence[Task], bar: Progress) -> dict[Path, Patches]:
        """Read the barcodes of every section; a damaged file is found before anything is embedded."""
        paths = {s.patches for task in tasks for fold in task.folds for s in (*fold.train, *fold.test)}
        found = {path: read_patches(path) for path in sorted(paths)}
        step = bar.add_task("HEST: patches", total=sum(len(p.barcodes) for p in found.values()))
        self._tell = lambda count: bar.advance(step, count)
        return found

    def features(self, patches: Patches) -> NDArray[np.float32]:
        return self._cache.features(
            self.embedder, patches.key, len(patches.barcodes), patches.read, progress=self._tell
        )


def _fold(
    task: Task, fold: Fold, source: _Source, patches: dict[Path, Patches], folder: Path, exact: bool
) -> dict[str, Any]:
    def side(samples: Sequence[Sample]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        opened = [(patches[s.patches], s.expression) for s in samples]
        features = [source.features(p) for p, _ in opened]
        counts = [read_counts(path, p.barcodes, task.genes) for p, path in opened]
        return np.concatenate(features), np.concatenate(counts)

    def compute() -> dict[str, Any]:
        (x_train_ND, counts_train_NG), (x_test_MD, counts_test_MG) = side(fold.train), side(fold.test)
        data = (x_train_ND, x_test_MD, counts_train_NG, counts_test_MG)
        pearson_G = exact_ridge_pearson(*data)[0] if exact else ridge_pearson(*data)
        return {
            "task": task.name,
            "fold": fold.number,
            "train": [s.name for s in fold.train],
            "test": [s.name for s in fold.test],
            "spots_train": len(x_train_ND),
            "spots_test": len(x_test_MD),
            "genes": list(task.genes),
            "pearson": [float(r) if np.isfinite(r) else None for r in pearson_G],
            "constant_in_test": [g for g, c in zip(task.genes, counts_test_MG.T, strict=True) if np.ptp(c) == 0],
        }

    sides = {"train": fold.train, "test": fold.test}
    decides = {
        "protocol": [_PROTOCOL, "exact" if exact else f"lsqr, scikit-learn {sklearn.__version__}"],
        "encoder": source.embedder.key,
        "task": [task.name, fold.number, list(task.genes)],
        "data": {
            name: [[patches[s.patches].key, s.expression.name, s.expression.stat().st_size] for s in samples]
            for name, samples in sides.items()
        },
    }
    part: dict[str, Any] = kept(folder, f"{task.name}-{fold.number}", decides, compute)
    return part


def _mean(fold: dict[str, Any]) -> float | None:
    return None if None in fold["pearson"] else float(np.mean(fold["pearson"]))


def _undefined(fold: dict[str, Any]) -> str | None:
    """Say which genes have no correlation, and what the mean of the others is."""
    lost = [gene for gene, r in zip(fold["genes"], fold["pearson"], strict=True) if r is None]
    if not lost:
        return None
    constant = [gene for gene in lost if gene in fold["constant_in_test"]]
    flat = [gene for gene in lost if gene not in constant]
    why = [f"{', '.join(constant)} constant in the test spots"] if constant else []
    why += [f"predictions of {', '.join(flat)} constant"] if flat else []
    others = [r for r in fold["pearson"] if r is not None]
    mean = f"mean of the other {len(others)} genes {np.mean(others):.4f}" if others else "no other gene"
    return f"{fold['task']} fold {fold['fold']}: {'; '.join(why)} ({mean})"


def _clusters(folds: Sequence[dict[str, Any]], tasks: Sequence[str]) -> Clusters | None:
    """Folds as clusters, drawn within their task; one component per task."""
    means = [_mean(fold) for fold in folds]
    if any(mean is None for mean in means):
        return None
    member_SC = np.array([[fold["task"] == task for task in tasks] for fold in folds], np.float64)
    return Clusters(
        names=tuple(f"{fold['task']}/{fold['fold']}" for fold in folds),
        numerator_SC=member_SC * np.array(means, np.float64)[:, None],
        denominator_SC=member_SC,
        strata=tuple(fold["task"] for fold in folds),
    )


def _score(name: str, folds: Sequence[dict[str, Any]], tasks: Sequence[str], notes: Sequence[str]) -> Score:
    undefined = [text for fold in folds if (text := _undefined(fold))]
    clusters = _clusters(folds, tasks)
    if clusters is None:
        return Score(name=name, value=None, note="; ".join([*notes, "not defined: " + "; ".join(undefined)]))
    found = estimate(clusters)
    return Score(name=name, value=found.value, low=found.low, high=found.high, note="; ".join(notes) if notes else None)


def _result(
    embedder: Embedder,
    folds: list[dict[str, Any]],
    present: Sequence[str],
    missing: Sequence[str],
    exact: bool,
    root: Path,
    seconds: float,
) -> Result:
    metric = "pearson_exact" if exact else "pearson"
    notes = []
    if len(present) < len(TASKS):
        absent = f"; missing on the disk: {', '.join(missing)}" if missing else ""
        notes.append(f"mean over {len(present)} of {len(TASKS)} tasks ({', '.join(present)}){absent}")
    scores = [_score(metric, folds, present, notes)]
    for task in present:
        own = [fold for fold in folds if fold["task"] == task]
        means = [mean for fold in own if (mean := _mean(fold)) is not None]
        spread = [f"std over {len(own)} folds {np.std(means):.4f}"] if len(means) == len(own) else []
        scores.append(_score(f"{metric}/{task}", own, [task], spread))
    scores += [Score(name=f"{metric}/{task}", value=None, note="not on the disk") for task in missing]
    of_task = {f"{metric}/{task}": [fold for fold in folds if fold["task"] == task] for task in present}
    groups = {metric: (folds, present)} | {name: (own, [name.split("/")[1]]) for name, own in of_task.items()}
    clusters = {name: found.to_plain() for name, group in groups.items() if (found := _clusters(*group)) is not None}
    return Result(
        benchmark="hest",
        encoder=embedder.name,
        encoder_key=embedder.key,
        pooling=embedder.pooling,
        headline=metric,
        scores=tuple(scores),
        data={
            "root": str(root),
            "tasks": list(present),
            "missing": list(missing),
            "protocol": _PROTOCOL,
            "solver": "exact" if exact else "lsqr",
            "scikit-learn": sklearn.__version__,
            "interval": "bootstrap over the folds of each task",
        },
        details={"folds": folds, "clusters": clusters},
        seconds=seconds,
    )
