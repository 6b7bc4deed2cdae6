"""How the views of a tile are drawn. Imports no torch, so that the command line can read it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from histill.errors import ConfigError

__all__ = ["ViewConfig"]

MAX_STRENGTH = 3.0
MAX_BLUR_SIGMA_PX = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """Multi-crop views: how many, how large, and how much they differ.

    The crops are those of DINOv2 (Oquab et al. 2023); the colour part is made for H&E: no solarisation, no grey-scale.
    """

    global_px: int = 0
    """Side of a global crop, pixels; 0: the largest multiple of two patches within the tiles, the teacher's input and
    224 px."""
    local_px: int = 0
    """Side of a local crop, pixels; 0: about 0.44 of the global side, a multiple of the patch size."""
    n_global: int = 2
    """Global crops per tile, at least 1; the teacher sees only these."""
    n_local: int = 8
    """Local crops per tile, 0 or more; only the student sees these."""
    global_area: tuple[float, float] = (0.32, 1.0)
    """Least and greatest share of the tile's area in a global crop."""
    local_area: tuple[float, float] = (0.05, 0.32)
    """Least and greatest share of the tile's area in a local crop."""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """Least and greatest width / height of a crop, before it is resized to a square."""
    flips: bool = True
    """Mirror half of the crops."""
    rotations: bool = True
    """Turn each crop by 0, 90, 180 or 270 degrees, equally often."""
    colour: float = 1.0
    """Strength of brightness, contrast, saturation and hue jitter; 0: none, 1: the usual amount, at most 3."""
    stain: float = 1.0
    """Strength of haematoxylin and eosin jitter in optical density; 0: none, 1: the usual amount, at most 3."""
    scanner: float = 0.0
    """Strength of another scanner's look: gamma and mixing of the colours, and noise; 0: none, 1: a scanner of another
    maker, at most 3."""
    blur_probability: float = 0.3
    """Share of crops that are blurred."""
    blur_sigma_px: tuple[float, float] = (0.2, 1.5)
    """Least and greatest standard deviation of the Gaussian blur, pixels of the crop."""
    teacher_view: Literal["same", "clean", "other"] = "same"
    """What the teacher sees: the student's crop; the same crop without blur, colour, stain and scanner changes; or the
    same crop with other draws of them, so that the two look at two renderings of one piece of tissue."""

    def __post_init__(self) -> None:
        for name, least in (("global_px", 0), ("local_px", 0), ("n_global", 1), ("n_local", 0)):
            self._check(name, getattr(self, name) >= least, f"{least} or more")
        for name in ("global_area", "local_area"):
            low, high = getattr(self, name)
            self._check(name, 0 < low <= high <= 1, "two shares, 0 < least <= greatest <= 1")
        low, high = self.aspect
        self._check("aspect", 0 < low <= high < math.inf, "two ratios, 0 < least <= greatest")
        for name in ("colour", "stain", "scanner"):
            self._check(name, 0 <= getattr(self, name) <= MAX_STRENGTH, f"0 to {MAX_STRENGTH:g}")
        self._check("blur_probability", 0 <= self.blur_probability <= 1, "0 to 1")
        low, high = self.blur_sigma_px
        self._check(
            "blur_sigma_px",
            0 < low <= high <= MAX_BLUR_SIGMA_PX,
            f"two lengths in pixels, 0 < least <= greatest <= {MAX_BLUR_SIGMA_PX:g}",
        )
        self._check("teacher_view", self.teacher_view in ("same", "clean", "other"), "same, clean, other")

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(
                "this setting of the views is out of range",
                where=f"views.{name}",
                got=getattr(self, name),
                allowed=allowed,
            )
