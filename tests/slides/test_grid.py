from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from histill.slides.grid import tile_origins, tissue_shares


@pytest.mark.parametrize(
    ("width", "height", "extent", "stride", "expected"),
    [
        (10, 7, 3.0, 3.0, [(0, 0), (3, 0), (6, 0), (0, 3), (3, 3), (6, 3)]),
        (9, 3, 3.0, 3.0, [(0, 0), (3, 0), (6, 0)]),
        (8, 3, 3.0, 3.0, [(0, 0), (3, 0)]),
        (6, 3, 3.0, 1.5, [(0, 0), (2, 0), (3, 0)]),
        (3, 3, 3.0, 3.0, [(0, 0)]),
        (2, 3, 3.0, 3.0, []),
        (3, 2, 3.0, 3.0, []),
        (12, 3, 3.0, 5.0, [(0, 0), (5, 0)]),
        (10, 4, 3.3, 3.3, [(0, 0), (3, 0)]),  # the third would start at 7 (6.6) and end at 10.3
        (11, 4, 3.3, 3.3, [(0, 0), (3, 0), (7, 0)]),
    ],
)
def test_origins(width: int, height: int, extent: float, stride: float, expected: list[tuple[int, int]]) -> None:
    got = tile_origins(width, height, extent, stride)
    assert got.dtype == np.int64
    assert got.shape == (len(expected), 2)
    assert [tuple(origin) for origin in got.tolist()] == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(40, 500), st.floats(40, 500))
def test_a_grid_is_complete_and_inside(width: int, height: int, extent: float, stride: float) -> None:
    got = {tuple(origin) for origin in tile_origins(width, height, extent, stride).tolist()}
    axes = [[round(i * stride) for i in range(int(length / stride) + 3)] for length in (width, height)]
    x, y = ([o for o in axis if o + extent <= n] for axis, n in zip(axes, (width, height), strict=True))
    assert got == {(a, b) for a in x for b in y}
    assert len(got) == len(tile_origins(width, height, extent, stride))


def test_an_extent_that_rounding_made_too_long_still_fits() -> None:
    extent = 96 * 0.9 / 0.3
    assert extent > 288  # by 6e-14
    assert len(tile_origins(288, 288, extent, extent)) == 1
    assert len(tile_origins(288 * 5, 288 * 2, extent, extent)) == 10


def test_a_stride_below_a_pixel_is_refused() -> None:
    for extent, stride in ((10.0, 0.5), (0.0, 10.0), (10.0, float("nan"))):
        with pytest.raises(ValueError, match="stride"):
            tile_origins(100, 100, extent, stride)


def _share(mask: NDArray[np.bool_], width: int, height: int, x: int, y: int, extent: float) -> float:
    """From the definition: the overlap of the tile with every mask pixel."""
    rows, columns = mask.shape
    total = 0.0
    for row in range(rows):
        for column in range(columns):
            across = min(x + extent, (column + 1) * width / columns) - max(x, column * width / columns)
            down = min(y + extent, (row + 1) * height / rows) - max(y, row * height / rows)
            if mask[row, column] and across > 0 and down > 0:
                total += across * down
    return total / extent**2


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(60, 400),
    st.integers(60, 400),
    st.floats(3, 60),
    st.integers(0, 2**32 - 1),
)
def test_shares_are_exact_areas(rows: int, columns: int, width: int, height: int, extent: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    origins = tile_origins(width, height, extent, max(extent, min(width, height) / 3))
    got = tissue_shares(mask, width, height, origins, extent)
    assert got.dtype == np.float32
    expected = [_share(mask, width, height, x, y, extent) for x, y in origins.tolist()]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_full_and_empty_masks() -> None:
    origins = tile_origins(1000, 700, 99.7, 99.7)
    np.testing.assert_allclose(tissue_shares(np.ones((37, 53), bool), 1000, 700, origins, 99.7), 1, atol=1e-6)
    assert not tissue_shares(np.zeros((37, 53), bool), 1000, 700, origins, 99.7).any()
    assert tissue_shares(np.ones((3, 3), bool), 10, 10, np.zeros((0, 2), np.int64), 5.0).shape == (0,)
