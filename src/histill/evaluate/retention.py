"""How much of the teacher's skill the student kept, beyond what an untrained network has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["MARGIN", "Row", "no_retention", "report", "retention"]

MARGIN = 0.02
"""The teacher must beat the untrained network by this much, or a retention would be noise divided by noise."""

_INTERVAL_ENDS = ("_low", "_high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of a report."""

    metric: str
    """Name, as in the scores."""
    teacher: float
    student: float
    untrained: float
    """The scores (higher is better)."""
    retention: float | None
    """See :func:`retention`."""
    reason: str | None
    """Why ``retention`` is None; None otherwise."""


def no_retention(student: float, teacher: float, untrained: float, *, margin: float = MARGIN) -> str | None:
    """Why these scores have no retention; None when they have one. Arguments as in :func:`retention`."""
    scores = {"student": student, "teacher": teacher, "untrained network": untrained}
    bad = [name for name, score in scores.items() if not math.isfinite(score)]
    if bad:
        return f"the score of the {' and the '.join(bad)} is not finite"
    if teacher - untrained < margin:
        return f"the teacher ({teacher:.4f}) does not lead the untrained network ({untrained:.4f}) by {margin:g}"
    return None


def retention(student: float, teacher: float, untrained: float, *, margin: float = MARGIN) -> float | None:
    """``(student - untrained) / (teacher - untrained)`` of one metric where higher is better.

    Parameters
    ----------
    student, teacher, untrained
        The same metric on the same images; ``untrained`` is the student's architecture at its random start.
    margin
        Least lead of the teacher over the untrained network, in the metric's unit.

    Returns
    -------
    float or None
        1 = as good as the teacher, 0 = as an untrained network; may lie outside of 0 to 1. None when the teacher has
        no such lead or a score is not finite: :func:`no_retention` says which.
    """
    if no_retention(student, teacher, untrained, margin=margin) is not None:
        return None
    return (student - untrained) / (teacher - untrained)


def report(
    teacher_scores: Mapping[str, float], student_scores: Mapping[str, float], untrained_scores: Mapping[str, float]
) -> tuple[Row, ...]:
    """One row per metric that all three have, in the teacher's order; ends of intervals (``*_low``) are left out."""
    rows = []
    for metric, teacher in teacher_scores.items():
        if metric.endswith(_INTERVAL_ENDS) or metric not in student_scores or metric not in untrained_scores:
            continue
        student, untrained = student_scores[metric], untrained_scores[metric]
        rows.append(
            Row(
                metric=metric,
                teacher=teacher,
                student=student,
                untrained=untrained,
                retention=retention(student, teacher, untrained),
                reason=no_retention(student, teacher, untrained),
            )
        )
    return tuple(rows)
