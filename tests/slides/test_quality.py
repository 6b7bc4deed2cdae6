from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from histill.errors import ConfigError
from histill.slides.options import QualityOptions
from histill.slides.quality import laplacian_variance, pen_pixels, rejected

OPTIONS = QualityOptions()
NONE = QualityOptions(white_max=1, black_max=1, blur_min=0, pen_max=1)
INKS = {
    "blue": (40, 70, 170),
    "navy": (20, 40, 120),
    "royal": (50, 60, 200),
    "green": (20, 120, 60),
    "teal": (20, 130, 120),
    "red": (215, 20, 40),
}


@pytest.fixture(scope="session")
def mitosis(shared_data: Path) -> list[NDArray[np.uint8]]:
    """Every third real H&E tile, 128 px at about 0.25 um/px; four scanners."""
    paths = sorted((shared_data / "tiles" / "mitosis").rglob("*.jpg"))[::3]
    assert len(paths) == 1240
    return [simplejpeg.decode_jpeg(path.read_bytes()) for path in paths]


def _stroke(tile: NDArray[np.uint8], ink: Any, width_px: int, opacity: float = 0.85) -> NDArray[np.uint8]:
    """Draw a marker stroke across a tile: ink over tissue, slightly transparent, with a soft edge."""
    line = Image.new("L", (tile.shape[1], tile.shape[0]))
    ImageDraw.Draw(line).line([(0, 20), (tile.shape[1], tile.shape[0] - 20)], fill=255, width=width_px)
    alpha = np.asarray(line.filter(ImageFilter.GaussianBlur(2)))[..., None] / 255 * opacity
    return np.rint(tile * (1 - alpha) + np.array(ink) * alpha).astype(np.uint8)


def _blurred(tile: NDArray[np.uint8], sigma_px: float) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(sigma_px)))


# ------------------------------------------------------------------ real tiles are kept


def test_real_tiles_are_kept(mitosis: list[NDArray[np.uint8]]) -> None:
    found = [rejected(tile, OPTIONS, 0.25) for tile in mitosis]
    assert sum(fault is not None for fault in found) == 0


def test_real_cytology_and_other_stains_are_kept(shared_data: Path) -> None:
    """Nearly white fields of cytology under four scanners; kidney in trichrome, silver and PAS."""
    for folder, mpp in (("multiscanner", 0.5), ("unlabelled", 0.5)):
        paths = [path for path in sorted((shared_data / "tiles" / folder).rglob("*.jpg")) if path.is_file()][::2]
        faults = {path.name: rejected(np.asarray(Image.open(path).convert("RGB")), OPTIONS, mpp) for path in paths}
        hit = {name: fault for name, fault in faults.items() if fault is not None and "kidney" not in name}
        if folder == "multiscanner":
            assert not hit
        else:  # pictures of single nuclei, enlarged so far that they hold no detail: blur it is
            assert set(hit.values()) <= {"blur"}
            assert not [name for name, fault in faults.items() if fault and "kidney" in name]


# ------------------------------------------------------------------ what is to be found is found


@pytest.mark.parametrize("ink", list(INKS))
def test_marker_strokes_are_found(mitosis: list[NDArray[np.uint8]], ink: str) -> None:
    tiles = mitosis[::20]
    wide = [rejected(_stroke(tile, INKS[ink], 90), OPTIONS, 0.25) for tile in tiles]
    assert wide.count("pen") >= 0.97 * len(tiles), wide
    # the pixels themselves: under the stroke's middle, and hardly any beside it
    tile = _stroke(tiles[0], INKS[ink], 60)
    under = _stroke(np.zeros_like(tile), (255, 255, 255), 30)[..., 0] > 150
    assert pen_pixels(tile)[under].mean() > 0.9
    beside = _stroke(np.zeros_like(tile), (255, 255, 255), 80)[..., 0] == 0
    assert pen_pixels(tile)[beside].mean() < 0.02


def test_marker_on_glass_is_found() -> None:
    glass = np.full((224, 224, 3), 240, np.uint8)
    for name, ink in INKS.items():
        assert rejected(_stroke(glass, ink, 120, opacity=0.95), OPTIONS, 0.5) == "pen", name
    assert rejected(_stroke(glass, (25, 25, 30), 300, opacity=1.0), OPTIONS, 0.5) == "black"  # black marker


def test_real_surgical_ink_is_seen(shared_data: Path) -> None:
    """The margin of CMU-1-Small-Region carries green-blue ink; its dermis, pink and purple, carries none."""
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        inked = np.asarray(slide.read_region((1700, 1900), 0, (100, 100)).convert("RGB"))
        clean = np.asarray(slide.read_region((700, 2000), 0, (448, 448)).convert("RGB"))
    assert pen_pixels(inked).mean() > 0.15
    assert pen_pixels(clean).mean() < 0.01


@pytest.mark.parametrize("colour", [(240, 238, 241), (255, 255, 255), (226, 222, 220)])
def test_glass_is_white(colour: Any) -> None:
    noise = np.random.default_rng(0).normal(0, 2, (224, 224, 3))
    glass = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    assert rejected(glass, OPTIONS, 0.5) == "white"


def test_a_border_is_black(mitosis: list[NDArray[np.uint8]]) -> None:
    tile = mitosis[0].copy()
    tile[:72] = (8, 3, 10)
    assert rejected(tile, OPTIONS, 0.25) == "black"
    tile[36:72] = mitosis[0][36:72]
    assert rejected(tile, OPTIONS, 0.25) is None


@pytest.mark.parametrize("shrink", [1, 2])
def test_blur_is_found_at_any_scale(mitosis: list[NDArray[np.uint8]], shrink: int) -> None:
    """A sigma of 1.5 um is out of focus, whether the tile has 0.25 or 0.5 um/px; sharp tiles are not."""
    mpp = 0.25 * shrink
    tiles = [np.asarray(Image.fromarray(tile).reduce(shrink)) for tile in mitosis[::10]]
    bare = [tile for tile in tiles if (tile.max(axis=-1) < 20).mean() < 0.01]  # a padded tile keeps one sharp edge
    assert len(bare) > 100
    assert [rejected(_blurred(tile, 1.5 / mpp), OPTIONS, mpp) for tile in bare].count("blur") == len(bare)
    assert [rejected(tile, OPTIONS, mpp) for tile in tiles].count(None) == len(tiles)


# ------------------------------------------------------------------ definitions


@pytest.mark.parametrize(("mpp", "block"), [(0.5, 1), (1.0, 1), (0.4, 1), (0.25, 2), (0.17, 3), (0.125, 4)])
def test_the_laplacian_by_its_definition(mpp: float, block: int) -> None:
    tile = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    grey = tile.astype(np.float64) @ [0.25, 0.5, 0.25]
    rows, columns = 50 // block, 61 // block
    grey = grey[: rows * block, : columns * block].reshape(rows, block, columns, block).mean(axis=(1, 3))
    values = [
        4 * grey[i, j] - grey[i - 1, j] - grey[i + 1, j] - grey[i, j - 1] - grey[i, j + 1]
        for i in range(1, rows - 1)
        for j in range(1, columns - 1)
    ]
    assert laplacian_variance(tile, mpp) == pytest.approx(np.var(values), rel=1e-12)


def test_the_laplacian_does_not_overflow() -> None:
    """A chessboard is the largest Laplacian that there is: +-8 * 127.5."""
    for block, mpp in ((1, 0.5), (2, 0.25), (3, 0.17)):
        board = np.indices((60, 60)).sum(axis=0) % 2 * 255
        tile = np.repeat(np.kron(board, np.ones((block, block), int))[..., None], 3, axis=2).astype(np.uint8)
        assert laplacian_variance(tile, mpp) == pytest.approx((4 * 255) ** 2)


def test_a_tile_too_small_to_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        laplacian_variance(np.zeros((5, 50, 3), np.uint8), 0.25)


def test_each_filter_can_be_switched_off() -> None:
    flat = {"white": (245, 245, 245), "black": (5, 5, 5), "pen": INKS["blue"], "blur": (200, 150, 180)}
    for name, colour in flat.items():
        tile = np.full((64, 64, 3), colour, np.uint8)
        assert rejected(tile, OPTIONS, 0.5) == name
        assert rejected(tile, NONE, 0.5) is None
        for other in flat:
            limit = {"white": "white_max", "black": "black_max", "pen": "pen_max", "blur": "blur_min"}[other]
            alone = QualityOptions(
                **{"white_max": 1, "black_max": 1, "blur_min": 0, "pen_max": 1, limit: getattr(OPTIONS, limit)}
            )
            assert (rejected(tile, alone, 0.5) == other) == (other in (name, "blur"))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_share_is_what_the_limit_says(share: float) -> None:
    """Noise in pink; a random share of single pixels white, black or blue."""
    rng = np.random.default_rng(0)
    for limit, fault, colour in (
        ("white_max", "white", (250, 250, 250)),
        ("black_max", "black", (5, 5, 5)),
        ("pen_max", "pen", (40, 70, 170)),
    ):
        tile = np.clip(np.array((210, 140, 180)) + rng.normal(0, 15, (224, 224, 3)), 0, 255).astype(np.uint8)
        tile[rng.random((224, 224)) < share] = colour
        off = {"white_max": 1.0, "black_max": 1.0, "pen_max": 1.0}
        assert rejected(tile, QualityOptions(**{**off, limit: share - 0.03}), 0.5) == fault
        assert rejected(tile, QualityOptions(**{**off, limit: share + 0.03}), 0.5) is None


@pytest.mark.parametrize("bad", [{"white_max": 1.1}, {"pen_max": -0.1}, {"blur_min": -1}, {"blur_min": float("nan")}])
def test_bad_options_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="quality"):
        QualityOptions(**bad)
