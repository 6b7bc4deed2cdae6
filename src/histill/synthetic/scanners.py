"""Scanners: from transmitted light to the 8-bit image of one instrument.

Shapes: H height, W width, S stains, C colours (red, green, blue).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from histill.errors import ConfigError, nearest
from histill.synthetic.stains import RGB, StainSpec, beer_lambert
from histill.synthetic.texture import Array

__all__ = ["SCANNERS", "ScannerSpec", "render", "scanner_spec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannerSpec:
    """One scanner, in the order in which light passes it."""

    name: str
    """The key in :data:`SCANNERS`."""
    blur_px: float = 0.0
    """Standard deviation of the optics' blur, in pixels."""
    matrix: tuple[RGB, RGB, RGB] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """Colour matrix; each row sums to 1, so that white stays white."""
    white: RGB = (1.0, 1.0, 1.0)
    """Colour of blank glass, from 0 to 1."""
    gamma: float = 1.0
    """Exponent on the values; above 1 is darker in the middle."""
    noise: float = 0.0
    """Standard deviation of the photon noise at full light, from 0 to 1."""
    jpeg_quality: int | None = None
    """Quality of the JPEG compression inside the scanner (4:2:2), 1 to 100; None for no compression."""

    def __post_init__(self) -> None:
        rows = [sum(row) for row in self.matrix]
        if any(abs(row - 1.0) > 1e-6 for row in rows):
            raise ConfigError("each row of a colour matrix sums to 1", where=f"scanner {self.name}", got=rows)
        if self.blur_px < 0 or self.noise < 0 or self.gamma <= 0:
            raise ConfigError(
                "blur and noise are not negative and gamma is above 0",
                where=f"scanner {self.name}",
                got=(self.blur_px, self.noise, self.gamma),
            )


SCANNERS: dict[str, ScannerSpec] = {
    spec.name: spec
    for spec in (
        ScannerSpec(name="ideal"),  # the Beer-Lambert values, rounded
        ScannerSpec(  # neutral, sharp
            name="aurora",
            blur_px=0.55,
            matrix=((0.96, 0.04, 0.00), (0.02, 0.95, 0.03), (0.00, 0.05, 0.95)),
            white=(0.955, 0.955, 0.960),
            gamma=1.0,
            noise=0.010,
            jpeg_quality=85,
        ),
        ScannerSpec(  # cold and saturated
            name="boreas",
            blur_px=0.75,
            matrix=((1.10, -0.09, -0.01), (-0.04, 1.07, -0.03), (0.02, -0.10, 1.08)),
            white=(0.905, 0.930, 0.965),
            gamma=1.08,
            noise=0.012,
            jpeg_quality=80,
        ),
        ScannerSpec(  # warm, pale, a little soft
            name="cinder",
            blur_px=1.05,
            matrix=((0.90, 0.08, 0.02), (0.06, 0.90, 0.04), (0.02, 0.16, 0.82)),
            white=(0.985, 0.960, 0.925),
            gamma=0.82,
            noise=0.016,
            jpeg_quality=75,
        ),
        ScannerSpec(  # dark and purplish, noisy
            name="dusk",
            blur_px=0.80,
            matrix=((0.92, 0.12, -0.04), (0.05, 0.98, -0.03), (0.06, 0.02, 0.92)),
            white=(0.895, 0.875, 0.915),
            gamma=1.15,
            noise=0.024,
            jpeg_quality=80,
        ),
    )
}
"""Scanners by name. Invented, not measured; they differ about as much as instruments of several makers do."""


def scanner_spec(name: str) -> ScannerSpec:
    """Look a scanner up; an unknown name is a :class:`~histill.errors.ConfigError` with the nearest names."""
    if name not in SCANNERS:
        raise ConfigError(f"there is no scanner '{name}'", allowed=", ".join(SCANNERS), remedy=nearest(name, SCANNERS))
    return SCANNERS[name]


def render(concentrations_HWS: Array, stain: StainSpec, scanner: ScannerSpec, seed: int) -> NDArray[np.uint8]:
    """Scan a section: the geometry never changes, so renderings of one section are registered.

    Parameters
    ----------
    concentrations_HWS
        Haematoxylin, eosin and residual, as :func:`histill.synthetic.draw_tile` gives them.
    stain, scanner
        Which protocol and which instrument.
    seed
        Of the noise.

    Returns
    -------
    (H, W, 3) uint8, RGB.
    """
    light_HWC = beer_lambert(concentrations_HWS, stain)
    if scanner.blur_px:
        gaussian_filter(light_HWC, (scanner.blur_px, scanner.blur_px, 0.0), truncate=3.0, output=light_HWC)
    mixed_HWC = np.zeros_like(light_HWC)
    for index, column in enumerate(np.asarray(scanner.matrix, dtype=np.float32).T):
        mixed_HWC += light_HWC[..., index, None] * column
    value_HWC = np.clip(mixed_HWC, 0.0, 1.0)
    if scanner.noise:
        rng = np.random.default_rng(seed)
        value_HWC += np.float32(scanner.noise) * np.sqrt(value_HWC) * rng.standard_normal(value_HWC.shape, np.float32)
        np.clip(value_HWC, 0.0, 1.0, out=value_HWC)
    if scanner.gamma != 1.0:
        value_HWC **= np.float32(scanner.gamma)
    value_HWC *= np.asarray(scanner.white, dtype=np.float32)
    image_HWC: NDArray[np.uint8] = np.rint(value_HWC * 255.0).astype(np.uint8)
    if scanner.jpeg_quality is None:
        return image_HWC
    coded = simplejpeg.encode_jpeg(image_HWC, quality=scanner.jpeg_quality, colorspace="RGB", colorsubsampling="422")
    decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(coded, colorspace="RGB")
    return decoded
