"""Intervals and stopping splits, against other code and as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from histill.errors import DataError
from histill.evaluate.eva.scoring import (
    balanced_accuracy,
    drawn_groups,
    run_interval,
    stopping_groups,
    stopping_split,
)


def test_balanced_accuracy_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.choice(4, 200, p=[0.6, 0.2, 0.15, 0.05]), rng.integers(0, 4, 200)
    assert balanced_accuracy(predicted, label) == pytest.approx(balanced_accuracy_score(label, predicted), abs=1e-12)


def test_the_interval_over_runs_is_students() -> None:
    from scipy import stats

    values = [0.8, 0.82, 0.79, 0.81, 0.85]
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert run_interval(values) == pytest.approx(expected)
    assert run_interval([0.8]) is None


def test_what_is_drawn_without_groups_stays_small() -> None:
    few, many = drawn_groups(None, 50), drawn_groups(None, 5000)
    assert len(np.unique(few)) == 50
    assert sorted(np.unique(many, return_counts=True)[1].tolist()) == [2] * 1000 + [3] * 1000
    assert (many == drawn_groups(None, 5000)).all()
    assert drawn_groups(np.array(["a", "b"]), 2).tolist() == ["a", "b"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), groups=st.integers(10, 40))
def test_a_stopping_split_parts_groups_and_has_all_classes(seed: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rng.integers(2, 9, groups))
    label = (group % 2 + rng.integers(0, 2, len(group))) % 3
    fit, stop = stopping_split(label, group, seed=seed)
    assert sorted([*fit, *stop]) == list(range(len(label)))
    assert not set(group[fit]) & set(group[stop])
    assert set(label[fit]) == set(label[stop]) == set(label)


def test_without_groups_a_fifth_is_taken_of_each_class() -> None:
    label = np.repeat([0, 1], [50, 100])
    fit, stop = stopping_split(label, None)
    assert np.bincount(label[stop]).tolist() == [10, 20]
    assert len(fit) == 120


def test_groups_without_classes() -> None:
    group = np.repeat(np.arange(7), 3)
    fit, stop = stopping_groups(group)
    assert len(np.unique(group[stop])) == 2
    assert not set(group[fit]) & set(group[stop])
    with pytest.raises(DataError, match="no stopping split"):
        stopping_groups(np.zeros(5))


def test_one_image_of_a_class_cannot_be_split() -> None:
    with pytest.raises(DataError, match="1 of the rarest class"):
        stopping_split(np.array([0] * 20 + [1] * 20 + [2]), None)


def test_a_class_that_is_not_scored_does_not_count() -> None:
    label, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])  # class 2 is predicted, and never right
    assert balanced_accuracy(predicted, label) == 0.75


def test_a_class_in_one_group_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"no stopping split[\s\S]*3 groups"):
        stopping_split(np.array([0, 0, 1, 1, 0, 0]), np.array([0, 0, 1, 1, 2, 2]))
