from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from histill.demo import measure
from histill.demo.pictures import align, colours
from histill.models import STUDENTS, build_student, wrap
from histill.models.encoder import Encoder


def _nano() -> Encoder:
    return wrap(build_student("vit-nano", seed=0), name="n", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)).eval()


def test_multiply_accumulates_are_those_counted_by_hand() -> None:
    model = _nano()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    spec = STUDENTS["vit-nano"]
    patches = (112 // 14) ** 2
    tokens, width = patches + 1 + 4, spec.embed_dim
    block = 12 * width**2 * tokens + 2 * tokens**2 * width  # qkv, projection, MLP; two products of attention
    assert measure.count_macs(model, 112) == patches * 3 * 14**2 * width + spec.depth * block


def test_speed_is_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    # each call of the clock: began, ended; the teacher takes 2 s, the student 0.5 s, and the machine slows down
    slowing = itertools.count()
    now = 0.0

    class Slow(torch.nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal now
            assert images.shape == (8, 3, 112, 112)
            now += self.seconds * (1 + 0.1 * (next(slowing) // 2))
            return images

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    models = {"teacher": Slow(2.0), "student": Slow(0.5)}
    autocast = torch.autocast("cpu", enabled=False)
    rates, ratios = measure.speeds(models, autocast, batch=8, rounds=5)  # type: ignore[arg-type]
    assert ratios == pytest.approx([4.0] * 5)
    assert rates["student"] == pytest.approx(4 * rates["teacher"])
    assert rates["teacher"] == pytest.approx(8 / (2.0 * 1.5)), "the median round, after three to warm up"


def test_neighbours_lie_on_other_slides_and_come_nearest_first() -> None:
    features_ND = np.array([[1, 0], [1, 0.01], [1, 0.2], [0, 1], [1, 0.1]], dtype=np.float32)
    slides = ["a", "a", "b", "b", "c"]
    found = measure.nearest_elsewhere(features_ND, slides, np.array([0, 3]), 2)
    assert found.tolist() == [[4, 2], [4, 1]], "row 1 is nearest to row 0 and is left out: it lies on the same slide"
    scaled = measure.nearest_elsewhere(features_ND * np.array([[1], [9], [5], [2], [7]]), slides, np.array([0, 3]), 2)
    assert scaled.tolist() == found.tolist(), "the cosine does not see the length"


def test_the_share_of_the_same_class_is_counted_over_all_neighbours() -> None:
    labels = np.array(["x", "y", "x", "y"])
    share = measure.same_class_share(np.array([[1, 2], [3, 3]]), labels, np.array([0, 1]))
    assert share == 0.75


def test_components_are_turned_onto_those_of_the_other_model() -> None:
    rng = np.random.default_rng(0)
    target = rng.standard_normal((50, 3))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    np.testing.assert_allclose(align(target @ turn, target), target, atol=1e-12)
    other = rng.standard_normal((50, 3))
    np.testing.assert_allclose(
        np.linalg.norm(align(other, target), axis=1), np.linalg.norm(other, axis=1), err_msg="turned, not fitted"
    )


def test_components_become_bytes() -> None:
    assert colours(np.array([[-9.0, 0.0, 2.0]])).tolist() == [[0, 128, 255]]
