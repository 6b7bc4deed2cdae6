"""Teacher scores from prototype logits: Sinkhorn-Knopp in the log domain, and centring.

Shapes: M rows (crops or tokens) of this rank, K prototypes.

Sinkhorn alternates two normalisations of ``exp(logits / T)``: the prototypes to equal mass, then the rows to 1. Both
are diagonal scalings, so the whole state is one number per prototype, the potential ``v_K``: the scores are always
``softmax(logits_MK / T + v_K)`` over the prototypes, and one iteration is ``v_K -= log(sum of the scores over rows)``.
Nothing is exponentiated before its maximum is taken away, so no logit can overflow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "Reduce",
    "centred_softmax",
    "column_log_sum_exp_",
    "column_sum",
    "first_potential",
    "next_potential",
    "sinkhorn",
    "update_centre",
]

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over the ranks, in place or not: the returned tensor counts. All ranks call it equally often."""

# Makes a soft maximum from a plain sum: exponents are divided by this first, so that no float64 overflows for
# differences between ranks up to 700 * 32, and the result is at most 32 * log(ranks) above the true maximum.
_SOFT = 32.0


@torch.no_grad()
def sinkhorn(logits_MK: Tensor, temperature: float, iterations: int = 3, reduce: Reduce | None = None) -> Tensor:
    """Teacher scores whose mass is spread equally over the prototypes of the global batch.

    Source: Cuturi, *Sinkhorn distances*, NeurIPS 2013, algorithm 1; Caron et al., SwAV, NeurIPS 2020, section 3.1.
    The order is DINOv2's: prototypes first, samples last. Computed in float64; for many rows see
    `chunked_prototype_loss`.

    Parameters
    ----------
    logits_MK
        Teacher logits of this rank's rows, any float type; ranks may hold different numbers of rows, also none.
    temperature
        Divides the logits.
    iterations
        Number of times that both normalisations are done; 0 is a plain softmax.
    reduce
        Sum over the ranks; None with one rank.

    Returns
    -------
    Tensor
        targets_MK, float32, without a gradient; each row sums to 1.
    """
    assert logits_MK.ndim == 2, f"sinkhorn takes (rows, prototypes), got {tuple(logits_MK.shape)}"
    assert temperature > 0, f"a temperature is positive, got {temperature}"
    assert iterations >= 0, f"a number of iterations is not negative, got {iterations}"
    # float64: potentials of +-100 rounded to float32 would make ranks differ from one rank by 1e-5.
    scaled_MK = logits_MK.double() / temperature
    if iterations == 0:
        return torch.softmax(scaled_MK, dim=1).float()
    potential_K = first_potential(column_log_sum_exp_(scaled_MK.clone()), reduce)
    for _ in range(iterations - 1):
        scores_MK = torch.softmax(scaled_MK + potential_K, dim=1)
        potential_K = next_potential(potential_K, column_sum(scores_MK), reduce)
    return torch.softmax(scaled_MK.add_(potential_K), dim=1).float()


def column_log_sum_exp_(scaled_MK: Tensor) -> Tensor:
    """Log of the sum of exponentials over the rows, (K,) float64; overwrites its argument, -inf without rows."""
    if scaled_MK.shape[0] == 0:
        return scaled_MK.new_full(scaled_MK.shape[1:], -torch.inf, dtype=torch.float64)
    top_K = scaled_MK.amax(dim=0)
    return top_K.double() + column_sum(scaled_MK.sub_(top_K).exp_()).log()


def column_sum(x_MK: Tensor) -> Tensor:
    """Sum over the rows, (K,) float64."""
    # A product with ones is several times faster than a sum down the columns on CPUs.
    return torch.mv(x_MK.T, x_MK.new_ones(x_MK.shape[0])).double()


def first_potential(log_sum_exp_K: Tensor, reduce: Reduce | None) -> Tensor:
    """Potential after the first normalisation of the prototypes, (K,) float64, from the local log-sum-exp.

    With ranks the shared reference of the exponents must be found with sums alone: first the mean over the ranks,
    then from it a soft maximum, which lies above every rank's value and close to the largest.
    """
    if reduce is not None:
        present_K = torch.isfinite(log_sum_exp_K)
        total_K, ranks_K = reduce(torch.stack([log_sum_exp_K.where(present_K, 0.0), present_K.double()]))
        mean_K = total_K / ranks_K.clamp_min(1.0)
        soft_K = mean_K + _SOFT * reduce(((log_sum_exp_K - mean_K) / _SOFT).exp()).log()
        log_sum_exp_K = soft_K + reduce((log_sum_exp_K - soft_K).exp()).log()
    return _centred(-log_sum_exp_K)


def next_potential(potential_K: Tensor, mass_K: Tensor, reduce: Reduce | None) -> Tensor:
    """Potential after one more iteration, (K,) float64.

    ``mass_K`` is the sum over this rank's rows of the scores under ``potential_K``. Over all ranks it is at least
    1 / (rows * prototypes), because the potential has put mass 1 on each prototype: its logarithm is safe.

    Source: one pass of Cuturi, *Sinkhorn distances*, NeurIPS 2013, algorithm 1, on the logarithm of its scaling (Peyré
    and Cuturi, *Computational optimal transport*, 2019, section 4.4): ``potential_K - log(mass_K)``, less its mean.

    Parameters
    ----------
    potential_K
        The potential so far, float64; not changed.
    mass_K
        Sums over this rank's rows, float64; zeros where a rank has no rows.
    reduce
        Sum over the ranks; None with one rank.

    Returns
    -------
    Tensor
        (K,) float64 with mean 0, the same on all ranks; ``softmax(logits / temperature + it)`` are the scores.
    """
    if reduce is not None:
        mass_K = reduce(mass_K)
    return _centred(potential_K - mass_K.log())


def _centred(potential_K: Tensor) -> Tensor:
    """Take away the mean: it cancels in the softmax over the prototypes, and float32 then keeps more digits."""
    return potential_K - potential_K.mean()


@torch.no_grad()
def centred_softmax(logits_MK: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """Teacher scores by centring and sharpening, float32, without a gradient.

    Source: Caron et al., DINO, ICCV 2021, section 3.1.

    Parameters
    ----------
    logits_MK
        Teacher logits, any leading shape.
    centre_K
        Running mean of the logits, float32; zeros at the start.
    temperature
        Divides the centred logits.
    """
    return torch.softmax((logits_MK.float() - centre_K) / temperature, dim=-1)


@torch.no_grad()
def update_centre(centre_K: Tensor, logits_MK: Tensor, momentum: float = 0.9, reduce: Reduce | None = None) -> Tensor:
    """Move the running mean of the teacher's logits by one batch; returns a new (K,) float32 tensor.

    Source: Caron et al., DINO, ICCV 2021, equation 4.

    Parameters
    ----------
    centre_K
        The mean so far.
    logits_MK
        Teacher logits of this rank's rows; ranks may hold different numbers of rows.
    momentum
        Share of the old mean that is kept.
    reduce
        Sum over the ranks; None with one rank.
    """
    assert logits_MK.ndim == 2, f"a centre is the mean of (rows, prototypes), got {tuple(logits_MK.shape)}"
    sum_K = logits_MK.sum(dim=0, dtype=torch.float64)
    sum_and_rows = torch.cat([sum_K, sum_K.new_full((1,), logits_MK.shape[0])])
    if reduce is not None:
        sum_and_rows = reduce(sum_and_rows)
    rows = sum_and_rows[-1]
    mean_K = torch.where(rows > 0, sum_and_rows[:-1] / rows.clamp_min(1.0), centre_K.double())
    return (momentum * centre_K.double() + (1.0 - momentum) * mean_K).float()
