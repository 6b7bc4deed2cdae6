from __future__ import annotations

import math

import numpy as np
import pytest

from histill.errors import DataError
from histill.evaluate import agreement
from histill.evaluate.agreement import (
    collapse_warning,
    effective_rank,
    knn_overlap,
    linear_cka,
    mean_pairwise_cosine,
)
from histill.evaluate.features import as_features, unit_rows


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed: int, dims: int) -> np.ndarray:
    return np.linalg.qr(normal(seed, dims, dims))[0]


def test_cka_equals_the_kernel_form():
    x, y = normal(0, 60, 7), normal(1, 60, 11)
    y[:, :7] += x
    centring = np.eye(60) - 1 / 60
    kernels = [centring @ (z @ z.T) @ centring for z in (x, y)]
    hsic = [float((a * b).sum()) for a, b in ((kernels[0], kernels[1]), (kernels[0], kernels[0]), (kernels[1],) * 2)]
    assert linear_cka(x, y) == pytest.approx(hsic[0] / math.sqrt(hsic[1] * hsic[2]), rel=1e-12)


def test_cka_of_a_small_case_by_hand():
    x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    y = np.array([[5.0], [3.0], [4.0], [4.0]])  # centred: 1, -1, 0, 0: one of two equally strong directions of x
    assert linear_cka(x, y) == pytest.approx(1 / math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e100])
def test_cka_ignores_rotation_shift_scale_and_common_order(scale):
    x, y = normal(2, 50, 6), normal(3, 50, 6)
    expected = linear_cka(x, y)
    order = np.random.default_rng(4).permutation(50)
    assert linear_cka(x, scale * (x @ rotation(5, 6) + 3.0)) == pytest.approx(1.0, rel=1e-9)
    assert linear_cka(scale * (x @ rotation(5, 6) + 3.0)[order], y[order]) == pytest.approx(expected, rel=1e-9)
    assert linear_cka(x, x[order]) < 0.5  # the order of one side alone matters


def test_constant_features_agree_with_nothing():
    constant = np.full((30, 4), 0.1, dtype=np.float32)
    assert linear_cka(constant, normal(6, 30, 4)) == 0.0
    assert effective_rank(constant) == 0.0


def test_knn_overlap_by_hand():
    def at(*degrees: float) -> np.ndarray:
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)

    x = at(0, 10, 90, 105)  # nearest: 1, 0, 3, 2
    y = at(0, 10, 30, 15)  # nearest: 1, 3, 3, 1
    assert knn_overlap(x, y, k=1) == pytest.approx(2 / 4)
    assert knn_overlap(x, 7 * x, k=1) == 1.0


def test_knn_overlap_equals_a_loop_whatever_the_block(monkeypatch):
    x, y = normal(7, 41, 5), normal(8, 41, 9)
    y[:, :5] += 2 * x
    expected = 0.0
    for i in range(41):
        near = []
        for z in (x, y):
            cosine = z @ z[i] / np.linalg.norm(z, axis=1)
            cosine[i] = -np.inf
            near.append(set(np.argsort(-cosine)[:6]))
        expected += len(near[0] & near[1]) / 6 / 41
    assert knn_overlap(x, y, k=6) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(agreement, "_CHUNK", 41 * 3)  # three rows a block, the last one shorter
    assert knn_overlap(x, y, k=6) == pytest.approx(expected, abs=1e-12)


def test_identical_features_overlap_fully_and_unrelated_ones_by_chance():
    x = normal(9, 400, 8)
    assert knn_overlap(x, x @ rotation(10, 8)) == 1.0
    assert knn_overlap(x, normal(11, 400, 8)) == pytest.approx(10 / 399, abs=0.01)


def test_effective_rank_by_hand():
    x = np.zeros((4, 5))
    x[0, 0], x[1, 0], x[2, 3], x[3, 3] = 3, -3, 1, -1  # centred, singular values 3 sqrt 2 and sqrt 2
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(x) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(100.0 * x + 7.0) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(np.array([[1.0, 2.0], [2.0, 4.0], [5.0, 10.0]])) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 12), (9, 40)])
def test_effective_rank_equals_the_singular_values(shape):
    x = normal(12, *shape) * np.geomspace(1, 100, shape[1])
    singular = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    p = singular[singular > 1e-9] / singular.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert effective_rank(x @ rotation(13, shape[1])) == pytest.approx(effective_rank(x), rel=1e-6)


def test_effective_rank_is_full_for_equal_directions():
    x = np.concatenate([np.eye(6), -np.eye(6)])
    assert effective_rank(x) == pytest.approx(6.0, rel=1e-9)


def test_mean_pairwise_cosine_equals_a_loop():
    x = normal(14, 12, 3) + 1.0
    unit = unit_rows(x)
    pairs = [unit[i] @ unit[j] for i in range(12) for j in range(i)]
    assert mean_pairwise_cosine(x) == pytest.approx(float(np.mean(pairs)), rel=1e-12)
    assert mean_pairwise_cosine(np.ones((5, 3))) == pytest.approx(1.0)
    with pytest.raises(DataError, match="two images"):
        mean_pairwise_cosine(np.ones((1, 3)))


def test_collapse_is_told_with_its_numbers():
    assert collapse_warning(60.0, 180.0, 192) is None
    text = collapse_warning(10.0, 180.0, 192)
    assert text is not None
    assert "COLLAPSE" in text
    assert "10.0 of 192" in text
    assert "180.0" in text


def test_a_narrow_student_is_not_blamed_for_a_wide_teacher():
    assert collapse_warning(40.0, 900.0, 64) is None
    assert collapse_warning(15.0, 900.0, 64) is not None


def test_equal_features_for_all_images_are_a_collapse():
    assert collapse_warning(60.0, 60.0, 192, mean_cosine=0.98) is None
    text = collapse_warning(60.0, 60.0, 192, mean_cosine=0.9999)
    assert text is not None
    assert "0.9999" in text


def test_wrong_arguments():
    x = normal(15, 20, 3)
    with pytest.raises(DataError, match="20 and 19 rows"):
        linear_cka(x, x[:19])
    with pytest.raises(DataError, match="20 images"):
        knn_overlap(x, x, k=20)
    with pytest.raises(DataError, match="shape"):
        effective_rank(x[0])
    x[17, 1] = np.nan
    with pytest.raises(DataError, match=r"1 of 20 feature rows(.|\n)*row 17"):
        effective_rank(x)


def test_features_are_copied_and_zero_rows_stay_zero():
    x = np.array([[0.0, 0.0], [3.0, 4.0]])
    as_features(x, "x")[0, 0] = 9.0
    assert x[0, 0] == 0.0
    np.testing.assert_allclose(unit_rows(x), [[0, 0], [0.6, 0.8]])
