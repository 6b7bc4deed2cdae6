from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from histill.errors import DataError
from histill.evaluate import probes
from histill.evaluate.probes import (
    balanced_accuracy,
    cluster_bootstrap,
    inner_splits,
    knn_probe,
    linear_probe,
    macro_auc,
)


def drawn(seed: int, count: int, classes: int = 2, dims: int = 12, lead: float = 1.0, rare: float = 0.2):
    """Features (scaled and shifted), labels with a rare class, and the slides that they lie on."""
    rng = np.random.default_rng(seed)
    p = np.full(classes, (1 - rare) / (classes - 1))
    p[-1] = rare
    code = rng.choice(classes, size=count, p=p)
    centres = np.random.default_rng(99).normal(size=(classes, dims)) * lead
    slide = rng.integers(0, 15, size=count)
    x = (centres[code] + rng.normal(size=(count, dims))) * np.geomspace(0.01, 100, dims) + 5
    return x.astype(np.float32), np.array([f"class {i}" for i in code]), slide


@pytest.mark.parametrize("classes", [2, 4])
def test_a_single_strength_equals_scikit_learn(classes):
    x, y, _ = drawn(0, 300, classes, lead=0.4)
    test_x, test_y, _ = drawn(1, 200, classes, lead=0.4)
    found = linear_probe(x, y, test_x, test_y, c_grid=(0.03,))
    scaler = StandardScaler().fit(x.astype(float))
    model = LogisticRegression(C=0.03, class_weight="balanced", max_iter=5000).fit(scaler.transform(x), y)
    p = model.predict_proba(scaler.transform(test_x))
    auc = roc_auc_score(test_y, p[:, 1]) if classes == 2 else roc_auc_score(test_y, p, multi_class="ovr")
    assert found.c == 0.03
    assert found.auc == pytest.approx(auc, abs=1e-3)
    assert found.balanced_accuracy == pytest.approx(
        balanced_accuracy_score(test_y, model.predict(scaler.transform(test_x))), abs=0.01
    )
    assert found.classes == tuple(model.classes_)
    np.testing.assert_allclose(found.scores_MC, p, atol=2e-3)


def test_the_strength_is_the_best_on_unseen_slides():
    x, y, slide = drawn(2, 240, lead=0.15)
    test_x, test_y, _ = drawn(3, 200, lead=0.15)
    grid = (1.0, 1e-4, 1e-2)
    scores = {}
    for c in grid:
        folds = []
        for fit, validation in inner_splits(y, slide):
            assert not set(slide[fit]) & set(slide[validation])
            scaler = StandardScaler().fit(x[fit].astype(float))
            model = LogisticRegression(C=c, class_weight="balanced", max_iter=5000).fit(
                scaler.transform(x[fit]), y[fit]
            )
            folds.append(roc_auc_score(y[validation], model.predict_proba(scaler.transform(x[validation]))[:, 1]))
        scores[c] = np.mean(folds)
    found = linear_probe(x, y, test_x, test_y, train_groups_N=slide, c_grid=grid)
    assert found.c == max(scores, key=scores.get)
    again = linear_probe(x, y, test_x, test_y, train_groups_N=slide, c_grid=grid)
    np.testing.assert_array_equal(found.scores_MC, again.scores_MC)


def test_slides_in_the_inner_split_change_the_choice():
    # a feature that only tells the slide: within slides it predicts (each slide is of one class), across it does not
    rng = np.random.default_rng(4)
    slide = np.repeat(np.arange(40), 10)
    y = (slide % 2).astype(int)
    fingerprint = rng.normal(size=(40, 60))[slide] + 0.1 * rng.normal(size=(400, 60))
    plain = [probes._inner_auc(fingerprint, y, inner_splits(y, groups), 1.0) for groups in (None, slide)]
    assert plain[0] > 0.99
    assert plain[1] < 0.75


def test_inner_splits_keep_every_class_and_are_stratified_without_slides():
    _, y, slide = drawn(5, 200, classes=3)
    for groups in (None, slide):
        splits = inner_splits(y, groups)
        assert len(splits) == 3
        for fit, validation in splits:
            assert set(y[fit]) == set(y)
            assert sorted(np.concatenate([fit, validation])) == list(range(200))


def test_no_inner_split_without_a_second_slide_per_class():
    y = np.repeat(["a", "b"], 30)
    slide = np.repeat([1, 2], 30)
    with pytest.raises(DataError, match=r"cannot be split(.|\n)*2 slides"):
        inner_splits(y, slide)
    x = np.random.default_rng(6).normal(size=(60, 3))
    assert linear_probe(x, y, x, y, train_groups_N=slide, c_grid=(0.1,)).c == 0.1


def test_macro_auc_is_one_versus_rest():
    rng = np.random.default_rng(7)
    y = rng.integers(0, 3, size=60)
    p = rng.dirichlet(np.ones(3), size=60)
    assert macro_auc(y, p, [0, 1, 2]) == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"))
    two = y < 2  # the third class is not among the test images: left out
    expected = (roc_auc_score(y[two] == 0, p[two, 0]) + roc_auc_score(y[two] == 1, p[two, 1])) / 2
    assert macro_auc(y[two], p[two], [0, 1, 2]) == pytest.approx(expected)
    with pytest.raises(DataError, match="two classes"):
        macro_auc(y[y == 0], p[y == 0], [0, 1, 2])


def test_balanced_accuracy_by_hand():
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.7, 0.3, 0.0], [0.1, 0.2, 0.7]])
    # class a: 1 of 2 right, class b: 0 of 2 (one is taken for a, one for c, which no test image is)
    assert balanced_accuracy(np.array(["a", "a", "b", "b"]), scores, ["a", "b", "c"]) == 0.25


def test_knn_by_hand():
    train = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]])
    y = np.array(["a", "a", "a", "b", "a", "a"])  # b is one of six
    found = knn_probe(train, y, np.array([[0.05, 9.0], [5.0, 0.0]]), np.array(["b", "a"]), k=2)
    # first: one a, one b: 1/5 against 1/1; second: two a
    np.testing.assert_allclose(found.scores_MC, [[1 / 6, 5 / 6], [1.0, 0.0]])
    assert found.balanced_accuracy == 1.0
    assert found.auc == 1.0


def test_knn_auc_equals_scikit_learn_whatever_the_block(monkeypatch):
    x, y, _ = drawn(8, 300, lead=0.3)
    test_x, test_y, _ = drawn(9, 150, lead=0.3)
    model = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(x.astype(float), y)
    expected = roc_auc_score(test_y, model.predict_proba(test_x.astype(float))[:, 1])
    assert knn_probe(x, y, test_x, test_y).auc == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr(probes, "_CHUNK", 300 * 7)
    assert knn_probe(x, y, test_x, test_y).auc == pytest.approx(expected, abs=1e-9)


def test_a_rare_class_is_not_voted_down():
    x, y, _ = drawn(10, 600, lead=0.6, rare=0.05)
    test_x, test_y, _ = drawn(11, 600, lead=0.6, rare=0.05)
    x, test_x = (z / np.geomspace(0.01, 100, 12) for z in (x - 5, test_x - 5))
    majority = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(x, y).predict(test_x)
    plain = balanced_accuracy_score(test_y, majority)
    assert knn_probe(x, y, test_x, test_y).balanced_accuracy > plain + 0.1
    unweighted = LogisticRegression(C=0.01).fit(x, y)
    assert (
        linear_probe(x, y, test_x, test_y, c_grid=(0.01,)).balanced_accuracy
        > balanced_accuracy_score(test_y, unweighted.predict(test_x)) + 0.1
    )


def test_wrong_arguments():
    x, y, _ = drawn(12, 100)
    unknown = y.copy()
    unknown[3] = "class 7"
    for probe in (linear_probe, knn_probe):
        with pytest.raises(DataError, match=r"class 7(.|\n)*class 0, class 1"):
            probe(x, y, x, unknown)
        with pytest.raises(DataError, match="two classes"):
            probe(x, y, x[y == "class 0"], y[y == "class 0"])
        with pytest.raises(DataError, match="100 rows and 99 labels"):
            probe(x, y[:99], x, y)
        with pytest.raises(DataError, match="not finite"):
            probe(x, y, np.where(x > 100, np.inf, x), y)
    with pytest.raises(DataError, match="k = 101"):
        knn_probe(x, y, x, y, k=101)


def test_a_strength_that_does_not_converge_is_told_and_left_out(monkeypatch):
    x, y, slide = drawn(13, 200, lead=0.2)
    monkeypatch.setattr(probes, "_MAX_ITERATIONS", 3)
    found = linear_probe(x, y, x, y, train_groups_N=slide, c_grid=(1e-5, 1e4))
    assert found.c == 1e-5
    assert found.unconverged == (1e4,)
    with pytest.raises(DataError, match="did not converge in 3"):
        linear_probe(x, y, x, y, c_grid=(1e4,))


def scored(seed: int, count: int, classes: int):
    rng = np.random.default_rng(seed)
    slide = rng.integers(0, 9, size=count)
    y = rng.integers(0, classes, size=count)
    p = rng.dirichlet(np.ones(classes), size=count).round(1)  # with ties
    p[np.arange(count), y] += 0.3
    return y, p, slide


@pytest.mark.parametrize("classes", [2, 3])
def test_bootstrap_equals_drawing_slides_by_hand(classes):
    y, p, slide = scored(14, 80, classes)
    rows = [np.flatnonzero(slide == s) for s in np.unique(slide)]
    counts = np.random.default_rng(5).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=60)
    areas = []
    for count in counts:
        index = np.concatenate([np.tile(r, c) for r, c in zip(rows, count, strict=True)])
        areas.append(macro_auc(y[index], p[index], range(classes)))
    found = cluster_bootstrap(y, p, range(classes), slide, resamples=60, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-12)
    assert found.resamples == 60


def test_bootstrap_holds_the_estimate_and_is_seeded():
    y, p, slide = scored(15, 400, 2)
    first, again, other = (cluster_bootstrap(y, p, [0, 1], slide, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.low < macro_auc(y, p, [0, 1]) < first.high
    narrow = cluster_bootstrap(y, p, [0, 1], slide, level=0.5)
    assert first.low < narrow.low < narrow.high < first.high


def test_slides_that_differ_widen_the_interval():
    rng = np.random.default_rng(16)
    slide = np.repeat(np.arange(12), 40)
    y = rng.integers(0, 2, size=480)
    skill = np.where(np.arange(12) < 6, 3.0, 0.0)[slide]  # half of the slides are easy, half are noise
    p = rng.normal(size=480) + skill * y
    by_slide = cluster_bootstrap(y, np.stack([-p, p], axis=1), [0, 1], slide)
    by_image = cluster_bootstrap(y, np.stack([-p, p], axis=1), [0, 1], np.arange(480))
    assert by_slide.high - by_slide.low > 1.5 * (by_image.high - by_image.low)


def test_resamples_of_one_class_are_counted_out():
    y = np.array([0, 0, 1, 1])
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4]])
    found = cluster_bootstrap(y, p, [0, 1], np.array(["a", "a", "b", "b"]), resamples=400)
    assert 150 < found.resamples < 250  # half of the draws of two slides hold both
    assert found.low == found.high == macro_auc(y, p, [0, 1])
    with pytest.raises(DataError, match="1 slide"):
        cluster_bootstrap(y, p, [0, 1], np.array(["a"] * 4))
    with pytest.raises(DataError, match="two classes"):
        cluster_bootstrap(y[:2], p[:2], [0, 1], np.array(["a", "b"]))
