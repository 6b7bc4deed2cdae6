"""The token decoder, its loss and its score, against values worked out by hand and by other code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histill.errors import DataError
from histill.evaluate.eva.segmentation import (
    IGNORE,
    SegmentationSchedule,
    TokenDecoder,
    dice_loss,
    image_dice,
    mean_dice,
    train_decoder,
)


def patches(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """32 px images of 8 px cells: tokens tell the class of a cell, the image says where in it the object is."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 3, (count, 4, 4))
    tokens = np.eye(3, dtype=np.float32)[cells] + 0.1 * rng.standard_normal((count, 4, 4, 3)).astype(np.float32)
    disc = np.zeros((8, 8), bool)
    disc[2:6, 2:6] = True
    inside = np.tile(disc, (4, 4))[None]
    masks = (cells.repeat(8, axis=1).repeat(8, axis=2) * inside).astype(np.uint8)
    images = np.where((inside & (masks > 0))[..., None], 40, 220).astype(np.uint8).repeat(3, axis=-1)
    return tokens, images, masks


def test_dice_by_hand() -> None:
    mask = np.array([[0, 1, 1], [2, 2, IGNORE]])
    predicted = np.array([[1, 1, 0], [2, 0, 2]])
    # class 1: both 1, predicted 2, there 2; class 2: both 1, predicted 1 (one is ignored), there 2; class 3: not there
    assert image_dice(predicted, mask, 4)[:2].tolist() == pytest.approx([2 / 4, 2 / 3])
    assert np.isnan(image_dice(predicted, mask, 4)[2])
    assert mean_dice(np.array([[0.5, 1.0], [np.nan, 0.25], [np.nan, np.nan]])) == pytest.approx((0.75 + 0.25) / 2)


def test_dice_equals_f1() -> None:
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    mask, predicted = rng.integers(0, 4, (2, 40, 40))
    expected = f1_score(mask.ravel(), predicted.ravel(), average=None)[1:]
    np.testing.assert_allclose(image_dice(predicted, mask, 4), expected, rtol=1e-12)


def test_the_loss_is_one_minus_soft_dice_over_the_batch() -> None:
    rng = np.random.default_rng(1)
    logits, mask = torch.from_numpy(rng.standard_normal((2, 3, 4, 5))), torch.from_numpy(rng.integers(0, 3, (2, 4, 5)))
    share = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    expected = []
    for k in range(3):
        target = mask.numpy() == k
        expected.append(1 - (2 * share[:, k][target].sum() + 1e-5) / (share[:, k].sum() + target.sum() + 1e-5))
    assert dice_loss(logits, mask).item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_ignored_pixels_have_no_gradient_and_no_weight() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randint(0, 3, (2, 4, 4))
    mask[:, :2] = IGNORE
    loss = dice_loss(logits, mask)
    loss.backward()
    assert (logits.grad[:, :, :2] == 0).all()
    assert (logits.grad[:, :, 2:] != 0).any()
    assert loss.item() == pytest.approx(dice_loss(logits.detach()[:, :, 2:], mask[:, 2:]).item(), rel=1e-12)


@pytest.mark.parametrize(("grid", "side"), [(4, 32), (7, 50), (16, 224)])
def test_logits_have_the_size_of_the_image(grid: int, side: int) -> None:
    images = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    assert TokenDecoder(6, 5)(torch.randn(1, grid, grid, 6), images).shape == (1, 5, side, side)


def test_it_learns_from_tokens_and_image_together() -> None:
    train, stop, test = patches(48, 1), patches(16, 2), patches(16, 3)
    schedule = SegmentationSchedule(steps=90, batch=16)
    run = train_decoder(*train, stop, classes=3, seed=0, schedule=schedule)
    assert mean_dice(run.dice(*test)) > 0.85
    assert run.stop_score == pytest.approx(mean_dice(run.dice(*stop)), abs=1e-9)
    blank = (np.zeros_like(test[0]), test[1], test[2])
    assert mean_dice(run.dice(*blank)) < 0.6, "the image alone does not tell the classes apart"


def test_equal_seeds_give_equal_runs_and_leave_the_global_seed_alone() -> None:
    train, stop = patches(20, 1), patches(8, 2)
    schedule = SegmentationSchedule(steps=7, batch=8)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train_decoder(*train, stop, classes=3, seed=1, schedule=schedule)
    assert (torch.random.get_rng_state() == before).all()
    again = train_decoder(*train, stop, classes=3, seed=1, schedule=schedule)
    other = train_decoder(*train, stop, classes=3, seed=2, schedule=schedule)
    assert (first.steps, first.best_step) == (again.steps, again.best_step)
    assert (first.decoder.classify.weight == again.decoder.classify.weight).all()
    assert (first.decoder.classify.weight != other.decoder.classify.weight).any()
    assert first.steps == 7


def test_it_stops_without_improvement() -> None:
    train, stop = patches(8, 1), patches(4, 2)
    stop = (stop[0], stop[1], np.zeros_like(stop[2]))  # nothing but background: the score cannot get better
    run = train_decoder(*train, stop, classes=3, seed=0, schedule=SegmentationSchedule(steps=40, batch=8))
    assert (run.best_step, run.steps) == (1, 1 + round(0.2 * 40))


def test_arrays_that_do_not_fit_are_refused() -> None:
    tokens, images, masks = patches(4, 1)
    stop = patches(4, 2)
    with pytest.raises(DataError, match="do not fit"):
        train_decoder(tokens[:3], images, masks, stop, classes=3, seed=0)
    with pytest.raises(DataError, match="another class"):
        train_decoder(tokens, images, masks + 3, stop, classes=3, seed=0)
