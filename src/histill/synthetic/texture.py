"""Noise and fibres: the textures that tissue is made of.

All textures are windows of a few periodic noise fields (the *atlas*), which are made once per process. A window
of another place costs a copy, so a tile needs no filtering of its own.

Shapes: H height, W width.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

__all__ = ["ATLAS_PX", "Array", "Mask", "atlas", "fibres", "noise"]

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

ATLAS_PX = 512
"""Period of the noise fields; a tile that is larger repeats them."""


@cache
def atlas(scale_px: float) -> Array:
    """Periodic band-passed Gaussian noise with structures of about ``scale_px``.

    Parameters
    ----------
    scale_px
        Standard deviation of the smoothing Gaussian, in pixels; a second one of three times that width is taken
        away, so that the mean over a few structures is near 0.

    Returns
    -------
    (512, 512) float32, mean 0, variance 1, read-only. Always the same for the same scale.
    """
    rng = np.random.default_rng([20011, round(scale_px * 1000)])
    white = np.fft.rfft2(rng.standard_normal((ATLAS_PX, ATLAS_PX)))
    frequency2 = np.fft.fftfreq(ATLAS_PX)[:, None] ** 2 + np.fft.rfftfreq(ATLAS_PX)[None, :] ** 2
    fall = -2.0 * np.pi**2 * scale_px**2
    field = np.fft.irfft2(white * (np.exp(fall * frequency2) - np.exp(9 * fall * frequency2)), s=(ATLAS_PX, ATLAS_PX))
    result: Array = ((field - field.mean()) / field.std()).astype(np.float32)
    result.flags.writeable = False
    return result


def noise(rng: np.random.Generator, scale_px: float, height: int, width: int) -> Array:
    """Cut a random window out of :func:`atlas`, mirrored at random: (H, W) float32.

    Parameters
    ----------
    rng
        Draws the place and the mirrors.
    scale_px
        Of the grain, see :func:`atlas`.
    height, width
        H and W.
    """
    top, left = rng.integers(ATLAS_PX, size=2)
    steps = rng.choice((-1, 1), size=2)
    rows = (top + steps[0] * np.arange(height)) % ATLAS_PX
    columns = (left + steps[1] * np.arange(width)) % ATLAS_PX
    window: Array = atlas(scale_px)[rows[:, None], columns[None, :]]
    return window


def fibres(
    rng: np.random.Generator, height: int, width: int, *, angle: float, waviness: float
) -> tuple[Array, Array, Array]:
    """Wavy parallel fibres: noise that is stretched along bent lines.

    Parameters
    ----------
    angle
        Main direction of the fibres, in radians from the x axis towards the y axis.
    waviness
        1 for ordinary collagen, 0 for straight fibres.

    Returns
    -------
    fibrils_HW, bundles_HW, across_HW
        Thin and thick fibres, float32 of about unit variance; and the coordinate across the fibres in pixels,
        whose level lines are the fibres (for aligning nuclei).
    """
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    bend = waviness * (9.0 * noise(rng, 45.0, height, width) + 1.6 * noise(rng, 11.0, height, width))
    across = (cos * y - sin * x + bend).astype(np.float32)
    along = (cos * x + sin * y).astype(np.float32)
    shift = rng.integers(ATLAS_PX, size=4)
    fibrils = map_coordinates(atlas(1.2), [across * 1.5 + shift[0], along * 0.13 + shift[1]], order=1, mode="grid-wrap")
    bundles = map_coordinates(
        atlas(2.5), [across * 0.55 + shift[2], along * 0.07 + shift[3]], order=1, mode="grid-wrap"
    )
    return fibrils, bundles, across
