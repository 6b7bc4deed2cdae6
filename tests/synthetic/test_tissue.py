from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histill.errors import ConfigError
from histill.synthetic import KINDS, MPP, SlideEffects, draw_field, draw_tile, slide_effects
from histill.synthetic.cells import CELLS, Cell, draw_cell
from histill.synthetic.glands import cell_borders
from histill.synthetic.texture import ATLAS_PX, atlas, fibres, noise


def _nuclear_share(concentrations_HWS: np.ndarray) -> float:
    haematoxylin_HW = concentrations_HWS[..., 0]
    return float((haematoxylin_HW > 2 * np.median(haematoxylin_HW)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_is_determined_by_its_arguments(kind: str) -> None:
    effects = slide_effects(3)
    first = draw_tile(kind, 96, 5, effects)
    assert first.shape == (96, 96, 3)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, draw_tile(kind, 96, 5, slide_effects(3)))
    assert not np.array_equal(first, draw_tile(kind, 96, 6, effects))
    assert not np.array_equal(first, draw_tile(kind, 96, 5, slide_effects(4)))


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(KINDS), tile_px=st.integers(32, 150), seed=st.integers(0, 2**63))
def test_concentrations_are_finite_and_not_negative(kind: str, tile_px: int, seed: int) -> None:
    concentrations_HWS = draw_tile(kind, tile_px, seed, slide_effects(seed))
    assert np.isfinite(concentrations_HWS).all()
    assert concentrations_HWS.min() >= 0.0
    assert concentrations_HWS.max() < 6.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_nuclei_and_matrix(kind: str) -> None:
    shares = [_nuclear_share(draw_tile(kind, 128, seed, SlideEffects())) for seed in range(6)]
    assert 0.08 < np.mean(shares) < 0.6


def test_glands_have_large_lumina_and_stroma_has_none() -> None:
    def empty(kind: str) -> float:
        """Share of tiles with blank space whose every side touches tissue (so no fat, no glass)."""
        found = []
        for seed in range(10):
            blank_HW = draw_tile(kind, 128, seed, SlideEffects()).sum(-1) < 0.05
            border = np.concatenate([blank_HW[0], blank_HW[-1], blank_HW[:, 0], blank_HW[:, -1]])
            found.append(blank_HW.mean() > 0.04 and border.mean() < 0.1)
        return float(np.mean(found))

    assert empty("gland") >= 0.3
    assert empty("stroma") == 0.0


def test_slides_differ_and_the_effects_show() -> None:
    effects = [slide_effects(seed) for seed in range(50)]
    assert len({item.nuclear_size for item in effects}) == 50
    assert slide_effects(7) == slide_effects(7)
    pale, strong = SlideEffects(haematoxylin=0.8), SlideEffects(haematoxylin=1.2)
    ratio = draw_tile("stroma", 64, 1, strong)[..., 0].sum() / draw_tile("stroma", 64, 1, pale)[..., 0].sum()
    assert ratio == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["epithelial", "lymphocyte", "tumour"])
def test_a_nucleus_has_the_area_of_its_table_entry(kind: str) -> None:
    style = CELLS[kind]
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(60):
        canvas_HWS = np.zeros((96, 96, 3), np.float32)
        draw_cell(canvas_HWS, rng, Cell(kind=kind, y=48.3, x=47.6, angle=0.7), MPP)
        areas.append((canvas_HWS[..., 1] > 0.065).sum() * MPP**2)  # eosin is half its plateau at the outline
    expected = np.pi / 4 * style.length_um * style.width_um * (1 + style.size_cv**2)
    assert np.mean(areas) == pytest.approx(expected, rel=0.10)


def test_a_nucleus_is_cut_by_the_border_not_moved() -> None:
    whole_HWS = np.full((80, 80, 3), 0.1, np.float32)
    part_HWS = whole_HWS[:, 40:].copy()
    draw_cell(whole_HWS, np.random.default_rng(4), Cell(kind="tumour", y=40.0, x=40.0, angle=0.3), MPP)
    draw_cell(part_HWS, np.random.default_rng(4), Cell(kind="tumour", y=40.0, x=0.0, angle=0.3), MPP)
    np.testing.assert_allclose(part_HWS[..., 1], whole_HWS[:, 40:, 1], atol=1e-5)
    outside_HWS = np.full((20, 20, 3), 0.1, np.float32)
    draw_cell(outside_HWS, np.random.default_rng(4), Cell(kind="tumour", y=-90.0, x=0.0, angle=0.3), MPP)
    np.testing.assert_array_equal(outside_HWS, np.float32(0.1))


def test_noise_is_standardised_periodic_and_of_its_scale() -> None:
    for scale_px in (1.0, 4.0, 25.0):
        field = atlas(scale_px)
        assert field.shape == (ATLAS_PX, ATLAS_PX)
        assert field.mean() == pytest.approx(0.0, abs=1e-4)
        assert field.std() == pytest.approx(1.0, rel=1e-4)
        assert not field.flags.writeable
    near = [float((atlas(scale) * np.roll(atlas(scale), 3, axis=0)).mean()) for scale in (1.0, 4.0, 25.0)]
    assert near[0] < 0.2 < near[1] < 0.95 < near[2]
    wide = noise(np.random.default_rng(0), 4.0, 8, ATLAS_PX + 40)
    np.testing.assert_array_equal(wide[:, :40], wide[:, ATLAS_PX:])


def test_fibres_run_along_their_angle() -> None:
    for angle in (0.0, np.pi / 2):
        fibrils_HW, bundles_HW, across_HW = fibres(np.random.default_rng(2), 128, 128, angle=angle, waviness=0.0)
        for field_HW in (fibrils_HW, bundles_HW):
            down, right = np.abs(np.diff(field_HW, axis=0)).mean(), np.abs(np.diff(field_HW, axis=1)).mean()
            assert (down > 3 * right) if angle == 0.0 else (right > 3 * down)
        assert np.ptp(across_HW) == pytest.approx(127, abs=0.01)


def test_cell_borders_lie_halfway() -> None:
    borders_HW = cell_borders(np.array([[32.0, 16.0], [32.0, 48.0]], np.float32), 64)
    assert abs(int(borders_HW[32].argmax()) - 32) <= 1
    assert borders_HW[32, 10] < 0.01
    assert cell_borders(np.zeros((1, 2), np.float32), 10).max() == 0.0


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean lymphoid"):
        draw_tile("lymphoit", 64, 0, SlideEffects())
    with pytest.raises(ConfigError, match="tile_px"):
        draw_tile("gland", 16, 0, SlideEffects())


@pytest.mark.parametrize(("kind", "cell"), [("gland", "epithelial"), ("tumour", "tumour"), ("lymphoid", "lymphocyte")])
def test_a_field_knows_its_nuclei(kind: str, cell: str) -> None:
    field = draw_field(kind, 128, 5, SlideEffects())
    np.testing.assert_array_equal(field.concentrations_HWS, draw_tile(kind, 128, 5, SlideEffects()))
    assert max(field.cells, key=lambda name: field.cells[name]) == cell
    names = {list(CELLS)[value - 1] for value in np.unique(field.nuclei_HW) if value}
    assert cell in names <= set(field.cells)
    inside = field.nuclei_HW > 0
    haematoxylin_HW = field.concentrations_HWS[..., 0]
    assert haematoxylin_HW[inside].mean() > 2 * haematoxylin_HW[~inside].mean()
