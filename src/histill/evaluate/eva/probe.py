"""Linear probes of the EVA protocol: all runs and learning rates are independent heads, trained together in memory.

A run is a seed: its start weights and its order of the training images. Heads of one seed (one per learning rate) see
the same batches, so a batch is gathered once for them and goes through one product; the gradient of a linear head is
written out, without autograd, and one check scores the heads of all seeds. What bounds a step is reading and writing
256 rows of features: a batch of one seed stays in the second-level cache between the gather and its two products,
which is why seeds go one after another and not through one batched product. Outputs come before images
(``logits_LOB``): a product that gives a few long rows is several times faster than one that gives a few long columns.

Shapes: N training, V stopping and M scored images, D features, E columns (features, a one for the bias, zeros), C
classes, O outputs of a head (1 with two classes, as the original, else C), S seeds, L learning rates, P = L * O rows
of a seed's heads, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from histill.errors import DataError
from histill.evaluate.eva.adam import StackedAdam
from histill.evaluate.features import Array

_LINE = 16
"""Columns are filled up to a multiple of this: rows then begin on a cache line."""

__all__ = ["ProbeSchedule", "Probes", "batch_order", "start_weights", "train_probes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSchedule:
    """How long and how fast; the defaults are the original's."""

    steps: int = 12_500
    """At most."""
    batch: int = 256
    weight_decay: float = 0.0
    patience: float = 0.2
    """A head stops after this share of all checks without a better stopping score.

    A check follows every epoch and the last step.
    """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probes:
    """Trained heads H: seed by seed, and for each seed by learning rate."""

    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    """Of each head."""
    weight_HOD: torch.Tensor
    """float32, of each head's best check."""
    bias_HO: torch.Tensor
    stop_scores: tuple[float, ...]
    """Best balanced accuracy on the stopping images, 0 to 1."""
    best_steps: tuple[int, ...]
    """Steps done at that check."""
    steps: tuple[int, ...]
    """Steps done when the head stopped."""

    def predict(self, x_MD: Array) -> Array:
        """Classes (H, M) int64 of images with float features."""
        heads, outputs, dim = self.weight_HOD.shape
        weight, bias = self.weight_HOD.reshape(-1, dim), self.bias_HO.reshape(-1, 1)
        found = []
        for start in range(0, len(x_MD), 8192):
            x = _floats(x_MD[start : start + 8192], weight.device)
            found.append(_classes(torch.addmm(bias, weight, x.T).view(heads, outputs, -1)).cpu().numpy())
        return np.concatenate(found, axis=1) if found else np.zeros((heads, 0), np.int64)


def start_weights(seed: int, dim: int, outputs: int) -> torch.Tensor:
    """Start of one run: (O, D + 1) float32, the bias last; uniform within 1 / sqrt(D), as a linear layer of torch."""
    uniform = torch.rand(outputs, dim + 1, generator=torch.Generator().manual_seed(seed))
    start: torch.Tensor = (2 * uniform - 1) / dim**0.5
    return start


def batch_order(seed: int, epoch: int, count: int) -> Array:
    """Order (N,) int64 in which a run sees the training images in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class _Heads:
    """All heads, what each has reached on the stopping images, and which of them still run."""

    def __init__(
        self, adams: list[StackedAdam], lrs: Sequence[float], patience: int, stop: tuple[Array, Array], classes: int
    ) -> None:
        self.adams, self._patience, self._outputs = adams, patience, 1 if classes == 2 else classes
        device = adams[0].parameters[0].device
        self._x_EV = _columns(stop[0], device).T
        self._y_V = torch.from_numpy(stop[1].astype(np.int64)).to(device)
        present = torch.bincount(self._y_V, minlength=classes)
        self._member_VC = torch.nn.functional.one_hot(self._y_V, classes).float()[:, present > 0]
        self._count_C = present[present > 0].double()
        self.rate_SL = torch.tensor(lrs, dtype=torch.float32, device=device).repeat(len(adams), 1)
        self._best_SL = torch.full_like(self.rate_SL, -1.0, dtype=torch.float64)
        self._best_SPE = self._now()
        self._best_step_SL, self._steps_SL, self._waited_SL = (
            torch.zeros_like(self.rate_SL, dtype=torch.int64) for _ in range(3)
        )

    def _now(self) -> torch.Tensor:
        return torch.stack([adam.parameters[0] for adam in self.adams])

    def check(self, step: int) -> None:
        """Score all heads, keep those that got better, and stop those that have waited long enough."""
        heads_SPE, running_SL = self._now(), self.rate_SL > 0
        logits_PV = heads_SPE.flatten(0, 1) @ self._x_EV
        hits_HV = _classes(logits_PV.view(-1, self._outputs, logits_PV.shape[1])) == self._y_V
        # counts of hits are whole numbers in float32, so that equal counts give equal scores
        score_H = ((hits_HV.float() @ self._member_VC).double() / self._count_C).mean(dim=1)
        better_SL = (score_H.view_as(self._best_SL) > self._best_SL) & running_SL
        self._best_SL = torch.where(better_SL, score_H.view_as(self._best_SL), self._best_SL)
        self._best_step_SL[better_SL], self._steps_SL[running_SL] = step, step
        if better_SL.any():
            better_SP1 = better_SL.repeat_interleave(self._outputs, dim=1)[..., None]
            self._best_SPE = torch.where(better_SP1, heads_SPE, self._best_SPE)
        self._waited_SL = torch.where(better_SL, 0, self._waited_SL + 1)
        self.rate_SL[self._waited_SL >= self._patience] = 0.0

    def probes(self, seeds: Sequence[int], lrs: Sequence[float], dim: int) -> Probes:
        """Give every head at its best check."""
        heads_HOE = self._best_SPE.view(-1, self._outputs, self._best_SPE.shape[2])
        return Probes(
            seeds=tuple(seed for seed in seeds for _ in lrs),
            lrs=tuple(lrs) * len(seeds),
            weight_HOD=heads_HOE[..., :dim].contiguous(),
            bias_HO=heads_HOE[..., dim].contiguous(),
            stop_scores=tuple(self._best_SL.flatten().tolist()),
            best_steps=tuple(self._best_step_SL.flatten().tolist()),
            steps=tuple(self._steps_SL.flatten().tolist()),
        )


@torch.no_grad()
def train_probes(
    train_x_ND: Array,
    train_y_N: Array,
    stop_x_VD: Array,
    stop_y_V: Array,
    *,
    classes: int,
    seeds: Sequence[int],
    lrs: Sequence[float] = (3e-4,),
    schedule: ProbeSchedule | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Probes:
    """Train one head per seed and learning rate with AdamW and cross entropy, and keep each one's best check.

    With two classes a head has one output (binary cross entropy), else one per class. A head that has stopped is not
    trained on. What a seed gives does not depend on the other seeds.

    Parameters
    ----------
    train_x_ND, train_y_N, stop_x_VD, stop_y_V
        Features, any float type (trained on in float32), and classes, 0 to ``classes`` - 1.
    seeds, lrs
        A head is trained for each combination.
    schedule, device
        The original's if None; where the features are held.
    progress
        Told after every epoch how many steps are done.

    Raises
    ------
    DataError
        Features that are not finite or do not fit, labels out of range, nothing to train or stop on.
    """
    schedule = schedule or ProbeSchedule()
    _check(train_x_ND, train_y_N, "training", classes, train_x_ND.shape[-1])
    _check(stop_x_VD, stop_y_V, "stopping", classes, train_x_ND.shape[-1])
    x_NE = _columns(train_x_ND, torch.device(device))
    y_N = torch.from_numpy(train_y_N.astype(np.int64)).to(device)
    epoch_steps = -(-len(x_NE) // schedule.batch)
    patience = max(1, round(schedule.patience * -(-schedule.steps // epoch_steps)))
    # one optimiser per seed: the arithmetic of a seed then does not depend, to the last bit, on who else is there
    dim, outputs = train_x_ND.shape[1], 1 if classes == 2 else classes
    starts = [start_weights(seed, dim, outputs).repeat(len(lrs), 1).to(device) for seed in seeds]
    fill = x_NE.shape[1] - dim - 1
    adams = [StackedAdam([torch.nn.functional.pad(start, (0, fill))], schedule.weight_decay) for start in starts]
    heads = _Heads(adams, lrs, patience, (stop_x_VD, stop_y_V), classes)
    step = epoch = 0
    while step < schedule.steps and heads.rate_SL.any():
        count = min(epoch_steps, schedule.steps - step)
        for seed, adam, rate_L in zip(seeds, adams, heads.rate_SL, strict=True):
            if rate_L.any():
                order_N = torch.from_numpy(batch_order(seed, epoch, len(x_NE))).to(device)
                with _one_thread():
                    _epoch(x_NE, y_N, order_N[: count * schedule.batch], adam, rate_L, schedule.batch)
        step, epoch = step + count, epoch + 1
        heads.check(step)
        if progress is not None:
            progress(step)
    return heads.probes(seeds, lrs, dim)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Work on one thread of the processor: for products of this size threads wait longer for each other than they save.

    On a busy machine ten times longer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _epoch(
    x_NE: torch.Tensor, y_N: torch.Tensor, order_M: torch.Tensor, adam: StackedAdam, rate_L: torch.Tensor, batch: int
) -> None:
    """Train the heads of one seed on its batches of one epoch."""
    heads_PE = adam.parameters[0]
    outputs = len(heads_PE) // len(rate_L)
    rate_P = rate_L.repeat_interleave(outputs)
    gradient_PE = torch.empty_like(heads_PE)
    buffer_BE = x_NE.new_empty(min(batch, len(order_M)), x_NE.shape[1])
    label_M = y_N[order_M]
    minus_L1B = x_NE.new_full((1, 1, 1), -1.0).expand(len(rate_L), 1, len(buffer_BE))
    for rows_B, label_B in zip(order_M.split(batch), label_M.split(batch), strict=True):
        x_BE = torch.index_select(x_NE, 0, rows_B, out=buffer_BE[: len(rows_B)])
        logits_LOB = torch.mm(heads_PE, x_BE.T).view(len(rate_L), outputs, -1)
        if outputs == 1:  # probability minus target: the gradient of the cross entropy by the logits
            error_LOB = logits_LOB.sigmoid_().sub_(label_B)
        else:
            error_LOB = torch.softmax(logits_LOB, dim=1)
            error_LOB.scatter_add_(1, label_B.expand(len(rate_L), 1, -1), minus_L1B[..., : len(rows_B)])
        error_PB = error_LOB.view(len(heads_PE), -1)
        torch.addmm(gradient_PE, error_PB, x_BE, beta=0, alpha=1 / len(rows_B), out=gradient_PE)
        adam.step([gradient_PE], rate_P)


def _classes(logits_HOM: torch.Tensor) -> torch.Tensor:
    """Predicted classes (H, M)."""
    return (logits_HOM[:, 0] > 0).long() if logits_HOM.shape[1] == 1 else logits_HOM.argmax(dim=1)


def _columns(x_ND: Array, device: torch.device) -> torch.Tensor:
    """Features, a one (its weight is the bias) and zeros (E - D - 1 of them), float32."""
    count, dim = x_ND.shape
    x_NE = np.zeros((count, -(-(dim + 1) // _LINE) * _LINE), np.float32)
    x_NE[:, :dim] = x_ND
    x_NE[:, dim] = 1.0
    return torch.from_numpy(x_NE).to(device)


def _floats(x: Array, device: torch.device) -> torch.Tensor:
    """Copy to float32 on the device; cached features are read only, which torch does not take as they are."""
    return torch.from_numpy(np.array(x, dtype=np.float32, order="C")).to(device)


def _check(x_ND: Array, y_N: Array, name: str, classes: int, dim: int) -> None:
    if x_ND.ndim != 2 or len(x_ND) != len(y_N) or not len(x_ND) or x_ND.shape[1] != dim:
        raise DataError(
            f"the {name} features do not fit",
            got=f"features {x_ND.shape}, {len(y_N)} labels",
            allowed=f"one row of {dim} features per label",
        )
    if not ((y_N >= 0) & (y_N < classes)).all():
        raise DataError(f"a {name} label is out of range", got=sorted(set(y_N.tolist())), allowed=f"0 to {classes - 1}")
    finite_N = np.isfinite(x_ND).all(axis=1)
    if not finite_N.all():
        raise DataError(f"the {name} features are not finite", where=f"first in row {int(np.argmin(finite_N))}")
