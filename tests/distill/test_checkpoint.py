from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from histill.distill import checkpoint
from histill.distill.checkpoint import TrainingState
from histill.errors import RunError


def built(seed: int) -> tuple[dict[str, nn.Module], torch.optim.AdamW]:
    torch.manual_seed(seed)
    modules: dict[str, nn.Module] = {
        "student": nn.Linear(4, 3),
        "task": nn.Sequential(nn.Linear(3, 2)),
        "average": nn.Linear(4, 3),
    }
    modules["average"].requires_grad_(False)
    trained = [parameter for name in ("student", "task") for parameter in modules[name].parameters()]
    return modules, torch.optim.AdamW([{"params": trained[:2]}, {"params": trained[2:]}], lr=0.1, fused=True)


def step(modules: dict[str, nn.Module], optimiser: torch.optim.AdamW, number: int) -> float:
    x = torch.linspace(-1, 1, 8).reshape(2, 4) * (number + 1)
    loss = modules["task"](modules["student"](x)).square().sum()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    modules, optimiser = built(0)
    whole = [step(modules, optimiser, number) for number in range(6)]
    modules, optimiser = built(0)
    for number in range(3):
        step(modules, optimiser, number)
    path = checkpoint.save(tmp_path, 3, TrainingState(modules, [optimiser]), keep=2)
    modules, optimiser = built(99)
    assert checkpoint.load(path, TrainingState(modules, [optimiser])) == (3, {})
    assert [step(modules, optimiser, number) for number in range(3, 6)] == whole[3:]


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    modules, optimiser = built(0)
    for number in (0, 5, 10, 15):
        checkpoint.save(tmp_path, number, TrainingState(modules, [optimiser]), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000010.safetensors",
        "step_00000015.safetensors",
    ]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000015.safetensors"
    assert checkpoint.latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    modules, optimiser = built(0)
    path = checkpoint.save(tmp_path, 3, TrainingState(modules, [optimiser]), keep=1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="step_00000003"):
        checkpoint.load(path, TrainingState(modules, [optimiser]))


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    modules, optimiser = built(0)
    path = checkpoint.save(tmp_path, 3, TrainingState(modules, [optimiser]), keep=1)
    modules["student"] = nn.Linear(5, 3)
    with pytest.raises(RunError, match="does not fit"):
        checkpoint.load(path, TrainingState(modules, [optimiser]))
