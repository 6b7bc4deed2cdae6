"""Tissue: four kinds of fields, drawn as concentrations of dye at 0.5 microns per pixel.

A field is laid out first (fibres, glands, nests, fat, blank glass), then its nuclei are drawn one by one, then the
amounts of both dyes are drawn independently of the kind, so that the mean colour says little about it.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histill.errors import ConfigError, nearest
from histill.synthetic.cells import CELLS, MITOSES, Cell, draw_cell
from histill.synthetic.glands import GlandStyle, cell_borders, draw_gland, draw_vessel
from histill.synthetic.scene import MPP, Scene, SlideEffects
from histill.synthetic.texture import Array, Mask, fibres, noise

__all__ = ["KINDS", "Field", "draw_field", "draw_tile"]

KINDS = ("gland", "tumour", "stroma", "lymphoid")
"""The tissue classes: normal glands, atypical epithelium, stroma without epithelium, lymphocyte-rich tissue."""

_MARGIN_PX = 8.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Field:
    """A field with its nuclei."""

    concentrations_HWS: Array
    """Of haematoxylin, eosin and residual, float32, not negative."""
    nuclei_HW: NDArray[np.uint8]
    """1 + the position in :data:`histill.synthetic.cells.CELLS` of the nucleus that lies there; 0 for none."""
    cells: dict[str, int]
    """Cell type -> nuclei with their centre in the field."""


def draw_tile(kind: str, tile_px: int, seed: int, slide_effects: SlideEffects) -> Array:
    """Draw one field of tissue: (tile_px, tile_px, 3) float32, the concentrations of :func:`draw_field`."""
    return draw_field(kind, tile_px, seed, slide_effects).concentrations_HWS


def draw_field(kind: str, tile_px: int, seed: int, slide_effects: SlideEffects) -> Field:
    """Draw one field of tissue and keep where its nuclei are.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    tile_px
        Side in pixels of 0.5 microns, at least 32.
    seed
        The same arguments give the same field.
    slide_effects
        What it shares with the other tiles of its slide.

    Raises
    ------
    ConfigError
        An unknown kind, or a side below 32.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no tissue '{kind}'", allowed=", ".join(KINDS), remedy=nearest(kind, KINDS))
    if tile_px < 32:
        raise ConfigError("a tile is too small to hold tissue", where="tile_px", got=tile_px, allowed="32 or more")
    scene = _matrix(tile_px, np.random.default_rng([seed, KINDS.index(kind)]), slide_effects)
    {"gland": _glands, "tumour": _tumour, "stroma": _stroma, "lymphoid": _lymphoid}[kind](scene)
    tissue_HW = _clear(scene)
    nuclei_HW, cells = np.zeros((tile_px, tile_px), dtype=np.uint8), Counter[str]()
    values = {name: value for value, name in enumerate(CELLS, start=1)}
    for cell in scene.cells:
        row, column = (min(max(int(value), 0), tile_px - 1) for value in (cell.y, cell.x))
        if not tissue_HW[row, column]:
            continue
        drawn = draw_cell(scene.canvas_HWS, scene.rng, cell, MPP, slide_effects.chromatin)
        if drawn is not None:
            part, nucleus_HW = drawn
            nuclei_HW[part][nucleus_HW] = values[cell.kind]
        cells[cell.kind] += 0 <= cell.y < tile_px and 0 <= cell.x < tile_px
    return Field(concentrations_HWS=_balance(scene), nuclei_HW=nuclei_HW, cells=dict(cells))


def _matrix(tile_px: int, rng: np.random.Generator, effects: SlideEffects) -> Scene:
    """Start a scene with collagen, in which everything else lies."""
    fibrils, bundles, across = fibres(
        rng, tile_px, tile_px, angle=float(rng.uniform(0, math.pi)), waviness=effects.waviness
    )
    dense = float(rng.uniform(0.20, 0.34))
    loose_HW = noise(rng, 25.0, tile_px, tile_px)
    packing = 1.0 / (1.0 + np.exp(-2.2 * (bundles + 0.9 + 0.5 * loose_HW)))  # near 0 in the clefts between bundles
    grain = noise(rng, 1.0, tile_px, tile_px)
    canvas = np.zeros((tile_px, tile_px, 3), dtype=np.float32)
    canvas[..., 1] = dense * packing * (1.0 + 0.26 * fibrils + 0.12 * bundles + 0.10 * grain) + 0.015
    canvas[..., 0] = effects.basophilia * (0.35 + 0.5 * packing) * (1.0 + 0.25 * fibrils)
    np.maximum(canvas, 0.0, out=canvas)
    return Scene(canvas, across, np.ones((tile_px, tile_px), dtype=bool), rng, effects)


def _scatter(scene: Scene, count: float, spacing_px: float, mask_HW: Mask) -> Array:
    """Draw about ``count`` random points in the mask, none nearer than ``spacing_px`` to another: (N, 2) y, x."""
    side = mask_HW.shape[0]
    wanted = int(scene.rng.poisson(max(count, 0.0) * (1 + 2 * _MARGIN_PX / side) ** 2))
    tries = int(min(4.0 * wanted / max(float(mask_HW.mean()), 0.02), 500.0 * max(1.0, (side / 128) ** 2))) + 8
    points = scene.rng.uniform(-_MARGIN_PX, side + _MARGIN_PX, size=(tries, 2)).astype(np.float32)
    index = np.clip(points.astype(np.int64), 0, side - 1)
    points = points[mask_HW[index[:, 0], index[:, 1]]]
    near = ((points[:, None] - points[None]) ** 2).sum(-1) < spacing_px**2
    alive = np.ones(len(points), dtype=bool)
    for row in range(len(points)):
        if alive[row]:
            alive[row + 1 :] &= ~near[row, row + 1 :]
    return points[alive][:wanted]


def _add_cells(
    scene: Scene, kind: str, count: float, spacing_px: float, mask_HW: Mask, *, aligned: bool = False
) -> Array:
    """Scatter cells of one type; ``aligned`` turns them along the fibres."""
    points = _scatter(scene, count, spacing_px, mask_HW)
    side = mask_HW.shape[0]
    for y, x in points:
        angle = float(scene.rng.uniform(0, math.pi))
        if aligned:
            row, column = (min(max(int(value), 1), side - 2) for value in (y, x))
            dy = scene.across_HW[row + 1, column] - scene.across_HW[row - 1, column]
            dx = scene.across_HW[row, column + 1] - scene.across_HW[row, column - 1]
            angle = math.atan2(-dx, dy) + 0.12 * float(scene.rng.standard_normal())
        scene.cells.append(Cell(kind=kind, y=float(y), x=float(x), angle=angle, size=scene.effects.nuclear_size))
    return points


def _count(scene: Scene, kind: str, share: float) -> float:
    """How many nuclei of a type cover this share of the field."""
    style = CELLS[kind]
    size = scene.effects.nuclear_size
    nucleus_px = math.pi / 4 * style.length_um * style.width_um * size * size / MPP**2
    return share * scene.stroma_HW.size / nucleus_px


def _stroma_cells(scene: Scene, fibroblasts: float, lymphocytes: float) -> None:
    """Cells of the stroma, as shares of the area that is stroma."""
    free = float(scene.stroma_HW.mean())
    density = scene.effects.cellularity * free
    _add_cells(
        scene, "fibroblast", _count(scene, "fibroblast", fibroblasts * density), 11.0, scene.stroma_HW, aligned=True
    )
    _add_cells(scene, "lymphocyte", _count(scene, "lymphocyte", lymphocytes * density), 12.0, scene.stroma_HW)


def _vessels(scene: Scene, expected: float) -> None:
    """Small vessels with endothelium and red cells, where stroma is."""
    side = scene.stroma_HW.shape[0]
    area = (side / 128) ** 2
    for y, x in _scatter(scene, expected * area, 40.0, scene.stroma_HW):
        draw_vessel(scene, float(y), float(x))


def _gland_sites(scene: Scene, radius_px: float, spread: float, gap_px: float) -> list[tuple[float, float, float]]:
    """Centres and radii of glands: one well inside the tile, then what fits around it."""
    side, rng = scene.stroma_HW.shape[0], scene.rng
    sites: list[tuple[float, float, float]] = []
    for attempt in range(40 + 40 * (side // 128) ** 2):
        low, high = (0.25, 0.75) if not sites else (-0.35 * 128 / side, 1 + 0.35 * 128 / side)
        y, x = rng.uniform(low * side, high * side, size=2)
        radius = radius_px * math.exp(spread * float(rng.standard_normal()))
        if attempt > 20:
            radius *= 0.8
        if all(math.hypot(y - v, x - u) > radius + r + gap_px for v, u, r in sites):
            sites.append((float(y), float(x), radius))
    return sites


def _glands(scene: Scene) -> None:
    """Draw normal glands: one layer of epithelium with basal nuclei around an open lumen."""
    style = GlandStyle(
        height_um=float(scene.rng.uniform(10.0, 13.0)),
        irregularity=0.05,
        basophilia=scene.effects.basophilia,
        goblets=float(scene.rng.choice((0.0, 0.35))),
        nuclear_size=scene.effects.nuclear_size,
    )
    gap_px = float(scene.rng.uniform(3.0, 12.0))
    for y, x, radius_px in _gland_sites(scene, scene.effects.gland_radius_um / MPP, 0.14, gap_px):
        draw_gland(scene, y, x, radius_px, style)
    _stroma_cells(scene, 0.20, float(scene.rng.uniform(0.0, 0.06)))
    _vessels(scene, 0.3)


def _tumour(scene: Scene) -> None:
    """Atypical epithelium: crowded large uneven nuclei in misshapen glands or solid nests, and mitoses."""
    rng, grade = scene.rng, scene.effects.grade
    epithelium_HW = _nests(scene) if rng.random() < 0.35 + 0.4 * grade else _misshapen_glands(scene)
    size = scene.effects.nuclear_size * (0.86 + 0.24 * grade)
    count = _count(scene, "tumour", 0.66 * float(epithelium_HW.mean())) / size**2
    points = _scatter(scene, count, 18.0 * size, epithelium_HW)
    scene.canvas_HWS[..., 1] += 0.13 * cell_borders(points, epithelium_HW.shape[0]) * epithelium_HW
    for y, x in points:
        kind = str(rng.choice(MITOSES)) if rng.random() < 0.02 + 0.04 * grade else "tumour"
        pleomorphism = math.exp(0.20 * grade * float(rng.standard_normal()))
        angle = float(rng.uniform(0, math.pi))
        scene.cells.append(Cell(kind=kind, y=float(y), x=float(x), angle=angle, size=size * pleomorphism))
    _stroma_cells(scene, 0.20, float(rng.uniform(0.0, 0.08)))


def _nests(scene: Scene) -> Mask:
    """Draw solid sheets of epithelium, some with slits; returns where epithelium is."""
    side, rng = scene.stroma_HW.shape[0], scene.rng
    height_HW = noise(rng, 25.0, side, side) + 0.35 * noise(rng, 8.0, side, side)
    height_HW = height_HW - np.float32(np.quantile(height_HW, rng.uniform(0.10, 0.35)))
    cover_HW = np.clip(4.0 * height_HW + 0.5, 0.0, 1.0)
    slits_HW = np.clip(3.0 * (noise(rng, 11.0, side, side) - rng.uniform(1.7, 2.6)), 0.0, 1.0)
    grain_HW = 1.0 + 0.16 * noise(rng, 2.5, side, side) + 0.10 * noise(rng, 1.0, side, side)
    scene.canvas_HWS *= (1.0 - cover_HW)[..., None]
    cytoplasm_HW = cover_HW * (1.0 - slits_HW) * grain_HW
    scene.canvas_HWS[..., 0] += cytoplasm_HW * 1.5 * scene.effects.basophilia
    scene.canvas_HWS[..., 1] += cytoplasm_HW * float(rng.uniform(0.17, 0.27))
    scene.stroma_HW &= height_HW <= 0
    return np.asarray((height_HW > 0) & (slits_HW < 0.3))


def _misshapen_glands(scene: Scene) -> Mask:
    """Draw back-to-back glands with thick walls and small uneven lumina; returns where epithelium is."""
    rng, effects = scene.rng, scene.effects
    epithelium_HW = np.zeros(scene.stroma_HW.shape, dtype=bool)
    for y, x, radius_px in _gland_sites(scene, 1.05 * effects.gland_radius_um / MPP, 0.22, -6.0):
        style = GlandStyle(
            height_um=float(rng.uniform(15.0, 22.0)),
            irregularity=0.10 + 0.06 * effects.grade,
            basophilia=1.3 * effects.basophilia,
        )
        part, wall_HW = draw_gland(scene, y, x, radius_px, style)
        epithelium_HW[part] |= wall_HW
    return epithelium_HW


def _stroma(scene: Scene) -> None:
    """Collagen or smooth muscle with spindle cells along the fibres, and vessels."""
    if scene.rng.random() < 0.3:  # smooth muscle: packed, evenly eosinophilic
        scene.canvas_HWS[..., 1] = 0.45 * scene.canvas_HWS[..., 1] + 0.19
    _vessels(scene, 0.7)
    _stroma_cells(scene, float(scene.rng.uniform(0.16, 0.40)), float(scene.rng.uniform(0.0, 0.05)))


def _lymphoid(scene: Scene) -> None:
    """Lymphocytes, close together, in a fine meshwork with some histiocytes and spindle cells."""
    side, rng = scene.stroma_HW.shape[0], scene.rng
    mesh_HW = 1.0 + 0.30 * noise(rng, 4.0, side, side) + 0.2 * noise(rng, 1.5, side, side)
    scene.canvas_HWS[..., 1] = 0.45 * scene.canvas_HWS[..., 1] + float(rng.uniform(0.05, 0.13)) * mesh_HW
    density_HW = noise(rng, 25.0, side, side)
    crowd_HW = np.asarray(density_HW > np.quantile(density_HW, rng.uniform(0.05, 0.40)))
    _vessels(scene, 0.4)
    _add_cells(scene, "histiocyte", rng.uniform(1.0, 4.0) * (side / 128) ** 2, 20.0, scene.stroma_HW & crowd_HW)
    count = _count(scene, "lymphocyte", float(rng.uniform(0.30, 0.50)) * float(crowd_HW.mean()))
    _add_cells(scene, "lymphocyte", count, 11.0 * scene.effects.nuclear_size, scene.stroma_HW & crowd_HW)
    _stroma_cells(scene, 0.08, 0.04)


def _clear(scene: Scene) -> Mask:
    """In some tiles put fat or blank glass along one side; returns where tissue is left for nuclei."""
    side, rng = scene.stroma_HW.shape[0], scene.rng
    choice = rng.random()
    if choice > 0.35:
        return np.ones((side, side), dtype=bool)
    angle, share = float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.08, 0.34))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    distance = math.cos(angle) * x + math.sin(angle) * y + 7.0 * noise(rng, 25.0, side, side)
    distance = distance + 1.5 * noise(rng, 4.0, side, side)
    distance = np.quantile(distance, share) - distance  # positive in the cleared part
    cleared = np.clip(distance / 2.0 + 0.5, 0.0, 1.0)
    scene.canvas_HWS *= (1.0 - cleared)[..., None]
    if choice < 0.18:  # fat: large empty cells with thin walls
        pitch = 78.0
        count = int(side / pitch) + 3
        grid = (np.indices((count, count)).reshape(2, -1).T - 1.0) * pitch
        walls = cell_borders((grid + rng.uniform(-24, 24, size=grid.shape)).astype(np.float32), side, width_px=0.9)
        rim = np.exp(-((distance / 1.6) ** 2))
        scene.canvas_HWS[..., 1] += 0.22 * np.maximum(walls * cleared, rim)
        scene.canvas_HWS[..., 0] += 0.03 * np.maximum(walls * cleared, rim)
    return np.asarray(distance < 0.0)


def _balance(scene: Scene) -> Array:
    """Draw the mean amounts of both dyes independently of the kind of tissue, within what looks natural."""
    canvas, rng, effects = scene.canvas_HWS, scene.rng, scene.effects
    np.maximum(canvas, 0.0, out=canvas)
    for index, mean, factor in ((0, 0.175, effects.haematoxylin), (1, 0.165, effects.eosin)):
        wanted = mean * math.exp(0.12 * float(rng.standard_normal()))
        pull = (wanted / max(float(canvas[..., index].mean()), 1e-3)) ** 0.9
        canvas[..., index] *= np.float32(min(max(pull, 0.62), 1.6) * factor)
    return canvas
