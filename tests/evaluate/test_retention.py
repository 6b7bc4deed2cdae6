from __future__ import annotations

import math

import pytest

from histill.evaluate.retention import no_retention, report, retention


@pytest.mark.parametrize(("student", "expected"), [(0.72, 1.0), (0.59, 0.0), (0.655, 0.5), (0.785, 1.5), (0.525, -0.5)])
def test_retention_by_hand(student, expected):
    assert retention(student, teacher=0.72, untrained=0.59) == pytest.approx(expected)
    assert no_retention(student, teacher=0.72, untrained=0.59) is None


@pytest.mark.parametrize("untrained", [0.71, 0.72, 0.9])
def test_no_number_when_the_teacher_has_no_lead(untrained):
    assert retention(0.75, teacher=0.72, untrained=untrained) is None
    reason = no_retention(0.75, teacher=0.72, untrained=untrained)
    assert reason is not None
    assert "0.7200" in reason
    assert f"{untrained:.4f}" in reason


def test_the_margin_is_settable():
    assert retention(0.715, teacher=0.72, untrained=0.71, margin=0.005) == pytest.approx(0.5)


def test_a_score_that_is_not_finite_is_named():
    assert retention(math.nan, 0.7, 0.5) is None
    assert no_retention(math.nan, 0.7, 0.5) == "the score of the student is not finite"
    assert no_retention(0.6, math.inf, math.nan) == "the score of the teacher and the untrained network is not finite"


def test_report_has_one_row_per_common_metric():
    rows = report(
        {"linear_auc": 0.7, "linear_auc_low": 0.65, "linear_auc_high": 0.75, "cosine": 0.9, "knn_auc": 0.6},
        {"linear_auc": 0.65, "linear_auc_low": 0.6, "linear_auc_high": 0.7, "cosine": 0.95},
        {"cosine": 1.0, "linear_auc": 0.6, "linear_auc_low": 0.5, "linear_auc_high": 0.7, "knn_auc": 0.5},
    )
    assert [row.metric for row in rows] == ["linear_auc", "cosine"]
    assert (rows[0].teacher, rows[0].student, rows[0].untrained) == (0.7, 0.65, 0.6)
    assert rows[0].retention == pytest.approx(0.5)
    assert rows[0].reason is None
    assert rows[1].retention is None
    assert rows[1].reason is not None
