from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from histill.errors import ConfigError
from histill.slides.options import TissueOptions
from histill.slides.tissue import otsu_threshold, tissue_mask

OPTIONS = TissueOptions()
GLASS, PINK, PALE, PURPLE = (243, 240, 244), (225, 130, 175), (235, 205, 222), (120, 80, 150)


def _glass(height: int = 200, width: int = 300, noise: float = 3, colour: Any = GLASS) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    image = np.array(colour) + rng.normal(0, noise, (height, width, 3)) + np.linspace(-6, 0, width)[:, None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _paint(image: NDArray[np.uint8], box: tuple[int, int, int, int], colour: Any) -> None:
    left, top, right, bottom = box
    noise = np.random.default_rng(1).normal(0, 6, (bottom - top, right - left, 3))
    image[top:bottom, left:right] = np.clip(np.array(colour) + noise, 0, 255)


def _mask(image: NDArray[np.uint8], mpp: float = 8.0, **options: float) -> NDArray[np.bool_]:
    return tissue_mask(image, np.ones(image.shape[:2], bool), mpp, TissueOptions(**options))


def _real(path: Path, mpp: float) -> NDArray[np.uint8]:
    """The whole level 0 at 8 um/px, with its scale taken as given."""
    with openslide.OpenSlide(path) as slide:
        image = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
    size = (round(image.width * mpp / 8), round(image.height * mpp / 8))
    return np.asarray(image.resize(size, Image.Resampling.BOX))


# ------------------------------------------------------------------ Otsu


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=3, max_size=30))
def test_otsu_finds_the_cut_of_least_variance_within(counts: list[int]) -> None:
    """The same cut by the other definition: the least sum of squares inside the two classes, by brute force."""
    values = np.repeat(np.arange(len(counts)), counts)
    within = {
        cut: sum(((part - part.mean()) ** 2).sum() for part in (values[values < cut], values[values >= cut]))
        for cut in range(1, len(counts))
        if (values < cut).any() and (values >= cut).any()
    }
    threshold = otsu_threshold(np.array(counts, dtype=np.int64))
    if within:
        assert within[threshold] == pytest.approx(min(within.values()), abs=1e-6)
    else:
        assert threshold == 0


# ------------------------------------------------------------------ drawn slides


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (233, 228, 226), (238, 240, 232), (200, 198, 200)])
def test_a_blank_slide_has_no_tissue(colour: Any) -> None:
    assert not _mask(_glass(colour=colour)).any()


@pytest.mark.parametrize(("first", "second"), [(PINK, PURPLE), (PALE, PURPLE), (PINK, PINK), (PALE, PALE)])
def test_a_slide_that_is_all_tissue_is_not_halved(first: Any, second: Any) -> None:
    image = _glass()
    _paint(image, (0, 0, 150, 200), first)
    _paint(image, (150, 0, 300, 200), second)
    assert _mask(image).all()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("colour", [PINK, PURPLE, PALE])
def test_tissue_on_glass_is_found_to_the_pixel(share: float, colour: Any) -> None:
    side = round((60_000 * share) ** 0.5 / 1.3)
    image = _glass()
    _paint(image, (20, 10, 20 + min(side, 270), 10 + min(side, 180)), colour)
    truth = np.zeros(image.shape[:2], bool)
    truth[10 : 10 + min(side, 180), 20 : 20 + min(side, 270)] = True
    wrong = _mask(image, closing_um=0) ^ truth
    assert wrong.sum() <= 4 * (side + 4)  # the edge, since the picture is averaged over 3 x 3 pixels


def test_pale_beside_strong_tissue_is_kept() -> None:
    image = _glass()
    _paint(image, (20, 20, 120, 180), PALE)
    _paint(image, (120, 20, 220, 180), PURPLE)
    found = _mask(image)
    assert found[24:176, 24:216].all()
    assert not found[:, 230:].any()


def test_absent_black_and_ink_are_never_tissue() -> None:
    image = _glass()
    _paint(image, (50, 50, 250, 150), PINK)
    image[:, :30] = (12, 2, 20)  # a black border, saturated
    image[160:190, 100:200] = (40, 70, 180)  # marker
    image[80:110, 120:150] = (30, 120, 70)  # green ink on the tissue
    present = np.ones(image.shape[:2], bool)
    present[50:150, 200:250] = False
    found = tissue_mask(image, present, 8.0, OPTIONS)
    assert found[54:146, 54:110].all()
    assert not found[:, :30].any()
    assert not found[155:].any()
    assert not found[82:108, 122:148].any()
    assert not found[~present].any()


def test_absent_pixels_have_no_part_in_the_threshold() -> None:
    """Faint tissue (saturation 0.08) is found by Otsu's threshold, which a strongly coloured third would draw up."""
    image = _glass(noise=1)
    _paint(image, (20, 20, 150, 180), (238, 219, 230))
    image[:, 200:] = (255, 0, 255)
    present = np.ones(image.shape[:2], bool)
    present[:, 199:] = False
    assert tissue_mask(image, present, 8.0, OPTIONS)[24:176, 24:146].mean() > 0.99
    assert _mask(image)[24:176, 24:146].mean() < 0.5


@pytest.mark.parametrize("mpp", [4.0, 8.0, 16.0])
def test_areas_are_square_microns_at_any_scale(mpp: float) -> None:
    """Pieces and holes of 0.7 and 1.5 times the limit."""
    image = _glass(round(3200 / mpp), round(4800 / mpp), noise=1)

    def box(x_um: float, y_um: float, area_um2: float) -> tuple[int, int, int, int]:
        side = round(area_um2**0.5 / mpp)
        return (round(x_um / mpp), round(y_um / mpp), round(x_um / mpp) + side, round(y_um / mpp) + side)

    dust, piece, block = box(200, 200, 14_000), box(800, 200, 30_000), box(1600, 300, 6e6)
    small, large = box(2000, 800, 28_000), box(3000, 800, 60_000)
    for part in (dust, piece, block):
        _paint(image, part, PINK)
    for hole in (small, large):
        left, top, right, bottom = hole
        image[top:bottom, left:right] = GLASS
    found = _mask(image, mpp, closing_um=0, piece_min_um2=20_000, hole_min_um2=40_000)

    def at(part: tuple[int, int, int, int]) -> bool:
        left, top, right, bottom = part
        return bool(found[(top + bottom) // 2, (left + right) // 2])

    assert [at(part) for part in (dust, piece, small, large)] == [False, True, True, False]


def test_gaps_are_closed_to_the_slides_edge_and_no_further() -> None:
    image = _glass(noise=1)
    _paint(image, (0, 50, 100, 150), PINK)
    _paint(image, (105, 50, 200, 150), PINK)  # a gap of 5 px: 40 um
    _paint(image, (212, 50, 300, 150), PINK)  # one of 12 px: 96 um
    found = _mask(image, closing_um=24)
    assert found[52:148, :198].all()
    assert not found[50:150, 203:209].any()
    assert not found[:48].any()


def test_a_notch_at_the_slides_edge_is_no_hole() -> None:
    image = _glass(noise=1)
    _paint(image, (0, 0, 300, 200), PINK)
    image[:15, 100:115] = GLASS  # 14,400 um^2
    image[100:115, 100:115] = GLASS
    found = _mask(image, closing_um=0, hole_min_um2=20_000)
    assert not found[2:12, 103:112].any()
    assert found[90:125, 90:125].all()


def test_a_slide_with_no_pixels_at_all() -> None:
    image = np.full((50, 60, 3), 255, np.uint8)
    assert not tissue_mask(image, np.zeros((50, 60), bool), 8.0, OPTIONS).any()


@pytest.mark.parametrize(
    "bad",
    [
        {"mpp": 0},
        {"saturation_floor": 0.2},
        {"saturation_ceiling": 1.5},
        {"closing_um": -1},
        {"piece_min_um2": float("nan")},
        {"hole_min_um2": float("inf")},
    ],
)
def test_bad_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="tissue"):
        TissueOptions(**bad)


# ------------------------------------------------------------------ real slides


def test_skin_on_glass(shared_data: Path) -> None:
    image = _real(shared_data / "slides" / "CMU-1-Small-Region.svs", 0.499)
    found = _mask(image)
    assert 0.35 < found.mean() < 0.45
    # looked at by eye: dermis, epidermis, the keratin-filled follicle; glass left and right; specks of dust
    for x, y in ((130, 480), (190, 90), (240, 250), (300, 450), (250, 120), (270, 205)):
        assert found[y // 3, x // 3], (x, y)
    for x, y in ((60, 60), (60, 400), (360, 300), (390, 115), (0, 5), (390, 540)):
        assert not found[y // 3, x // 3], (x, y)


def test_a_stitched_scan_with_absent_fields(shared_data: Path) -> None:
    image = _real(shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", 2.0)
    found = _mask(image)
    assert 0.6 < found.mean() < 0.66
    height, width = found.shape
    for x, y in ((0.3, 0.5), (0.5, 0.3), (0.9, 0.85), (0.05, 0.55)):
        assert found[int(y * height), int(x * width)], (x, y)
    for x, y in ((0.05, 0.05), (0.3, 0.12), (0.64, 0.6), (0.1, 0.9), (0.99, 0.25)):  # (0.64, 0.6): the torn hole
        assert not found[int(y * height), int(x * width)], (x, y)
    # its inner part alone, all tissue: not halved
    inner = image[int(0.3 * height) : int(0.75 * height), int(0.15 * width) : int(0.45 * width)]
    assert _mask(inner).mean() > 0.995
