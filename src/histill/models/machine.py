"""What computes here, and how much memory it holds."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from histill.errors import ConfigError

__all__ = ["held_bytes", "peak_bytes", "pick_device", "processor_name"]


def pick_device(name: str) -> torch.device:
    """Find the device of ``--device``; ``auto`` is the first GPU, or else the CPU.

    Raises
    ------
    ConfigError
        torch knows no device of this name, it is neither CPU nor GPU, or this GPU cannot be reached.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = None
    with suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError("there is no such device", where="--device", got=name, allowed="auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError("this GPU cannot be reached", where="--device", got=name, allowed="auto or cpu here")
    return device


def processor_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def held_bytes(device: torch.device) -> int | None:
    """Bytes that are held now: by torch on a GPU, by the whole process on a processor; None where nobody tells.

    What earlier work left in the allocator's hands is given back first, or else the next work would use it unseen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
        return _resident("VmRSS")
    except (OSError, AttributeError, TypeError, StopIteration):
        return None


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held at the peak of a run, as :func:`held_bytes` counts them; None, without a run, where nobody tells.

    The peak that a process reports counts from its beginning; Linux sets it back to the present on request (proc(5),
    clear_refs).
    """
    if held_bytes(device) is None:
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    return _resident("VmHWM")


def _resident(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
