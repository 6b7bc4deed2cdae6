"""Engines: one contract, several libraries that run a model."""

from __future__ import annotations

from histill.models.engines.engine import ENGINES, Engine, LoadedEngine
from histill.models.engines.open import open_engine

__all__ = ["ENGINES", "Engine", "LoadedEngine", "open_engine"]
