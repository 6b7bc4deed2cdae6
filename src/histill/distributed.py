"""Ranks: who am I among the processes of this run, and what all of them know together.

Pure code gets its collectives as arguments (``reduce``, ``gather``), so that it runs without a process group.

Shapes: B rows of this rank, A rows of all ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from histill.errors import RunError

if TYPE_CHECKING:
    import torch

__all__ = ["Ranks", "join", "leave", "others_may_end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Place of this process in the run."""

    rank: int = 0
    """From 0 to ``world`` - 1."""
    world: int = 1
    """Number of processes."""

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

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

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (B, ...) of all ranks one below the other, (A, ...), in the order of ranks; B may differ.

        A gradient flows back: each rank's rows get the sum of what all ranks say of them.
        """
        if self.world == 1:
            return rows
        from histill.collectives import gather_rows

        return gather_rows(rows)

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON-ready value of every rank, in the order of ranks."""
        if self.world == 1:
            return [value]
        import torch

        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(text)])).tolist()
        whole = bytes(self.gather(text).numpy())
        ends = [sum(sizes[: rank + 1]) for rank in range(self.world)]
        return [json.loads(whole[end - size : end]) for end, size in zip(ends, sizes, strict=True)]

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()


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

    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():  # else it may still run on the CPU
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return Ranks(rank=dist.get_rank(), world=dist.get_world_size())


def leave(ranks: Ranks) -> None:
    """Take the process group down, at the end of a command."""
    if ranks.world > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


@contextmanager
def others_may_end(ranks: Ranks) -> Iterator[None]:
    """Say plainly that another rank has ended, where a collective fails because of it.

    Raises
    ------
    RunError
        In place of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1:
            raise
        import torch.distributed as dist

        # gloo raises bare RuntimeErrors from C++
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in _BACKENDS):
            raise
        raise RunError(
            "another process of this run has ended",
            where=f"rank {ranks.rank} of {ranks.world} noticed it",
            got=str(error).splitlines()[0],
            remedy="its own message says why, if it was not killed; the same command goes on from the last checkpoint",
        ) from None


_BACKENDS = ("gloo", "nccl", "connection closed by peer", "connection reset")
