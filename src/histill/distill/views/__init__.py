"""Multi-crop views of a batch of tiles: cut, turned, blurred and coloured in batches, on the training device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from histill.distill.views.config import ViewConfig

if TYPE_CHECKING:
    from histill.distill.views.make import Views, make_views

__all__ = ["ViewConfig", "Views", "make_views"]


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name in ("Views", "make_views"):
        from histill.distill.views import make

        return getattr(make, name)
    raise AttributeError(f"module 'histill.distill.views' has no attribute {name!r}")
