"""What the demo can be told. Imports no torch: the command line reads this module alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histill.errors import ConfigError

__all__ = ["GLOBAL_PX", "LOCAL_PX", "SLIDE_PX", "STUDENT", "TILE_PX", "DemoConfig"]

STUDENT = "vit-nano"
"""The student that is taught."""
SLIDE_PX = 1536
"""Side of a drawn slide, pixels of 0.5 microns: 0.8 mm."""
TILE_PX = 128
"""Side of a tile, pixels of 0.5 microns."""
GLOBAL_PX, LOCAL_PX = 112, 56
"""Sides of the crops; the checks and the speeds are measured at the global one."""

_FEWEST_SLIDES = 6  # four to learn from and two to test on: with less, a kind of tissue is often missing in one part
_SLIDES_A_SECTION = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """A small distillation on drawn slides, offline, with a report."""

    out: Path = Path("histill-demo")
    """Folder of the demo: a new or empty one, or that of a demo that was cut short, which then goes on."""
    steps: int = 256
    """Training steps: the same result everywhere, sooner or later."""
    seed: int = 0
    """Seed of everything that is drawn, tissue and training."""
    slides: int = 18
    """Slides to draw, every third one for testing; beside them come sections under every stain and scanner."""

    def __post_init__(self) -> None:
        """Check each field."""
        for name, holds, allowed in (
            ("steps", self.steps >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("slides", self.slides >= _FEWEST_SLIDES, f"{_FEWEST_SLIDES} or more"),
        ):
            if not holds:
                raise ConfigError("out of range", where=f"--{name}", got=getattr(self, name), allowed=allowed)

    @property
    def sections(self) -> int:
        """Sections to draw under every stain and scanner, for the checks alone."""
        return max(1, self.slides // _SLIDES_A_SECTION)
