"""histill: small, robust pathology encoders, distilled from large ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from histill.distill import distill
    from histill.extract import extract
    from histill.models import load_encoder
    from histill.models.engines import open_engine

__all__ = ["__version__", "distill", "extract", "load_encoder", "open_engine"]

_WHERE = {
    "distill": "histill.distill",
    "extract": "histill.extract",
    "load_encoder": "histill.models",
    "open_engine": "histill.models.engines",
}


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that ``import histill`` stays light."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'histill' has no attribute {name!r}")
