"""What the search for tissue and the filters of tiles can be told. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from histill.errors import ConfigError

__all__ = ["QualityOptions", "TissueOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueOptions:
    """How tissue is told from glass."""

    mpp: float = 8.0
    """Scale of the mask, microns per mask pixel."""
    saturation_floor: float = 0.05
    """Saturation (HSV, 0 to 1) that tissue has at least: Otsu's threshold is not let below it, so that a slide with
    glass alone has no tissue. Glass has up to 0.04 on the scanners that were looked at."""
    saturation_ceiling: float = 0.1
    """Saturation from which a pixel is tissue in any case: Otsu's threshold is not let above it, so that a slide that
    is all tissue is not cut into pale and strong. Stained tissue has 0.12 and more at 8 um/px."""
    closing_um: float = 24.0
    """Gaps up to about twice this width are closed, microns."""
    piece_min_um2: float = 20_000.0
    """Smaller pieces are dust, square microns (a tile of 224 px at 0.5 um/px covers 12,544)."""
    hole_min_um2: float = 10_000.0
    """Smaller holes belong to the tissue, square microns (larger ones would let tiles of glass count as tissue)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.mpp < float("inf"):
            raise ConfigError("a scale is positive", where="tissue.mpp", got=self.mpp, allowed="above 0, as 8")
        if not 0 <= self.saturation_floor <= self.saturation_ceiling <= 1:
            raise ConfigError(
                "the limits of Otsu's threshold are not in order",
                where="tissue.saturation_floor, tissue.saturation_ceiling",
                got=f"{self.saturation_floor}, {self.saturation_ceiling}",
                allowed="0 <= floor <= ceiling <= 1",
            )
        for name in ("closing_um", "piece_min_um2", "hole_min_um2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    "a length or an area is not negative",
                    where=f"tissue.{name}",
                    got=getattr(self, name),
                    allowed="0 or more",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions:
    """Which tiles are left out although there is tissue. The defaults keep every real tile that they were tried on."""

    white_max: float = 0.97
    """Share of a tile's pixels that may be near white (glass, holes, fat); 1: off."""
    black_max: float = 0.5
    """Share of a tile's pixels that may be near black (borders of a scan, black marker); 1: off."""
    blur_min: float = 25.0
    """Least variance of the Laplacian of grey (0 to 255), judged at about 0.5 um/px; 0: off. Sharp tissue has 100 to
    4,000, the same blurred by a sigma of 1.5 um has 0.3 to 12."""
    pen_max: float = 0.25
    """Share of a tile's pixels that may have the colour of blue, green or red marker ink; 1: off. Switch it off for
    stains that are blue or green themselves (trichrome, alcian blue)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("white_max", "black_max", "pen_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    "a share lies between 0 and 1", where=f"quality.{name}", got=getattr(self, name), allowed="0 to 1"
                )
        if not 0 <= self.blur_min < float("inf"):
            raise ConfigError(
                "a variance is not negative", where="quality.blur_min", got=self.blur_min, allowed="0 or more"
            )
