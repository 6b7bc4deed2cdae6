"""Nuclei: how each cell type looks at 0.5 microns per pixel, and drawing one into a concentration map.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from histill.synthetic.texture import ATLAS_PX, Array, Mask, atlas

__all__ = ["CELLS", "MITOSES", "Cell", "CellStyle", "draw_cell", "local_frame"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellStyle:
    """How the nucleus of one cell type looks."""

    length_um: float
    """Mean length of the nucleus."""
    width_um: float
    """Mean width of the nucleus."""
    size_cv: float
    """Coefficient of variation of both."""
    irregularity: float
    """Amplitude of the bumps of the outline, as a share of the radius."""
    haematoxylin: float
    """Mean concentration inside."""
    haematoxylin_cv: float
    """Coefficient of variation of it from nucleus to nucleus."""
    texture: float
    """Contrast of the chromatin."""
    grain_px: float
    """Size of the chromatin clumps."""
    membrane: float
    """Haematoxylin that the nuclear membrane adds."""
    nucleoli: float
    """Mean number of nucleoli."""
    bend: float = 0.0
    """Largest curvature of a long nucleus, as a share of its length."""
    halo: float = 0.0
    """Radius of the clear zone around it, in nuclear radii; 0 for none."""


CELLS: dict[str, CellStyle] = {
    "epithelial": CellStyle(
        length_um=9.0, width_um=5.6, size_cv=0.09, irregularity=0.03, haematoxylin=0.52, haematoxylin_cv=0.12,
        texture=0.20, grain_px=1.0, membrane=0.22, nucleoli=0.5,
    ),
    "fibroblast": CellStyle(
        length_um=14.0, width_um=2.8, size_cv=0.22, irregularity=0.05, haematoxylin=0.58, haematoxylin_cv=0.18,
        texture=0.16, grain_px=1.0, membrane=0.14, nucleoli=0.2, bend=0.22,
    ),
    "endothelial": CellStyle(
        length_um=9.0, width_um=2.8, size_cv=0.15, irregularity=0.03, haematoxylin=0.66, haematoxylin_cv=0.12,
        texture=0.15, grain_px=1.0, membrane=0.12, nucleoli=0.0, bend=0.12,
    ),
    "lymphocyte": CellStyle(
        length_um=6.4, width_um=5.9, size_cv=0.08, irregularity=0.025, haematoxylin=0.72, haematoxylin_cv=0.14,
        texture=0.36, grain_px=1.5, membrane=0.16, nucleoli=0.0, halo=1.28,
    ),
    "histiocyte": CellStyle(
        length_um=9.5, width_um=6.5, size_cv=0.12, irregularity=0.07, haematoxylin=0.33, haematoxylin_cv=0.15,
        texture=0.20, grain_px=1.0, membrane=0.26, nucleoli=0.8,
    ),
    "tumour": CellStyle(
        length_um=12.0, width_um=8.8, size_cv=0.20, irregularity=0.085, haematoxylin=0.55, haematoxylin_cv=0.24,
        texture=0.34, grain_px=1.7, membrane=0.30, nucleoli=1.3,
    ),
    "metaphase": CellStyle(
        length_um=10.0, width_um=3.6, size_cv=0.10, irregularity=0.06, haematoxylin=1.25, haematoxylin_cv=0.08,
        texture=0.10, grain_px=1.7, membrane=0.0, nucleoli=0.0, halo=1.5,
    ),
    "anaphase": CellStyle(
        length_um=8.5, width_um=3.0, size_cv=0.10, irregularity=0.06, haematoxylin=1.20, haematoxylin_cv=0.08,
        texture=0.10, grain_px=1.7, membrane=0.0, nucleoli=0.0, bend=0.15, halo=1.45,
    ),
    "prometaphase": CellStyle(
        length_um=8.5, width_um=7.0, size_cv=0.10, irregularity=0.14, haematoxylin=1.10, haematoxylin_cv=0.08,
        texture=0.30, grain_px=1.7, membrane=0.0, nucleoli=0.0, halo=1.7,
    ),
}  # fmt: skip
"""Cell types by name. Sizes follow textbook values; the amounts of dye are chosen by eye."""

MITOSES = ("metaphase", "anaphase", "prometaphase")
"""The cell types that are mitotic figures: no membrane, ragged outline, in a clear zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One nucleus to draw."""

    kind: str
    """A key of :data:`CELLS`."""
    y: float
    """Centre, in pixels; may lie outside the tile."""
    x: float
    """Centre, in pixels."""
    angle: float
    """Direction of the long axis, in radians from the x axis towards the y axis."""
    size: float = 1.0
    """Factor on the size."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What was drawn at random for one nucleus."""

    a: float  # half length, in pixels
    b: float  # half width, in pixels
    split_px: float  # distance of the two plates of an anaphase from the middle
    bend: float
    amount: float  # haematoxylin
    focus_px: float  # width of the soft edge
    bumps: tuple[tuple[float, float], ...]  # amplitude and phase of 2, 3, 4 and 5 bumps per turn
    grain_at: tuple[int, int]
    nucleoli: Array  # (n, 2), in half lengths and half widths


def _draw_shape(rng: np.random.Generator, cell: Cell, style: CellStyle, mpp: float) -> _Shape:
    size, aspect, amount, *outline = (float(value) for value in rng.standard_normal(7))
    factor = cell.size * math.exp(style.size_cv * size)
    aspect = math.exp(0.5 * style.size_cv * aspect)
    a, b = (0.5 / mpp * factor * value for value in (style.length_um * aspect, style.width_um / aspect))
    bend, focus, *phases = (float(value) for value in rng.random(6))
    fall = (1.2, 0.8, 0.45, 0.3)
    row, column = (int(value) for value in rng.integers(ATLAS_PX // 2, size=2))
    return _Shape(
        a=a,
        b=b,
        split_px=2.0 * b if cell.kind == "anaphase" else 0.0,
        bend=style.bend * (2.0 * bend - 1.0) / max(a, 1.0),
        amount=style.haematoxylin * math.exp(style.haematoxylin_cv * amount),
        focus_px=1.3 + 1.1 * focus**3,  # few nuclei lie out of focus
        bumps=tuple(
            (style.irregularity * share * value, 2 * math.pi * phase)
            for share, value, phase in zip(fall, outline, phases, strict=True)
        ),
        grain_at=(row, column),
        nucleoli=rng.uniform(-0.55, 0.55, size=(int(rng.poisson(style.nucleoli)), 2)).astype(np.float32),
    )


def local_frame(
    shape: tuple[int, ...], y: float, x: float, reach_px: float
) -> tuple[tuple[slice, slice], Array, Array] | None:
    """Part of a map within reach of a point: its slices, and dy (H, 1) and dx (1, W) from the point; None if empty.

    Parameters
    ----------
    shape
        Of the map: (H, W, ...).
    y, x
        The point, in pixels; it may lie outside.
    reach_px
        Half the side of the part.
    """
    height, width = shape[:2]
    top, bottom = max(0, math.floor(y - reach_px)), min(height, math.ceil(y + reach_px))
    left, right = max(0, math.floor(x - reach_px)), min(width, math.ceil(x + reach_px))
    if top >= bottom or left >= right:
        return None
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    dx = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(x)
    return (slice(top, bottom), slice(left, right)), dy, dx


def draw_cell(
    canvas_HWS: Array, rng: np.random.Generator, cell: Cell, mpp: float, chromatin: float = 1.0
) -> tuple[tuple[slice, slice], Mask] | None:
    """Draw one nucleus into the concentration map, in place; parts outside of it are cut off.

    Parameters
    ----------
    canvas_HWS
        Concentrations, float32.
    rng
        Draws shape, chromatin and focus; takes the same steps wherever the cell lies.
    cell
        What to draw and where.
    mpp
        Microns per pixel of the map.
    chromatin
        Factor on the contrast of the chromatin (a property of the slide).

    Returns
    -------
    A part of the map and where in it the nucleus lies; None when it lies outside the map.
    """
    style = CELLS[cell.kind]
    mitotic = cell.kind in MITOSES
    shape = _draw_shape(rng, cell, style, mpp)
    extent = max(shape.a, shape.b + shape.split_px)
    frame = local_frame(canvas_HWS.shape, cell.y, cell.x, extent * max(1.3, style.halo) + 4.0)
    if frame is None:
        return None
    part, dy, dx = frame
    cos, sin = np.float32(math.cos(cell.angle)), np.float32(math.sin(cell.angle))
    along, across = cos * dx + sin * dy, cos * dy - sin * dx
    window_HWS = canvas_HWS[part]
    if style.halo:
        distance = np.sqrt(along * along + across * across)
        thinned = np.clip((extent * style.halo - distance) / 3.0 + 0.5, 0.0, 1.0)
        window_HWS *= (1.0 - (0.40 if mitotic else 0.30) * thinned)[..., None]
    across = np.abs(across) - np.float32(shape.split_px) if shape.split_px else across
    if shape.bend:
        across = across + np.float32(shape.bend) * along * along
    p = np.asarray(along / shape.a, dtype=np.float32)
    q = np.asarray(across / shape.b, dtype=np.float32)
    row, column = shape.grain_at
    grain = atlas(style.grain_px)[row : row + p.shape[0], column : column + p.shape[1]]
    # about the distance to the outline in pixels, positive inside
    depth = (_outline(p, q, shape.bumps) - np.sqrt(p * p + q * q)) * np.float32(shape.b)
    if mitotic:
        depth = depth + 0.7 * np.clip(grain, -1.0, 1.3)
    mask = np.clip(depth / np.float32(shape.focus_px) + 0.5, 0.0, 1.0)
    mask = mask * mask * (3.0 - 2.0 * mask)
    nuclear = shape.amount * (1.0 + style.texture * chromatin * np.clip(grain, -1.6, 2.2))
    if style.membrane:
        nuclear = nuclear + style.membrane * np.exp(-(((depth - 1.2) / 1.1) ** 2))
    for u, v in shape.nucleoli:
        nuclear = nuclear + 0.40 * np.exp(-(((p - u) * shape.a) ** 2 + ((q - v) * shape.b) ** 2) / 3.2)
    cover = 0.85 * mask  # a section is thicker than a nucleus is deep: something shines through
    window_HWS *= (1.0 - cover)[..., None]
    window_HWS[..., 0] += mask * nuclear
    window_HWS[..., 1] += 0.13 * mask
    return part, np.asarray(mask > 0.5)


def _outline(p: Array, q: Array, bumps: tuple[tuple[float, float], ...]) -> Array:
    """Radius of the outline in the direction of each pixel: 1 with 2 to 5 bumps per turn."""
    theta = np.arctan2(q, p)
    edge = np.ones_like(theta)
    for order, (amplitude, phase) in enumerate(bumps, start=2):
        edge += np.float32(amplitude) * np.cos(order * theta + np.float32(phase))
    return edge
