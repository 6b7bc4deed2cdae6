"""Encoders against each other on the same slides, and the measures that this and the retention draw again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from histill.errors import DataError
from histill.evaluate.areas import RocArea
from histill.evaluate.plism.groups import read_pairs, slide_medians
from histill.evaluate.report.collect import Column, Encoder, differing_facts, find_score
from histill.evaluate.report.tables import NAMES, Page, empty_cell, not_run, number_text, words
from histill.evaluate.results import Result
from histill.evaluate.statistics import Clusters, Measure, paired_test

__all__ = ["difference_tables", "measure_of"]

_LEAST_P = 0.001
_FEW = 10  # clusters, below which percentile intervals are known to be too narrow


def measure_of(result: Result, name: str) -> Measure | str:
    """What can be drawn again by slide, patient or fold; or why nothing can."""
    if result.benchmark == "plism" and result.details.get("pairs"):
        return slide_medians(read_pairs(result.details["pairs"]), name) or "it is not defined"
    area = result.details.get("areas", {}).get(name)
    if area:
        return RocArea.from_plain(area)
    plain = result.details.get("clusters", {}).get(name)
    return Clusters.from_plain(plain) if plain else "its results keep no sums by slide, patient or fold"


def difference_tables(page: Page) -> list[dict[str, Any]]:
    """Pairs of encoders by measures that at least two of them have; EVA in a table of its own."""
    found = page.found
    shared = [own for own in found.columns if sum((each, own) in found.results for each in found.encoders) > 1]
    tables = []
    for columns in ([c for c in shared if c.benchmark != "eva"], [c for c in shared if c.benchmark == "eva"]):
        ran = [each for each in found.encoders if any((each, own) in found.results for own in columns)]
        rows = [
            {"first": str(a), "second": str(b), "cells": [_cell(page, a, b, own) for own in columns]}
            for a, b in combinations(ran, 2)
        ]
        heads = [{"name": NAMES.get(own.benchmark, own.benchmark), "score": words(own.score)} for own in columns]
        if rows:
            tables.append({"columns": heads, "rows": rows})
    return tables


def _cell(page: Page, a: Encoder, b: Encoder, column: Column) -> dict[str, Any]:
    """First minus second with the interval and p of a paired bootstrap, or why there is none."""
    results = [page.found.results.get((encoder, column)) for encoder in (a, b)]
    both = [result for result in results if result is not None]
    if len(both) < 2:
        absent = [encoder for encoder, result in zip((a, b), results, strict=True) if result is None]
        notes = [number for encoder in absent for number in not_run(page, encoder, column)]
        return empty_cell(value="not run", missing=True, notes=sorted(set(notes)))
    scores = [find_score(result, column.score) for result in both]
    values = [score.value for score in scores if score is not None and score.value is not None]
    if len(values) < 2:
        return empty_cell(value="not defined", missing=True, notes=_texts(page, [s.note for s in scores if s]))
    name = f"{NAMES.get(column.benchmark, column.benchmark)} ({words(column.score)})"
    differing = differing_facts(both)
    notes = _texts(page, [f"{name}: these two differ in {', '.join(differing)}"]) if differing else []
    interval, remark = _test(both, column.score)
    notes += _texts(page, [f"{name}: {remark}"]) if remark else []
    return empty_cell(value=_signed(values[0] - values[1]), interval=interval, notes=sorted(set(notes)))


def _texts(page: Page, texts: Sequence[str | None]) -> list[int]:
    return [page.notes.number(text) for text in texts if text]


def _test(results: Sequence[Result], name: str) -> tuple[str, str | None]:
    """Interval and p as text, and what a reader must know of them, or why there are none."""
    measures = [measure_of(result, name) for result in results]
    if texts := [measure for measure in measures if isinstance(measure, str)]:
        return "", f"no interval of the difference, {texts[0]}"
    first, second = (measure for measure in measures if not isinstance(measure, str))
    try:
        found = paired_test(first, second)
    except DataError as error:
        return "", f"no interval of the difference, {error.what}"
    if found.low is None or found.high is None or found.p is None:
        return "", f"no interval of the difference, too few clusters to draw from ({found.clusters})"
    p = f"p < {_LEAST_P}" if found.p < _LEAST_P else f"p {found.p:.3f}"
    few = f"drawn from {found.clusters} clusters only: the interval is too narrow and p too small"
    return f"{_signed(found.low)} to {_signed(found.high)}; {p}", few if found.clusters < _FEW else None


def _signed(value: float) -> str:
    text = number_text(round(value, 3) or 0.0)  # no sign before 0.000
    return f"+{text}" if round(value, 3) > 0 else text
