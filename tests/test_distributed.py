from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

from histill.distributed import Ranks, join
from histill.errors import RunError

_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_rank_0_of_1_and_its_collectives_change_nothing() -> None:
    ranks = join()
    assert ranks == Ranks(rank=0, world=1)
    values = torch.tensor([1.0, -2.0])
    assert ranks.sum_(values) is values
    assert ranks.max_(values) is values
    assert values.tolist() == [1.0, -2.0]


def test_a_half_announced_group_is_an_error_with_the_missing_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunError, match=r"without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        join()


_RANK = """
import torch, torch.distributed as dist
from histill.distributed import join
ranks = join()
own = torch.tensor([1.0 + ranks.rank, 5.0 - 10.0 * ranks.rank])
print(ranks.rank, ranks.world, ranks.sum_(own.clone()).tolist(), ranks.max_(own.clone()).tolist())
dist.destroy_process_group()
"""


def test_two_ranks_sum_and_take_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        values = ("2", str(rank), str(rank), "127.0.0.1", str(port))
        for name, value in zip(_VARIABLES, values, strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        processes.append(subprocess.Popen([sys.executable, "-c", _RANK], stdout=subprocess.PIPE, text=True))
    lines = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert lines == [f"{rank} 2 [3.0, 0.0] [2.0, 5.0]" for rank in range(2)]
