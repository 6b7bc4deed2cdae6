"""What a run computes with."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from histill.distill.precision import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from histill.distill.precision import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory(torch.device("cpu"))
for _ in range(10):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_kept_memory_is_not_cleared_by_the_kernel_again() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)
        for how in ("as it comes", "kept")
    }
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB. The heap grows until its gaps fit (three times at most, as far
    # as was seen), so the first ten allocations do not count, and of the twenty that do four may still make it grow.
    assert faults["as it comes"] >= 20 * 32
    assert faults["kept"] <= 0.2 * faults["as it comes"]


def test_memory_of_a_gpu_is_not_meant() -> None:
    assert not keep_freed_memory(torch.device("cuda"))
