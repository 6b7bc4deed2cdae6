"""Groups of slide pairs, their medians, the score, and how sure they are.

Shapes: S slides, P pairs, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill.evaluate.features import Array
from histill.evaluate.plism.engine import PairMetrics
from histill.evaluate.plism.layout import SlideName
from histill.evaluate.results import Score
from histill.evaluate.statistics import estimate

__all__ = [
    "GROUPS",
    "METRICS",
    "Pair",
    "SlideMedians",
    "Summary",
    "details",
    "pair_rows",
    "read_pairs",
    "scores",
    "slide_medians",
    "summarise",
]

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideMedians:
    """A mean of medians over groups of pairs, as a :class:`histill.evaluate.statistics.Measure` of slides.

    A pair of slides that are drawn u and v times counts u v times; pairs of a slide with itself do not exist.
    """

    names: tuple[str, ...]
    """Slides."""
    groups: tuple[tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]], ...]
    """Per median: the values of its pairs (P), and the places of both slides in ``names``."""
    strata: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Pairs of each group."""
        return tuple(len(values_P) for values_P, _, _ in self.groups)

    @property
    def value(self) -> float:
        """Mean of the medians."""
        return float(np.mean([np.median(values_P) for values_P, _, _ in self.groups]))

    def values(self, drawn_BS: Array) -> NDArray[np.float64]:
        """(B,); NaN where a group is empty."""
        counts_BS = drawn_BS.astype(np.int32)
        medians = [
            _weighted_medians(values_P, counts_BS[:, a_P] * counts_BS[:, b_P]) for values_P, a_P, b_P in self.groups
        ]
        mean_B: NDArray[np.float64] = np.mean(medians, axis=0)
        return mean_B


def slide_medians(pairs: Sequence[Pair], name: str) -> SlideMedians | None:
    """Give a score (``score``, or ``METRIC/GROUP``) as a measure of slides; None where it is not defined."""
    metric, _, group = name.partition("/")
    parts = SCORE_PARTS if name == "score" else ((metric, group),)
    names = tuple(sorted({slide.name for pair in pairs for slide in (pair.a, pair.b)}))
    place = {slide: number for number, slide in enumerate(names)}
    found = []
    for metric, group in parts:
        members = [pair for pair in pairs if pair.within(group)]
        if _why_not(members, metric, group) is not None:
            return None
        a_P, b_P = (np.array([place[getattr(pair, side).name] for pair in members], np.intp) for side in "ab")
        found.append((_values(members, metric), a_P, b_P))
    return SlideMedians(names=names, groups=tuple(found))


def scores(pairs: Sequence[Pair]) -> tuple[Score, ...]:
    """The score and the four medians that it is the mean of, with 95 % intervals.

    Intervals are percentiles of a bootstrap clustered by slide (:class:`SlideMedians`). Resamples in which a group is
    empty are left out; with fewer than half left there is no interval.
    """
    by_name = {(summary.metric, summary.group): summary for summary in summarise(pairs)}
    parts = [by_name[part] for part in SCORE_PARTS]
    notes = [summary.note for summary in parts if summary.note]
    found = [_score(pairs, "score", "; ".join([*notes, *_tie_note(pairs)]))]
    return (*found, *(_score(pairs, f"{summary.metric}/{summary.group}", summary.note or "") for summary in parts))


def _tie_note(pairs: Sequence[Pair]) -> list[str]:
    """Ties count for the twin, as in the definition; an encoder that lives on that must not look good unnoticed."""
    share = float(np.mean([pair.metrics.tied for pair in pairs])) if pairs else 0.0
    if share < 0.01:
        return []
    return [f"{share:.0%} of the tiles are as near to another tile as to their twin: collapsed features or copies"]


def _score(pairs: Sequence[Pair], name: str, note: str) -> Score:
    measure = slide_medians(pairs, name)
    if measure is None:
        return Score(name=name, value=None, note=note)
    found = estimate(measure)
    lone = ["too few slides for an interval"] if found.low is None else []
    notes = "; ".join([*([note] if note else []), *lone])
    return Score(name=name, value=found.value, low=found.low, high=found.high, note=notes or None)


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


def read_pairs(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Read what :func:`pair_rows` gave, without the share of ties."""
    found = []
    for row in rows:
        numbers = {metric: math.nan if row[metric] is None else float(row[metric]) for metric in METRICS}
        a, b = (SlideName.of(row[side], Path("results.json")) for side in ("slide_a", "slide_b"))
        found.append(Pair(a=a, b=b, metrics=PairMetrics(**numbers)))
    return found


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
