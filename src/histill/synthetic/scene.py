"""What a field of tissue is while it is laid out, and what the fields of one slide have in common.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from histill.synthetic.cells import Cell
from histill.synthetic.texture import Array, Mask

__all__ = ["MPP", "Scene", "SlideEffects", "slide_effects"]

MPP = 0.5
"""Microns per pixel of everything that is drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideEffects:
    """What the tiles of one slide (one patient, one block) have in common."""

    haematoxylin: float = 1.0
    """Factor on the amount of haematoxylin."""
    eosin: float = 1.0
    """Factor on the amount of eosin."""
    nuclear_size: float = 1.0
    """Factor on the size of all nuclei."""
    chromatin: float = 1.0
    """Factor on the contrast of the chromatin."""
    cellularity: float = 1.0
    """Factor on the number of nuclei in stroma."""
    gland_radius_um: float = 25.0
    """Mean radius of the glands."""
    waviness: float = 1.0
    """How wavy the collagen is."""
    basophilia: float = 0.06
    """Haematoxylin in cytoplasm and matrix."""
    grade: float = 0.5
    """How far the tumour is from the normal, from 0 to 1."""


def slide_effects(seed: int) -> SlideEffects:
    """Draw the random effects of one slide."""
    rng = np.random.default_rng([seed, 7])
    spread = np.exp(rng.standard_normal(6) * np.array([0.15, 0.13, 0.06, 0.18, 0.18, 0.10]))
    return SlideEffects(
        haematoxylin=float(spread[0]),
        eosin=float(spread[1]),
        nuclear_size=float(spread[2]),
        chromatin=float(spread[3]),
        cellularity=float(spread[4]),
        gland_radius_um=25.0 * float(spread[5]),
        waviness=float(rng.uniform(0.5, 1.5)),
        basophilia=float(rng.uniform(0.03, 0.10)),
        grade=float(rng.uniform(0.2, 1.0)),
    )


@dataclass(slots=True)
class Scene:
    """A field while it is being laid out; structures are drawn at once, nuclei are collected and drawn last."""

    canvas_HWS: Array
    """Concentrations."""
    across_HW: Array
    """Coordinate across the fibres, in pixels; its level lines are the fibres."""
    stroma_HW: Mask
    """Where cells of the stroma may lie."""
    rng: np.random.Generator
    effects: SlideEffects
    cells: list[Cell] = field(default_factory=list)
