"""Encoders by measures as plain values for the page and for Markdown, and the published rows beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from histill.evaluate.report.collect import Collection, Column, Encoder, Role, differing_facts, find_score, place_of
from histill.evaluate.report.reference import PUBLISHED, SOURCES
from histill.evaluate.results import Result

__all__ = [
    "NAMES",
    "Notes",
    "Page",
    "columns_of",
    "empty_cell",
    "eva_columns",
    "headline",
    "not_run",
    "number_text",
    "published_rows",
    "sources",
    "subset_notes",
    "words",
]

_STANDARD = (
    Column(benchmark="plism", score="score"),
    Column(benchmark="hest", score="pearson"),
    Column(benchmark="pathorob", score="robustness_index"),
)
"""Stand in the headline table even when nobody ran them."""
NAMES = {"plism": "PLISM", "hest": "HEST", "eva": "EVA", "pathorob": "PathoROB", "tiles": "Tiles", "paired": "Paired"}
_WHAT = {
    "plism": "same tissue across scanners and stainings; mean of four medians",
    "hest": "gene expression from tiles; Pearson correlation",
    "eva": "classification and segmentation, as the original computes it",
    "pathorob": "neighbours share biology rather than the centre",
    "tiles": "own labelled tiles",
    "paired": "own fields under several scanners",
}
_PLISM_FULL = 91  # slides


@dataclass(slots=True)
class Notes:
    """Footnotes: the same text gets the same number everywhere."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        """Number of a text, from 1."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What every section looks at."""

    found: Collection
    roles: tuple[Role, ...]
    notes: Notes


def columns_of(found: Collection) -> list[Column]:
    """Columns of the headline table; EVA has a table of its own."""
    own = [column for column in found.columns if column.benchmark != "eva"]
    return sorted({*own, *_STANDARD}, key=lambda column: (place_of(column.benchmark), column.score))


def eva_columns(found: Collection) -> list[Column]:
    """A column for each task that was published or run."""
    published = [name for row in PUBLISHED if row.benchmark == "eva" for name in row.scores]
    own = [column.score for column in found.columns if column.benchmark == "eva"]
    return [Column(benchmark="eva", score=name) for name in dict.fromkeys([*published, *own])]


def number_text(value: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{number_text(low)} to {number_text(high)}"


def headline(page: Page, columns: Sequence[Column]) -> dict[str, Any]:
    """A table of encoders by measures, and the published rows of these measures."""
    heads = []
    for column in columns:
        results = [result for (_, own), result in page.found.results.items() if own == column]
        notes, differing = [], differing_facts(results)
        if differing:
            text = f"rows of {NAMES.get(column.benchmark, column.benchmark)} ({column.score}) differ in "
            notes.append(page.notes.number(f"{text}{', '.join(differing)}: compare them with care"))
        name, score = NAMES.get(column.benchmark, column.benchmark), words(column.score)
        if column.benchmark == "eva":  # in its own table the task is the head
            score, _, name = (part.replace("_", " ") for part in column.score.partition("/"))
        heads.append({"name": name, "score": score, "what": _WHAT.get(column.benchmark), "notes": notes})
    measured = [
        {"name": encoder.shown, "pooling": encoder.pooling, "cells": [_cell(page, encoder, own) for own in columns]}
        for encoder in page.found.encoders
    ]
    return {"columns": heads, "measured": measured, "published": published_rows(columns)}


def words(score: str) -> str:
    """``balanced_accuracy/bach`` as ``bach: balanced accuracy``, ``few_shot_auc/4`` as ``few shot auc, 4 a class``."""
    metric, _, task = score.partition("/")
    if task.isdecimal():
        return f"{metric}, {task} a class".replace("_", " ")
    return f"{task}: {metric}".replace("_", " ") if task else metric.replace("_", " ")


def empty_cell(**values: Any) -> dict[str, Any]:
    """A cell of a table with these values, the others empty."""
    return {"value": "", "interval": "", "notes": [], "source": "", "missing": False} | values


def _cell(page: Page, encoder: Encoder, column: Column) -> dict[str, Any]:
    result = page.found.results.get((encoder, column))
    if result is None:
        return empty_cell(value="not run", missing=True, notes=not_run(page, encoder, column))
    score = find_score(result, column.score)
    assert score is not None, "collect looked at this"
    notes = [page.notes.number(text) for text in [*subset_notes(result), *([score.note] if score.note else [])]]
    if score.value is None:
        return empty_cell(value="not defined", missing=True, notes=notes)
    return empty_cell(value=number_text(score.value), interval=_interval(score.low, score.high), notes=notes)


def not_run(page: Page, encoder: Encoder, column: Column) -> list[int]:
    """Number the note that says why a measure was not run; empty where nobody said."""
    absent = page.found.absence(encoder, column)
    if absent is None:
        return []
    benchmark, _, task = absent.benchmark.partition("/")
    whose = f" of {encoder}" if absent.encoder else ""
    what = f"{NAMES.get(benchmark, benchmark)}{', ' if task else ''}{task}{whose}"
    return [page.notes.number(f"{what} was not run: {absent.reason}")]


def subset_notes(result: Result) -> list[str]:
    """Where PLISM was run on less than the whole, or as the original computes it."""
    if result.benchmark != "plism":
        return []
    data, found = result.data, []
    if data.get("slides", _PLISM_FULL) != _PLISM_FULL:
        found.append(f"PLISM on {data['slides']} of {_PLISM_FULL} slides: not comparable with the published score")
    if "tiles" in data:
        found.append(f"PLISM on {data['tiles']:,} of {data.get('tiles_in_slide', data['tiles']):,} tiles of each slide")
    if data.get("compat", "none") != "none":
        found.append(f"PLISM as the original computes it ({data['compat']})")
    return found


def _letter(source: str) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[list(SOURCES).index(source)]


def sources() -> list[dict[str, str]]:
    """Where the published rows come from, by letter."""
    return [{"letter": _letter(name), "text": source.text, "date": source.date} for name, source in SOURCES.items()]


def published_rows(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Published rows with a number in one of the columns, joined by encoder and pooling."""
    table: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in PUBLISHED:
        for place, column in enumerate(columns):
            value = row.scores.get(column.score) if row.benchmark == column.benchmark else None
            if value is not None:
                cells = table.setdefault((row.encoder, row.pooling), [empty_cell() for _ in columns])
                cells[place] = empty_cell(value=number_text(value), source=_letter(row.source))
    return [{"name": name, "pooling": pooling, "cells": cells} for (name, pooling), cells in table.items()]
