"""Collectives with a gradient. Apart from ``distributed``, which must not import torch.

Shapes: B rows of this rank, A rows of all ranks, M the most rows of a rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_rows"]


def gather_rows(rows_B: Tensor) -> Tensor:
    """The rows of all ranks, (A, ...), in the order of ranks; see :meth:`histill.distributed.Ranks.gather`."""
    gathered: Tensor = _GatherRows.apply(rows_B)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_B: Tensor) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        counts_R = [torch.zeros(1, dtype=torch.int64, device=rows_B.device) for _ in range(world)]
        dist.all_gather(counts_R, torch.tensor([len(rows_B)], device=rows_B.device))
        counts = [int(count) for count in counts_R]
        # Ranks may hold different numbers of rows, and all_gather takes equal ones: the shorter are padded.
        padded_M = rows_B.new_zeros(max(counts), *rows_B.shape[1:])
        padded_M[: len(rows_B)] = rows_B
        parts_RM = [torch.empty_like(padded_M) for _ in range(world)]
        dist.all_gather(parts_RM, padded_M)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([part_M[:count] for part_M, count in zip(parts_RM, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor) -> Tensor:
        grad_A = grad_A.contiguous().clone()
        dist.all_reduce(grad_A)
        return grad_A[ctx.own]
