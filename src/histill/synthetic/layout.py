"""Where a drawn slide has tissue, and of which kind: pure geometry, at 0.5 microns per drawing pixel.

Pieces of tissue are bumpy ellipses. They are laid out with a *mosaic*: a jittered hexagonal lattice of sites, each of
which owns the drawing pixels nearest to it in coordinates that noise has bent. Each site has one kind of tissue, by a
low-frequency map, so that neighbouring sites form regions.

Shapes: H height, W width (in cells of 16 drawing pixels where the name says grid), N sites or points, K kinds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.spatial import cKDTree

from histill.errors import ConfigError, nearest
from histill.synthetic.scene import MPP
from histill.synthetic.texture import ATLAS_PX, Array, atlas
from histill.synthetic.tissue import KINDS

__all__ = ["CELL_PX", "ROUGH_PX", "SITE_PX", "Layout", "SlideTruth", "TissuePlan", "annotation", "lay_out"]

CELL_PX = 16
"""Side of a cell of the region grid, in drawing pixels."""
SITE_PX = 216.0
"""Mean distance of neighbouring sites of the mosaic, in drawing pixels."""
ROUGH_PX = 20.0
"""How far the fine noise of an outline reaches, in drawing pixels."""

_JITTER = 0.08  # of the sites, as a share of their distance
_COLOURS = {"gland": (80, 140, 220), "tumour": (200, 40, 40), "stroma": (150, 200, 150), "lymphoid": (120, 70, 160)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TissuePlan:
    """What lies on a slide."""

    kinds: tuple[str, ...] = KINDS
    """Which kinds of tissue, of :data:`histill.synthetic.KINDS`; each covers about the same area."""
    pieces: int = 1
    """Number of pieces, side by side along the longer side of the slide."""
    region_um: float = 350.0
    """About how wide a region of one kind is."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ConfigError(
                "the kinds of tissue must be known, at least one and no one twice",
                where="tissue, kinds",
                got=", ".join(self.kinds),
                allowed=", ".join(KINDS),
                remedy=nearest(unknown[0], KINDS) if unknown else None,
            )
        if not 1 <= self.pieces <= 8 or not self.region_um > 0:
            raise ConfigError(
                "there are 1 to 8 pieces and regions are wider than 0",
                where="tissue",
                got=f"pieces {self.pieces}, region_um {self.region_um}",
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideTruth:
    """Which kind of tissue lies where on a slide."""

    kinds: tuple[str, ...]
    """Names of the values of ``grid_HW``."""
    grid_HW: NDArray[np.int8]
    """Index into ``kinds`` of each square cell, -1 for glass; read-only."""
    cell_px: float
    """Side of a cell, in level-0 pixels; the first cell begins at the slide's top left."""
    width_px: int
    """Of the slide, in level-0 pixels."""
    height_px: int
    """Of the slide, in level-0 pixels."""

    def kind_at(self, x: float, y: float) -> str | None:
        """Give the kind at a level-0 position; None on glass and outside the slide."""
        if not (0 <= x < self.width_px and 0 <= y < self.height_px):
            return None
        index = int(self.grid_HW[int(y / self.cell_px), int(x / self.cell_px)])
        return None if index < 0 else self.kinds[index]

    def kind_of(self, x: float, y: float, side_px: float, *, share: float = 0.9) -> str | None:
        """Give the kind that covers at least ``share`` of a tile; None when none does.

        Parameters
        ----------
        x, y
            The tile's top left, in level-0 pixels.
        side_px
            Its side, in level-0 pixels.
        share
            Of the cells whose centres lie in the tile; above 0.5.
        """
        rows, columns = (
            slice(max(math.ceil(low / self.cell_px - 0.5), 0), max(math.ceil((low + side_px) / self.cell_px - 0.5), 0))
            for low in (y, x)
        )
        window = self.grid_HW[rows, columns]
        if not window.size:
            return self.kind_at(x + side_px / 2, y + side_px / 2)
        counts = np.bincount(window.ravel().astype(np.int64) + 1, minlength=len(self.kinds) + 1)[1:]
        best = int(counts.argmax())
        return self.kinds[best] if counts[best] >= share * window.size else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The geometry of one slide, in drawing pixels."""

    height: int
    """Of the drawing."""
    width: int
    """Of the drawing."""
    depth_HW: Array
    """About how far the centre of each grid cell lies inside tissue, in drawing pixels; negative on glass."""
    sites_N2: Array
    """Sites of the mosaic: y, x."""
    kinds_N: NDArray[np.int8]
    """Kind of each site, as an index into the plan's kinds."""
    shift: tuple[int, int]
    """Where the bending noise begins in its atlas."""

    def bend(self, y_N: NDArray[np.int64], x_N: NDArray[np.int64]) -> tuple[Array, Array]:
        """Give the bent coordinates of drawing pixels; ``y_N`` and ``x_N`` are broadcast against each other."""
        row, column = (y_N + self.shift[0]) % ATLAS_PX, (x_N + self.shift[1]) % ATLAS_PX
        coarse, fine = atlas(45.0), atlas(11.0)
        down = y_N + 11.0 * coarse[row, column] + 3.0 * fine[row, column]
        right = x_N + 11.0 * coarse[column, row] + 3.0 * fine[column, row]
        return np.asarray(down, dtype=np.float32), np.asarray(right, dtype=np.float32)

    def roughness(self, y_N: NDArray[np.int64], x_N: NDArray[np.int64]) -> Array:
        """Give what the outline's fine noise adds to ``depth_HW``, in drawing pixels, at most :data:`ROUGH_PX`."""
        row, column = (y_N + self.shift[1]) % ATLAS_PX, (x_N + self.shift[0]) % ATLAS_PX
        rough = 6.0 * atlas(25.0)[row, column] + 1.5 * atlas(4.0)[row, column]
        return np.asarray(np.clip(rough, -ROUGH_PX, ROUGH_PX), dtype=np.float32)


def lay_out(
    *, width_px: int, height_px: int, mpp: float, seed: int, plan: TissuePlan | None = None
) -> tuple[Layout, SlideTruth]:
    """Lay a slide out. The same arguments give the same slide; it costs some milliseconds.

    Parameters
    ----------
    width_px, height_px
        Size of the slide, in level-0 pixels.
    mpp
        Microns per level-0 pixel.
    seed
        Of outlines and regions.
    plan
        What lies on the slide; the default plan if None.
    """
    plan = plan or TissuePlan()
    rng = np.random.default_rng([seed, 11])
    height, width = (max(math.ceil(size * mpp / MPP), CELL_PX) for size in (height_px, width_px))
    rows, columns = (np.arange(CELL_PX // 2, -(-size // CELL_PX) * CELL_PX, CELL_PX) for size in (height, width))
    depth_HW = _pieces(rng, rows, columns, height, width, plan.pieces)
    sites_N2 = _lattice(rng, height, width)
    kinds_N = _regions(rng, sites_N2, depth_HW, plan)
    row, column = (int(value) for value in rng.integers(ATLAS_PX, size=2))
    layout = Layout(
        height=height, width=width, depth_HW=depth_HW, sites_N2=sites_N2, kinds_N=kinds_N, shift=(row, column)
    )
    down, right = layout.bend(rows[:, None], columns[None, :])
    _, owner = cKDTree(sites_N2).query(np.stack([down.ravel(), right.ravel()], axis=1))
    tissue = depth_HW + layout.roughness(rows[:, None], columns[None, :]) > 0
    grid_HW = np.where(tissue, kinds_N[owner].reshape(depth_HW.shape), np.int8(-1)).astype(np.int8)
    grid_HW.flags.writeable = False
    truth = SlideTruth(
        kinds=plan.kinds, grid_HW=grid_HW, cell_px=CELL_PX * MPP / mpp, width_px=width_px, height_px=height_px
    )
    return layout, truth


def _waves(rng: np.random.Generator, y: Array, x: Array, wavelength_px: float, count: int = 16) -> Array:
    """Sum of plane waves with about this wavelength in all directions: smooth, of about unit variance."""
    number = 2 * math.pi / wavelength_px * np.exp(0.25 * rng.standard_normal(count))
    angle, phase = rng.uniform(0, 2 * math.pi, size=(2, count))
    total = np.zeros(np.broadcast_shapes(y.shape, x.shape))
    for k, theta, start in zip(number, angle, phase, strict=True):
        total += np.cos(k * math.sin(theta) * y + k * math.cos(theta) * x + start)
    return np.asarray(total * math.sqrt(2.0 / count), dtype=np.float32)


def _pieces(
    rng: np.random.Generator,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    height: int,
    width: int,
    count: int,
) -> Array:
    """Depth inside the nearest piece, at these rows and columns, in drawing pixels."""
    y, x = rows.astype(np.float32)[:, None], columns.astype(np.float32)[None, :]
    depth = np.full((len(rows), len(columns)), -np.inf, dtype=np.float32)
    for number in range(count):
        place, size = (number + 0.5) / count, 1.0 / count
        centre = np.array([0.5, place] if width >= height else [place, 0.5])
        share = np.array([1.0, size] if width >= height else [size, 1.0])
        centre_y, centre_x = (centre + share * rng.uniform(-0.03, 0.03, size=2)) * (height, width)
        radius_y, radius_x = share * rng.uniform(0.36, 0.42, size=2) * (height, width)
        radius = min(radius_y, radius_x)
        rho = np.hypot((y - centre_y) / radius_y, (x - centre_x) / radius_x)
        bumps = 0.11 * _waves(rng, y, x, 1.6 * radius) + 0.05 * _waves(rng, y, x, 0.5 * radius)
        depth = np.maximum(depth, (radius * (1.0 - rho + bumps)).astype(np.float32))
    edge = np.minimum(np.minimum(y, height - y), np.minimum(x, width - x))  # a scan has glass around its tissue
    return np.asarray(np.minimum(depth, edge - 0.03 * min(height, width)), dtype=np.float32)


def _lattice(rng: np.random.Generator, height: int, width: int) -> Array:
    """Sites of the mosaic, over the drawing and one more row and column all around it."""
    step_y = SITE_PX * math.sqrt(3) / 2
    row, column = np.mgrid[-1 : height // step_y + 3, -1 : width // SITE_PX + 3]
    sites = np.stack([row * step_y, (column + 0.5 * (row % 2)) * SITE_PX], axis=-1).reshape(-1, 2)
    return np.asarray(sites + SITE_PX * rng.uniform(-_JITTER, _JITTER, size=sites.shape), dtype=np.float32)


def _regions(rng: np.random.Generator, sites_N2: Array, depth_HW: Array, plan: TissuePlan) -> NDArray[np.int8]:
    """Kind of each site: where one of K smooth maps is highest, raised so that each wins about as many in tissue."""
    y, x = sites_N2.T
    wavelength = 2.0 * plan.region_um / MPP
    score_NK = np.stack([_waves(rng, y, x, wavelength) for _ in plan.kinds], axis=1)
    cells = np.clip((sites_N2 / CELL_PX).astype(np.int64), 0, np.array(depth_HW.shape) - 1)
    inside = score_NK[depth_HW[cells[:, 0], cells[:, 1]] > -SITE_PX / 4]
    wanted = len(inside) / len(plan.kinds)
    for step in range(200):
        counts = np.bincount(inside.argmax(axis=1), minlength=len(plan.kinds))
        if np.abs(counts - wanted).max() < 1:
            break
        lift = np.asarray((wanted - counts) / max(wanted, 1.0) * 0.2 * 0.98**step, dtype=np.float32)
        inside, score_NK = inside + lift, score_NK + lift
    return np.asarray(score_NK.argmax(axis=1), dtype=np.int8)


# ------------------------------------------------------------------ annotation


def annotation(truth: SlideTruth) -> dict[str, Any]:
    """Make a GeoJSON feature collection of the regions, in level-0 pixels, as QuPath reads and writes it.

    Each feature is one connected region: a polygon with holes along the cells' sides (as QuPath makes them of a pixel
    classifier's map), with its kind in ``properties.classification.name``.
    """
    features = []
    for index, kind in enumerate(truth.kinds):
        components, count = label(truth.grid_HW == index)
        for number in range(1, count + 1):
            rings = [[_level0(truth, *corner) for corner in ring] for ring in _outlines(components == number)]
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": rings},
                    "properties": {
                        "objectType": "annotation",
                        "classification": {"name": kind, "color": list(_COLOURS[kind])},
                    },
                }
            )
    return {"type": "FeatureCollection", "features": features}


def _level0(truth: SlideTruth, row: int, column: int) -> list[float]:
    return [
        round(min(column * truth.cell_px, float(truth.width_px)), 3),
        round(min(row * truth.cell_px, float(truth.height_px)), 3),
    ]


def _outlines(mask_HW: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """Trace a connected mask along its pixels' sides.

    Returns
    -------
    Closed rings of corners (row, column), the first the outer one and the others the holes. Where two pixels touch
    at a corner only, the rings pass through it, so that rings touch there but no ring touches itself.
    """
    padded = np.pad(mask_HW, 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}  # steps out of each corner, tissue at the right
    for inner, outer, start, step in (
        (padded[1:, :], padded[:-1, :], (1, 0), (0, 1)),  # top sides, rightward
        (padded[:-1, :], padded[1:, :], (1, 1), (0, -1)),  # bottom sides, leftward
        (padded[:, 1:], padded[:, :-1], (1, 1), (-1, 0)),  # left sides, upward
        (padded[:, :-1], padded[:, 1:], (0, 1), (1, 0)),  # right sides, downward
    ):
        for row, column in np.argwhere(inner & ~outer).tolist():
            following.setdefault((row + start[0], column + start[1]), []).append(step)
    rings = []
    while following:
        rings.append(_ring(following, min(following)))
    return [[(row - 1, column - 1) for row, column in ring] for ring in rings]


def _ring(following: dict[tuple[int, int], list[tuple[int, int]]], start: tuple[int, int]) -> list[tuple[int, int]]:
    """Take one ring out of ``following``: its corners, the last the same as the first."""
    at, heading, corners = start, (0, 0), list[tuple[int, int]]()
    while True:
        steps = following[at]
        # where four sides meet, turn left: to the pixel across the corner, with tissue at the right
        turn = (-heading[1], heading[0])
        step = turn if turn in steps else steps[0]
        steps.remove(step)
        if not steps:
            del following[at]
        if step != heading:
            corners.append(at)
        at, heading = (at[0] + step[0], at[1] + step[1]), step
        if at == start:  # the top left corner of a ring is a corner of no other ring that is left
            return [*corners, start]
