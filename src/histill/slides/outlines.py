"""The outline of a mask, as polygons that cover exactly its pixels, and as GeoJSON that QuPath opens.

Shapes: H and W of the mask, E edges between a pixel of it and one outside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Polygon", "geojson", "mask_polygons"]

Polygon = list[NDArray[np.int64]]
"""Rings of corners (points, 2), x and y, not closed: the outer one first, then the holes."""


def mask_polygons(mask_HW: NDArray[np.bool_]) -> list[Polygon]:
    """Trace the edges of a mask: one polygon a piece (pixels joined by their sides), with its holes.

    Reading them back pixel by pixel (:func:`histill.slides.masks.fill_polygon`) gives the mask again.

    Parameters
    ----------
    mask_HW
        bool.

    Returns
    -------
    list
        Pieces in the order of their first pixel, row by row; corners in pixels, where pixel k covers [k, k + 1).
    """
    label_HW, count = ndimage.label(mask_HW)
    start_E2, step_E2, label_E = _edges(np.pad(label_HW, 1))
    pieces: list[Polygon] = [[] for _ in range(count)]
    for ring, edge in _rings(start_E2, step_E2):
        (x, y), (next_x, next_y) = ring.T, np.roll(ring, -1, axis=0).T
        is_outer = int((x * next_y - next_x * y).sum()) > 0
        pieces[label_E[edge] - 1].insert(0 if is_outer else len(pieces[label_E[edge] - 1]), ring)
    return pieces


def _edges(label_HW: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Sides of pixels with nothing beyond, each walked with its pixel on the right hand: start, step, label."""
    inside_HW = label_HW > 0
    found = []
    # (row and column of the neighbour beyond the side, corner of the pixel where the walk begins, its direction)
    for (down, across), corner, step in (
        ((-1, 0), (0, 0), (1, 0)),
        ((0, 1), (1, 0), (0, 1)),
        ((1, 0), (1, 1), (-1, 0)),
        ((0, -1), (0, 1), (0, -1)),
    ):
        beyond_HW = np.roll(inside_HW, (-down, -across), axis=(0, 1))
        row_E, column_E = np.nonzero(inside_HW & ~beyond_HW)
        start_E2 = np.stack([column_E + corner[0] - 1, row_E + corner[1] - 1], axis=1)
        found.append((start_E2, np.tile(np.array(step), (len(row_E), 1)), label_HW[row_E, column_E]))
    start_E2, step_E2, label_E = (np.concatenate(part) for part in zip(*found, strict=True))
    return start_E2, step_E2, label_E


def _rings(start_E2: NDArray[np.int64], step_E2: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], int]]:
    """Join edges end to start into rings of corners (points between edges of different direction)."""
    leaving: dict[tuple[int, int], list[int]] = {}
    starts, steps = [tuple(start) for start in start_E2.tolist()], [tuple(step) for step in step_E2.tolist()]
    for edge, start in enumerate(starts):
        leaving.setdefault(start, []).append(edge)
    unused, rings = [True] * len(starts), []
    for first in range(len(starts)):
        if not unused[first]:
            continue
        edge, corners, before = first, [], None
        while unused[edge]:
            unused[edge] = False
            if steps[edge] != before:
                corners.append(starts[edge])
            before = step_x, step_y = steps[edge]
            x, y = starts[edge]
            # Where two pixels meet at a corner two edges leave: a right turn stays with the same pixel.
            following = leaving[x + step_x, y + step_y]
            turned = [other for other in following if steps[other] == (-step_y, step_x)]
            edge = turned[0] if len(following) > 1 else following[0]
        if before == steps[first]:
            corners.pop(0)  # the walk began in the middle of a side
        rings.append((np.array(corners, dtype=np.int64), first))
    return rings


def geojson(polygons: list[Polygon], scale_x: float, scale_y: float, name: str) -> dict[str, Any]:
    """Write polygons as annotations: a FeatureCollection in level-0 pixels, ready for JSON.

    Parameters
    ----------
    polygons
        As :func:`mask_polygons` gives them.
    scale_x, scale_y
        Level-0 pixels per mask pixel.
    name
        Class of the annotations in QuPath.
    """
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [_closed(ring, scale_x, scale_y) for ring in polygon]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for polygon in polygons
    ]
    return {"type": "FeatureCollection", "features": features}


def _closed(ring: NDArray[np.int64], scale_x: float, scale_y: float) -> list[list[float]]:
    points: list[list[float]] = np.round(ring * np.array([scale_x, scale_y]), 3).tolist()
    return [*points, points[0]]
