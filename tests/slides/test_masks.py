from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from histill.slides.masks import fill_polygon, read_mask
from histill.slides.slide import SlideError

WIDTH, HEIGHT = 4000, 3000  # of the slide; the mask is 40 x 30
MASK = (WIDTH, HEIGHT, 40, 30)


def _box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def _feature(kind: str, coordinates: Any) -> dict[str, Any]:
    """As QuPath 0.5 writes an annotation."""
    return {
        "type": "Feature",
        "id": "2f8d6b7e-7f0c-4d43-9e4c-1f1f6a8f4a53",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }


def _write(folder: Path, content: Any) -> Path:
    path = folder / "slide.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _boxes(*boxes: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    mask = np.zeros((30, 40), bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


# ------------------------------------------------------------------ filling


def _turns(ring: NDArray[np.float64], x: float, y: float) -> float:
    """Times that a ring goes round a point: the sum of the angles under which the point sees its edges."""
    away = ring - [x, y]
    angle = np.arctan2(away[:, 1], away[:, 0])
    step = np.diff(np.append(angle, angle[0]))
    return float(abs(((step + np.pi) % (2 * np.pi) - np.pi).sum()) / (2 * np.pi))


def _star(rng: np.random.Generator, points: int, radius: float) -> NDArray[np.float64]:
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(0.4, 1, points) * radius
    return np.stack([10.3 + radii * np.cos(angle), 9.1 + radii * np.sin(angle)], axis=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 30), st.floats(1, 25))
def test_a_pixel_is_inside_when_its_centre_is(seed: int, points: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    outer = _star(rng, points, radius)
    hole = (outer - [10.3, 9.1]) * 0.3 + [10.3, 9.1]
    mask = np.zeros((18, 22), bool)
    fill_polygon(mask, [outer, hole[::-1]])
    for row in range(18):
        for column in range(22):
            x, y = column + 0.5, row + 0.5
            rings = round(_turns(outer, x, y)) + round(_turns(hole, x, y))
            assert mask[row, column] == (rings == 1), (row, column)


def test_the_area_of_a_disc_has_no_bias() -> None:
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    areas = []
    for shift in np.random.default_rng(0).random((20, 2)):
        mask = np.zeros((60, 60), bool)
        fill_polygon(mask, [np.stack([30 + 20 * np.cos(angle), 30 + 20 * np.sin(angle)], axis=1) + shift])
        areas.append(mask.sum())
    assert np.mean(areas) == pytest.approx(np.pi * 400, rel=2e-3)  # an outline would add 63 pixels: 5 %


# ------------------------------------------------------------------ GeoJSON


@pytest.mark.parametrize("form", ["collection", "list", "feature"])
def test_the_forms_that_qupath_writes(tmp_path: Path, form: str) -> None:
    box = _feature("Polygon", [_box(500, 300, 1500, 1000)])
    content = {"collection": {"type": "FeatureCollection", "features": [box]}, "list": [box], "feature": box}[form]
    np.testing.assert_array_equal(read_mask(_write(tmp_path, content), *MASK), _boxes((5, 3, 15, 10)))


def test_union_holes_and_parts_that_leave_the_slide(tmp_path: Path) -> None:
    features = [
        _feature("Polygon", [_box(500, 300, 1500, 1000), _box(700, 500, 900, 800)]),
        _feature("Polygon", [_box(800, 300, 1600, 1200)[::-1]]),  # overlaps the first and half of its hole
        _feature("MultiPolygon", [[_box(-900, 2500, 300, 9000)], [_box(3000, 0, 3500, 200)]]),
    ]
    expected = _boxes((5, 3, 15, 10), (8, 3, 16, 12), (0, 25, 3, 30), (30, 0, 35, 2))
    expected[5:8, 7:8] = False
    got = read_mask(_write(tmp_path, {"type": "FeatureCollection", "features": features}), *MASK)
    np.testing.assert_array_equal(got, expected)


def test_a_point_may_have_a_height_and_a_ring_may_be_open(tmp_path: Path) -> None:
    ring = [[*point, 0.0] for point in _box(500, 300, 1500, 1000)[:-1]]
    got = read_mask(_write(tmp_path, _feature("Polygon", [ring])), *MASK)
    np.testing.assert_array_equal(got, _boxes((5, 3, 15, 10)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "holds no polygon"),
        ({"type": "FeatureCollection", "features": []}, "holds no polygon"),
        ({"type": "Topology"}, "no GeoJSON[\\s\\S]*Topology"),
        ("3", "no GeoJSON"),
        ([_feature("Point", [1, 2])], "feature 0[\\s\\S]*Point[\\s\\S]*Polygon or MultiPolygon"),
        ([_feature("Polygon", [_box(0, 0, 9, 9)]), _feature("LineString", [[1, 2], [3, 4]])], "feature 1"),
        ([{"type": "Feature", "geometry": None}], "no geometry"),
        ([7], "no geometry"),
        ([_feature("Polygon", [])], "no ring"),
        ([_feature("MultiPolygon", [])], "empty"),
        ([_feature("MultiPolygon", [[]])], "no ring"),
        ([_feature("Polygon", [[[0, 0], [1, 1]]])], "2 points"),
        ([_feature("Polygon", [[[0, 0], [1, "x"], [2, 2]]])], "no list of points"),
        ([_feature("Polygon", [[0, 1, 2, 3]])], "no list of points"),
        ('[{"geometry": {"type": "Polygon", "coordinates": [[[0, 0], [NaN, 1], [2, 2]]]}}]', "not finite"),
        ([_feature("Polygon", [_box(4001, 0, 5000, 900)])], "outside the slide[\\s\\S]*x 4001 to 5000"),
        ([_feature("Polygon", [_box(-50, -50, -1, -1)])], "outside the slide"),
    ],
)
def test_a_bad_geojson_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SlideError, match=message) as caught:
        read_mask(_write(tmp_path, content), *MASK)
    assert "slide.geojson" in str(caught.value)


# ------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(m, s) for m in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") for s in (".png", ".tif")] + [("I", ".tif")],
)
def test_every_kind_of_image(tmp_path: Path, mode: str, suffix: str) -> None:
    expected = _boxes((5, 3, 15, 10), (30, 20, 38, 29))
    label = expected.astype(np.uint8)  # 1, as label images have: nearly black to the eye, yet tissue
    if mode in ("I;16", "I"):
        image = Image.fromarray(label.astype(np.uint16 if mode == "I;16" else np.int32) * 256)
    elif mode == "P":
        image = Image.fromarray(label)
        image.putpalette([255, 255, 255, 0, 0, 0])  # the index counts, not the colour
    else:
        image = Image.fromarray(label * 255).convert(mode)
    path = tmp_path / f"mask{suffix}"
    image.save(path)
    with Image.open(path) as written:
        assert written.mode == mode
    np.testing.assert_array_equal(read_mask(path, *MASK), expected)


def test_a_transparent_pixel_is_not_tissue(tmp_path: Path) -> None:
    pixels = np.full((30, 40, 4), 255, np.uint8)
    pixels[:, 20:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", *MASK), _boxes((0, 0, 20, 30)))


def test_a_mask_of_another_size_is_resized_by_area(tmp_path: Path) -> None:
    fine = np.zeros((300, 400), np.uint8)
    fine[30:100, 50:150] = 1
    fine[0:10, 200:204] = 1  # 40 % of a mask pixel
    fine[0:10, 300:306] = 1  # 60 %
    Image.fromarray(fine).save(tmp_path / "fine.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "fine.png", *MASK), _boxes((5, 3, 15, 10), (30, 0, 31, 1)))
    Image.fromarray(np.eye(2, dtype=np.uint8)).resize((4, 3)).save(tmp_path / "coarse.png")
    coarse = np.asarray(Image.open(tmp_path / "coarse.png")) > 0
    np.testing.assert_array_equal(read_mask(tmp_path / "coarse.png", *MASK), np.kron(coarse, np.ones((10, 10), bool)))


def test_the_aspect_ratio_must_be_the_slides(tmp_path: Path) -> None:
    for size, good in (((403, 300), True), ((397, 300), True), ((405, 300), False), ((300, 400), False)):
        Image.new("L", size, 255).save(tmp_path / "mask.png")
        if good:
            assert read_mask(tmp_path / "mask.png", *MASK).all()
        else:
            with pytest.raises(SlideError, match=r"aspect ratio[\s\S]*4000 x 3000"):
                read_mask(tmp_path / "mask.png", *MASK)


def test_a_bad_image_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (300, 400), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    Image.new("F", (400, 300)).save(tmp_path / "float.tif")
    frames = [Image.new("L", (400, 300)), Image.new("L", (400, 300))]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    whole.rename(tmp_path / "mask.jpg")
    for name, message in (
        ("cut.png", "cannot be read"),
        ("text.png", "cannot be read"),
        ("none.png", "cannot be read"),
        ("none.geojson", "cannot be read"),
        ("float.tif", "mode F"),
        ("two.tif", "more than one"),
        ("mask.jpg", r"\.jpg[\s\S]*\.geojson"),
    ):
        with pytest.raises(SlideError, match=message):
            read_mask(tmp_path / name, *MASK)


def test_a_mask_image_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (400, 300), 255).save(tmp_path / "mask.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 - 1)  # Pillow warns here, and the test fails on warnings
    assert read_mask(tmp_path / "mask.png", *MASK).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 // 2 - 1)
    with pytest.raises(SlideError, match=r"too large[\s\S]*8 um/px"):
        read_mask(tmp_path / "mask.png", *MASK)
