from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histill.slides.render import TileRenderer
from histill.slides.slide import SlideError, UnreadableRegionError

TILE_PX = 224


def _blank(width: int, height: int, downsamples: tuple[int, ...] = (1,)) -> list[NDArray[np.uint8]]:
    return [np.full((height // d, width // d, 3), 200, np.uint8) for d in downsamples]


def _analytic(slide_mpp: float, width: int, height: int, downsample: int) -> NDArray[np.uint8]:
    """Red: lines of 4 um every 20 um across, white on black; green and blue: ramps across and down, 2 grey values a um.

    Each pixel is the exact mean over its own area, plus noise of two grey values so that rounding averages out.
    """
    edges = np.arange(width // downsample + 1) * downsample * slide_mpp
    lit = np.floor(edges / 20) * 4 + np.minimum(edges % 20, 4)  # microns of line up to here
    image = np.zeros((height // downsample, width // downsample, 3))
    image[..., 0] = 255 * np.diff(lit) / np.diff(edges)
    image[..., 1] = 8 + edges[1:] + edges[:-1]
    down = np.arange(height // downsample + 1) * downsample * slide_mpp
    image[..., 2] = (8 + down[1:] + down[:-1])[:, None]
    noise = np.random.default_rng(downsample).uniform(-2, 2, image.shape)
    return np.rint(np.clip(image + noise, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize(
    ("slide_mpp", "level"), [(0.25, 1), (0.265, 0), (0.499, 0), (0.125, 2), (0.13, 1), (0.5, 0), (0.52, 0)]
)
@pytest.mark.parametrize(("x", "y"), [(0, 0), (7, 3)])
def test_lengths_and_places_are_right(fake_slide: Any, slide_mpp: float, level: int, x: int, y: int) -> None:
    width, height = int(122 / slide_mpp), int(118 / slide_mpp)
    slide = fake_slide([_analytic(slide_mpp, width, height, d) for d in (1, 2, 4)])
    renderer = TileRenderer(slide, slide_mpp, 0.5, TILE_PX)
    assert renderer.level == level
    assert renderer.extent_px == pytest.approx(112 / slide_mpp)
    tile = renderer.read(x, y).astype(np.float64)
    assert tile.shape == (TILE_PX, TILE_PX, 3)

    centres_um = (np.arange(TILE_PX) + 0.5) * 0.5
    for channel, axis, start in ((1, 1, x), (2, 0, y)):
        ramp = tile[..., channel].mean(axis=1 - axis)
        error_um = (ramp - 8) / 2 - (start * slide_mpp + centres_um)
        inside = ramp < 245
        # the position on average to 0.05 px, and each column's to 0.3 px (its noise)
        assert abs(error_um[inside].mean()) < 0.05 * 0.5
        assert np.abs(error_um[inside]).max() < 0.3 * 0.5

    # the ruler: centres of mass of the whole lines inside the tile
    light = tile[..., 0].mean(axis=0)
    first_line = -(-(x * slide_mpp + 1e-9) // 20) * 20 if x else 0.0
    expected, found = [], []
    for line_um in np.arange(first_line, x * slide_mpp + 112 - 8, 20):
        near = np.abs(centres_um + x * slide_mpp - (line_um + 2)) < 6
        expected.append(line_um + 2 - x * slide_mpp)
        found.append((light * centres_um)[near].sum() / light[near].sum())
    assert len(found) >= 5
    length, true_length = found[-1] - found[0], expected[-1] - expected[0]
    assert abs(length / true_length - 1) < 0.01
    assert np.abs(np.subtract(found, expected)).max() < 0.1


def test_the_coarsest_level_that_is_fine_enough_is_read(fake_slide: Any) -> None:
    slide = fake_slide(_blank(2000, 1600, (1, 2, 4, 8)))
    assert [TileRenderer(slide, 0.25, mpp, 64).level for mpp in (0.25, 0.49, 0.5, 0.99, 1.0, 2.0, 5.0)] == [
        *(0, 0, 1, 1, 2, 3, 3)
    ]
    # a scale that rounding made a little coarser is the same scale
    assert TileRenderer(slide, 0.25 * (1 + 1e-9), 0.5, 64).level == 1


def test_the_coarser_axis_decides_and_both_axes_are_exact(fake_slide: Any) -> None:
    # level 1: 2 across, 3 down, so 0.25 um/px is there 0.5 across and 0.75 down
    ramp = np.zeros((480, 480, 3), np.uint8)
    ramp[..., 0] = np.arange(480) // 2
    ramp[..., 1] = (np.arange(480) // 2)[:, None]
    level_1 = ramp.reshape(160, 3, 240, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    slide = fake_slide([ramp, level_1])
    assert (slide.levels[1].downsample_x, slide.levels[1].downsample_y) == (2.0, 3.0)
    assert TileRenderer(slide, 0.25, 0.6, 64).level == 0
    renderer = TileRenderer(slide, 0.25, 1.5, 64)
    assert renderer.level == 1
    tile = renderer.read(30, 90).astype(float)
    expected = (np.arange(64) + 0.5) * 6 / 2 - 0.5
    np.testing.assert_allclose(tile[..., 0].mean(axis=0), expected + 15, atol=1)
    np.testing.assert_allclose(tile[..., 1].mean(axis=1), expected + 45, atol=1)


def test_a_coarse_slide_is_refused_beyond_the_tolerance(fake_slide: Any) -> None:
    slide = fake_slide(_blank(400, 400))
    assert TileRenderer(slide, 0.525, 0.5, 64).extent_px == pytest.approx(64 * 0.5 / 0.525)
    with pytest.raises(SlideError, match=r"--mpp 0\.53[\s\S]*--upsample"):
        TileRenderer(slide, 0.527, 0.5, 64)
    with pytest.raises(SlideError):
        TileRenderer(slide, 0.51, 0.5, 64, tolerance=0.0)
    assert TileRenderer(slide, 0.527, 0.5, 64, tolerance=0.1).level == 0
    enlarged = TileRenderer(slide, 1.0, 0.5, 64, upsample=True)
    assert enlarged.extent_px == 32
    assert enlarged.read(10, 10).shape == (64, 64, 3)


def test_the_same_scale_gives_the_same_pixels(fake_slide: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    slide = fake_slide([image])
    np.testing.assert_array_equal(TileRenderer(slide, 0.5, 0.5, 100).read(37, 41), image[41:141, 37:137])
    assert slide.reads == [(0, 37, 41, 100, 100)]


@pytest.mark.parametrize(("width", "height"), [(2967, 1001), (2966, 1003), (2965, 1002)])
def test_the_last_tile_stays_inside_a_level_that_was_cut(fake_slide: Any, width: int, height: int) -> None:
    """2967 / 4 is cut to 741: the level ends 3 level-0 pixels before the slide; FakeSlide refuses reads beyond."""
    slide = fake_slide(_blank(width, height, (1, 4)))
    assert slide.levels[1].downsample_x == 4
    renderer = TileRenderer(slide, 0.25, 1.0, 224)
    assert renderer.level == 1
    tile = renderer.read(width - 896, height - 896)
    assert (tile == 200).all()
    level, x, y, w, h = slide.reads[-1]
    assert (level, x + w, y + h) == (1, width // 4, height // 4)


def test_a_fractional_end_on_the_edge_is_read(fake_slide: Any) -> None:
    slide = fake_slide(_blank(423, 423))  # 224 * 0.5 / 0.265 = 422.64
    assert TileRenderer(slide, 0.265, 0.5, 224).read(0, 0).shape == (224, 224, 3)
    assert slide.reads == [(0, 0, 0, 423, 423)]
    slide = fake_slide(_blank(288, 288))
    renderer = TileRenderer(slide, 0.3, 0.9, 96)
    assert renderer.extent_px > 288  # by 6e-14
    renderer.read(0, 0)
    assert slide.reads == [(0, 0, 0, 288, 288)]


@pytest.mark.parametrize(("x", "y"), [(-1, 0), (0, -1), (1, 0), (0, 1)])
def test_a_tile_that_leaves_the_slide_is_refused(fake_slide: Any, x: int, y: int) -> None:
    with pytest.raises(ValueError, match="leaves a slide"):
        TileRenderer(fake_slide(_blank(423, 423)), 0.265, 0.5, 224).read(x, y)


def test_an_unreadable_region_is_not_swallowed(fake_slide: Any) -> None:
    slide = fake_slide(_blank(800, 400, (1, 2)), damaged=(500, 100, 520, 120))
    renderer = TileRenderer(slide, 0.25, 0.5, 100)
    assert renderer.read(300, 100).shape == (100, 100, 3)
    with pytest.raises(UnreadableRegionError, match="damaged"):
        renderer.read(301, 100)
