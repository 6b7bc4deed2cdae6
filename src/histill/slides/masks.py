"""Tissue that the user drew: GeoJSON annotations, as QuPath writes them, or a mask image.

Shapes: H and W of the mask, E edges of a polygon's rings.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histill.slides.slide import SlideError

__all__ = ["fill_polygon", "read_mask"]

_GEOJSON = (".geojson", ".json")
_IMAGES = (".png", ".tif", ".tiff")
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I")
_ASPECT = 0.01  # share by which a mask image's aspect ratio may differ from the slide's
_SHAPES = "Polygon or MultiPolygon"
_EXPORT = "export the annotations from QuPath as GeoJSON (File > Export objects), coordinates in level-0 pixels"

_Ring = NDArray[np.float64]  # (points, 2): x, y in level-0 pixels


def read_mask(path: Path, width: int, height: int, mask_width: int, mask_height: int) -> NDArray[np.bool_]:
    """Read where a slide's tissue is, by the user.

    GeoJSON (``.geojson``, ``.json``): a FeatureCollection, a Feature or a list of Features with Polygons or
    MultiPolygons in level-0 pixels; the union of all, holes left out. A mask pixel belongs to it when its centre does.
    An image (``.png``, ``.tif``, ``.tiff``): of the slide's aspect ratio to 1 %, and any size; non-zero is tissue; a
    mask pixel belongs to it when half its area does.

    Parameters
    ----------
    path
        The file.
    width, height
        Size of the slide's level 0 in pixels.
    mask_width, mask_height
        Size of the mask that is wanted, in pixels; it covers the whole slide.

    Returns
    -------
    ndarray
        bool, shape (mask_height, mask_width).

    Raises
    ------
    SlideError
        When the file is missing, damaged, of another kind, holds no polygon or another geometry, lies wholly outside
        the slide, or has another aspect ratio.
    """
    suffix = path.suffix.lower()
    if suffix in _IMAGES:
        return _from_image(path, width, height, mask_width, mask_height)
    if suffix not in _GEOJSON:
        raise SlideError(
            "a tissue mask is of an unknown kind", where=path, got=suffix or "no suffix", allowed=[*_GEOJSON, *_IMAGES]
        )
    mask_HW = np.zeros((mask_height, mask_width), dtype=bool)
    scale = np.array([mask_width / width, mask_height / height])
    meets, number = False, 0
    for number, rings in enumerate(_polygons(path), start=1):  # noqa: B007
        low, high = rings[0].min(axis=0), rings[0].max(axis=0)
        meets |= bool((high > 0).all() and low[0] < width and low[1] < height)
        fill_polygon(mask_HW, [ring * scale for ring in rings])
    if not number:
        raise SlideError("this GeoJSON holds no polygon", where=path, allowed=_SHAPES, remedy=_EXPORT)
    if not meets:
        raise SlideError(
            "every polygon of this GeoJSON lies outside the slide",
            where=path,
            got=f"{number} polygons, the last at x {low[0]:g} to {high[0]:g}, y {low[1]:g} to {high[1]:g}",
            allowed=f"x 0 to {width}, y 0 to {height}",
            remedy="check that the file belongs to this slide; " + _EXPORT,
        )
    return mask_HW


# ------------------------------------------------------------------ GeoJSON


def _polygons(path: Path) -> Iterator[list[_Ring]]:
    """Each polygon of a file: its outer ring, then its holes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SlideError("a tissue mask cannot be read", where=path, got=error) from None
    except ValueError as error:
        raise SlideError("this GeoJSON is not JSON in UTF-8", where=path, got=error) from None
    for number, feature in enumerate(_features(content, path)):
        where = f"{path}, feature {number}"
        geometry = feature.get("geometry") if isinstance(feature, dict) else None
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        coordinates = geometry.get("coordinates") if isinstance(geometry, dict) else None
        if kind not in ("Polygon", "MultiPolygon"):
            raise SlideError(
                "a feature of this GeoJSON is no area",
                where=where,
                got=kind or "no geometry",
                allowed=_SHAPES,
                remedy="leave it out of the export",
            )
        polygons = [coordinates] if kind == "Polygon" else coordinates
        if not isinstance(polygons, list) or not polygons:
            raise SlideError(f"a {kind} of this GeoJSON is empty", where=where)
        for polygon in polygons:
            if not isinstance(polygon, list) or not polygon:
                raise SlideError("a polygon of this GeoJSON has no ring", where=where)
            yield [_ring(points, where) for points in polygon]


def _features(content: Any, path: Path) -> list[Any]:
    kind = content.get("type") if isinstance(content, dict) else None
    features = [content] if kind == "Feature" else content.get("features") if kind == "FeatureCollection" else content
    if not isinstance(features, list):
        raise SlideError(
            "this JSON is no GeoJSON of annotations",
            where=path,
            got=kind or type(content).__name__,
            allowed="a FeatureCollection, a Feature or a list of Features",
            remedy=_EXPORT,
        )
    return features


def _ring(points: Any, where: str) -> _Ring:
    try:
        ring = np.array([[float(point[0]), float(point[1])] for point in points])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise SlideError("a ring of this GeoJSON is no list of points", where=where, got=error) from None
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise SlideError(
            "a ring of this GeoJSON encloses nothing",
            where=where,
            got=f"{len(ring)} points" if len(ring) < 3 else "a coordinate that is not finite",
            allowed="at least 3 points",
        )
    return ring


def fill_polygon(mask_HW: NDArray[np.bool_], rings: list[_Ring]) -> None:
    """Set, in place, the pixels whose centre lies inside a polygon: inside an odd number of its rings.

    Each edge flips all pixels of a row to the right of it; so the row's running count of edges tells inside (odd)
    from outside (even). Unlike a drawn outline this has no bias: a polygon's area is right on average.

    Parameters
    ----------
    mask_HW
        bool; other pixels stay as they are, so that several polygons make a union.
    rings
        float64, each (points, 2): x, y in mask pixels, where pixel k covers [k, k + 1); closed or not.
    """
    height, width = mask_HW.shape
    start_E2 = np.concatenate(rings)
    end_E2 = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    low_E, high_E = np.minimum(start_E2[:, 1], end_E2[:, 1]), np.maximum(start_E2[:, 1], end_E2[:, 1])
    # rows whose centre y lies in [low, high): each vertex belongs to one of its two edges
    first_E = np.clip(np.ceil(low_E - 0.5), 0, height).astype(np.int64)
    last_E = np.clip(np.ceil(high_E - 0.5), 0, height).astype(np.int64)
    count_E = np.maximum(last_E - first_E, 0)
    if not count_E.any():
        return
    edge = np.repeat(np.arange(len(count_E)), count_E)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count_E) - count_E, count_E) + first_E[edge]
    delta_E2 = end_E2 - start_E2
    x = start_E2[edge, 0] + (row + 0.5 - start_E2[edge, 1]) / delta_E2[edge, 1] * delta_E2[edge, 0]
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)  # first pixel whose centre is not left of the edge
    top, bottom, left, right = row.min(), row.max() + 1, column.min(), column.max()
    flips = np.zeros((bottom - top, right - left + 1), dtype=np.int32)
    np.add.at(flips, (row - top, column - left), 1)
    inside = np.cumsum(flips, axis=1)[:, :-1] % 2 == 1
    mask_HW[top:bottom, left:right] |= inside


# ------------------------------------------------------------------ images


def _from_image(path: Path, width: int, height: int, mask_width: int, mask_height: int) -> NDArray[np.bool_]:
    """Read a mask image; non-zero (and not wholly transparent) is tissue."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # beyond twice that size it is an error
            with Image.open(path) as image:
                _check_image(image, path, width, height)
                values = np.asarray(image)
                bands = image.getbands()
    except Image.DecompressionBombError as error:
        raise SlideError(
            "a mask image is too large", where=path, got=error, remedy="save it smaller: 8 um/px is enough"
        ) from None
    except (OSError, SyntaxError) as error:
        raise SlideError("a mask image cannot be read", where=path, got=error) from None
    tissue_HW = values != 0
    if tissue_HW.ndim == 3:
        colours = tissue_HW[..., :-1] if bands[-1] == "A" else tissue_HW
        tissue_HW = colours.any(axis=-1) & (tissue_HW[..., -1] | (bands[-1] != "A"))
    grey = Image.fromarray(tissue_HW.astype(np.uint8) * 255)
    return np.asarray(grey.resize((mask_width, mask_height), Image.Resampling.BOX)) >= 128


def _check_image(image: Image.Image, path: Path, width: int, height: int) -> None:
    if image.mode not in _MODES:
        raise SlideError("a mask image is of an unknown kind", where=path, got=f"mode {image.mode}", allowed=_MODES)
    if getattr(image, "n_frames", 1) != 1:
        raise SlideError("a mask image holds more than one picture", where=path, allowed="one")
    if abs(image.width * height / (image.height * width) - 1) > _ASPECT:
        raise SlideError(
            "a mask image has another aspect ratio than its slide",
            where=path,
            got=f"{image.width} x {image.height} px, ratio {image.width / image.height:.4g}",
            allowed=f"{width / height:.4g} ({width} x {height} px) to {_ASPECT:.0%}",
            remedy="save a mask of the whole slide, at any size",
        )
