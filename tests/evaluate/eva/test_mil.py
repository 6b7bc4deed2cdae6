"""Attention MIL: stacked runs equal a plain module trained alone; what fills a bag up has no weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from histill.errors import DataError
from histill.evaluate.eva.mil import MilSchedule, attention_mil, runs_together, start_mil, train_mil
from histill.evaluate.eva.probe import batch_order
from histill.evaluate.eva.scoring import balanced_accuracy

SMALL = MilSchedule(epochs=6, batch=4, projection=16, attention=12, hidden=(10, 8))


class PlainMil(nn.Module):
    """The network from its description, one bag at a time."""

    def __init__(self, dim: int, outputs: int, schedule: MilSchedule) -> None:
        super().__init__()
        width, gate, (first, second) = schedule.projection, schedule.attention, schedule.hidden
        self.project, self.tanh, self.sigmoid = nn.Linear(dim, width), nn.Linear(width, gate), nn.Linear(width, gate)
        self.weigh, self.first = nn.Linear(gate, 1), nn.Linear(width, first)
        self.second, self.classify = nn.Linear(first, second), nn.Linear(second, outputs)

    def forward(self, bag_ND: torch.Tensor) -> torch.Tensor:
        hidden = self.project(bag_ND)
        weight = torch.softmax(self.weigh(torch.tanh(self.tanh(hidden)) * torch.sigmoid(self.sigmoid(hidden))), dim=0)
        slide = (weight * hidden).sum(dim=0)
        return self.classify(torch.relu(self.second(torch.relu(self.first(slide)))))

    def take(self, parameters: dict[str, torch.Tensor], run: int = 0) -> PlainMil:
        state = {name: value[run].T if name.endswith("weight") else value[run, 0] for name, value in parameters.items()}
        assert self.load_state_dict(state, strict=False).missing_keys == ["weigh.bias"]  # it has no effect
        return self


def slides(count: int, classes: int, seed: int, dim: int = 9) -> tuple[list[np.ndarray], np.ndarray]:
    """Bags of 1 to 12 tiles; a few tiles of a slide carry its class."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % classes
    bags = [rng.standard_normal((rng.integers(1, 13), dim)).astype(np.float32) for _ in label]
    for bag, k in zip(bags, label, strict=True):
        bag[: max(1, len(bag) // 3), k] += 2.5
    return bags, label


def plain_run(train, stop, *, classes: int, seed: int, schedule: MilSchedule):
    (bags, label), (stop_bags, stop_label) = train, stop
    outputs = 1 if classes == 2 else classes
    net = PlainMil(bags[0].shape[1], outputs, schedule).take(start_mil(seed, bags[0].shape[1], outputs, schedule))
    optimiser = torch.optim.AdamW(net.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    best, best_epoch, state = -1.0, 0, None
    for epoch in range(schedule.epochs):
        order = batch_order(seed, epoch, len(bags))
        for first in range(0, len(bags), schedule.batch):
            rows = order[first : first + schedule.batch]
            logits = torch.stack([net(torch.from_numpy(bags[row])) for row in rows])
            target = torch.from_numpy(label[rows])
            if classes == 2:
                loss = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target.float())
            else:
                loss = nn.functional.cross_entropy(logits, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            logits = torch.stack([net(torch.from_numpy(bag)) for bag in stop_bags])
        predicted = ((logits[:, 0] > 0).long() if classes == 2 else logits.argmax(1)).numpy()
        score = balanced_accuracy(predicted, stop_label)
        if score > best:
            best, best_epoch = score, epoch + 1
            state = {name: value.clone() for name, value in net.state_dict().items()}
        if epoch + 1 - best_epoch >= max(1, round(schedule.patience * schedule.epochs)):
            break
    return state, best, best_epoch, epoch + 1


@pytest.mark.parametrize("classes", [2, 3])
def test_stacked_runs_equal_plain_runs(classes: int) -> None:
    train, stop = slides(22, classes, 1), slides(15, classes, 2)
    schedule = MilSchedule(epochs=12, batch=4, lr=5e-3, projection=16, attention=12, hidden=(10, 8), patience=0.25)
    seeds = (0, 4, 9)
    runs = train_mil(*train, *stop, classes=classes, seeds=seeds, schedule=schedule)
    for run, seed in enumerate(seeds):
        state, best, best_epoch, epochs = plain_run(train, stop, classes=classes, seed=seed, schedule=schedule)
        assert runs.stop_scores[run] == pytest.approx(best, abs=1e-12)
        assert (runs.best_epochs[run], runs.epochs[run]) == (best_epoch, epochs)
        for name in set(state) - {"weigh.bias"}:
            value = state[name]
            ours = runs.parameters[name][run]
            ours = ours.T if name.endswith("weight") else ours[0]
            torch.testing.assert_close(ours, value, rtol=0, atol=1e-4)
    assert len(set(runs.epochs)) > 1, "the test needs runs that stop at different times"


def test_one_slide_of_each_class_and_a_class_that_is_not_stopped_on() -> None:
    (bags, label), (stop_bags, stop_label) = slides(3, 3, 1), slides(12, 3, 2)
    kept = np.flatnonzero(stop_label != 2)
    stop = [stop_bags[row] for row in kept], stop_label[kept]
    schedule = MilSchedule(epochs=4, batch=4, lr=5e-3, projection=16, attention=12, hidden=(10, 8), patience=1.0)
    runs = train_mil(bags, label, *stop, classes=3, seeds=(4,), schedule=schedule)
    state, best, best_epoch, _ = plain_run((bags, label), stop, classes=3, seed=4, schedule=schedule)
    assert runs.stop_scores[0] == pytest.approx(best, abs=1e-12)
    assert runs.best_epochs[0] == best_epoch
    torch.testing.assert_close(runs.parameters["classify.weight"][0].T, state["classify.weight"], rtol=0, atol=1e-4)


def test_a_run_is_the_same_alone_and_in_a_stack() -> None:
    train, stop = slides(20, 3, 1), slides(12, 3, 2)
    together = train_mil(*train, *stop, classes=3, seeds=(2, 3), schedule=SMALL)
    for run, seed in enumerate((2, 3)):
        alone = train_mil(*train, *stop, classes=3, seeds=(seed,), schedule=SMALL)
        assert alone.best_epochs[0] == together.best_epochs[run]
        for name, value in alone.parameters.items():
            torch.testing.assert_close(value[0], together.parameters[name][run], rtol=0, atol=1e-5)
        assert (alone.predict(stop[0])[0] == together.predict(stop[0])[run]).all()


def test_what_fills_a_bag_up_has_no_weight() -> None:
    parameters = start_mil(1, 5, 3, SMALL)
    bag = torch.randn(1, 1, 4, 5)
    plain = attention_mil(parameters, bag, torch.zeros(1, 1, 4, dtype=torch.bool))
    filled = torch.cat([bag, torch.full((1, 1, 3, 5), 1e3)], dim=2)
    mask = torch.tensor([False] * 4 + [True] * 3).view(1, 1, 7)
    torch.testing.assert_close(attention_mil(parameters, filled, mask), plain)
    shuffled = attention_mil(parameters, bag[:, :, [2, 0, 3, 1]], torch.zeros(1, 1, 4, dtype=torch.bool))
    torch.testing.assert_close(shuffled, plain)


def test_it_learns_bags_whose_mean_says_little() -> None:
    train, stop, test = slides(60, 2, 1), slides(30, 2, 2), slides(60, 2, 3)
    schedule = MilSchedule(epochs=25, batch=8, lr=3e-3)
    runs = train_mil(*train, *stop, classes=2, seeds=(0,), schedule=schedule)
    assert balanced_accuracy(runs.predict(test[0])[0], test[1]) > 0.8


def test_runs_together_keeps_to_the_memory() -> None:
    assert runs_together(1000, 768, 20, 32, 2**40, "cuda") == 20
    assert runs_together(1000, 768, 20, 32, 2**40, "cpu") == 1
    assert runs_together(1000, 768, 20, 32, 1, "cuda") == 1
    fits = runs_together(1000, 768, 20, 32, 10**9, "cuda")
    assert fits * 32 * 1000 * (768 + 1024) * 4 <= 10**9


def test_damaged_slides_are_refused() -> None:
    train, stop = slides(8, 2, 1), slides(8, 2, 2)
    empty = [np.zeros((0, 9), np.float32), *train[0][1:]]
    with pytest.raises(DataError, match="do not fit"):
        train_mil(empty, train[1], *stop, classes=2, seeds=(0,), schedule=SMALL)
    broken = [np.full((2, 9), np.inf, np.float32), *train[0][1:]]
    with pytest.raises(DataError, match="not finite"):
        train_mil(broken, train[1], *stop, classes=2, seeds=(0,), schedule=SMALL)
    with pytest.raises(DataError, match="one label per slide"):
        train_mil(train[0], train[1][:-1], *stop, classes=2, seeds=(0,), schedule=SMALL)
    with pytest.raises(DataError, match="out of range"):
        train_mil(train[0], train[1] + 1, *stop, classes=2, seeds=(0,), schedule=SMALL)
