"""``report.html``: one page that holds everything that it shows."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
from markupsafe import Markup

from histill.demo.benchmarks import PAGE
from histill.demo.charts import Level, Line, chart, smooth
from histill.demo.pictures import Pictures
from histill.demo.summary import LABELS, PAIRED

__all__ = ["render"]

_CLASSES = {
    "gland": ("Normal glands", "round lumen, nuclei in a row at the base, mucin"),
    "tumour": ("Tumour (atypical epithelium)", "crowded large nuclei, irregular glands, mitoses"),
    "stroma": ("Stroma", "collagen, fibroblasts, vessels; no epithelium"),
    "lymphoid": ("Lymphoid tissue", "lymphocytes: small dark nuclei, closely packed"),
}
# table, metric -> what it is for a pathologist, what it is for an engineer, how its values are written
_MEASURES: dict[tuple[str, str], tuple[str, str, str]] = {
    (LABELS, "linear_auc"): (
        "Tells the four tissues apart",
        "a linear classifier on frozen features; area under the ROC curve, mean over classes; test slides only",
        "number",
    ),
    (LABELS, "linear_balanced_accuracy"): (
        "… names the right tissue",
        "the same classifier; balanced accuracy",
        "share",
    ),
    (LABELS, "knn_auc"): (
        "Similar tiles are the same tissue",
        "20 nearest neighbours among training slides; area under the ROC curve",
        "number",
    ),
    (LABELS, "knn_balanced_accuracy"): (
        "… and name the right tissue",
        "the same neighbours; balanced accuracy",
        "share",
    ),
    (PAIRED, "top_1"): (
        "Finds the same field under another stain or scanner",
        "the nearest of all other tiles of both is the same field (top-1)",
        "share",
    ),
    (PAIRED, "top_10"): ("… among the first ten", "the same, top-10", "share"),
    (PAIRED, "cosine"): (
        "Likeness of the same field under another stain or scanner",
        "mean cosine; not a merit by itself: a model that cannot tell anything apart has 1",
        "number",
    ),
}
_TERMS = {
    "dino": ("Whole tile, in words of the teacher", "cross-entropy (nats)", "DINO loss on the class token"),
    "ibot": ("Each patch, in words of the teacher", "cross-entropy (nats)", "iBOT loss on patch tokens"),
    "token_cls": ("Whole tile, feature by feature", "distance (no unit)", "Cosine + smooth-L1, class token"),
    "token_patch": ("Each patch, feature by feature", "distance (no unit)", "Cosine + smooth-L1, patch tokens"),
    "koleo": (
        "Tiles that crowd together",
        "minus log distance (nats)",
        "KoLeo: each tile and its nearest in the batch",
    ),
}
# benchmark -> what it asks, what its score is, how it is written; tasks of EVA by their own names
_BENCHMARKS: dict[str, tuple[str, str, str]] = {
    "plism": (
        "PLISM: does tissue stay the same under other stains and scanners?",
        "its score: mean of the medians of likeness and of top-10 retrieval, over pairs of slides",
        "number",
    ),
    "hest": (
        "HEST: are genes predicted from the picture?",
        "Pearson correlation, mean over 50 invented genes whose counts follow the drawn nuclei",
        "number",
    ),
    "eva/mhist": ("EVA, MHIST: two classes of fields", "linear head; balanced accuracy", "share"),
    "eva/bach": ("EVA, BACH: four classes of fields", "linear head; balanced accuracy", "share"),
    "eva/pcam": ("EVA, PCam: tumour in small patches", "linear head; balanced accuracy", "share"),
    "pathorob": (
        "PathoROB: ordered by tissue or by hospital?",
        "robustness index: 1 by tissue, 0 by hospital",
        "number",
    ),
    "tiles": ("Your own labelled tiles", "linear classifier; balanced accuracy", "share"),
    "paired": (
        "Your own fields under several scanners",
        "share whose twin is among the ten nearest tiles (top-10)",
        "share",
    ),
}
_POINTS = 300  # of a curve at most


def render(facts: Mapping[str, Any], curves: Mapping[str, Sequence[float]], pictures: Pictures) -> str:
    """Write the page.

    Parameters
    ----------
    facts
        As :func:`histill.demo.summary.summarise` makes them, with ``seconds`` and ``resumed``.
    curves
        As :func:`histill.demo.summary.curves` reads them.
    pictures
        As :func:`histill.demo.pictures.draw_pictures` draws them.

    Returns
    -------
    str
        HTML that loads no other file; it links to the page of the benchmarks beside it.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "thousands": "{:,}".format, "look": _look}
    text = importlib.resources.files("histill.demo").joinpath("templates", "report.html.j2").read_text("utf-8")
    return environment.from_string(text).render(
        facts=facts,
        pictures=dataclasses.asdict(pictures),
        classes=_CLASSES,
        rows=_rows(facts),
        benchmarks=_benchmark_rows(facts["benchmarks"]["headlines"]),
        benchmarks_page=PAGE,
        progress=[Markup(svg) for svg in _progress_charts(facts)],
        losses=_loss_charts(curves),
        learning_rate=Markup(_learning_rate(curves)),
        today=date.today().strftime("%d %B %Y").lstrip("0"),
        labels=LABELS,
        paired=PAIRED,
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%".replace("-", "\N{MINUS SIGN}")


def _look(name: str) -> str:
    """``harris-aurora`` in words."""
    stain, _, scanner = name.partition("-")
    return f"stain “{stain}”, scanner “{scanner}”"


def _rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of scores: one row per measure."""
    rows = []
    for (table, metric), (plain, technical, kind) in _MEASURES.items():
        row: dict[str, Any] = {"plain": plain, "technical": technical}
        for name in ("untrained", "student", "teacher"):
            scores = facts["scores"][name][table]
            ends = [scores.get(f"{metric}_{end}") for end in ("low", "high")]
            row[name] = _percent(scores[metric]) if kind == "share" else f"{scores[metric]:.3f}"
            row[f"{name}_interval"] = None if None in ends else f"{ends[0]:.3f} to {ends[1]:.3f}"
        share = facts["retention"][table][metric]
        row["retention"] = None if share is None else _percent(share)
        row["reason"] = facts["no_retention"].get(table, {}).get(metric)
        rows.append(row)
    return rows


def _benchmark_rows(headlines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table of benchmarks: one row per benchmark and task."""
    rows = []
    for found in headlines:
        plain, technical, kind = _BENCHMARKS[found["benchmark"]]
        row: dict[str, Any] = {"plain": plain, "technical": technical}
        for name in ("untrained", "student", "teacher"):
            value, *ends = (found[name][part] for part in ("value", "low", "high"))
            write = _percent if kind == "share" else "{:.3f}".format
            row[name] = "not defined" if value is None else write(value)
            row[f"{name}_interval"] = None if None in ends else f"{write(ends[0])} to {write(ends[1])}"
        rows.append(row)
    return rows


def _progress_charts(facts: Mapping[str, Any]) -> list[str]:
    """Charts of tissue recognition, scanner retrieval and agreement over the checks."""
    checks, scores = facts["training"]["checks"], facts["scores"]
    steps = [check["step"] for check in checks]

    def scored(table: str, metric: str, title: str, y_label: str) -> str:
        line = Line(
            x=[0, *steps],
            y=[facts["start"][table][metric], *(check["scores"][table][metric] for check in checks)],
            style="student",
            name="student",
            dots=True,
        )
        levels = [Level(y=scores[name][table][metric], style=name, name=name) for name in ("teacher", "untrained")]
        return chart([line], levels=levels, title=title, x_label="training steps", y_label=y_label)

    agreement = [
        Line(x=steps, y=[check[key] for check in checks], style=style, name=name, dots=True)
        for key, style, name in (("cka", "student", "CKA"), ("knn_overlap", "other", "neighbours"))
    ]
    return [
        scored(LABELS, "linear_auc", "Tissue recognition of the student during training", "area under the ROC curve"),
        scored(PAIRED, "top_1", "Scanner retrieval of the student during training", "share found (top-1)"),
        chart(
            agreement,
            title="Agreement of the student with the teacher during training",
            x_label="training steps",
            y_label="agreement (0 to 1)",
            y_range=(0.0, 1.0),
        ),
    ]


def _loss_charts(curves: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    charts = []
    for key, (plain, y_label, technical) in _TERMS.items():
        if key in curves:
            values = list(curves[key])
            window = max(3, len(values) // 25)
            lines = [
                Line(x=_thin(curves["step"]), y=_thin(values), style="student faint"),
                Line(x=_thin(curves["step"]), y=_thin(smooth(values, window)), style="student"),
            ]
            svg = chart(lines, title=technical, x_label="training steps", y_label=y_label)
            charts.append({"plain": plain, "technical": technical, "svg": Markup(svg)})
    return charts


def _learning_rate(curves: Mapping[str, Sequence[float]]) -> str:
    line = Line(x=_thin(curves["step"]), y=[1e4 * value for value in _thin(curves["lr"])], style="other")
    return chart([line], title="Learning rate", x_label="training steps", y_label="learning rate, in 0.0001")


def _thin(values: Sequence[float]) -> list[float]:
    """Every n-th value, so that a curve has no more points than can be seen."""
    return list(values[:: max(1, -(-len(values) // _POINTS))])
