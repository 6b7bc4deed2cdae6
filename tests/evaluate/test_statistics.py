from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histill.errors import DataError
from histill.evaluate.probes import balanced_accuracy
from histill.evaluate.statistics import (
    Clusters,
    accuracy_clusters,
    clusters_of,
    draws,
    estimate,
    paired_test,
    retention_percent,
)


def means(*values: float, strata: tuple[str, ...] | None = None) -> Clusters:
    """One cluster per value, a plain mean."""
    above = np.array(values, float)[:, None]
    names = tuple(f"s{i}" for i in range(len(values)))
    return Clusters(names=names, numerator_SC=above, denominator_SC=np.ones_like(above), strata=strata)


def every_resample(count: int) -> tuple[np.ndarray, np.ndarray]:
    """All draws of ``count`` clusters with their probabilities."""
    tally: dict[tuple[int, ...], int] = {}
    for drawn in itertools.product(range(count), repeat=count):
        key = tuple(drawn.count(i) for i in range(count))
        tally[key] = tally.get(key, 0) + 1
    return np.array(list(tally), float), np.array(list(tally.values())) / count**count


# ------------------------------------------------------------------ sums and values


def test_a_plain_mean_weighs_images_and_not_clusters() -> None:
    clusters = clusters_of(np.array([1.0, 2.0, 6.0]), np.ones(3), np.array(["b", "a", "b"]))
    assert clusters.names == ("a", "b")
    np.testing.assert_array_equal(clusters.numerator_SC[:, 0], [2.0, 7.0])
    assert clusters.value == pytest.approx(3.0)
    np.testing.assert_allclose(clusters.values(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])), [2.0, 3.5, 3.0])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(2, 6))
def test_balanced_accuracy_is_that_of_the_drawn_images(seed: int, classes: int, slides: int) -> None:
    rng = np.random.default_rng(seed)
    y, slide = rng.integers(0, classes, 40), rng.integers(0, slides, 40)
    scores = rng.normal(size=(40, classes))
    clusters = accuracy_clusters(y, scores.argmax(axis=1) == y, slide)
    names = list(range(classes))
    assert clusters.value == pytest.approx(balanced_accuracy(y, scores, names))
    drawn = draws(len(clusters.names), resamples=5, seed=seed)
    for weight, value in zip(drawn, clusters.values(drawn), strict=True):
        rows = np.concatenate(
            [
                np.flatnonzero(slide == int(s))
                for s, w in zip(clusters.names, weight, strict=True)
                for _ in range(int(w))
            ]
        )
        assert value == pytest.approx(balanced_accuracy(y[rows], scores[rows], names))


def test_a_class_that_no_drawn_slide_shows_is_left_out() -> None:
    clusters = accuracy_clusters(np.array(["a", "b"]), np.array([1.0, 0.0]), np.array(["s", "t"]))
    np.testing.assert_allclose(clusters.values(np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])), [1.0, 0.0, np.nan])


def test_json_keeps_them() -> None:
    clusters = means(0.1, 1 / 3, 0.7, strata=("x", "x", "y"))
    again = Clusters.from_plain(json.loads(json.dumps(clusters.to_plain())))
    assert again.names == clusters.names
    assert again.strata == clusters.strata
    np.testing.assert_array_equal(again.numerator_SC, clusters.numerator_SC)
    for damage in ({"names": ["s0"]}, {"numerator": [1.0]}, {"denominator": [["x"]]}):
        with pytest.raises(DataError, match="no sums per cluster"):
            Clusters.from_plain(clusters.to_plain() | damage)
    with pytest.raises(DataError, match="no sums per cluster"):
        Clusters.from_plain({})


def test_sums_need_finite_values_and_a_group_each() -> None:
    with pytest.raises(DataError, match="a group per image"):
        clusters_of(np.ones(3), np.ones(3), np.array(["a"]))
    with pytest.raises(DataError, match="finite"):
        clusters_of(np.array([1.0, np.nan]), np.ones(2), np.array(["a", "b"]))


# ------------------------------------------------------------------ draws and intervals


def test_draws_are_those_of_the_bootstrap() -> None:
    drawn = draws(3, resamples=60_000, seed=1)
    assert (drawn.sum(axis=1) == 3).all()
    outcomes, probability = every_resample(3)
    for outcome, expected in zip(outcomes, probability, strict=True):
        assert (drawn == outcome).all(axis=1).mean() == pytest.approx(expected, abs=0.006)
    np.testing.assert_array_equal(draws(3, resamples=5), draws(3, resamples=5))
    assert not np.array_equal(draws(3, resamples=5, seed=1), draws(3, resamples=5, seed=2))


def test_draws_stay_within_their_stratum() -> None:
    drawn = draws(5, resamples=200, strata=("x", "y", "x", "y", "y"))
    assert (drawn[:, [0, 2]].sum(axis=1) == 2).all()
    assert (drawn[:, [1, 3, 4]].sum(axis=1) == 3).all()
    assert len(np.unique(drawn[:, 0])) == 3


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_an_interval_is_that_of_all_resamples_counted_out(level: float) -> None:
    clusters = means(0.0, 1.0, 5.0)
    outcomes, probability = every_resample(3)
    values = clusters.values(outcomes)
    order = np.argsort(values)
    cumulated = np.cumsum(probability[order])
    found = estimate(clusters, resamples=40_000, level=level)
    for end, share in ((found.low, (1 - level) / 2), (found.high, (1 + level) / 2)):
        # a share that falls on a step of the distribution may go to either side of it
        near = [values[order][np.searchsorted(cumulated, share + d)] for d in (-0.01, 0.01)]
        assert min(near) - 1e-12 <= end <= max(near) + 1e-12
    assert (found.value, found.clusters, found.resamples, found.seed) == (2.0, 3, 40_000, 0)


def test_one_cluster_has_no_interval_and_strata_of_one_neither() -> None:
    for clusters in (means(0.4), means(0.4, 0.6, strata=("x", "y"))):
        found = estimate(clusters)
        assert (found.low, found.high, found.resamples) == (None, None, 0)
    assert estimate(means(0.4, 0.6, 0.7, strata=("x", "y", "y"))).low is not None


def test_what_lies_between_strata_is_no_uncertainty() -> None:
    found = estimate(means(0.0, 0.0, 1.0, 1.0, strata=("x", "x", "y", "y")))
    assert (found.low, found.high) == (0.5, 0.5)
    assert estimate(means(0.0, 0.0, 1.0, 1.0)).low == 0.0


def simulated(rng: np.random.Generator, slides: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of a slide are alike: slide effects of 1 and tile effects of 0.5, slides of differing sizes."""
    slide = np.repeat(np.arange(slides), rng.integers(5, 15, slides))
    return rng.normal(size=slides)[slide] + rng.normal(0, 0.5, len(slide)), slide


def test_95_of_100_intervals_hold_the_truth_though_tiles_of_a_slide_are_alike() -> None:
    rng = np.random.default_rng(0)
    hits, naive = [], []
    for run in range(600):
        x, slide = simulated(rng, 80)
        found = estimate(clusters_of(x, np.ones(len(x)), slide), resamples=400)
        hits.append(found.low <= 0 <= found.high)
        if run < 60:
            alone = estimate(clusters_of(x, np.ones(len(x)), np.arange(len(x))), resamples=200)
            naive.append(alone.low <= 0 <= alone.high)
    assert 0.92 <= np.mean(hits) <= 0.97
    assert np.mean(naive) < 0.7, "drawing tiles would claim far too much"


# ------------------------------------------------------------------ two encoders


def test_p_is_that_of_all_resamples_counted_out() -> None:
    a, b = means(0.9, 0.5, 0.7), means(0.5, 0.6, 0.4)
    outcomes, probability = every_resample(3)
    difference = a.value - b.value
    moved = a.values(outcomes) - b.values(outcomes) - difference
    exact = probability[np.abs(moved) >= abs(difference) - 1e-12].sum()
    found = paired_test(a, b, resamples=40_000)
    assert found.difference == pytest.approx(0.2)
    assert found.p == pytest.approx(exact, abs=0.008)


def test_the_same_encoder_does_not_differ_from_itself() -> None:
    found = paired_test(means(0.1, 0.5, 0.3), means(0.1, 0.5, 0.3))
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_lead_on_every_slide_is_never_certain() -> None:
    values = np.random.default_rng(0).normal(size=20)
    found = paired_test(means(*(values + 0.1)), means(*values), resamples=999)
    assert found.p == pytest.approx(1 / 1000)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    back = paired_test(means(*values), means(*(values + 0.1)), resamples=999)
    assert (back.difference, back.p) == (pytest.approx(-found.difference), found.p)


def test_pairing_sees_what_two_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(1)
    slides = rng.normal(size=30)
    a, b = means(*(slides + 0.2 + rng.normal(0, 0.1, 30))), means(*slides)
    assert estimate(a).low < estimate(b).high
    assert paired_test(a, b).p < 0.01


def test_5_of_100_comparisons_of_equals_find_a_difference() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        slides = rng.normal(size=40)
        noise = rng.normal(0, 0.3, (2, 40))
        found.append(paired_test(means(*(slides + noise[0])), means(*(slides + noise[1])), resamples=400).p)
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.09


def test_other_slides_cannot_be_compared() -> None:
    a = clusters_of(np.ones(2), np.ones(2), np.array(["p", "q"]))
    b = clusters_of(np.ones(2), np.ones(2), np.array(["p", "r"]))
    for compare in (paired_test, retention_percent):
        with pytest.raises(DataError, match=r"same slides only(.|\n)*differs q"):
            compare(a, b)


# ------------------------------------------------------------------ retention


def test_retention_is_a_ratio_on_the_same_resamples() -> None:
    teacher = np.array([0.5, 0.8, 0.9, 0.7])
    found = retention_percent(means(*(0.9 * teacher)), means(*teacher))
    assert found.value == pytest.approx(90.0)
    assert (found.low, found.high) == (pytest.approx(90.0), pytest.approx(90.0))  # what slides share cancels
    assert retention_percent(means(0.6), means(0.8)).low is None


def test_95_of_100_intervals_hold_the_retention() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        teacher = np.clip(rng.normal(0.7, 0.1, 40), 0.05, 1)
        student = 0.9 * teacher + rng.normal(0, 0.05, 40)
        found = retention_percent(means(*student), means(*teacher), resamples=400)
        hits += found.low <= 90 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_retention_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="above 0"):
        retention_percent(means(0.1, 0.2), means(0.0, 0.0))
    # a resample on which the teacher scores 0 is left out
    found = retention_percent(means(0.5, 0.2), means(0.5, 0.0), resamples=1000)
    assert found.resamples < 1000
    assert math.isfinite(found.high)
