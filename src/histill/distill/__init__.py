"""Teacher to student. :func:`distill` runs one distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from histill.distill.config import DistillConfig
from histill.distill.presets import PRESETS

if TYPE_CHECKING:
    from histill.distill.run import distill

__all__ = ["PRESETS", "DistillConfig", "distill"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name == "distill":
        from histill.distill.run import distill

        return distill
    raise AttributeError(f"module 'histill.distill' has no attribute {name!r}")
