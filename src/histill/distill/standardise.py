"""Standardise teacher tokens.

Raw tokens of DINOv2-type models share one large component, and a student that matches it has learnt nothing.

Shapes: M tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histill.errors import ModelError

__all__ = ["Moments", "Standardiser", "hadamard"]

Reduce = Callable[[torch.Tensor], torch.Tensor]


class Moments:
    """Running count, sum and second moments of tokens, in float64; ranks add theirs up, features never travel."""

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum_D = torch.zeros(channels, dtype=torch.float64)
        self.outer_DD = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, tokens_MD: torch.Tensor) -> None:
        """Take in tokens, (M, D), any float type."""
        # The products are taken in float32 per call and added in float64: exact enough, and fast.
        tokens_MD = tokens_MD.float()
        self.count += tokens_MD.shape[0]
        self.sum_D += tokens_MD.sum(0, dtype=torch.float64).cpu()
        self.outer_DD += (tokens_MD.T @ tokens_MD).double().cpu()

    def reduced(self, reduce: Reduce) -> Moments:
        """The moments over all ranks; ``reduce`` sums a tensor over them."""
        total = Moments(self.sum_D.shape[0])
        total.count, total.sum_D = reduce(self.count.clone()), reduce(self.sum_D.clone())
        total.outer_DD = reduce(self.outer_DD.clone())
        return total

    def mean_covariance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and population covariance (D, D), float64."""
        mean_D = self.sum_D / self.count
        return mean_D, self.outer_DD / self.count - torch.outer(mean_D, mean_D)


def hadamard(size: int) -> NDArray[np.float64]:
    """A Hadamard matrix of a given size, entries +-1: Sylvester's doubling over Paley's first construction.

    Raises
    ------
    ModelError
        When no prime q = size / 2^k - 1 with q = 3 (mod 4) exists (nor size a power of two).
    """
    core, doublings = size, 0
    while core > 0:
        base = np.ones((1, 1)) if core == 1 else _paley(core - 1)
        if base is not None:
            for _ in range(doublings):
                base = np.block([[base, base], [base, -base]])
            return base
        if core % 2:
            break
        core, doublings = core // 2, doublings + 1
    raise ModelError(
        "PHI-S has no Hadamard matrix for this teacher's width",
        where="--objective.standardiser",
        got=f"phi-s with {size} channels",
        remedy="use --objective.standardiser mean-std",
    )


def _paley(q: int) -> NDArray[np.float64] | None:
    if q % 4 != 3 or any(q % divisor == 0 for divisor in range(2, math.isqrt(q) + 1)):
        return None
    character = -np.ones(q)
    character[[value * value % q for value in range(1, q)]] = 1.0
    character[0] = 0.0
    jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]
    matrix = np.ones((q + 1, q + 1))
    matrix[1:, 1:] = jacobsthal + np.eye(q)
    matrix[1:, 0] = -1.0
    return matrix


class Standardiser(nn.Module):
    """An affine map of teacher tokens to zero mean and unit variance.

    ``mean-std``: each channel by its own standard deviation. ``phi-s``: rotate by the principal axes, then by a
    Hadamard matrix, then one scale, so that every channel has the same variance and no direction is stretched
    (Ranzinger et al., *PHI-S: Distribution balancing for label-free multi-teacher distillation*, arXiv 2410.01680,
    section 3.3).
    """

    mean_D: torch.Tensor
    matrix_DD: torch.Tensor | None
    scale_D: torch.Tensor

    def __init__(self, channels: int, kind: Literal["mean-std", "phi-s"]) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean_D", torch.zeros(channels))
        self.register_buffer("scale_D", torch.ones(channels))
        self.register_buffer("matrix_DD", torch.eye(channels) if kind == "phi-s" else None)

    def fit(self, moments: Moments) -> None:
        """Set the map from moments of at least two tokens."""
        mean_D, covariance_DD = moments.mean_covariance()
        variance_D = covariance_DD.diagonal()
        # A channel that never moves carries nothing; it is centred and left at its scale of zero.
        still_D = variance_D <= 1e-10 * variance_D.mean()
        self.mean_D.copy_(mean_D)
        if self.kind == "mean-std":
            self.scale_D.copy_(torch.where(still_D, 0.0, variance_D.clamp_min(1e-30).rsqrt()))
            return
        assert self.matrix_DD is not None
        channels = variance_D.shape[0]
        _, axes_DD = torch.linalg.eigh(covariance_DD)
        rotation_DD = torch.from_numpy(hadamard(channels)) @ axes_DD.T / math.sqrt(channels)
        self.matrix_DD.copy_(rotation_DD)
        self.scale_D.fill_(float(variance_D.mean().rsqrt()))

    def forward(self, tokens_MD: torch.Tensor) -> torch.Tensor:
        """Standardise tokens (..., D); float32 out."""
        centred_MD = tokens_MD.float() - self.mean_D
        if self.matrix_DD is not None:
            centred_MD = centred_MD @ self.matrix_DD.T
        return centred_MD * self.scale_D
