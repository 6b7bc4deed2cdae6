"""One run on many processes: DDP, FSDP2, gradients that wait, and compiled blocks. torch does the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from histill.distributed import Ranks
from histill.errors import ModelError

__all__ = [
    "blocks_of",
    "compile_blocks",
    "gradients_wait",
    "like",
    "local",
    "replicate",
    "same_as_first",
    "shard",
    "whole",
]

_COMPILED = 64


def blocks_of(model: Any) -> nn.ModuleList | nn.Sequential:
    """The blocks of a vision transformer: of timm, or of transformers inside histill's wrapper.

    Raises
    ------
    ModelError
        It keeps them elsewhere.
    """
    for path in ("blocks", "inner.encoder.layer", "inner.layer"):
        with suppress(AttributeError):
            found: Any = model.get_submodule(path)
            if isinstance(found, nn.ModuleList | nn.Sequential):
                return found
    raise ModelError(
        "the blocks of this model are not known, so it can be neither sharded nor compiled block by block",
        got=type(model).__name__,
        remedy="--scale.teachers replicate --scale.compile False",
    )


def compile_blocks(model: Any) -> None:
    """Compile each block of a vision transformer in place; equal blocks share one compiled code.

    Every size and number of crops is a code of its own, and all models of a run share torch's limit of them; its eight
    are soon spent on the fit and the checks, and the rest would run uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(_COMPILED, torch._dynamo.config.recompile_limit)
    for block in blocks_of(model):
        block.compile(dynamic=False)


@torch.no_grad()
def same_as_first(*modules: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers; each calls it."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.data, 0)


def replicate(module: nn.Module) -> nn.Module:
    """DDP around a module: gradients are averaged over the ranks while the backward pass still runs."""
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(module: nn.Module, blocks: nn.ModuleList | nn.Sequential, device: torch.device, ranks: Ranks) -> None:
    """FSDP2, in place: each block is gathered when its turn comes, the rest with the module's own forward."""
    mesh = init_device_mesh(device.type, (ranks.world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


@contextmanager
def gradients_wait(module: nn.Module, waiting: bool) -> Iterator[None]:
    """While ``waiting``, gradients add up on each rank; they travel with the first backward pass that does not wait."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not waiting)
    if waiting and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as a plain one; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """A plain tensor, on the device of ``pattern`` and sharded in the same way; every rank must ask for it."""
    value = value.to(pattern.device)
    return distribute_tensor(value, pattern.device_mesh, pattern.placements) if isinstance(pattern, DTensor) else value
