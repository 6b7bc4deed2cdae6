"""Checkpoints of a run: one safetensors file a step, whole or absent; the last few are kept. No teacher weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from histill import files
from histill.errors import RunError

__all__ = ["latest", "load", "save"]

_NAME = re.compile(r"step_(\d{8})\.safetensors")


def save(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    *,
    keep: int,
) -> Path:
    """Write the state before ``step`` and remove all but the last ``keep`` checkpoints.

    Parameters
    ----------
    folder
        The run's checkpoint folder.
    step
        The next step.
    modules
        Name -> module (student, heads, average); the optimizer's parameters are among theirs.
    optimiser
        AdamW or another optimizer whose state holds tensors only.
    keep
        Number of checkpoints that stay.
    """
    tensors = {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }
    for parameter_name, parameter in _named_parameters(modules, optimiser).items():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{key}/{parameter_name}"] = value.detach().cpu().contiguous()
    target = folder / f"step_{step:08d}.safetensors"
    with files.atomic_path(target) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})
    for old in _steps(folder)[:-keep]:
        old.unlink()
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, or None."""
    return next(reversed(_steps(folder)), None)


def load(path: Path, modules: dict[str, nn.Module], optimiser: torch.optim.Optimizer) -> int:
    """Restore a checkpoint in place, strictly, and return its step.

    Raises
    ------
    RunError
        When the file is damaged or belongs to another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            step = int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise RunError(
            "a checkpoint cannot be read",
            where=path,
            got=error,
            remedy="remove it: the run goes on from the one before",
        ) from None
    try:
        for name, module in modules.items():
            prefix = f"{name}/"
            state = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            module.load_state_dict(state, strict=True)
        optimiser.state.clear()
        for parameter_name, parameter in _named_parameters(modules, optimiser).items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimiser/{key}/{parameter_name}")
                if value is not None:
                    optimiser.state[parameter][key] = value.to(parameter.device)  # fused AdamW counts steps there too
    except RuntimeError as error:
        raise RunError("a checkpoint does not fit this run", where=path, got=error) from None
    return step


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*.safetensors") if _NAME.fullmatch(path.name))


def _named_parameters(modules: dict[str, nn.Module], optimiser: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    trained = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    return {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter in trained
    }
