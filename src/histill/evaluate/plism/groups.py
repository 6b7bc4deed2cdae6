"""Groups of slide pairs, their medians, the score, and how sure they are.

Shapes: S slides, P pairs, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.evaluate.plism.engine import PairMetrics
from histill.evaluate.plism.layout import SlideName
from histill.evaluate.results import Score

__all__ = ["GROUPS", "METRICS", "Pair", "Summary", "details", "pair_rows", "scores", "summarise"]

METRICS = ("cosine_similarity", "top_1_accuracy", "top_3_accuracy", "top_5_accuracy", "top_10_accuracy")
GROUPS = ("cross_scanner", "cross_staining", "both", "all")
"""Same staining; same scanner; both differ; every pair. Of 91 slides: 273, 546, 3,276 and 4,095 pairs."""
SCORE_PARTS = (
    ("cosine_similarity", "all"),
    ("top_10_accuracy", "cross_scanner"),
    ("top_10_accuracy", "cross_staining"),
    ("top_10_accuracy", "both"),
)
"""The score is the mean of these medians."""
MATRICES = ("cosine_similarity", "top_10_accuracy")
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two slides and what was measured on them."""

    a: SlideName
    b: SlideName
    metrics: PairMetrics

    def within(self, group: str) -> bool:
        """Whether it belongs to a group."""
        same_staining, same_scanner = self.a.staining == self.b.staining, self.a.scanner == self.b.scanner
        return {
            "cross_scanner": same_staining and not same_scanner,
            "cross_staining": same_scanner and not same_staining,
            "both": not same_staining and not same_scanner,
            "all": True,
        }[group]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One metric in one group; numbers are None when the group has no pairs, or a pair without a number."""

    metric: str
    group: str
    pairs: int
    mean: float | None
    std: float | None
    """Of the pairs, divided by their number."""
    median: float | None
    iqr: float | None
    """Third quartile less the first, with linear interpolation."""
    note: str | None = None


def _values(pairs: Sequence[Pair], metric: str) -> NDArray[np.float64]:
    return np.array([getattr(pair.metrics, metric) for pair in pairs], dtype=np.float64)


def _why_not(pairs: Sequence[Pair], metric: str, group: str) -> str | None:
    """Why there is no number; None when there is one."""
    if not pairs:
        return f"no two of these slides are a {group} pair"
    broken = [pair for pair in pairs if np.isnan(getattr(pair.metrics, metric))]
    if broken:
        first = f"{broken[0].a.name} and {broken[0].b.name}"
        return (
            f"{metric} is not a number for {len(broken)} of {len(pairs)} {group} pairs, first {first}: float16 overflow"
        )
    return None


def summarise(pairs: Sequence[Pair]) -> tuple[Summary, ...]:
    """Every metric in every group."""
    found = []
    for group in GROUPS:
        members = [pair for pair in pairs if pair.within(group)]
        for metric in METRICS:
            note = _why_not(members, metric, group)
            numbers: dict[str, float | None] = dict.fromkeys(("mean", "std", "median", "iqr"))
            if note is None:
                values_P = _values(members, metric)
                first, middle, third = np.percentile(values_P, (25, 50, 75)).tolist()
                mean, std = float(values_P.mean()), float(values_P.std())
                numbers = {"mean": mean, "std": std, "median": middle, "iqr": third - first}
            found.append(Summary(metric=metric, group=group, pairs=len(members), note=note, **numbers))
    return tuple(found)


def scores(pairs: Sequence[Pair]) -> tuple[Score, ...]:
    """The score and the four medians that it is the mean of, with 95 % intervals.

    Intervals are percentiles of a bootstrap clustered by slide: as many slides are drawn with replacement as there
    are, a pair of slides drawn u and v times counts u v times, pairs of a slide with itself do not exist. Resamples
    in which a group is empty are left out; with fewer than half left there is no interval.
    """
    by_name = {(summary.metric, summary.group): summary for summary in summarise(pairs)}
    parts = [by_name[part] for part in SCORE_PARTS]
    drawn = _resampled_medians(pairs)
    medians = [summary.median for summary in parts]
    notes = [summary.note for summary in parts if summary.note]
    whole = None if any(median is None for median in medians) else float(np.mean([m for m in medians if m is not None]))
    note = "; ".join([*notes, *_tie_note(pairs)]) or None
    found = [_score("score", whole, drawn.mean(axis=1), note)]
    for place, summary in enumerate(parts):
        found.append(_score(f"{summary.metric}/{summary.group}", summary.median, drawn[:, place], summary.note))
    return tuple(found)


def _tie_note(pairs: Sequence[Pair]) -> list[str]:
    """Ties count for the twin, as in the definition; an encoder that lives on that must not look good unnoticed."""
    share = float(np.mean([pair.metrics.tied for pair in pairs])) if pairs else 0.0
    if share < 0.01:
        return []
    return [f"{share:.0%} of the tiles are as near to another tile as to their twin: collapsed features or copies"]


def _score(name: str, value: float | None, drawn_B: NDArray[np.float64], note: str | None) -> Score:
    valid_B = drawn_B[~np.isnan(drawn_B)]
    if value is None or 2 * len(valid_B) < len(drawn_B):
        return Score(name=name, value=value, note=note or "too few slides for an interval")
    low, high = np.percentile(valid_B, (2.5, 97.5)).tolist()
    return Score(name=name, value=value, low=low, high=high, note=note)


def _resampled_medians(pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """(B, 4): the medians of ``SCORE_PARTS`` in every resample; NaN where a group is empty."""
    names = sorted({slide.name for pair in pairs for slide in (pair.a, pair.b)})
    place = {name: number for number, name in enumerate(names)}
    draws = (
        np.random.default_rng(SEED)
        .multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
        .astype(np.int32)
    )
    found = np.full((RESAMPLES, len(SCORE_PARTS)), np.nan)
    for number, (metric, group) in enumerate(SCORE_PARTS):
        members = [pair for pair in pairs if pair.within(group)]
        values_P = _values(members, metric)
        if len(members) and not np.isnan(values_P).any():
            a_P, b_P = (
                [place[slide.name] for slide in side] for side in zip(*((p.a, p.b) for p in members), strict=True)
            )
            found[:, number] = _weighted_medians(values_P, draws[:, a_P] * draws[:, b_P])
    return found


def _weighted_medians(values_P: NDArray[np.float64], weights_BP: NDArray[np.int32]) -> NDArray[np.float64]:
    """(B,) medians of values that occur so many times; NaN where none does."""
    order_P = np.argsort(values_P)
    values_P, reached_BP = values_P[order_P], weights_BP[:, order_P].cumsum(axis=1, dtype=np.int32)
    total_B1 = reached_BP[:, -1:]
    lower_B = (reached_BP <= (total_B1 - 1) // 2).sum(axis=1)
    upper_B = (reached_BP <= total_B1 // 2).sum(axis=1)
    last = len(values_P) - 1
    middle_B = (values_P[np.minimum(lower_B, last)] + values_P[np.minimum(upper_B, last)]) / 2
    return np.where(total_B1[:, 0] > 0, middle_B, np.nan)


def pair_rows(pairs: Sequence[Pair]) -> list[dict[str, str | float | None]]:
    """One row per pair: ``slide_a``, ``slide_b`` and the metrics; what is not a number is None."""
    return [
        {"slide_a": p.a.name, "slide_b": p.b.name} | {m: _or_none(getattr(p.metrics, m)) for m in METRICS}
        for p in pairs
    ]


def details(pairs: Sequence[Pair]) -> dict[str, Any]:
    """``pairs``, ``groups`` and ``matrix`` for ``results.json``.

    ``groups``: group -> metric -> summary. ``matrix``: ``slides``, and a square for each of ``MATRICES``, None where
    nothing was measured, as for a slide with itself.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for summary in summarise(pairs):
        plain = asdict(summary)
        groups[plain.pop("group")][plain.pop("metric")] = plain
    names = sorted({slide.name for pair in pairs for slide in (pair.a, pair.b)})
    matrix: dict[str, Any] = {"slides": names}
    for metric in MATRICES:
        known = {frozenset((p.a.name, p.b.name)): _or_none(getattr(p.metrics, metric)) for p in pairs}
        matrix[metric] = [[known.get(frozenset((row, column))) for column in names] for row in names]
    return {"pairs": pair_rows(pairs), "groups": groups, "matrix": matrix}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
