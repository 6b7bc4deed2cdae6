"""Prototypes for a teacher without heads: spherical k-means on its own standardised tokens.

Shapes: M tokens, D channels, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from histill.errors import DataError

__all__ = ["prototype_count", "spherical_kmeans"]

SMALLEST, LARGEST = 64, 131_072
_CHUNK_ROWS = 8192


def prototype_count(wanted: float, *, most: int) -> int:
    """The power of two nearest to ``wanted`` (on the log scale), from 64 to 131,072, and never above ``most``."""
    return int(min(LARGEST, most, max(SMALLEST, 2 ** round(math.log2(max(1.0, wanted))))))


def spherical_kmeans(
    tokens_MD: torch.Tensor,
    count: int,
    *,
    seed: int,
    iterations: int = 20,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Unit vectors that the tokens gather around, by cosine (Dhillon and Modha, *Concept decompositions*, 2001).

    Each iteration streams over the tokens in chunks and needs memory for one chunk's scores only. A prototype to
    which no token belongs starts anew at the token that fits its own prototype worst.

    Parameters
    ----------
    tokens_MD
        Standardised tokens, (M, D).
    count
        Number of prototypes K; at most M.
    seed
        Seed of the start (tokens drawn without replacement).
    iterations
        Most iterations; it stops earlier when no token moves.
    reduce
        Sum of a tensor over the ranks, each of which holds other tokens; they start from the sum of their draws.

    Returns
    -------
    Tensor
        float32, (K, D), rows of length 1.

    Raises
    ------
    DataError
        With fewer tokens than prototypes.
    """
    rows = tokens_MD.shape[0]
    if rows < count:
        raise DataError(
            "there are fewer tokens than prototypes",
            got=f"{rows} tokens for {count} prototypes",
            remedy="use more tiles, or fewer prototypes (--objective.cls-prototypes, --objective.patch-prototypes)",
        )
    unit_MD = F.normalize(tokens_MD.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    start_K = torch.randperm(rows, generator=generator)[:count].to(unit_MD.device)
    prototypes_KD = unit_MD[start_K].clone()
    if reduce is not None:
        prototypes_KD = F.normalize(reduce(prototypes_KD), dim=-1)
    assigned_M = torch.full((rows,), -1, device=unit_MD.device)
    for _ in range(iterations):
        best_M, now_M = _assign(unit_MD, prototypes_KD)
        moved = (now_M != assigned_M).sum()
        assigned_M = now_M
        prototypes_KD, dead = _move(unit_MD, assigned_M, best_M, count, reduce)
        if reduce is not None:
            moved = reduce(moved)
        if not dead and int(moved) == 0:
            break
    return prototypes_KD


def _move(
    unit_MD: torch.Tensor,
    assigned_M: torch.Tensor,
    best_M: torch.Tensor,
    count: int,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, int]:
    """Prototypes (K, D) at the directions of their tokens, and how many had none and start anew."""
    sums_KD = torch.zeros(count, unit_MD.shape[1], device=unit_MD.device).index_add_(0, assigned_M, unit_MD)
    counts_K = torch.bincount(assigned_M, minlength=count).float()
    if reduce is not None:
        sums_KD, counts_K = reduce(sums_KD), reduce(counts_K)
    prototypes_KD = F.normalize(sums_KD, dim=-1)
    dead_K = (counts_K == 0).nonzero().squeeze(1)
    if len(dead_K):
        # The worst-fitted tokens of this rank; ranks add up their proposals, so that all stay equal.
        fresh_KD = unit_MD[best_M.argsort()[: len(dead_K)]]
        if reduce is not None:
            fresh_KD = reduce(fresh_KD.clone())
        prototypes_KD[dead_K] = F.normalize(fresh_KD, dim=-1)
    return prototypes_KD, len(dead_K)


def _assign(unit_MD: torch.Tensor, prototypes_KD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine to the nearest prototype, its index), each (M,)."""
    parts = [(chunk @ prototypes_KD.T).max(dim=1) for chunk in unit_MD.split(_CHUNK_ROWS)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
