"""Ranks: who am I among the processes of this run, and sums over them.

Pure code gets its collectives as arguments (``reduce``), so that it runs without a process group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from histill.errors import RunError

if TYPE_CHECKING:
    import torch

__all__ = ["Ranks", "join"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Place of this process in the run."""

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
    """Join the process group that ``torchrun`` announces in the environment; one rank without it.

    On a machine with GPUs each rank takes its own as the current device, so that ``"cuda"`` means that one.

    Raises
    ------
    RunError
        When ``WORLD_SIZE`` announces several ranks and the rest of torchrun's variables is missing.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RunError(
            "the environment announces several ranks but not how they meet",
            got=f"WORLD_SIZE={world} without {', '.join(missing)}",
            remedy="start with torchrun, or unset WORLD_SIZE",
        )
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size())
