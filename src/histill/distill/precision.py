"""What a run computes with: device, precision, and how the processor's memory is kept."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import nn

__all__ = ["autocast_for", "keep_freed_memory", "plain_attention_on_cpu", "store_products_in"]


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed by the processor itself, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast_for(device: torch.device, precision: Literal["auto", "bf16", "fp32"]) -> torch.autocast:
    """The autocast context of the networks; it can be entered many times."""
    enabled = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def plain_attention_on_cpu(model: nn.Module, device: torch.device) -> None:
    """Let timm compute attention as two products and a softmax when the model runs on a CPU.

    For the short sequences of tiles torch's fused CPU kernel is the slower one: its backward took 27 ms against 4 ms
    for 64 x 3 heads x 69 tokens in bfloat16 (2 cores, torch 2.14). On a GPU the fused kernel stays.
    """
    if device.type == "cpu":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]


def store_products_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of all matrix products of a frozen model in the type that autocast computes them in.

    The numbers stay the same, bit for bit: autocast rounds these weights on each call. Half the memory, and no rounding
    at each step. Norms, layer scales and position embeddings stay in float32, and with them the residual stream.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)


# Parameters of glibc's mallopt, from <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory(device: torch.device) -> bool:
    """Let a process that trains on a CPU reuse the memory of its tensors instead of giving it back at every step.

    glibc maps each large tensor anew, and the kernel clears every page of it at its first touch: 870,000 page faults in
    twelve steps of preset `cpu`, and a seventh of their time. With its mappings off and its trimming at the largest
    value that it takes (2 GiB) they come from a heap that stays. Numbers do not change. Returns whether it was asked
    for: only with glibc (musl and other systems have no such parameters).
    """
    if device.type != "cpu":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    return all(libc.mallopt(name, value) == 1 for name, value in wanted)
