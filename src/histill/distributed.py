"""Ranks: who am I among the processes of this run, and sums over them.

Pure code gets its collectives as arguments (``reduce``), so that it runs without a process group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Ranks", "join"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place in the run."""

    rank: int = 0
    """From 0 to ``world`` - 1."""
    world: int = 1
    """Number of processes."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place and without a gradient; the tensor itself with one rank."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum over the ranks, in place and without a gradient."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor


def join() -> Ranks:
    """Join the process group that ``torchrun`` announces in the environment; one rank without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size())
