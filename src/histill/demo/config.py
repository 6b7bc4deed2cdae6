"""What the demo can be told. Imports no torch: the command line reads this module alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histill.errors import ConfigError

__all__ = ["GLOBAL_PX", "LOCAL_PX", "SLIDES", "STUDENT", "TILE_PX", "DemoConfig"]

STUDENT = "vit-nano"
"""The student that is taught."""
TILE_PX = 128
"""Side of a drawn tile, pixels of 0.5 microns."""
GLOBAL_PX, LOCAL_PX = 112, 56
"""Sides of the crops; the checks and the speeds are measured at the global one."""
SLIDES = 24
"""Labelled slides; every third one is a test slide."""

_KINDS = 4
_FEWEST_TILES = SLIDES * _KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """A small distillation on drawn tissue, offline, with a report."""

    out: Path = Path("histill-demo")
    """Folder of the demo: a new or empty one, or that of a demo that was cut short, which then goes on."""
    minutes: float = 3.5
    """Length of the whole demo in minutes; training gets what drawing, checks and the report leave of it."""
    seed: int = 0
    """Seed of everything that is drawn, tissue and training."""
    tiles: int = 2_000
    """Labelled tiles of tissue to draw; beside them come fields that are drawn under every stain and scanner."""

    def __post_init__(self) -> None:
        """Check each field."""
        for name, holds, allowed in (
            ("minutes", self.minutes > 0, "above 0"),
            ("seed", self.seed >= 0, "0 or more"),
            ("tiles", self.tiles >= _FEWEST_TILES, f"{_FEWEST_TILES} or more, for {SLIDES} slides of {_KINDS} kinds"),
        ):
            if not holds:
                raise ConfigError("out of range", where=f"--{name}", got=getattr(self, name), allowed=allowed)

    @property
    def fields(self) -> int:
        """Fields to draw under every stain and scanner."""
        return max(16, min(120, self.tiles // 16))
