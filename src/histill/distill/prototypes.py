"""Prototypes for a teacher without heads: spherical k-means on its own standardised tokens.

Shapes: M tokens, D channels, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from histill.errors import DataError

__all__ = ["Collective", "prototype_count", "spherical_kmeans"]

SMALLEST, LARGEST = 64, 131_072
_CHUNK_ROWS = 8192

Collective = Callable[[torch.Tensor], torch.Tensor]
"""A tensor of this rank -> one of all ranks."""


def prototype_count(wanted: float, *, most: int) -> int:
    """The power of two nearest to ``wanted`` (on the log scale), from 64 to 131,072, and never above ``most``."""
    return int(min(LARGEST, most, max(SMALLEST, 2 ** round(math.log2(max(1.0, wanted))))))


def spherical_kmeans(
    tokens_MD: torch.Tensor,
    count: int,
    lots_M: torch.Tensor,
    *,
    iterations: int = 20,
    reduce: Collective | None = None,
    gather: Collective | None = None,
) -> torch.Tensor:
    """Unit vectors that the tokens gather around, by cosine (Dhillon and Modha, *Concept decompositions*, 2001).

    Each iteration streams over the tokens in chunks and needs memory for one chunk's scores only. A prototype to
    which no token belongs starts anew at the token that fits its own prototype worst. However the tokens are spread
    over ranks, the prototypes are the same.

    Parameters
    ----------
    tokens_MD
        Standardised tokens of this rank, (M, D).
    count
        Number of prototypes K; at most the tokens of all ranks.
    lots_M
        A random number of each token, (M,) float64: the tokens with the lowest are the start.
    iterations
        Most iterations; it stops earlier when no token moves.
    reduce
        Sum of a tensor over the ranks; None with one rank.
    gather
        Rows of all ranks, one below the other; None with one rank.

    Returns
    -------
    Tensor
        float32, (K, D), rows of length 1.

    Raises
    ------
    DataError
        With fewer tokens than prototypes.
    """
    reduce, gather = reduce or _alone, gather or _alone
    rows = int(reduce(torch.tensor([tokens_MD.shape[0]], device=tokens_MD.device)))
    if rows < count:
        raise DataError(
            "there are fewer tokens than prototypes",
            got=f"{rows} tokens for {count} prototypes",
            remedy="use more tiles, or fewer prototypes (--objective.cls-prototypes, --objective.patch-prototypes)",
        )
    unit_MD = F.normalize(tokens_MD.float(), dim=-1)
    prototypes_KD = _lowest(lots_M.to(unit_MD.device), unit_MD, count, gather)
    assigned_M = torch.full((len(unit_MD),), -1, device=unit_MD.device)
    for _ in range(iterations):
        best_M, now_M = _assign(unit_MD, prototypes_KD)
        moved = reduce((now_M != assigned_M).sum().view(1))
        assigned_M = now_M
        prototypes_KD, dead = _move(unit_MD, assigned_M, best_M, count, reduce, gather)
        if not dead and int(moved) == 0:
            break
    return prototypes_KD


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _lowest(keys_M: torch.Tensor, rows_MD: torch.Tensor, count: int, gather: Collective) -> torch.Tensor:
    """The rows of the ``count`` lowest keys over all ranks, (count, D), in the order of keys."""
    own = keys_M.argsort(stable=True)[:count]
    keys_A, rows_AD = gather(keys_M[own]), gather(rows_MD[own])
    return rows_AD[keys_A.argsort(stable=True)[:count]].clone()


def _move(
    unit_MD: torch.Tensor,
    assigned_M: torch.Tensor,
    best_M: torch.Tensor,
    count: int,
    reduce: Collective,
    gather: Collective,
) -> tuple[torch.Tensor, int]:
    """Prototypes (K, D) at the directions of their tokens, and how many had none and start anew."""
    # Summed in float64: the order of summation, which differs between one rank and several, then leaves no trace.
    sums_KD = torch.zeros(count, unit_MD.shape[1], device=unit_MD.device, dtype=torch.float64)
    for chunk, unit_CD in enumerate(unit_MD.split(_CHUNK_ROWS)):
        sums_KD.index_add_(0, assigned_M[chunk * _CHUNK_ROWS :][: len(unit_CD)], unit_CD.double())
    sums_KD = reduce(sums_KD)
    counts_K = reduce(torch.bincount(assigned_M, minlength=count).double())
    prototypes_KD = F.normalize(sums_KD, dim=-1).float()
    dead_K = (counts_K == 0).nonzero().squeeze(1)
    if len(dead_K):
        prototypes_KD[dead_K] = _lowest(best_M, unit_MD, len(dead_K), gather)
    return prototypes_KD, len(dead_K)


def _assign(unit_MD: torch.Tensor, prototypes_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine to the nearest prototype, its index), each (M,)."""
    parts = [(chunk @ prototypes_KD.T).max(dim=1) for chunk in unit_MD.split(_CHUNK_ROWS)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
