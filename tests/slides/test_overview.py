from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histill.slides.overview import overview, overview_level
from histill.slides.slide import Level


def level(width: int, height: int) -> Level:
    return Level(width=width, height=height, downsample_x=1, downsample_y=1)


def exact_shares(full: int, out: int) -> np.ndarray:
    """(out, full): how much of each pixel each cell takes, by fractions."""
    cell = Fraction(full, out)
    return np.array(
        [[float(max(0, min((o + 1) * cell, i + 1) - max(o * cell, i))) for i in range(full)] for o in range(out)]
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_area_averages_whatever_the_blocks(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    block = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    longest = data.draw(st.integers(1, 80))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    exists = rng.random((height, width)) < data.draw(st.sampled_from([0.0, 0.95, 1.0]))
    broken = data.draw(st.booleans())

    def read(x: int, y: int, wide: int, high: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        part = np.s_[y : y + high, x : x + wide]
        if broken and x == y == 0:
            return None
        return pixels[part], None if exists.all() else exists[part]

    small = overview(level(width, height), level(width, height), block, longest, read)
    image, present = small.image_HW3, small.present_HW
    if broken:
        lost = np.zeros((height, width), bool)
        lost[: block[1], : block[0]] = True
        down, across = exact_shares(height, image.shape[0]), exact_shares(width, image.shape[1])
        assert (small.damaged_HW == (np.einsum("oh,hw,pw->op", down, lost, across) > 0)).all()
    else:
        assert not small.damaged_HW.any()
    if broken:
        exists[: block[1], : block[0]] = False
    assert max(image.shape[:2]) == min(longest, max(width, height))
    down, across = exact_shares(height, image.shape[0]), exact_shares(width, image.shape[1])
    lacking = np.einsum("oh,hw,pw->op", down, ~exists, across)
    assert (present == (lacking < 1e-9)).all()
    expected = np.einsum("oh,hwc,pw->opc", down, pixels, across) * image[..., 0].size / (width * height)
    assert np.abs(image - expected)[present].max(initial=0) <= 0.501
    assert (image[~present] == 255).all()


def test_overview_level() -> None:
    levels = [level(4000, 3000), level(1000, 750), level(250, 187)]
    assert [overview_level(levels, px) for px in (1, 250, 251, 1000, 1001, 9999)] == [2, 2, 1, 1, 0, 0]


def test_a_picture_needs_a_pixel() -> None:
    with pytest.raises(ValueError, match="at least one pixel"):
        overview(level(9, 9), level(9, 9), (3, 3), 0, lambda *_: None)
