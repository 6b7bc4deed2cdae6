"""Draw the tissue of a whole slide out of many fields, and scan it.

Every site of the mosaic has a field of its own; where two meet, one fades into the other over a few pixels along a
line that noise has bent, so that no straight seam shows.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual), C colours (red, green, blue), N neighbours.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from histill.synthetic.layout import CELL_PX, ROUGH_PX, SITE_PX, Layout, SlideTruth
from histill.synthetic.scanners import ScannerSpec, render
from histill.synthetic.scene import MPP, slide_effects
from histill.synthetic.stains import StainSpec
from histill.synthetic.texture import Array
from histill.synthetic.tissue import draw_tile

__all__ = ["draw_section", "scan"]

_REACH_PX = int(0.95 * SITE_PX)  # further from its site no piece of the mosaic reaches, bent as it may be
_NEIGHBOURS = 9  # of a site; those further away share no border with it
_SEAM_PX = 1.5  # width of the soft border between two pieces of the mosaic
_EDGE_PX = 3.0  # width of the soft border between tissue and glass
_LEAST_WEIGHT = 0.01  # what weighs less is not drawn
_LEAST_FIELD_PX = 32  # of draw_tile
_FIELDS = 32  # of each kind: beyond these, far sites of a large slide share one, turned or mirrored
_BLANK = 0.05  # of both dyes together: less is a lumen, a cleft, fat
_BAND_PX = 512  # rows of level 0 that are scanned at a time
_PAD_PX = 8  # more than any optics blur


def draw_section(layout: Layout, kinds: tuple[str, ...], seed: int) -> Array:
    """Draw all tissue of a slide.

    Parameters
    ----------
    layout
        Its geometry.
    kinds
        Names of the layout's kinds.
    seed
        Of what is drawn, and of the slide's random effects.

    Returns
    -------
    (H, W, 3) float32, concentrations at 0.5 microns per pixel; 0 on glass.
    """
    canvas_HWS = np.zeros((layout.height, layout.width, 3), dtype=np.float32)
    effects = slide_effects(seed)
    sites_N2 = layout.sites_N2
    _, near = cKDTree(sites_N2).query(sites_N2, k=min(_NEIGHBOURS + 1, len(sites_N2)))
    depth = Image.fromarray(layout.depth_HW)
    for index, kind in enumerate(kinds):
        sites = [int(site) for site in np.flatnonzero(layout.kinds_N == index)]
        windows = [(site, window) for site in sites if (window := _window(layout, site))]
        for number in range(min(len(windows), _FIELDS)):
            found = [_weights(layout, depth, site, near[site, 1:], at) for site, at in windows[number::_FIELDS]]
            side = max((size for _, weight_HW in found for size in weight_HW.shape), default=0)
            if side == 0:
                continue
            seeds = np.random.SeedSequence((seed, 8, index, number)).generate_state(1, np.uint64)
            field_HWS = draw_tile(kind, max(side, _LEAST_FIELD_PX), int(seeds[0]), effects)
            _even(field_HWS, effects.haematoxylin, effects.eosin)
            for turn, (part, weight_HW) in enumerate(found):
                height, width = weight_HW.shape
                canvas_HWS[part] += _turned(field_HWS, turn)[:height, :width] * weight_HW[..., None]
    return canvas_HWS


def _turned(field_HWS: Array, turn: int) -> Array:
    """One of the eight ways to lay a square."""
    return np.rot90(field_HWS if turn % 2 == 0 else field_HWS[:, ::-1], turn // 2)


def _even(field_HWS: Array, haematoxylin: float, eosin: float) -> None:
    """Bring the mean dyes of a field's tissue near those of the slide, so that the mosaic does not show from afar.

    Fields get their amounts of dye over all their area (:mod:`histill.synthetic.tissue`): one that is half fat is
    then too dark beside its neighbours.
    """
    tissue_HW = field_HWS[..., 0] + field_HWS[..., 1] > _BLANK
    if not tissue_HW.any():
        return
    for index, wanted in ((0, 0.19 * haematoxylin), (1, 0.18 * eosin)):
        mean = float(field_HWS[..., index].mean(where=tissue_HW))
        field_HWS[..., index] *= np.float32(min(max((wanted / max(mean, 1e-3)) ** 0.7, 0.6), 1.4))


def _window(layout: Layout, site: int) -> tuple[int, int, int, int] | None:
    """Where a site's field can show: top, bottom, left, right; None where there is no tissue."""
    y, x = layout.sites_N2[site]
    top, left = (max(int(value) - _REACH_PX, 0) for value in (y, x))
    bottom, right = (min(int(value) + _REACH_PX, size) for value, size in ((y, layout.height), (x, layout.width)))
    if top >= bottom or left >= right:
        return None
    cells = layout.depth_HW[top // CELL_PX : bottom // CELL_PX + 1, left // CELL_PX : right // CELL_PX + 1]
    return (top, bottom, left, right) if cells.max() > -ROUGH_PX else None


def _weights(
    layout: Layout, depth: Image.Image, site: int, near_N: NDArray[np.int64], window: tuple[int, int, int, int]
) -> tuple[tuple[slice, slice], Array]:
    """Where in its window a field shows, as slices, and there how much, 0 to 1; empty where it shows nowhere."""
    y, x = layout.sites_N2[site]
    top, bottom, left, right = window
    rows, columns = np.arange(top, bottom)[:, None], np.arange(left, right)[None, :]
    down, across = layout.bend(rows, columns)
    others = np.ones_like(down)
    for other_y, other_x in layout.sites_N2[near_N]:
        # how much nearer the other site is: a plane, since both squared distances have the same curvature
        step_y, step_x = ((other - own) / (SITE_PX * _SEAM_PX) for other, own in ((other_y, y), (other_x, x)))
        middle = np.float32((step_y * (other_y + y) + step_x * (other_x + x)) / 2)
        others += np.exp(np.minimum(np.float32(step_y) * down + (np.float32(step_x) * across - middle), 30.0))
    weight_HW = 1.0 / others
    box = (left / CELL_PX, top / CELL_PX, right / CELL_PX, bottom / CELL_PX)
    inside = np.asarray(depth.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box))
    if inside.min() < ROUGH_PX + _EDGE_PX:
        weight_HW *= np.clip((inside + layout.roughness(rows, columns)) / _EDGE_PX + 0.5, 0.0, 1.0)
    shown = weight_HW > _LEAST_WEIGHT
    if not shown.any():
        return (slice(0), slice(0)), weight_HW[:0, :0]
    (first, last), (begin, end) = (np.flatnonzero(shown.any(axis=axis))[[0, -1]] for axis in (1, 0))
    part = (slice(top + int(first), top + int(last) + 1), slice(left + int(begin), left + int(end) + 1))
    return part, weight_HW[first : last + 1, begin : end + 1]


def scan(
    section_HWS: Array, truth: SlideTruth, mpp: float, stain: StainSpec, scanner: ScannerSpec, seed: int
) -> NDArray[np.uint8]:
    """Render a section as level 0 of a slide.

    The scanner's own compression is left out, since the slide's file has one.

    Parameters
    ----------
    section_HWS
        Concentrations at 0.5 microns per pixel, as :func:`draw_section` gives them.
    truth
        Knows the size of level 0.
    mpp
        Microns per pixel of level 0.
    stain, scanner
        How it looks.
    seed
        Of the noise.

    Returns
    -------
    (height_px, width_px, 3) uint8, RGB.
    """
    optics = dataclasses.replace(scanner, jpeg_quality=None)
    image_HWC = np.empty((truth.height_px, truth.width_px, 3), dtype=np.uint8)
    for band, top in enumerate(range(0, truth.height_px, _BAND_PX)):
        bottom = min(top + _BAND_PX, truth.height_px)
        padded_top, padded_bottom = max(top - _PAD_PX, 0), min(bottom + _PAD_PX, truth.height_px)
        part_HWS = _resample(section_HWS, padded_top, padded_bottom, truth.width_px, mpp / MPP)
        noise_seed = int(np.random.SeedSequence((seed, 9, band)).generate_state(1, np.uint64)[0])
        part_HWC = render(part_HWS, stain, optics, noise_seed)
        image_HWC[top:bottom] = part_HWC[top - padded_top : bottom - padded_top]
    return image_HWC


def _resample(section_HWS: Array, top: int, bottom: int, width: int, step: float) -> Array:
    """Cut rows of level 0 out of the section; ``step`` is the side of a pixel of level 0, in drawing pixels."""
    if step == 1.0:
        return section_HWS[top:bottom, :width]
    support = 2 * math.ceil(max(step, 1.0)) + 1  # of the bicubic kernel
    first = max(math.floor(top * step) - support, 0)
    rows_HWS = section_HWS[first : math.ceil(bottom * step) + support]
    box = (0.0, top * step - first, width * step, min(bottom * step - first, float(len(rows_HWS))))
    part_HWS = np.empty((bottom - top, width, 3), dtype=np.float32)
    for stain in range(3):
        plane = Image.fromarray(np.ascontiguousarray(rows_HWS[..., stain]))
        part_HWS[..., stain] = np.asarray(plane.resize((width, bottom - top), Image.Resampling.BICUBIC, box=box))
    return np.maximum(part_HWS, 0.0, out=part_HWS)
