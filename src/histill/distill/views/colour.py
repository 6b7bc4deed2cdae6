"""Stain jitter in optical density and one colour matrix per crop.

Shapes: N crops, C = 3 colours (red, green, blue), P side of a crop, U draws per crop; 34: a matrix and a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "COLOUR_DRAWS",
    "DARKEST",
    "SCANNER_DRAWS",
    "STAIN_DRAWS",
    "Look",
    "add_noise",
    "apply_affine",
    "apply_stain",
    "draw_colour",
    "draw_look",
    "draw_stain",
    "noise_bank",
]

COLOUR_DRAWS = 4
"""Uniform draws per crop: brightness, contrast, saturation, hue."""

STAIN_DRAWS = 10
"""Uniform draws per crop: two concentrations, two offsets, two directions of three numbers."""

SCANNER_DRAWS = 14
"""Uniform draws per crop: three gammas, six mixings of colours, noise: how much and four for where it is taken."""

# At strength 1 each factor is drawn from 1 - x to 1 + x.
BRIGHTNESS = 0.1
CONTRAST = 0.15
SATURATION = 0.2
HUE_TURNS = 0.03
"""Greatest turn around the grey axis, of a whole turn."""

CONTRAST_PIVOT = 0.65
"""The grey level that contrast leaves alone: about the mean of an H&E tile."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Grey value of red, green and blue, ITU-R BT.601."""

HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])
"""Optical densities of the stains in red, green and blue. Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 2001."""

CONCENTRATION = 0.25
"""Greatest relative change of the amount of a stain."""
OFFSET = 0.03
"""Greatest change of the amount of a stain everywhere, optical density (base e)."""
DIRECTION = 0.06
"""Greatest change of each component of a stain's unit vector."""

GAMMA = 0.15
"""Greatest relative change of a colour's gamma."""
MIXING = 0.06
"""Greatest share of another colour in a colour; what is left is its own, so that grey stays grey."""
NOISE = 0.02
"""Greatest standard deviation of the noise, of full light."""
BANK_IMAGES = 8
"""Images of noise that all crops take theirs from."""

DARKEST = 1 / 255
"""Least value that has an optical density; darker pixels are taken as this."""


def draw_colour(uniform_NU: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """One affine colour map per crop: hue, then saturation, contrast and brightness, as (N, 3, 4).

    Hue turns the colour around the grey axis (Rodrigues' formula); saturation mixes with the grey value; contrast
    mixes with a constant grey; brightness multiplies. Nothing is cut to 0..1 in between.

    Parameters
    ----------
    uniform_NU
        ``COLOUR_DRAWS`` draws in [0, 1) for each crop.
    strength
        0: the identity.
    """
    signed_NU = strength * (2 * uniform_NU - 1)
    brightness_N, contrast_N, saturation_N = (1 + signed_NU[:, :3] * (BRIGHTNESS, CONTRAST, SATURATION)).T
    angle_N11 = (2 * math.pi * HUE_TURNS * signed_NU[:, 3])[:, None, None]
    grey = np.full((3, 3), 1 / 3)
    cross = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    hue_N33 = grey + np.cos(angle_N11) * (np.eye(3) - grey) + np.sin(angle_N11) * cross
    luma = np.broadcast_to(LUMA, (3, 3))
    saturate_N33 = luma + saturation_N[:, None, None] * (np.eye(3) - luma)
    matrix_N33 = (brightness_N * contrast_N)[:, None, None] * (saturate_N33 @ hue_N33)
    constant_N = brightness_N * (1 - contrast_N) * CONTRAST_PIVOT
    return np.concatenate([matrix_N33, np.broadcast_to(constant_N[:, None, None], (len(constant_N), 3, 1))], axis=2)


def draw_stain(uniform_NU: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """One map of optical densities per crop, as (N, 3, 4): ``OD' = M OD + b``.

    ``M = S' diag(a, 1) S^-1`` and ``b = S' (offset, 0)``: S has the unit vectors of haematoxylin, eosin and their
    normal as columns; S' the same with both stains' directions changed; a scales the amounts of the two stains.

    Parameters
    ----------
    uniform_NU
        ``STAIN_DRAWS`` draws in [0, 1) for each crop.
    strength
        0: the identity.
    """
    signed_NU = strength * (2 * uniform_NU - 1)
    stains_23 = np.stack([HAEMATOXYLIN, EOSIN])
    stains_23 /= np.linalg.norm(stains_23, axis=1, keepdims=True)
    changed_N23 = stains_23 + DIRECTION * signed_NU[:, 4:10].reshape(-1, 2, 3)
    changed_N23 /= np.linalg.norm(changed_N23, axis=2, keepdims=True)
    changed_N33 = _basis(changed_N23)
    amounts_N3 = np.ones((len(signed_NU), 3))
    amounts_N3[:, :2] += CONCENTRATION * signed_NU[:, 0:2]
    matrix_N33 = changed_N33 * amounts_N3[:, None, :] @ np.linalg.inv(_basis(stains_23))
    offset_N31 = changed_N33[:, :, :2] @ (OFFSET * signed_NU[:, 2:4, None])
    return np.concatenate([matrix_N33, offset_N31], axis=2)


@dataclass(frozen=True, slots=True)
class Look:
    """How each crop's colours are changed: three steps, of which None leaves out."""

    stain_N34: NDArray[np.float64] | None
    """Map of optical densities: stains, then the scanner's gammas."""
    colour_N34: NDArray[np.float64] | None
    """Map of colours: jitter, then the scanner's mixing."""
    noise_N: NDArray[np.float64] | None
    """Standard deviation of the noise."""
    place_N4: NDArray[np.float64] | None
    """Where in the bank each crop's noise stands: image, row, column, sign; each in [0, 1)."""


def draw_look(
    colour_NU: NDArray[np.float64],
    stain_NU: NDArray[np.float64],
    scanner_NU: NDArray[np.float64],
    *,
    colour: float,
    stain: float,
    scanner: float,
) -> Look:
    """Draw stain, colour and scanner changes of the given strengths, and merge what can be one step.

    A gamma multiplies optical densities, so that it costs nothing beside the stain; a mixing of colours is one more
    matrix beside the jitter.

    Parameters
    ----------
    colour_NU, stain_NU, scanner_NU
        ``COLOUR_DRAWS``, ``STAIN_DRAWS`` and ``SCANNER_DRAWS`` draws in [0, 1) for each crop.
    colour, stain, scanner
        Strengths; 0 leaves a change out.
    """
    stain_N34 = draw_stain(stain_NU, stain) if stain else None
    colour_N34 = draw_colour(colour_NU, colour) if colour else None
    if not scanner:
        return Look(stain_N34, colour_N34, None, None)
    signed_NU = scanner * (2 * scanner_NU[:, :9] - 1)
    identity_34 = np.eye(3, 4)
    gamma_N3 = (1 + GAMMA) ** signed_NU[:, :3]
    stain_N34 = gamma_N3[:, :, None] * (identity_34 if stain_N34 is None else stain_N34)
    mixing_N33 = np.zeros((len(signed_NU), 3, 3))
    mixing_N33[:, ~np.eye(3, dtype=bool)] = MIXING * signed_NU[:, 3:9]
    mixing_N33 += np.eye(3) * (1 - mixing_N33.sum(axis=2))[:, :, None]
    colour_N34 = mixing_N33 @ (identity_34 if colour_N34 is None else colour_N34)
    return Look(stain_N34, colour_N34, NOISE * scanner * scanner_NU[:, 9], scanner_NU[:, 10:14])


@cache
def noise_bank(px: int, device: torch.device) -> Tensor:
    """Gaussian noise of unit deviation, (images, 3, 2 px, 2 px), the same in every run."""
    generator = torch.Generator().manual_seed(0x5CA)
    return torch.randn(BANK_IMAGES, 3, 2 * px, 2 * px, generator=generator).to(device)


def add_noise(image_NCPP: Tensor, deviation_N: NDArray[np.float64], place_N4: NDArray[np.float64]) -> None:
    """Add to each crop a piece of the bank of noise, in place.

    Fresh noise for every pixel of a run that can go on anywhere would need a hash of every pixel. A crop takes a window
    of one of eight noise images, at a place and with a sign of its own.

    Parameters
    ----------
    image_NCPP
        Float, colours 0 to 1; changed.
    deviation_N
        Standard deviation of each crop's noise, in the image's unit.
    place_N4
        See :class:`Look`.
    """
    px = image_NCPP.shape[-1]
    bank = noise_bank(px, image_NCPP.device)
    image_N, row_N, column_N = (place_N4[:, :3] * (BANK_IMAGES, px + 1, px + 1)).astype(int).T
    sign_N = np.where(place_N4[:, 3] < 0.5, -1.0, 1.0)
    for number, (image, row, column) in enumerate(zip(image_N, row_N, column_N, strict=True)):
        window_CPP = bank[image, :, row : row + px, column : column + px]
        image_NCPP[number].add_(window_CPP, alpha=float(sign_N[number] * deviation_N[number]))


def _basis(stains_x23: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two stains and their unit normal, as columns."""
    normal_x3 = np.cross(stains_x23[..., 0, :], stains_x23[..., 1, :])
    normal_x3 /= np.linalg.norm(normal_x3, axis=-1, keepdims=True)
    return np.stack([stains_x23[..., 0, :], stains_x23[..., 1, :], normal_x3], axis=-1)


def apply_affine(image_NCPP: Tensor, affine_N34: Tensor, out_NCPP: Tensor) -> None:
    """Write each crop's colours, mapped by its matrix and constant, to ``out_NCPP``; values may leave 0..1.

    Parameters
    ----------
    image_NCPP
        Float; not changed.
    affine_N34
        A matrix and a constant for each crop, of the image's type and on its device.
    out_NCPP
        Float, contiguous; not the image itself.
    """
    matrix_N33, constant_N31 = affine_N34[:, :, :3], affine_N34[:, :, 3:]
    torch.baddbmm(constant_N31, matrix_N33, image_NCPP.flatten(2), out=out_NCPP.flatten(2))


def apply_stain(image_NCPP: Tensor, stain_N34: Tensor, out_NCPP: Tensor) -> None:
    """Write each crop under its changed stain to ``out_NCPP``; values may leave 0..1. The image is overwritten.

    Optical density is ``-ln(value)``, so ``ln(value') = M ln(value) - b``. Values have to be ``DARKEST`` or more.

    Parameters
    ----------
    image_NCPP
        Float, colours from ``DARKEST`` to 1; afterwards it holds their logarithms.
    stain_N34
        A map of optical densities for each crop (see :func:`draw_stain`), of the image's type and on its device.
    out_NCPP
        Float, contiguous; not the image itself.
    """
    minus_offset = torch.tensor([1.0, 1.0, 1.0, -1.0], device=stain_N34.device)
    apply_affine(image_NCPP.log_(), stain_N34 * minus_offset, out_NCPP)
    out_NCPP.exp_()
