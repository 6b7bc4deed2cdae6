"""Checkpoints of a run: one safetensors file a step, whole or absent; the last few are kept. No teacher weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from histill import files
from histill.distill.parallel import like, whole
from histill.distributed import Ranks
from histill.errors import RunError

__all__ = ["TrainingState", "latest", "load", "save"]

_NAME = re.compile(r"step_(\d{8})\.safetensors")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds."""

    modules: dict[str, nn.Module]
    """Name -> module (student, heads, average); the optimizers' parameters are among theirs."""
    optimisers: Sequence[torch.optim.Optimizer]
    """AdamW or others whose state holds tensors only."""
    failed: dict[str, str] = field(default_factory=dict)
    """Student -> why it learns no more."""


def save(folder: Path, step: int, state: TrainingState, *, keep: int, ranks: Ranks | None = None) -> Path:
    """Write the state before ``step`` and remove all but the last ``keep`` checkpoints.

    The file does not depend on the number of ranks: sharded tensors are written whole, by the first rank. Every rank
    must call this.

    Parameters
    ----------
    folder
        The run's checkpoint folder.
    step
        The next step.
    state
        What is saved.
    keep
        Number of checkpoints that stay.
    ranks
        Place in the run; one rank if None.
    """
    first = ranks is None or ranks.first
    tensors: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> None:
        value = whole(tensor.detach())
        if first:
            tensors[name] = value.cpu().contiguous()

    for name, module in state.modules.items():
        for key, value in module.state_dict().items():
            take(f"{name}/{key}", value)
    for name, (parameter, optimiser) in _trained(state).items():
        for key, value in optimiser.state.get(parameter, {}).items():
            take(f"optimiser/{key}/{name}", value)
    target = folder / f"step_{step:08d}.safetensors"
    if first:
        with files.atomic_path(target) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step), "failed": json.dumps(state.failed)})
        for old in _steps(folder)[:-keep]:
            old.unlink()
    if ranks is not None:
        ranks.wait()
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return next(reversed(_steps(folder)), None)


def load(path: Path, state: TrainingState) -> tuple[int, dict[str, str]]:
    """Restore a checkpoint in place, strictly; returns its step, and the students that had failed by then.

    Every rank reads the file, which must lie where all of them can see it; sharded tensors keep their share.

    Raises
    ------
    RunError
        When the file is damaged or belongs to another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            step, failed = int(metadata["step"]), json.loads(metadata.get("failed", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            "a checkpoint cannot be read",
            where=path,
            got=error,
            remedy="remove it: the run goes on from the one before",
        ) from None
    try:
        for name, module in state.modules.items():
            prefix, patterns = f"{name}/", module.state_dict()
            found = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            placed = {key: like(value, patterns[key]) if key in patterns else value for key, value in found.items()}
            module.load_state_dict(placed, strict=True)
        for optimiser in state.optimisers:
            optimiser.state.clear()
        for name, (parameter, optimiser) in _trained(state).items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimiser/{key}/{name}")
                if value is not None:  # fused AdamW counts steps on the parameter's device too
                    is_count = key == "step"
                    optimiser.state[parameter][key] = value.to(parameter.device) if is_count else like(value, parameter)
    except RuntimeError as error:
        raise RunError("a checkpoint does not fit this run", where=path, got=error) from None
    return step, failed


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*.safetensors") if _NAME.fullmatch(path.name))


def _trained(state: TrainingState) -> dict[str, tuple[nn.Parameter, torch.optim.Optimizer]]:
    """Name -> parameter and the optimizer that moves it."""
    of = {parameter: each for each in state.optimisers for group in each.param_groups for parameter in group["params"]}
    return {
        f"{name}.{key}": (parameter, of[parameter])
        for name, module in state.modules.items()
        for key, parameter in module.named_parameters()
        if parameter in of
    }
