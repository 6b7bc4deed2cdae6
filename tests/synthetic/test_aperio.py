from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from histill.synthetic import aperio as aperio_module
from histill.synthetic.aperio import default_levels, write_aperio


def _tiff_levels(path: Path) -> list[np.ndarray]:
    with tifffile.TiffFile(path) as tif:
        return [page.asarray() for page in tif.pages if page.is_tiled]  # type: ignore[union-attr]


def _read(path: Path, level: int = 0) -> np.ndarray:
    with openslide.OpenSlide(path) as source:
        return np.asarray(source.read_region((0, 0), level, source.level_dimensions[level]).convert("RGB"))


def _noise_image(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    light = 900 * gaussian_filter(rng.standard_normal((height, width, 1)), (9, 9, 0), mode="wrap")
    tint = 900 * gaussian_filter(rng.standard_normal((height, width, 3)), (25, 25, 0), mode="wrap")
    return np.clip(150 + light * 0.5 + tint, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("mpp", "power"), [(0.25, "40"), (0.265, "40"), (0.5, "20"), (0.5021, "20"), (1.0, "10")])
def test_openslide_reads_vendor_scale_and_levels(tmp_path: Path, mpp: float, power: str) -> None:
    write_aperio(tmp_path / "a.svs", _noise_image(621, 1003), mpp=mpp, levels=(1, 2, 8))
    with openslide.OpenSlide(tmp_path / "a.svs") as source:
        assert source.properties[openslide.PROPERTY_NAME_VENDOR] == "aperio"
        assert float(source.properties[openslide.PROPERTY_NAME_MPP_X]) == mpp
        assert float(source.properties[openslide.PROPERTY_NAME_MPP_Y]) == mpp
        assert source.properties[openslide.PROPERTY_NAME_OBJECTIVE_POWER] == power
        assert source.level_dimensions == ((1003, 621), (501, 310), (125, 77))
        assert source.level_downsamples == pytest.approx((1, 2, 8), rel=0.01)
        assert source.properties["openslide.level[0].tile-width"] == "240"
        assert source.associated_images["thumbnail"].size == (501, 310)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000"])
def test_every_level_is_the_mean_of_whole_squares(tmp_path: Path, compression: Literal["jpeg", "jpeg2000"]) -> None:
    image, path = _noise_image(500, 733), tmp_path / "a.svs"
    allowed = 3.2 if compression == "jpeg2000" else 1.2  # 38 dB is 2.6 on average
    write_aperio(path, image, mpp=0.5, levels=(1, 4, 6), compression=compression, tile_px=128, jpeg_quality=100)
    decoded = _tiff_levels(path)
    for number, (factor, level) in enumerate(zip((1, 4, 6), decoded, strict=True)):
        rows, columns = 500 // factor, 733 // factor
        assert level.shape == (rows, columns, 3)
        squares = image[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        assert np.abs(level - squares.mean((1, 3))).mean() < allowed, f"level {number}"
        assert np.abs(_read(path, number).astype(int) - level).mean() < 0.6, "as OpenSlide sees it"


def test_quality_is_in_the_quantization_tables(tmp_path: Path) -> None:
    for quality, first in ((90, 3), (50, 16), (75, 8)):  # the IJG luminance table starts with 16 at quality 50
        write_aperio(tmp_path / "a.svs", _noise_image(240, 240), mpp=0.5, jpeg_quality=quality)
        with tifffile.TiffFile(tmp_path / "a.svs") as tif:
            page = tif.pages[0]
            page.parent.filehandle.seek(page.dataoffsets[0])  # type: ignore[union-attr]
            coded = page.parent.filehandle.read(page.databytecounts[0])  # type: ignore[union-attr]
        with Image.open(io.BytesIO(coded)) as tile:
            assert tile.quantization[0][0] == first  # type: ignore[attr-defined]
            assert tile.size == (240, 240)


def test_tiles_at_the_border_do_not_ring(tmp_path: Path) -> None:
    write_aperio(tmp_path / "a.svs", np.full((250, 250, 3), 243, dtype=np.uint8), mpp=0.5)
    assert np.abs(_read(tmp_path / "a.svs").astype(int) - 243).max() <= 1


@given(st.integers(1, 200_000), st.integers(1, 200_000))
def test_default_levels_leave_a_small_last_one(width: int, height: int) -> None:
    levels = default_levels(width, height)
    assert levels == (1, 4, 16, 64)[: len(levels)]
    assert max(width, height) / levels[-1] <= 1500 or len(levels) == 4
    assert len(levels) == 1 or max(width, height) / levels[-2] > 1500


def test_a_failed_slide_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = aperio_module._encode
    calls = iter(range(100))

    def fail(*args: Any) -> bytes:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return whole(*args)

    monkeypatch.setattr(aperio_module, "_encode", fail)
    with pytest.raises(OSError, match="No space"):
        write_aperio(tmp_path / "a.svs", _noise_image(500, 500), mpp=0.5)
    assert list(tmp_path.iterdir()) == []
