"""Teacher to student. The package is a function too: ``histill.distill(config)``."""

from __future__ import annotations

import sys
from types import ModuleType
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


class _CallablePackage(ModuleType):
    """``histill.distill`` is this package as soon as any part of it is imported, and a function to its users."""

    def __call__(self, config: DistillConfig, **options: Any) -> dict[str, Any] | None:
        from histill.distill.run import distill

        return distill(config, **options)


sys.modules[__name__].__class__ = _CallablePackage
