"""Heads that are trained together equal plain PyTorch, one run after another over a DataLoader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from histill.errors import DataError
from histill.evaluate.eva.probe import ProbeSchedule, batch_order, start_weights, train_probes
from histill.evaluate.eva.scoring import balanced_accuracy


def tissue_like(count: int, dim: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as encoders give them: a shared mean, a decaying spectrum, classes that overlap."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    centres = np.random.default_rng(98).standard_normal((classes, dim))
    label = rng.choice(classes, size=count, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    spectrum = 1 / (1 + np.arange(dim)) ** 0.4
    x = (rng.standard_normal((count, dim)) + centres[label] * 0.5) * spectrum
    return (x @ axes + 0.3).astype(np.float32), label


def plain_run(train, stop, *, classes: int, seed: int, lr: float, schedule: ProbeSchedule):
    """One run, as one would write it: autograd, nn.Linear, AdamW, DataLoader."""
    (x, y), (stop_x, stop_y) = train, stop
    binary = classes == 2
    head = torch.nn.Linear(x.shape[1], 1 if binary else classes)
    start = start_weights(seed, x.shape[1], head.out_features)
    with torch.no_grad():
        head.weight.copy_(start[:, :-1])
        head.bias.copy_(start[:, -1])
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=schedule.weight_decay)
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    epoch_steps = -(-len(x) // schedule.batch)
    patience = max(1, round(schedule.patience * -(-schedule.steps // epoch_steps)))
    best, best_step, state, waited, step, epoch = -1.0, 0, None, 0, 0, 0
    while step < schedule.steps and waited < patience:
        for xb, yb in DataLoader(data, batch_size=schedule.batch, sampler=batch_order(seed, epoch, len(x)).tolist()):
            logits = head(xb)
            if binary:
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], yb.float())
            else:
                loss = torch.nn.functional.cross_entropy(logits, yb)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == schedule.steps:
                break
        epoch += 1
        with torch.no_grad():
            logits = head(torch.from_numpy(stop_x))
        predicted = ((logits[:, 0] > 0).long() if binary else logits.argmax(1)).numpy()
        score = balanced_accuracy(predicted, stop_y)
        if score > best:
            best, best_step, waited = score, step, 0
            state = (head.weight.detach().clone(), head.bias.detach().clone())
        else:
            waited += 1
    return state, best, best_step, step


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_heads_trained_together_equal_plain_runs(classes: int, weight_decay: float) -> None:
    train, stop = tissue_like(700, 48, classes, 1), tissue_like(300, 48, classes, 2)
    schedule = ProbeSchedule(steps=220, batch=64, weight_decay=weight_decay)
    seeds, lrs = (0, 3, 11), (3e-4, 3e-3)
    probes = train_probes(*train, *stop, classes=classes, seeds=seeds, lrs=lrs, schedule=schedule)
    for head, (seed, lr) in enumerate((seed, lr) for seed in seeds for lr in lrs):
        (weight, bias), best, best_step, steps = plain_run(
            train, stop, classes=classes, seed=seed, lr=lr, schedule=schedule
        )
        assert (probes.seeds[head], probes.lrs[head]) == (seed, lr)
        torch.testing.assert_close(probes.weight_HOD[head], weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(probes.bias_HO[head], bias, rtol=0, atol=1e-4)
        assert probes.stop_scores[head] == pytest.approx(best, abs=1e-12)
        assert (probes.best_steps[head], probes.steps[head]) == (best_step, steps)
        assert balanced_accuracy(probes.predict(stop[0])[head], stop[1]) == pytest.approx(best, abs=1e-12)


def test_equality_holds_on_pixels_of_real_tiles(shared_data: Path) -> None:
    from PIL import Image

    paths = sorted((shared_data / "tiles" / "mitosis").glob("*/*.jpg"))
    tiles = [np.asarray(Image.open(path).convert("RGB").resize((8, 8), Image.Resampling.BOX)) for path in paths]
    x = (np.stack(tiles).reshape(len(paths), -1) / 255).astype(np.float32)
    y = np.array([path.parent.name == "atypical" for path in paths]).astype(np.int64)
    train, stop = (x[::2], y[::2]), (x[1::2], y[1::2])
    schedule = ProbeSchedule(steps=300)
    probes = train_probes(*train, *stop, classes=2, seeds=(0, 1), schedule=schedule)
    for head, seed in enumerate((0, 1)):
        (weight, _), best, best_step, steps = plain_run(train, stop, classes=2, seed=seed, lr=3e-4, schedule=schedule)
        torch.testing.assert_close(probes.weight_HOD[head], weight, rtol=0, atol=1e-4)
        assert (probes.best_steps[head], probes.steps[head]) == (best_step, steps)
        assert probes.stop_scores[head] == pytest.approx(best, abs=1e-12)


def test_a_run_does_not_depend_on_the_other_runs() -> None:
    train, stop = tissue_like(300, 20, 3, 1), tissue_like(200, 20, 3, 2)
    schedule = ProbeSchedule(steps=120, batch=64)
    together = train_probes(*train, *stop, classes=3, seeds=(5, 6, 7), schedule=schedule)
    for head, seed in enumerate((5, 6, 7)):
        alone = train_probes(*train, *stop, classes=3, seeds=(seed,), schedule=schedule)
        torch.testing.assert_close(alone.weight_HOD[0], together.weight_HOD[head], rtol=0, atol=0)
        assert alone.steps[0] == together.steps[head]


def test_a_stopped_head_is_frozen_while_others_go_on() -> None:
    train, stop = tissue_like(400, 24, 4, 3), tissue_like(200, 24, 4, 4)
    schedule = ProbeSchedule(steps=400, batch=64, patience=0.1)
    probes = train_probes(*train, *stop, classes=4, seeds=(0, 1), lrs=(1e-5, 1e-1), schedule=schedule)
    assert len(set(probes.steps)) > 1, "the test needs heads that stop at different times"
    assert all(steps <= 400 for steps in probes.steps)
    patience = round(0.1 * -(-400 // 7)) * 7
    for best, steps in zip(probes.best_steps, probes.steps, strict=True):
        assert steps == 400 or steps - best == patience


def test_the_last_step_is_checked_in_the_middle_of_an_epoch() -> None:
    train, stop = tissue_like(300, 16, 3, 1), tissue_like(100, 16, 3, 2)
    probes = train_probes(*train, *stop, classes=3, seeds=(0,), schedule=ProbeSchedule(steps=2, batch=64))
    assert probes.steps == (2,)
    assert probes.best_steps == (2,)


@pytest.mark.parametrize("lack", ["in training", "in stopping", "one image each"])
def test_splits_that_lack_a_class_equal_plain_runs(lack: str) -> None:
    (x, y), (stop_x, stop_y) = tissue_like(200, 12, 4, 5), tissue_like(120, 12, 4, 6)
    if lack == "in training":
        x, y = x[y != 1], y[y != 1]
    elif lack == "in stopping":
        stop_x, stop_y = stop_x[stop_y != 3], stop_y[stop_y != 3]
    else:
        first = [int(np.argmax(y == k)) for k in range(4)]
        x, y = x[first], y[first]
    schedule = ProbeSchedule(steps=90, batch=32, patience=1.0)
    probes = train_probes(x, y, stop_x, stop_y, classes=4, seeds=(0, 1), lrs=(3e-3,), schedule=schedule)
    for head, seed in enumerate((0, 1)):
        (weight, _), best, best_step, _ = plain_run(
            (x, y), (stop_x, stop_y), classes=4, seed=seed, lr=3e-3, schedule=schedule
        )
        torch.testing.assert_close(probes.weight_HOD[head], weight, rtol=0, atol=1e-4)
        assert probes.stop_scores[head] == pytest.approx(best, abs=1e-12)
        assert probes.best_steps[head] == best_step


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), epoch=st.integers(0, 10**4), count=st.integers(1, 50))
def test_an_order_is_a_permutation_of_its_own(seed: int, epoch: int, count: int) -> None:
    order = batch_order(seed, epoch, count)
    assert sorted(order) == list(range(count))
    assert (order == batch_order(seed, epoch, count)).all()


def test_the_start_is_that_of_a_linear_layer_and_belongs_to_the_seed() -> None:
    start = start_weights(4, 100, 50)
    assert start.abs().max() <= 0.1
    assert start.std() == pytest.approx(0.1 / 3**0.5, rel=0.03)
    assert (start != start_weights(5, 100, 50)).any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x, y: (np.where(np.arange(len(x))[:, None] == 7, np.nan, x), y), "not finite"),
        (lambda x, y: (x, y + 1), "out of range"),
        (lambda x, y: (x[:-1], y), "do not fit"),
    ],
)
def test_damaged_training_data_is_refused(damage, message: str) -> None:
    train, stop = tissue_like(60, 8, 3, 1), tissue_like(60, 8, 3, 2)
    with pytest.raises(DataError, match=message):
        train_probes(*damage(*train), *stop, classes=3, seeds=(0,))
    with pytest.raises(DataError, match=message):
        train_probes(*train, *damage(*stop), classes=3, seeds=(0,))
