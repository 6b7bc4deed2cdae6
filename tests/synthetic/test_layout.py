from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.path import Path as Outline
from scipy.ndimage import label

from histill.errors import ConfigError
from histill.synthetic import KINDS
from histill.synthetic.layout import TissuePlan, _outlines
from histill.synthetic.slides import slide_truth


def test_wrong_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean tumour"):
        TissuePlan(kinds=("tumor",))
    with pytest.raises(ConfigError, match="at least one"):
        TissuePlan(kinds=())
    with pytest.raises(ConfigError, match="pieces 0"):
        TissuePlan(pieces=0)


@pytest.mark.parametrize("seed", range(6))
def test_every_kind_gets_its_share_and_glass_surrounds_the_tissue(seed: int) -> None:
    truth = slide_truth(width_px=2000, height_px=2000, seed=seed)
    share = np.bincount(truth.grid_HW.ravel() + 1, minlength=5) / truth.grid_HW.size
    assert 0.3 < share[0] < 0.7
    assert share[1:].min() > 0.5 * (1 - share[0]) / 4
    border = np.concatenate([truth.grid_HW[[0, -1]].ravel(), truth.grid_HW[:, [0, -1]].ravel()])
    assert (border == -1).all()


def test_pieces_are_apart() -> None:
    truth = slide_truth(width_px=4000, height_px=1500, seed=1, tissue=TissuePlan(pieces=3))
    _, count = label(truth.grid_HW >= 0)
    large = np.bincount(label(truth.grid_HW >= 0)[0].ravel())[1:] > 300
    assert count >= 3
    assert large.sum() == 3


@settings(max_examples=60, deadline=None)
@given(
    x=st.floats(-100, 2100), y=st.floats(-100, 1900), side=st.floats(20, 600), share=st.sampled_from([0.6, 0.9, 1.0])
)
def test_the_kind_of_a_tile_is_that_of_its_cells(x: float, y: float, side: float, share: float) -> None:
    truth = slide_truth(width_px=2001, height_px=1703, mpp=0.265, seed=8)
    assert truth.cell_px == pytest.approx(16 * 0.5 / 0.265)
    kinds = []
    for row in range(truth.grid_HW.shape[0]):
        for column in range(truth.grid_HW.shape[1]):
            middle = ((column + 0.5) * truth.cell_px, (row + 0.5) * truth.cell_px)
            if x <= middle[0] < x + side and y <= middle[1] < y + side:
                kinds.append(int(truth.grid_HW[row, column]))
    if not kinds:
        assert truth.kind_of(x, y, side, share=share) == truth.kind_at(x + side / 2, y + side / 2)
        return
    wanted = [kind for index, kind in enumerate(truth.kinds) if kinds.count(index) >= share * len(kinds)]
    assert truth.kind_of(x, y, side, share=share) == (wanted[0] if wanted else None)


def test_outside_the_slide_there_is_nothing() -> None:
    truth = slide_truth(width_px=500, height_px=400, seed=0)
    assert [truth.kind_at(x, y) for x, y in ((-1, 200), (250, -1), (500, 200), (250, 400), (0, 0))] == [None] * 5
    assert truth.kind_at(250, 200) in KINDS
    with pytest.raises(ValueError, match="read-only"):
        truth.grid_HW[0, 0] = 1


def _filled(rings: list[Any], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Even-odd rule, by matplotlib."""
    points = np.stack([xs.ravel(), ys.ravel()], axis=1)
    inside = np.zeros(len(points), dtype=bool)
    for ring in rings:
        inside ^= Outline(np.asarray(ring, dtype=np.float64)).contains_points(points)
    return inside.reshape(xs.shape)


@settings(max_examples=150, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans()))
def test_outlines_give_the_mask_back_and_touch_themselves_nowhere(mask: np.ndarray) -> None:
    components, count = label(mask)
    ys, xs = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    for number in range(1, count + 1):
        rings = _outlines(components == number)
        assert np.array_equal(_filled([[(c, r) for r, c in ring] for ring in rings], xs, ys), components == number)
        areas = []
        for ring in rings:
            assert ring[0] == ring[-1]
            assert len(set(ring)) == len(ring) - 1 >= 4
            r, c = np.array(ring).T
            assert ((np.diff(r) == 0) ^ (np.diff(c) == 0)).all(), "along the sides"
            assert (np.diff(r)[1:] * np.diff(r)[:-1] == 0).all(), "corners only"
            areas.append(float((c[:-1] * r[1:] - c[1:] * r[:-1]).sum() / 2))
        assert areas[0] > 0
        assert all(area < 0 for area in areas[1:]), "holes run the other way"
