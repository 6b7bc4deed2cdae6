"""Glands, vessels and cell borders: the structures that are larger than a cell.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual), N points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import zoom
from scipy.spatial import cKDTree

from histill.synthetic.cells import Cell, local_frame
from histill.synthetic.scene import MPP, Scene
from histill.synthetic.texture import Array, Mask, noise

__all__ = ["GlandStyle", "cell_borders", "draw_gland", "draw_vessel"]


def cell_borders(points_N2: Array, side: int, width_px: float = 1.1) -> Array:
    """Borders halfway between neighbouring points, (side, side) float32 from 0 to 1.

    Parameters
    ----------
    points_N2
        y, x in pixels; with fewer than two there is no border.
    side
        Of the map, pixels.
    width_px
        How wide a border is.
    """
    if len(points_N2) < 2:
        return np.zeros((side, side), dtype=np.float32)
    half = (side + 1) // 2
    grid = np.indices((half, half)).reshape(2, -1).T * 2.0 + 0.5
    distance, _ = cKDTree(points_N2).query(grid, k=2)
    gap = (distance[:, 1] - distance[:, 0]).reshape(half, half).astype(np.float32)
    fine = zoom(gap, 2, order=1, grid_mode=True, mode="nearest")[:side, :side]
    borders: Array = np.exp(-((fine / (2.0 * width_px)) ** 2)).astype(np.float32)
    return borders


class _Contour:
    """A closed curve around a centre: radius as a function of the direction."""

    def __init__(self, rng: np.random.Generator, radius_px: float, irregularity: float) -> None:
        self.radius_px = radius_px
        self.amplitudes = irregularity * rng.standard_normal(4) * np.array([1.3, 0.9, 0.6, 0.4])
        self.phases = rng.uniform(0, 2 * math.pi, size=4)

    def __call__(self, theta: Array) -> Array:
        bumps = sum(
            np.float32(amplitude) * np.cos((order + 2) * theta + np.float32(phase))
            for order, (amplitude, phase) in enumerate(zip(self.amplitudes, self.phases, strict=True))
        )
        return np.asarray(self.radius_px * np.clip(1.0 + bumps, 0.55, 1.5), dtype=np.float32)


def _ramp(distance_px: Array, width_px: float = 2.0) -> Array:
    """0 outside, 1 inside, over a soft edge."""
    return np.asarray(np.clip(distance_px / np.float32(width_px) + 0.5, 0.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class GlandStyle:
    """How the glands of one tile look."""

    height_um: float
    """Thickness of the epithelium."""
    irregularity: float
    """Amplitude of the outline's bumps, as a share of the radius."""
    basophilia: float
    """Haematoxylin in the cytoplasm."""
    goblets: float = 0.0
    """Share of the cells with a vacuole of mucin."""
    nuclear_size: float = 0.0
    """Factor on the size of the nuclei of the basal row; 0 for no such row."""


def draw_gland(
    scene: Scene, y: float, x: float, radius_px: float, style: GlandStyle
) -> tuple[tuple[slice, slice], Mask]:
    """Draw one gland: cytoplasm, membranes and lumen at once; its nuclei are added to the scene's cells.

    The gland's area leaves the stroma.

    Parameters
    ----------
    scene
        Where; changed in place.
    y, x, radius_px
        Centre and mean radius, in pixels.
    style
        How it looks.

    Returns
    -------
    Its part of the map as slices, and there, where epithelium is.
    """
    rng = scene.rng
    outer = _Contour(rng, radius_px, style.irregularity)
    inner = _Contour(rng, max(radius_px - style.height_um / MPP, 0.12 * radius_px), 2.0 * style.irregularity)
    nuclei, angles = _palisade(rng, outer, y, x, style.nuclear_size)
    scene.cells += nuclei
    frame = local_frame(scene.stroma_HW.shape, y, x, 1.5 * radius_px + 4)
    if frame is None:
        return (slice(0), slice(0)), np.zeros((0, 0), dtype=bool)
    part, dy, dx = frame
    radius, theta = np.sqrt(dy * dy + dx * dx), np.arctan2(dy, dx)
    wobble = 0.9 * noise(rng, 4.0, *radius.shape)
    to_base, to_lumen = outer(theta) - radius + wobble, radius - inner(theta) + wobble
    window_HWS = scene.canvas_HWS[part]
    cleft = 1.0 - 0.5 * np.exp(-(((to_base + 2.5) / 1.8) ** 2))
    window_HWS *= ((1.0 - _ramp(to_base)) * cleft)[..., None]
    _cytoplasm(window_HWS, rng, to_base, to_lumen, style)
    for angle in angles[rng.random(len(angles)) < style.goblets]:
        _goblet(window_HWS, rng, inner, float(angle), dy, dx)
    lines = 0.08 * _radial_borders(theta, radius, angles) + 0.10 * np.exp(-((to_lumen / 1.4) ** 2))
    window_HWS[..., 1] += _ramp(to_base) * _ramp(to_lumen) * lines
    window_HWS[..., 1] += 0.16 * np.exp(-(((to_base + 0.5) / 1.2) ** 2))  # basement membrane
    scene.stroma_HW[part] &= to_base < -4.0
    return part, np.asarray((to_base > 5.0) & (to_lumen > 3.0))


def _cytoplasm(window_HWS: Array, rng: np.random.Generator, to_base: Array, to_lumen: Array, style: GlandStyle) -> None:
    """Fill the epithelium, paler towards the lumen, and put secretion into some lumina."""
    eosin, mucin = float(rng.uniform(0.17, 0.27)), float(rng.uniform(0.0, 0.5))
    secretion = float(rng.uniform(0.05, 0.14)) if rng.random() < 0.35 else 0.0
    inside, wall = _ramp(to_base), _ramp(to_lumen)
    grain = 1.0 + 0.15 * noise(rng, 2.5, *to_base.shape) + 0.1 * noise(rng, 1.0, *to_base.shape)
    apical = np.clip(to_base / (to_base + to_lumen + 1e-3), 0.0, 1.0)
    cytoplasm = inside * wall * grain
    window_HWS[..., 0] += cytoplasm * style.basophilia * (1.9 - 1.3 * apical)
    window_HWS[..., 1] += cytoplasm * eosin * (1.0 - mucin * apical**2)
    if secretion:
        clots = np.clip(grain + 0.8 * noise(rng, 4.0, *to_base.shape), 0.0, 2.0)
        window_HWS[..., 1] += secretion * inside * (1.0 - wall) * clots


def _palisade(
    rng: np.random.Generator, outer: _Contour, y: float, x: float, nuclear_size: float
) -> tuple[list[Cell], Array]:
    """Nuclei in one basal row, and the direction of each cell from the centre."""
    depth_px = 3.9 / MPP * max(nuclear_size, 0.9)
    count = max(8, round(2 * math.pi * (outer.radius_px - depth_px) / (6.3 / MPP * max(nuclear_size, 0.9))))
    steps = (np.arange(count) + 0.16 * rng.standard_normal(count)) * 2 * math.pi / count
    angles = np.asarray(steps + rng.uniform(0, 2 * math.pi), dtype=np.float32)
    if nuclear_size == 0.0:
        return [], angles
    radii = outer(angles) - depth_px - np.abs(rng.normal(0.0, 1.8, size=count))
    tilts = angles + 0.13 * rng.standard_normal(count)
    cells = [
        Cell(
            kind="epithelial",
            y=y + float(radius) * math.sin(angle),
            x=x + float(radius) * math.cos(angle),
            angle=float(tilt),
            size=nuclear_size,
        )
        for angle, radius, tilt in zip(angles, radii, tilts, strict=True)
    ]
    return cells, angles


def _radial_borders(theta: Array, radius: Array, angles: Array) -> Array:
    """Lines between neighbouring cells of a gland, from 0 to 1."""
    ordered = np.sort(np.mod(angles, 2 * math.pi))
    middles = (ordered + np.append(ordered[1:], ordered[0] + 2 * math.pi)) / 2
    turned = np.mod(theta, 2 * math.pi)
    padded = np.concatenate([middles[-1:] - 2 * math.pi, middles, middles[:1] + 2 * math.pi])
    index = np.clip(np.searchsorted(padded, turned), 1, len(padded) - 1)
    gap = np.minimum(turned - padded[index - 1], padded[index] - turned) * radius
    return np.asarray(np.exp(-(gap**2)), dtype=np.float32)


def _goblet(window_HWS: Array, rng: np.random.Generator, inner: _Contour, angle: float, dy: Array, dx: Array) -> None:
    """Draw a vacuole of pale bluish mucin near the lumen."""
    centre = float(inner(np.asarray(angle, dtype=np.float32))) + float(rng.uniform(6.0, 9.0))
    size_px = float(rng.uniform(4.5, 6.5))
    cos, sin = math.cos(angle), math.sin(angle)
    top, left = float(dy[0, 0]), float(dx[0, 0])  # the window's corner, seen from the gland's centre
    frame = local_frame(window_HWS.shape, centre * sin - top, centre * cos - left, 10.0)
    if frame is None:
        return
    part, down, right = frame
    u, v = cos * right + sin * down, cos * down - sin * right
    mask = _ramp(size_px - np.sqrt((u / 1.25) ** 2 + v * v))
    window_HWS[part] *= (1.0 - 0.8 * mask)[..., None]
    window_HWS[part][..., 0] += 0.045 * mask


def draw_vessel(scene: Scene, y: float, x: float) -> None:
    """Draw a small vessel with red cells; its endothelial nuclei are added to the scene's cells."""
    rng = scene.rng
    a, b = float(rng.uniform(6.0, 13.0)) / MPP, float(rng.uniform(3.5, 6.0)) / MPP
    turn = float(rng.uniform(0, math.pi))
    cos, sin = math.cos(turn), math.sin(turn)
    for direction in rng.uniform(0, 2 * math.pi) + np.array([0.0, 2.3, 4.1])[: int(rng.integers(2, 4))]:
        p, q = a * math.cos(direction), b * math.sin(direction)
        along = turn + math.atan2(b * math.cos(direction), -a * math.sin(direction))
        scene.cells.append(Cell(kind="endothelial", y=y + sin * p + cos * q, x=x + cos * p - sin * q, angle=along))
    red_cells = rng.uniform(-0.8, 0.8, size=(int(rng.integers(0, 6)), 2)) * (a, b)
    frame = local_frame(scene.stroma_HW.shape, y, x, a + 6)
    if frame is None:
        return
    part, dy, dx = frame
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    depth = np.asarray((1.0 - np.sqrt((u / a) ** 2 + (v / b) ** 2)) * b, dtype=np.float32)
    window_HWS = scene.canvas_HWS[part]
    window_HWS *= (1.0 - _ramp(depth))[..., None]
    window_HWS[..., 1] += 0.26 * np.exp(-((depth / 1.5) ** 2))
    for red_u, red_v in red_cells:
        distance = np.asarray(np.hypot(u - red_u, v - red_v), dtype=np.float32)
        disc = _ramp(3.2 / MPP - distance) * _ramp(depth - 1.5) * (0.65 + 0.35 * np.clip(distance / 5.0, 0.0, 1.0))
        window_HWS[..., 1] = np.maximum(window_HWS[..., 1], 0.30 * disc)
        window_HWS[..., 2] = np.maximum(window_HWS[..., 2], 0.20 * disc)
    scene.stroma_HW[part] &= depth < -4.0
