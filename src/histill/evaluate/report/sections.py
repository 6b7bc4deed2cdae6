"""The sections below the headline: PLISM pairs, bars by task, retention, cost, what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from histill.errors import DataError
from histill.evaluate import retention as retentions
from histill.evaluate.report import charts
from histill.evaluate.report.collect import Collection, Column, Encoder, Role, find_score, place_of
from histill.evaluate.report.differences import measure_of
from histill.evaluate.report.tables import NAMES, Page, empty_cell, not_run, number_text, published_rows, words
from histill.evaluate.results import Result, Score
from histill.evaluate.statistics import retention_percent

__all__ = ["cost_table", "plism_parts", "provenance_table", "retention_table", "task_groups"]

_COST = {
    "parameters, millions": ("parameters", 1e6),
    "MACs a tile, billions": ("macs_per_tile", 1e9),
    "tiles a second": ("tiles_per_second", 1.0),
    "memory, GB": ("memory_bytes", 1e9),
}
"""Heading -> a field of :class:`histill.evaluate.cost.Cost`, and its unit."""
_COLOURS = 8  # c0 to c7 in the style sheet


def plism_parts(page: Page) -> list[dict[str, Any]]:
    """Matrix and groups of each encoder that has them."""
    found = []
    for encoder, results in page.found.of("plism").items():
        for result in results:
            matrix, groups = result.details.get("matrix"), result.details.get("groups")
            part: dict[str, Any] = {"encoder": str(encoder), "map": None, "slides": 0, "named": True, "groups": []}
            if matrix and matrix["slides"]:
                names = matrix["slides"]
                order = charts.order_slides(names)
                above, below = (
                    np.array(matrix[metric], np.float64)[np.ix_(order, order)]
                    for metric in ("top_10_accuracy", "cosine_similarity")
                )
                title = f"PLISM pairs of {encoder}: top-10 accuracy above, cosine below the diagonal"
                svg = charts.heat_map([names[place] for place in order], above, below, title=title)
                part |= {"map": Markup(svg), "slides": len(names), "named": len(names) <= charts.NAMED_SLIDES}
            for group, metrics in (groups or {}).items():
                row = {"name": group.replace("_", " "), "pairs": max(each["pairs"] for each in metrics.values())}
                part["groups"].append(row | {"metrics": _group_cells(page, group, metrics)})
            found.append(part)
    return found


def _group_cells(page: Page, group: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    cells = []
    for metric, summary in metrics.items():
        name = metric.replace("_accuracy", "").replace("_similarity", "").replace("_", " ")
        if summary["median"] is None:
            notes = [page.notes.number(f"PLISM, {group.replace('_', ' ')}: {summary['note']}")]
            cells.append({"name": name, "cell": empty_cell(value="not defined", missing=True, notes=notes)})
        else:
            iqr, mean, std = (number_text(summary[each]) for each in ("iqr", "mean", "std"))
            spread = f"IQR {iqr}; mean {mean} ({std})"
            cells.append({"name": name, "cell": empty_cell(value=number_text(summary["median"]), interval=spread)})
    return cells


def _styles(page: Page) -> dict[Encoder, str]:
    """CSS class of each encoder's bars: its role, or a colour of its own."""
    styles = {encoder: f"c{number % _COLOURS}" for number, encoder in enumerate(page.found.encoders)}
    for role in page.roles:
        styles |= {role.student: "student", role.teacher: "teacher"}
        styles |= {role.untrained: "untrained"} if role.untrained else {}
    return styles


def task_groups(page: Page) -> list[dict[str, Any]]:
    """Bars of every score below the headline, in groups of one benchmark and metric."""
    styles, groups = _styles(page), []
    for benchmark in sorted({column.benchmark for column in page.found.columns}, key=place_of):
        by_encoder = {encoder: _all_scores(results) for encoder, results in page.found.of(benchmark).items()}
        headlines = {column.score for column in page.found.columns if column.benchmark == benchmark}
        names = dict.fromkeys(name for scores in by_encoder.values() for name in scores)
        tasks = [name for name in names if "/" in name or name not in headlines]
        for metric in dict.fromkeys(_metric(benchmark, name) for name in tasks):
            members = [name for name in tasks if _metric(benchmark, name) == metric]
            span = _span([scores[name] for scores in by_encoder.values() for name in members if name in scores])
            groups.append(
                {
                    "title": f"{NAMES.get(benchmark, benchmark)}{': ' if metric else ''}{metric.replace('_', ' ')}",
                    "span": f"{span[0]:g} to {span[1]:g}".replace("-", "\N{MINUS SIGN}"),
                    "charts": [_chart(page, benchmark, name, by_encoder, styles, span) for name in members],
                    "published": _published_tasks(benchmark, members),
                }
            )
    return groups


def _metric(benchmark: str, name: str) -> str:
    """What joins tasks in one group: the metric before the slash. PLISM's score has parts of two metrics."""
    return name.partition("/")[0] if "/" in name and benchmark != "plism" else ""


def _task(benchmark: str, name: str) -> str:
    task = name.partition("/")[2]
    if task.isdecimal():
        return f"{task} a class"
    return words(name) if benchmark == "plism" or not task else task.replace("_", " ")


def _all_scores(results: Sequence[Result]) -> dict[str, Score]:
    return {score.name: score for result in results for score in result.scores}


def _span(scores: Sequence[Score]) -> tuple[float, float]:
    """From 0, or below where a value is, to the next tenth above the largest."""
    values = [end for score in scores for end in (score.value, score.low, score.high) if end is not None]
    high = max([*values, 0.1])
    return float(np.floor(10 * min([*values, 0.0])) / 10), float(np.ceil(10 * high - 1e-9) / 10)


def _chart(
    page: Page,
    benchmark: str,
    name: str,
    by_encoder: dict[Encoder, dict[str, Score]],
    styles: dict[Encoder, str],
    span: tuple[float, float],
) -> dict[str, Any]:
    rows, notes = [], []
    for encoder in page.found.encoders:
        score = by_encoder.get(encoder, {}).get(name)
        if score is None or score.value is None:
            text = "not run" if score is None else "not defined"
            rows.append(charts.Bar(name=str(encoder), style=styles[encoder], value=None, text=text))
            if score is None:
                notes += not_run(page, encoder, Column(benchmark=benchmark, score=name))
            elif score.note:
                notes.append(page.notes.number(f"not defined: {score.note}"))
            continue
        notes += [page.notes.number(score.note)] if score.note else []
        rows.append(
            charts.Bar(
                name=str(encoder),
                style=styles[encoder],
                value=score.value,
                low=score.low,
                high=score.high,
                text=number_text(score.value),
            )
        )
    return {
        "title": _task(benchmark, name),
        "svg": Markup(charts.bars(rows, title=name, span=span)),
        "notes": sorted(set(notes)),
    }


def _published_tasks(benchmark: str, members: Sequence[str]) -> dict[str, Any] | None:
    """EVA's stand beside its headline table already."""
    rows = published_rows([Column(benchmark=benchmark, score=name) for name in members]) if benchmark != "eva" else []
    return {"columns": [_task(benchmark, name) for name in members], "rows": rows} if rows else None


def retention_table(page: Page, role: Role) -> dict[str, Any]:
    """A row for each score that student and teacher have, in order of benchmarks."""
    rows = []
    for column in page.found.columns:
        student, teacher = (page.found.results.get((who, column)) for who in (role.student, role.teacher))
        untrained = page.found.results.get((role.untrained, column)) if role.untrained else None
        if student is None or teacher is None:
            absent = [str(who) for who, r in ((role.student, student), (role.teacher, teacher)) if r is None]
            rows.append(_retention_head(column, column.score) | {"why": f"not run: {' and '.join(absent)}"})
            continue
        for score in teacher.scores:
            pupil = find_score(student, score.name)
            start = find_score(untrained, score.name) if untrained else None
            if pupil is None or pupil.value is None or score.value is None:
                rows.append(_retention_head(column, score.name) | {"why": "not defined for both"})
                continue
            row = _retention_head(column, score.name) | {"student": pupil.value, "teacher": score.value}
            row |= {"untrained": start.value if start else None} | _share(page, student, teacher, score.name)
            rows.append(row | _beyond(page, pupil.value, score.value, row["untrained"]))
    for row in rows:
        row |= {name: number_text(row[name]) for name in ("student", "teacher", "untrained")}
    return {"student": role.student, "teacher": role.teacher, "untrained": role.untrained, "rows": rows}


def _retention_head(column: Column, score: str) -> dict[str, Any]:
    blank = dict.fromkeys(("student", "teacher", "untrained", "why"))
    name = {"benchmark": NAMES.get(column.benchmark, column.benchmark), "score": words(score)}
    return blank | name | {"share": empty_cell(), "beyond": empty_cell(), "headline": score == column.score}


def _share(page: Page, student: Result, teacher: Result, name: str) -> dict[str, Any]:
    """Student / teacher in percent, with an interval where both hold the sums of the same clusters."""
    pupil, master = find_score(student, name), find_score(teacher, name)
    assert pupil is not None
    assert pupil.value is not None
    assert master is not None
    assert master.value is not None
    if not master.value > 0:
        notes = [page.notes.number("no share of the teacher: its score is not above 0")]
        return {"share": empty_cell(value="not defined", missing=True, notes=notes)}
    percent, interval = 100 * pupil.value / master.value, ""
    measures = [measure_of(result, name) for result in (student, teacher)]
    texts = [measure for measure in measures if isinstance(measure, str)]
    drawn = [measure for measure in measures if not isinstance(measure, str)]
    if not texts:
        try:
            found = retention_percent(*drawn)
            if found.low is not None and found.high is not None:
                interval = f"{found.low:.0f} to {found.high:.0f} %"
            else:
                texts = [f"too few clusters to draw from ({found.clusters})"]
        except DataError as error:
            texts = [error.what]
    score = f"{NAMES.get(teacher.benchmark, teacher.benchmark)} ({words(name)})"
    notes = [page.notes.number(f"{score}: no interval of the share, {text}") for text in texts[:1]]
    return {"share": empty_cell(value=_percent(percent), interval=interval, notes=notes)}


def _percent(value: float) -> str:
    return f"{value:.1f} %".replace("-", "\N{MINUS SIGN}")


def _beyond(page: Page, student: float, teacher: float, untrained: float | None) -> dict[str, Any]:
    """Percent of the teacher's lead over the untrained network that the student kept."""
    if untrained is None:
        return {"beyond": empty_cell(value="not run", missing=True)}
    share = retentions.retention(student, teacher, untrained)
    if share is None:
        notes = [page.notes.number(f"no retention: {retentions.no_retention(student, teacher, untrained)}")]
        return {"beyond": empty_cell(value="not defined", missing=True, notes=notes)}
    return {"beyond": empty_cell(value=_percent(100 * share))}


def cost_table(page: Page) -> dict[str, Any]:
    """Size, speed and memory, and seconds of each benchmark; a row for each machine on which an encoder was measured.

    Parts and features that were there already cost no seconds again.
    """
    found = page.found
    benchmarks = sorted({column.benchmark for column in found.columns}, key=place_of)
    rows = []
    for encoder in found.encoders:
        by_cost: dict[str, list[Result]] = {}
        for (who, _), result in found.results.items():
            if who == encoder:
                by_cost.setdefault(repr(result.data.get("cost")), []).append(result)
        for own in by_cost.values() or [[]]:
            cells = _cost_cells(page, own[0].data.get("cost") if own else None)
            for benchmark in benchmarks:
                spent = [result.seconds for result in own if result.benchmark == benchmark]
                missing = empty_cell(value="not run", missing=True)
                cells.append(empty_cell(value=f"{sum(spent):,.1f}") if spent else missing)
            rows.append({"name": encoder.shown, "pooling": encoder.pooling, "cells": cells})
    return {"columns": [*_COST, *(f"{NAMES.get(name, name)}, seconds" for name in benchmarks)], "rows": rows}


def _cost_cells(page: Page, cost: dict[str, Any] | None) -> list[dict[str, Any]]:
    if cost is None:
        return [empty_cell(value="not measured", missing=True) for _ in _COST]
    how = (
        f"{cost['tiles_per_second']:,} tiles a second: {cost['processor']}, {cost['threads']} threads, "
        f"{cost['batch']} tiles of {cost['input_px']} px at once ({cost['tiles']}), {cost['precision']}, "
        f"{cost['engine']}, {cost['date']}; a plain matrix product ran at {cost['yardstick_gflops']:,.0f} GFLOP/s "
        f"in the same rounds; memory with {cost['memory_batch']} tiles at once: {cost['memory_rule']}"
    )
    cells = []
    for name, unit in _COST.values():
        notes = [page.notes.number(how)] if name in ("tiles_per_second", "memory_bytes") else []
        known = cost[name] is not None
        value = f"{cost[name] / unit:,.3g}" if known and cost[name] < 1e3 * unit else f"{(cost[name] or 0) / unit:,.0f}"
        cells.append(empty_cell(value=value if known else "not known", missing=not known, notes=notes))
    return cells


def provenance_table(found: Collection) -> list[dict[str, str]]:
    """A row per result: weights, data and version."""
    rows = []
    for (encoder, column), result in sorted(found.results.items(), key=_result_place):
        told = {name: value for name, value in result.data.items() if name != "cost"}  # has a table of its own
        told |= {name: result.settings[name] for name in ("input_px", "precision") if name in result.settings}
        facts = [f"{name.replace('_', ' ')} {_brief(name, value)}" for name, value in told.items()]
        rows.append(
            {
                "benchmark": f"{NAMES.get(column.benchmark, column.benchmark)}, {words(column.score)}",
                "encoder": str(encoder),
                "key": result.encoder_key[:12],
                "facts": "; ".join(facts),
                "version": result.histill,
                "date": result.date,
            }
        )
    return rows


def _result_place(item: tuple[tuple[Encoder, Column], Result]) -> tuple[Any, ...]:
    return place_of(item[0][1].benchmark), *item[0]


def _brief(name: str, value: Any) -> str:
    """A fact in few words; of a path the last name alone, since a page is passed on, and of a digest the start."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key.replace('_', ' ')} {_brief(key, each)}" for key, each in value.items()) + ")"
    if isinstance(value, list):
        return ", ".join(_brief(name, each) for each in value) or "none"
    text = str(value)
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:12]
    return Path(text).name if Path(text).is_absolute() else text
