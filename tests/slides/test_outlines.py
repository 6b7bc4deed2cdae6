"""Outlines of masks: exact, whatever the shape."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from histill.slides.masks import fill_polygon, read_mask
from histill.slides.outlines import geojson, mask_polygons

MASKS = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@settings(max_examples=300, deadline=None)
@given(mask=MASKS)
def test_filling_the_outlines_gives_the_mask_again(mask: np.ndarray) -> None:
    polygons = mask_polygons(mask)
    filled = np.zeros_like(mask)
    for polygon in polygons:
        fill_polygon(filled, [ring.astype(float) for ring in polygon])
    np.testing.assert_array_equal(filled, mask)


@settings(max_examples=200, deadline=None)
@given(mask=MASKS)
def test_one_polygon_a_piece_outer_ring_first(mask: np.ndarray) -> None:
    labels, count = ndimage.label(mask)
    polygons = mask_polygons(mask)
    assert len(polygons) == count
    for number, polygon in enumerate(polygons, start=1):
        areas = []
        for ring in polygon:
            (x, y), (next_x, next_y) = ring.T, np.roll(ring, -1, axis=0).T
            areas.append(float((x * next_y - next_x * y).sum()) / 2)
            steps = np.abs(np.roll(ring, -1, axis=0) - ring)
            assert (steps.min(axis=1) == 0).all()  # along the pixels' sides
            turns = np.diff(np.vstack([steps, steps[:1]]) > 0, axis=0).any(axis=1)
            assert turns.all()  # no point in the middle of a side
        assert areas[0] > 0
        assert all(area < 0 for area in areas[1:])
        assert sum(areas) == (labels == number).sum()


def test_an_island_that_touches_the_rim_of_its_hole_by_corners() -> None:
    mask = np.ones((5, 5), dtype=bool)
    mask[[1, 2, 2, 3], [2, 1, 3, 2]] = False
    rim, island = mask_polygons(mask)
    assert [len(ring) for ring in rim] == [4, 12]
    assert [ring.tolist() for ring in island] == [[[2, 2], [3, 2], [3, 3], [2, 3]]]


def test_nothing_has_no_outline() -> None:
    assert mask_polygons(np.zeros((3, 4), dtype=bool)) == []


def test_geojson_is_read_back_at_the_slide_s_scale(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((30, 40)) < 0.4
    told = geojson(mask_polygons(mask), 1001 / 40, 751 / 30, "Tissue")
    (tmp_path / "a.geojson").write_text(json.dumps(told))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.geojson", 1001, 751, 40, 30), mask)
