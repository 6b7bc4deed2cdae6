"""Slide classification of the EVA protocol: gated attention over the tiles of a slide, stacked runs trained together.

Ilse et al. 2018 ("Attention-based Deep Multiple Instance Learning") with a linear projection before it: tiles are
projected to 128, weighed by ``softmax(w (tanh(V h) * sigmoid(U h)))``, summed, and classified by an MLP 128-64.
Bags of different size are filled up to the longest of a batch, and the filling has no weight.

Runs are independent: their parameters are stacked on the first axis, and batches of all runs go through one product.
That is for an accelerator, as many runs as its memory takes. A processor is bound by the arithmetic of a single run
already, and loses a little by larger arrays: there runs go one after another (see :func:`runs_together`).

Shapes: R runs, B bags, N tiles of the longest bag, D features, H hidden, C classes, O outputs (1 with two classes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax

from histill.errors import DataError
from histill.evaluate.eva.adam import StackedAdam
from histill.evaluate.eva.probe import batch_order
from histill.evaluate.eva.scoring import balanced_accuracy
from histill.evaluate.features import Array

__all__ = [
    "MilRuns",
    "MilSchedule",
    "Parameters",
    "attention_mil",
    "attention_weights",
    "class_scores",
    "pooled_tiles",
    "refit_mil",
    "runs_together",
    "start_mil",
    "train_mil",
]

_EVAL_BAGS = 8

Parameters = dict[str, torch.Tensor]
"""``layer.weight`` (R, in, out) and ``layer.bias`` (R, 1, out)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MilSchedule:
    """How long, how fast, how wide; the defaults are the original's."""

    epochs: int = 100
    """At most."""
    batch: int = 32
    """Slides."""
    lr: float = 1e-3
    weight_decay: float = 0.0
    patience: float = 0.2
    """A run stops after this share of the epochs without a better stopping score; a check follows every epoch."""
    projection: int = 128
    attention: int = 128
    hidden: tuple[int, int] = (128, 64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MilRuns:
    """Trained runs, each at its best check."""

    seeds: tuple[int, ...]
    parameters: Parameters
    stop_scores: tuple[float, ...]
    """Best balanced accuracy on the stopping slides, 0 to 1."""
    best_epochs: tuple[int, ...]
    """Epochs done at that check."""
    epochs: tuple[int, ...]
    """Epochs done when the run stopped."""

    def predict(self, bags: Sequence[Array]) -> Array:
        """Classes (R, M) int64 of M slides, each (tiles, D)."""
        return _predict(self.parameters, bags)


def start_mil(seed: int, dim: int, outputs: int, schedule: MilSchedule) -> Parameters:
    """Start of one run (R = 1): every layer uniform within 1 / sqrt(in), as linear layers of torch.

    The attention's last layer has no bias: a softmax does not see it, and Adam would walk it along rounding errors.
    """
    generator = torch.Generator().manual_seed(seed)
    width, gate, (first, second) = schedule.projection, schedule.attention, schedule.hidden
    layers = {
        "project": (dim, width),
        "tanh": (width, gate),
        "sigmoid": (width, gate),
        "weigh": (gate, 1),
        "first": (width, first),
        "second": (first, second),
        "classify": (second, outputs),
    }
    parameters: Parameters = {}
    for name, (rows, columns) in layers.items():
        drawn = (2 * torch.rand(1, rows + 1, columns, generator=generator) - 1) / rows**0.5
        parameters[f"{name}.weight"] = drawn[:, :-1].contiguous()
        if name != "weigh":
            parameters[f"{name}.bias"] = drawn[:, -1:].contiguous()
    return parameters


def attention_mil(parameters: Parameters, bags_RBND: torch.Tensor, filled_RBN: torch.Tensor) -> torch.Tensor:
    """Logits (R, B, O).

    Parameters
    ----------
    parameters
        Of R runs.
    bags_RBND
        Tiles; what fills a bag up may hold any finite number.
    filled_RBN
        True where there is no tile.
    """
    slide_RBH = pooled_tiles(parameters, bags_RBND, filled_RBN)[0]
    return _layer(
        parameters, "classify", F.relu(_layer(parameters, "second", F.relu(_layer(parameters, "first", slide_RBH))))
    )


def pooled_tiles(
    parameters: Parameters, bags_RBND: torch.Tensor, filled_RBN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum tiles by their weights: slides (R, B, H), and the weights (R, B, N).

    Source: Ilse et al., ICML 2018, equations 7 (the sum) and 9 (gated attention), on tiles projected to H first.

    Parameters
    ----------
    parameters
        Of R runs; ``project``, ``tanh``, ``sigmoid`` and ``weigh`` are used.
    bags_RBND
        Tiles, float32; what fills a bag up may hold any finite number.
    filled_RBN
        True where there is no tile; each bag has at least one tile.

    Returns
    -------
    slide_RBH
        float32.
    weight_RBN
        float32: adds up to 1 over the tiles of a bag, 0 where there is none.
    """
    runs, bags, tiles, _ = bags_RBND.shape
    hidden_RXH = _layer(parameters, "project", bags_RBND.flatten(1, 2))
    gated_RXA = torch.tanh(_layer(parameters, "tanh", hidden_RXH))
    gated_RXA = gated_RXA * torch.sigmoid(_layer(parameters, "sigmoid", hidden_RXH))
    score_RBN = (
        torch.bmm(gated_RXA, parameters["weigh.weight"]).view(runs, bags, tiles).masked_fill(filled_RBN, float("-inf"))
    )
    weight_RBN = torch.softmax(score_RBN, dim=2)
    return torch.einsum("rbn,rbnh->rbh", weight_RBN, hidden_RXH.view(runs, bags, tiles, -1)), weight_RBN


def _layer(parameters: Parameters, name: str, x_RXI: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(parameters[f"{name}.bias"], x_RXI, parameters[f"{name}.weight"])


def runs_together(longest: int, dim: int, runs: int, batch: int, memory_bytes: int, device: str) -> int:
    """How many runs to stack: on the processor one, elsewhere what fits (tiles, hidden values of a batch, float32)."""
    if torch.device(device).type == "cpu":
        return 1
    per_run = batch * longest * (dim + 8 * 128) * 4
    return max(1, min(runs, memory_bytes // per_run))


def train_mil(
    bags: Sequence[Array],
    label_N: Array,
    stop_bags: Sequence[Array],
    stop_label_V: Array,
    *,
    classes: int,
    seeds: Sequence[int],
    schedule: MilSchedule | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> MilRuns:
    """Train one network per seed with AdamW and cross entropy, and keep each one's best check.

    A run that has stopped leaves the stack: it is not trained on.

    Parameters
    ----------
    bags, stop_bags
        Per slide (tiles, D), any float type; at least one tile.
    label_N, stop_label_V
        Classes, 0 to ``classes`` - 1.
    classes
        Number of classes; two classes have one output (binary cross entropy).
    seeds
        One run each; all go together, see :func:`runs_together`.
    schedule, device
        The original's if None; where it is computed.
    progress
        Told after every epoch how many epochs are done.

    Raises
    ------
    DataError
        A slide without tiles or with features that are not finite or do not fit; labels out of range.
    """
    schedule, device = schedule or MilSchedule(), torch.device(device)
    dim = _check(bags, label_N, classes, None)
    _check(stop_bags, stop_label_V, classes, dim)
    stack = _started(seeds, dim, classes, schedule, device)
    for epoch in range(schedule.epochs):
        _epoch(stack, bags, label_N, [seeds[run] for run in stack.running.tolist()], epoch, schedule, device)
        stack.check(epoch + 1, stop_bags, stop_label_V)
        if progress is not None:
            progress(epoch + 1)
        if not len(stack.running):
            break
    return MilRuns(
        seeds=tuple(seeds),
        parameters=stack.best,
        stop_scores=tuple(stack.scores.tolist()),
        best_epochs=tuple(stack.best_epochs.tolist()),
        epochs=tuple(stack.epochs.tolist()),
    )


def refit_mil(
    bags: Sequence[Array],
    label_N: Array,
    *,
    classes: int,
    seeds: Sequence[int],
    schedule: MilSchedule | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Parameters:
    """Train one network per seed for all of ``schedule.epochs``, with nothing to stop on; arguments as of `train_mil`.

    Returns
    -------
    dict
        :data:`Parameters` of R = ``len(seeds)`` runs after the last epoch, float32, on ``device``.

    Raises
    ------
    DataError
        As :func:`train_mil`.
    """
    schedule, device = schedule or MilSchedule(), torch.device(device)
    dim = _check(bags, label_N, classes, None)
    stack = _started(seeds, dim, classes, schedule, device)
    for epoch in range(schedule.epochs):
        _epoch(stack, bags, label_N, seeds, epoch, schedule, device)
        if progress is not None:
            progress(epoch + 1)
    return dict(zip(stack.names, stack.adam.parameters, strict=True))


def _started(seeds: Sequence[int], dim: int, classes: int, schedule: MilSchedule, device: torch.device) -> _Stack:
    starts = [start_mil(seed, dim, 1 if classes == 2 else classes, schedule) for seed in seeds]
    return _Stack({name: torch.cat([start[name] for start in starts]).to(device) for name in starts[0]}, schedule)


def _epoch(
    stack: _Stack,
    bags: Sequence[Array],
    label_N: Array,
    seeds: Sequence[int],
    epoch: int,
    schedule: MilSchedule,
    device: torch.device,
) -> None:
    """Show every slide once to each run of the stack; ``seeds`` are theirs."""
    label = torch.from_numpy(label_N.astype(np.int64)).to(device)
    orders = np.stack([batch_order(seed, epoch, len(bags)) for seed in seeds])
    for first in range(0, len(bags), schedule.batch):
        rows_RB = orders[:, first : first + schedule.batch]
        _step(stack, *_filled(bags, rows_RB, device), label[torch.from_numpy(rows_RB)], schedule.lr)


class _Stack:
    """The runs that still train, and the best check of all."""

    def __init__(self, parameters: Parameters, schedule: MilSchedule) -> None:
        runs = len(parameters["project.weight"])
        self.names, self._patience = list(parameters), max(1, round(schedule.patience * schedule.epochs))
        self.adam = StackedAdam(list(parameters.values()), schedule.weight_decay)
        self.best = {name: value.clone() for name, value in parameters.items()}
        self.running = np.arange(runs)
        """Numbers of the runs that still train."""
        self.scores, self.best_epochs, self.epochs = np.full(runs, -1.0), np.zeros(runs, int), np.zeros(runs, int)

    def check(self, epoch: int, bags: Sequence[Array], label_V: Array) -> None:
        now = dict(zip(self.names, self.adam.parameters, strict=True))
        score_R = np.array([balanced_accuracy(predicted_V, label_V) for predicted_V in _predict(now, bags)])
        better_R = score_R > self.scores[self.running]
        improved = self.running[better_R]
        self.scores[improved], self.best_epochs[improved], self.epochs[self.running] = score_R[better_R], epoch, epoch
        for name, value in now.items():
            self.best[name][improved] = value[better_R]
        stays_R = epoch - self.best_epochs[self.running] < self._patience
        if not stays_R.all():
            self.adam.keep(torch.from_numpy(np.flatnonzero(stays_R)).to(self.adam.parameters[0].device))
            self.running = self.running[stays_R]


def _step(
    stack: _Stack,
    bags_RBND: torch.Tensor,
    filled_RBN: torch.Tensor,
    label_RB: torch.Tensor,
    lr: float,
) -> None:
    """One update of all runs; the gradient of the sum of their losses is each one's own."""
    leaves = [parameter.detach().requires_grad_() for parameter in stack.adam.parameters]
    logits_RBO = attention_mil(dict(zip(stack.names, leaves, strict=True)), bags_RBND, filled_RBN)
    if logits_RBO.shape[2] == 1:
        loss = F.binary_cross_entropy_with_logits(logits_RBO[..., 0], label_RB.float(), reduction="none")
    else:
        loss = F.cross_entropy(logits_RBO.flatten(0, 1), label_RB.flatten(), reduction="none").view(label_RB.shape)
    gradients = torch.autograd.grad(loss.mean(dim=1).sum(), leaves)
    stack.adam.step(gradients, torch.full((len(label_RB),), lr, device=bags_RBND.device))


def _filled(bags: Sequence[Array], rows_RB: Array, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles (R, B, N, D) of the wanted slides, filled up with zeros, and where they are filled."""
    longest = max(len(bags[row]) for row in rows_RB.flat)
    tiles = np.zeros((*rows_RB.shape, longest, bags[0].shape[1]), np.float32)
    filled = np.ones((*rows_RB.shape, longest), bool)
    for place in np.ndindex(rows_RB.shape):
        bag = bags[int(rows_RB[place])]
        tiles[place][: len(bag)], filled[place][: len(bag)] = bag, False
    return torch.from_numpy(tiles).to(device), torch.from_numpy(filled).to(device)


def _predict(parameters: Parameters, bags: Sequence[Array]) -> Array:
    """Classes (R, M)."""
    logits_RMO = _logits(parameters, bags)
    return (logits_RMO[..., 0] > 0).astype(np.int64) if logits_RMO.shape[2] == 1 else logits_RMO.argmax(axis=2)


def class_scores(parameters: Parameters, bags: Sequence[Array]) -> Array:
    """Probabilities (R, M, C) float64 of the classes of M slides, each (tiles, D)."""
    logits_RMO = _logits(parameters, bags).astype(np.float64)
    if logits_RMO.shape[2] == 1:
        logits_RMO = np.concatenate([np.zeros_like(logits_RMO), logits_RMO], axis=2)
    scores: Array = softmax(logits_RMO, axis=2)
    return scores


@torch.no_grad()
def attention_weights(parameters: Parameters, bag_ND: Array) -> Array:
    """Weights (R, N) float32 of a slide's tiles: in each run they add up to 1."""
    weight = parameters["project.weight"]
    tiles, filled = _filled([bag_ND], np.zeros((1, 1), np.int64), weight.device)
    runs = len(weight)
    _, weight_RBN = pooled_tiles(parameters, *(each.expand(runs, *each.shape[1:]) for each in (tiles, filled)))
    weights: Array = weight_RBN[:, 0].cpu().numpy()
    return weights


@torch.no_grad()
def _logits(parameters: Parameters, bags: Sequence[Array]) -> Array:
    """Logits (R, M, O) float32, some slides at a time; those of like size together, to fill up little."""
    weight = parameters["project.weight"]
    found = np.zeros((len(weight), len(bags), parameters["classify.weight"].shape[2]), np.float32)
    by_size = np.argsort([len(bag) for bag in bags], kind="stable")
    for first in range(0, len(bags), _EVAL_BAGS):
        rows_B = by_size[first : first + _EVAL_BAGS]
        tiles, filled = _filled(bags, rows_B[None], weight.device)
        for run in range(len(weight)):  # one after another: the tiles are shared, and stay in the cache
            own = {name: value[run : run + 1] for name, value in parameters.items()}
            found[run, rows_B] = attention_mil(own, tiles, filled)[0].cpu().numpy()
    return found


def _check(bags: Sequence[Array], label_N: Array, classes: int, dim: int | None) -> int:
    if not len(bags) or len(bags) != len(label_N):
        raise DataError("one label per slide is needed", got=f"{len(bags)} slides, {len(label_N)} labels")
    dim = dim or bags[0].shape[-1]
    for number, bag in enumerate(bags):
        if bag.ndim != 2 or not len(bag) or bag.shape[1] != dim:
            raise DataError(
                "the features of a slide do not fit",
                where=f"slide {number}",
                got=bag.shape,
                allowed=f"(tiles, {dim}), at least one tile",
            )
        if not np.isfinite(bag).all():
            raise DataError("the features of a slide are not finite", where=f"slide {number}")
    if not ((label_N >= 0) & (label_N < classes)).all():
        raise DataError("a label is out of range", got=sorted(set(label_N.tolist())), allowed=f"0 to {classes - 1}")
    return dim
