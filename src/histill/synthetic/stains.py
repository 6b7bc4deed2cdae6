"""Stains: optical density vectors of the dyes, and the Beer-Lambert law.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual), C colours (red, green, blue).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from histill.errors import ConfigError, nearest
from histill.synthetic.texture import Array

__all__ = ["STAINS", "StainSpec", "beer_lambert", "stain_spec"]

RGB = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StainSpec:
    """One staining protocol.

    Each vector is the optical density (base 10) in red, green and blue that concentration 1 of the dye gives.
    """

    name: str
    """The key in :data:`STAINS`."""
    haematoxylin: RGB
    """Optical density of concentration 1."""
    eosin: RGB
    """Optical density of concentration 1."""
    residual: RGB
    """Optical density of concentration 1 of what is neither: red cells, pigment."""

    def __post_init__(self) -> None:
        for field in ("haematoxylin", "eosin", "residual"):
            vector = getattr(self, field)
            if len(vector) != 3 or min(vector) < 0 or max(vector) == 0:
                raise ConfigError(
                    "an optical density vector has three values, none negative, not all zero",
                    where=f"stain {self.name}, {field}",
                    got=vector,
                )


def _dye(direction: RGB, strength: float) -> RGB:
    """Optical densities of a dye with this direction, normalised, times the strength."""
    norm = sum(value * value for value in direction) ** 0.5
    red, green, blue = (strength * value / norm for value in direction)
    return red, green, blue


_RESIDUAL = (0.268, 0.570, 0.776)  # Ruifrok & Johnston's third vector (a brown), also near that of red cells

STAINS: dict[str, StainSpec] = {
    spec.name: spec
    for spec in (
        StainSpec(  # the published vectors
            name="ruifrok",
            haematoxylin=_dye((0.650, 0.704, 0.286), 1.0),
            eosin=_dye((0.072, 0.990, 0.105), 1.0),
            residual=_dye(_RESIDUAL, 1.0),
        ),
        StainSpec(  # regressive, strong nuclei, deep pink
            name="harris",
            haematoxylin=_dye((0.630, 0.690, 0.360), 1.12),
            eosin=_dye((0.100, 0.900, 0.390), 0.98),
            residual=_dye(_RESIDUAL, 1.0),
        ),
        StainSpec(  # progressive, bluer and paler nuclei
            name="mayer",
            haematoxylin=_dye((0.720, 0.640, 0.270), 0.90),
            eosin=_dye((0.080, 0.920, 0.300), 0.85),
            residual=_dye(_RESIDUAL, 1.0),
        ),
        StainSpec(  # reddish purple nuclei, orange eosin
            name="gill",
            haematoxylin=_dye((0.560, 0.730, 0.390), 1.00),
            eosin=_dye((0.060, 0.880, 0.470), 0.90),
            residual=_dye(_RESIDUAL, 1.0),
        ),
        StainSpec(  # blue-grey nuclei, purplish eosin
            name="carazzi",
            haematoxylin=_dye((0.690, 0.620, 0.370), 1.00),
            eosin=_dye((0.160, 0.940, 0.240), 0.95),
            residual=_dye(_RESIDUAL, 1.0),
        ),
        StainSpec(  # after years in the archive: haematoxylin has turned brownish, eosin has gone
            name="faded",
            haematoxylin=_dye((0.540, 0.660, 0.520), 0.75),
            eosin=_dye((0.080, 0.880, 0.470), 0.60),
            residual=_dye(_RESIDUAL, 1.0),
        ),
    )
}
"""Staining protocols by name. ``ruifrok`` holds the vectors of Ruifrok and Johnston, *Quantification of
histochemical staining by color deconvolution*, 2001; the others are modelled on how sections of these protocols
look, not measured."""


def stain_spec(name: str) -> StainSpec:
    """Look a stain up; an unknown name is a :class:`~histill.errors.ConfigError` with the nearest names."""
    if name not in STAINS:
        raise ConfigError(f"there is no stain '{name}'", allowed=", ".join(STAINS), remedy=nearest(name, STAINS))
    return STAINS[name]


def beer_lambert(concentrations_HWS: Array, stain: StainSpec) -> Array:
    """Light that passes a stained section.

    The Beer-Lambert law as in Ruifrok and Johnston (2001): the optical density -log10(I / I0) is the sum over the
    dyes of concentration times the dye's vector.

    Parameters
    ----------
    concentrations_HWS
        Haematoxylin, eosin and residual, not negative.
    stain
        The dyes' vectors.

    Returns
    -------
    (H, W, 3) float32, the transmitted share of the light from 0 to 1.
    """
    concentrations_HWS = np.asarray(concentrations_HWS, dtype=np.float32)
    density_HWC = np.zeros((*concentrations_HWS.shape[:2], 3), dtype=np.float32)
    for index, vector in enumerate((stain.haematoxylin, stain.eosin, stain.residual)):  # no BLAS: the same on any core
        density_HWC += concentrations_HWS[..., index, None] * np.asarray(vector, dtype=np.float32)
    return np.exp(density_HWC * np.float32(-np.log(10.0)))
