"""The benchmark ``tiles --level slide``: from features of slides and a label each to a cross-validated area.

Two classifiers see the same folds: ``mean``, a linear probe on the mean feature of a slide, and ``abmil``, gated
attention over its tiles as the EVA protocol trains it (:mod:`histill.evaluate.eva.mil`), several runs a fold whose
probabilities are averaged. A slide's score always comes from networks that have not seen its patient. The area counts
pairs of slides of the same fold, since scores of two classifiers share no scale (``auc_pooled`` counts all pairs); its
interval draws patients again.

Shapes: S slides, M scored ones, R runs, C classes, D features.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
from rich.console import Console

from histill import files
from histill.errors import DataError
from histill.evaluate.areas import RocArea
from histill.evaluate.eva.mil import MilSchedule, class_scores, refit_mil, runs_together, train_mil
from histill.evaluate.features import Array
from histill.evaluate.parts import digest, kept, progress
from histill.evaluate.probes import fit_linear, macro_auc
from histill.evaluate.results import Result, Score, write_result
from histill.evaluate.slide_features import (
    FeatureSource,
    LabelTable,
    SlideBags,
    find_features,
    read_bags,
    read_labels,
)
from histill.evaluate.slide_folds import SEED, Fold, folds_of, shared_groups
from histill.evaluate.slide_head import SlideHead, read_head, write_head
from histill.evaluate.statistics import RESAMPLES, accuracy_clusters, estimate
from histill.evaluate.statistics import SEED as DRAW_SEED

__all__ = ["HEAD", "KINDS", "run_slides"]

KINDS = ("mean", "abmil")
"""Linear probe on mean features; gated attention."""
HEAD = "abmil.safetensors"
"""Networks trained on all slides of the table, beside the results."""
_PROTOCOL = "slides 1"
"""Changes when a part's number would."""
_MEMORY = 4 * 2**30  # of the networks that are trained together on a GPU


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cohort:
    """All that a fold is made of."""

    table: LabelTable
    bags: SlideBags
    classes: tuple[str, ...]
    code_S: Array
    """Class number of each slide."""
    seeds: tuple[int, ...]
    schedule: MilSchedule
    device: str

    @classmethod
    def of(
        cls, table: LabelTable, bags: SlideBags, seeds: tuple[int, ...], schedule: MilSchedule, device: str
    ) -> _Cohort:
        """Number the classes."""
        classes, code_S = np.unique(table.label_S, return_inverse=True)
        names = tuple(classes.tolist())
        return cls(table=table, bags=bags, classes=names, code_S=code_S, seeds=seeds, schedule=schedule, device=device)

    def describe(self) -> dict[str, Any]:
        """What a result says of its slides, seeds and protocol."""
        return {
            "slides": len(self.code_S),
            "classes": {name: int((self.table.label_S == name).sum()) for name in self.classes},
            "clusters": self.table.unit,
            "bootstrap": {"resamples": RESAMPLES, "seed": DRAW_SEED},
            "seeds": list(self.seeds),
            "fold_seed": SEED,
            "schedule": asdict(self.schedule) | {"hidden": list(self.schedule.hidden)},
            "protocol": _PROTOCOL,
        }

    def decides(self, rows: Sequence[Array]) -> dict[str, Any]:
        """All that decides a training on these rows."""
        table = self.table
        return {
            "protocol": _PROTOCOL,
            "features": self.bags.key,
            "tiles": [len(bag) for bag in self.bags.bags],
            "table": digest([table.slide_S.tolist(), table.label_S.tolist(), table.group_S.tolist()]),
            "rows": [each.tolist() for each in rows],
            "seeds": list(self.seeds),
            "schedule": asdict(self.schedule),
        }

    def some(self, rows: Array) -> tuple[list[Array], Array]:
        """Bags and class numbers of some rows."""
        return [self.bags.bags[row] for row in rows], self.code_S[rows]


def run_slides(
    *,
    csv_path: Path,
    features: Path,
    out: Path,
    folds: int = 5,
    runs: int = 5,
    max_tiles: int = 10_000,
    embeddings: bool = False,
    schedule: MilSchedule | None = None,
    device: str = "cpu",
    console: Console,
) -> Result:
    """Cross-validate both classifiers on labelled slides; finished folds in ``out`` are not computed again.

    Parameters
    ----------
    csv_path
        Columns ``slide,label`` and, where there are, ``patient``, and ``fold`` or ``split`` (train, val, test).
    features
        Folder of `histill extract`; or of TRIDENT's or CLAM's ``<slide>.h5``.
    out
        Gets ``parts/``, ``results.json``, ``predictions.csv``, and the classifier trained on all slides.
    folds
        Made where the table has none: whole patients, stratified by class.
    runs, max_tiles, schedule
        Networks per fold; tiles of a slide that they see at most (0: all); how they are trained.
    embeddings
        Also write ``embeddings.h5``: what each slide is to both classifiers.
    device
        Of the networks.

    Returns
    -------
    Result
        ``<kind>_auc`` (macro one-versus-rest with more than two classes), ``<kind>_auc_pooled`` and
        ``<kind>_balanced_accuracy``.

    Raises
    ------
    DataError
        The table, the folds or a slide's features cannot be used.
    """
    begun = time.monotonic()
    source, table = find_features(features), read_labels(csv_path)
    made = folds_of(csv_path, table, folds)
    bags = _bags(source, table, max_tiles, console)
    cohort = _Cohort.of(table, bags, tuple(range(runs)), schedule or MilSchedule(), device)
    parts = _parts(cohort, made, out / "parts", console)
    head = _head(cohort, source, parts["abmil"], out / HEAD)
    scored, scores = _scores(cohort, made, parts, _notes(table, made, bags, max_tiles))
    _write_predictions(out / "predictions.csv", cohort, made, scored)
    if embeddings:
        _write_embeddings(out / "embeddings.h5", cohort, head)
    counts = {"folds": len(made), "max_tiles": max_tiles}
    data = _places(csv_path, source, features, table) | cohort.describe() | counts
    details = _details(cohort, made, parts, scored) | {"head": head.facts}
    result = _result(source, scores, data, details, time.monotonic() - begun)
    write_result(result, out)
    return result


def _result(
    source: FeatureSource, scores: Sequence[Score], data: dict[str, Any], details: dict[str, Any], seconds: float
) -> Result:
    return Result(
        benchmark="tiles",
        encoder=source.encoder,
        encoder_key=source.key,
        pooling=source.pooling,
        headline="abmil_auc",
        scores=tuple(scores),
        data=data,
        details=details,
        seconds=seconds,
    )


def _places(csv_path: Path, source: FeatureSource, features: Path, table: LabelTable) -> dict[str, Any]:
    unlabelled = len(set(source.files) - set(table.slide_S.tolist()))
    return {"root": str(csv_path), "features": str(features), "unlabelled": unlabelled}


def _details(cohort: _Cohort, made: Any, parts: dict[str, Any], scored: Any) -> dict[str, Any]:
    """Folds, and what a paired test needs of each score."""
    areas = {f"{kind}_auc": _plain(cohort, made, *scored[kind]) for kind in KINDS}
    clusters = {f"{kind}_balanced_accuracy": _accuracy(cohort, *scored[kind]).to_plain() for kind in KINDS}
    return {"parts": parts, "areas": areas, "clusters": clusters}


def _bags(source: FeatureSource, table: LabelTable, max_tiles: int, console: Console) -> SlideBags:
    with progress(console) as bar:
        step = bar.add_task("reading features", total=len(table.slide_S))
        return read_bags(source, table.slide_S.tolist(), max_tiles, lambda: bar.advance(step))


def _parts(cohort: _Cohort, folds: list[Fold], folder: Path, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Train and score every fold, or read what it gave: kind -> one part per fold."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    compute: dict[str, Callable[[Fold], dict[str, Any]]] = {
        "mean": partial(_mean, cohort),
        "abmil": partial(_abmil, cohort),
    }
    with progress(console) as bar:
        step = bar.add_task("folds", total=len(KINDS) * len(folds))
        for kind in KINDS:
            for fold in folds:
                decides = {"kind": kind} | cohort.decides([fold.fit, fold.stop, fold.test])
                part = kept(folder, f"{kind}-fold-{fold.name}", decides, partial(compute[kind], fold))
                found[kind].append({"fold": fold.name} | part)
                bar.advance(step)
    return found


def _mean(cohort: _Cohort, fold: Fold) -> dict[str, Any]:
    """Fit a linear probe on all slides that are not scored; its strength is chosen on patients of theirs."""
    x_SD, code_S, group_S = cohort.bags.mean_SD.astype(np.float64), cohort.code_S, cohort.table.group_S
    model, c, unconverged = fit_linear(x_SD[fold.train], code_S[fold.train], group_S[fold.train])
    assert model.classes_.tolist() == list(range(len(cohort.classes))), "a fold trains on every class"
    return {"scores": model.predict_proba(x_SD[fold.test]).tolist(), "c": c, "unconverged": list(unconverged)}


def _abmil(cohort: _Cohort, fold: Fold) -> dict[str, Any]:
    """Train the networks, each stopped on slides that are not scored."""
    fit, stop = cohort.some(fold.fit), cohort.some(fold.stop)
    longest, dim = max(map(len, fit[0])), fit[0][0].shape[1]
    together = runs_together(longest, dim, len(cohort.seeds), cohort.schedule.batch, _MEMORY, cohort.device)
    runs, best_epochs, stop_scores = list[Array](), list[int](), list[float]()
    for first in range(0, len(cohort.seeds), together):
        trained = train_mil(
            *fit,
            *stop,
            classes=len(cohort.classes),
            seeds=cohort.seeds[first : first + together],
            schedule=cohort.schedule,
            device=cohort.device,
        )
        runs.append(class_scores(trained.parameters, cohort.some(fold.test)[0]))
        best_epochs += trained.best_epochs
        stop_scores += trained.stop_scores
    scores_RMC = np.concatenate(runs)
    told = {"best_epochs": best_epochs, "stop_scores": stop_scores}
    return {"scores": scores_RMC.mean(axis=0).tolist(), "runs": scores_RMC.tolist()} | told


def _head(cohort: _Cohort, source: FeatureSource, parts: Sequence[dict[str, Any]], path: Path) -> SlideHead:
    """Train networks on all slides, as long as the folds' did at the median; or read those of an earlier run."""
    epochs = max(1, round(median([epoch for part in parts for epoch in part["best_epochs"]])))
    every = np.arange(len(cohort.code_S))
    key = digest(cohort.decides([every]) | {"epochs": epochs, "encoder": source.key})
    if path.exists():
        try:
            there = read_head(path)
        except DataError:
            there = None
        if there is not None and there.facts.get("key") == key:
            return there
    parameters = refit_mil(
        *cohort.some(every),
        classes=len(cohort.classes),
        seeds=cohort.seeds,
        schedule=replace(cohort.schedule, epochs=epochs),
        device=cohort.device,
    )
    facts: dict[str, Any] = {"encoder": source.encoder, "weights": source.weights, "pooling": source.pooling}
    facts |= {"seeds": list(cohort.seeds), "epochs": epochs, "slides": len(every), "key": key}
    parameters = {name: value.cpu() for name, value in parameters.items()}
    head = SlideHead(parameters=parameters, classes=cohort.classes, facts=facts)
    write_head(path, head)
    return head


def _notes(table: LabelTable, folds: list[Fold], bags: SlideBags, max_tiles: int) -> list[str]:
    larger = int((bags.tiles_S > max_tiles).sum()) if max_tiles else 0
    drawn = [f"of {larger} slides abmil saw {max_tiles:,} drawn tiles"] if larger else []
    return [*shared_groups(table, folds), *drawn]


def _scores(
    cohort: _Cohort, folds: list[Fold], parts: dict[str, list[dict[str, Any]]], notes: list[str]
) -> tuple[dict[str, tuple[Array, Array]], list[Score]]:
    """Rows that were scored and their probabilities, by kind; and the scores of the result."""
    rows_M = np.concatenate([fold.test for fold in folds])
    scored, found = {}, list[Score]()
    for kind in KINDS:
        scores_MC = np.concatenate([np.array(part["scores"]).reshape(-1, len(cohort.classes)) for part in parts[kind]])
        scored[kind] = (rows_M, scores_MC)
        plain = _plain(cohort, folds, rows_M, scores_MC)
        area = estimate(RocArea.from_plain(plain))
        pooled = estimate(RocArea.from_plain(plain | {"fold": [""] * len(rows_M)}))
        right = estimate(_accuracy(cohort, rows_M, scores_MC))
        told = [*_spread(cohort, folds, parts[kind]), *notes]
        named = (("auc", area, told), ("auc_pooled", pooled, notes), ("balanced_accuracy", right, notes))
        for name, value, note in named:
            note = [*note, *(["too few patients or slides for an interval"] if value.low is None else [])]
            found.append(
                Score(
                    name=f"{kind}_{name}",
                    value=value.value,
                    low=value.low,
                    high=value.high,
                    note="; ".join(note) or None,
                )
            )
    return scored, found


def _spread(cohort: _Cohort, folds: list[Fold], parts: Sequence[dict[str, Any]]) -> list[str]:
    """The area of each fold alone, and of each network alone, in words."""
    areas = [
        macro_auc(cohort.code_S[fold.test], np.array(part["scores"]), range(len(cohort.classes)))
        for fold, part in zip(folds, parts, strict=True)
        if len(np.unique(cohort.code_S[fold.test])) > 1
    ]
    told = [f"mean of {len(areas)} folds {np.mean(areas):.3f} (std {np.std(areas):.3f})"] if len(areas) > 1 else []
    if "runs" in parts[0] and len(cohort.seeds) > 1:
        rows_M = np.concatenate([fold.test for fold in folds])
        scores_RMC = np.concatenate([np.array(part["runs"]) for part in parts], axis=1)
        alone = [RocArea.from_plain(_plain(cohort, folds, rows_M, scores_MC)).value for scores_MC in scores_RMC]
        told.append(f"one of the {len(alone)} networks alone {np.mean(alone):.3f} (std {np.std(alone):.3f})")
    return told


def _plain(cohort: _Cohort, folds: list[Fold], rows_M: Array, scores_MC: Array) -> dict[str, Any]:
    """What a paired test between two encoders needs: see :class:`RocArea`."""
    table = cohort.table
    return {
        "slide": table.slide_S[rows_M].tolist(),
        "label": table.label_S[rows_M].tolist(),
        "group": table.group_S[rows_M].tolist(),
        "fold": [fold.name for fold in folds for _ in fold.test],
        "classes": list(cohort.classes),
        "scores": scores_MC.tolist(),
    }


def _accuracy(cohort: _Cohort, rows_M: Array, scores_MC: Array) -> Any:
    code_M = cohort.code_S[rows_M]
    return accuracy_clusters(code_M, scores_MC.argmax(axis=1) == code_M, cohort.table.group_S[rows_M])


def _write_predictions(path: Path, cohort: _Cohort, folds: list[Fold], scored: dict[str, tuple[Array, Array]]) -> None:
    """One row a scored slide: its label, its fold, and the probability of each class by both classifiers."""
    table, fold_M = cohort.table, [fold.name for fold in folds for _ in fold.test]
    rows_M = scored[KINDS[0]][0]
    with files.atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["slide", table.unit, "label", "fold", *(f"{k}_{name}" for k in KINDS for name in cohort.classes)]
        )
        for place, row in enumerate(rows_M.tolist()):
            values = [f"{value:.6f}" for kind in KINDS for value in scored[kind][1][place]]
            writer.writerow([table.slide_S[row], table.group_S[row], table.label_S[row], fold_M[place], *values])


def _write_embeddings(path: Path, cohort: _Cohort, head: SlideHead) -> None:
    """``slide``, ``label``, ``mean`` (S, D) and ``abmil`` (S, R, H), the last by networks that saw all labels."""
    with files.atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        for name, texts in (("slide", cohort.table.slide_S), ("label", cohort.table.label_S)):
            file.create_dataset(name, data=texts.tolist(), dtype=h5py.string_dtype())
        file["mean"] = cohort.bags.mean_SD
        file["abmil"] = np.stack([head.embed(bag) for bag in cohort.bags.bags])
        file["abmil"].attrs["trained_on"] = "the labels of all these slides"
        file.attrs.update({name: value for name, value in head.facts.items() if isinstance(value, str)})
