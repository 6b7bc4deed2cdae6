from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from histill.slides.open import _comparable, open_slide
from histill.slides.openslide_reader import OpenSlideReader
from histill.slides.slide import SlideError
from histill.slides.tiff_reader import TiffReader
from histill.synthetic.aperio import write_aperio

JPEG, JPEG2000, BOXES = "CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "boxes.tiff"


@pytest.mark.parametrize("name", [JPEG, JPEG2000, BOXES])
def test_tiled_tiffs_take_the_fast_path(shared_data: Path, name: str) -> None:
    path = shared_data / "slides" / name
    assert open_slide(path).reader == "tiff"
    assert open_slide(path, reader="openslide").reader == "openslide"
    assert open_slide(path, reader="tiff").reader == "tiff"


@pytest.mark.parametrize(("name", "level", "change"), [(JPEG, 0, 1), (JPEG2000, 1, 3), (BOXES, 3, 1)])
def test_other_pixels_on_any_level_take_openslide(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str, level: int, change: int
) -> None:
    right = TiffReader.read

    def wrong(self: TiffReader, at: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        pixels = right(self, at, x, y, width, height)
        if at == level:
            pixels[-1, -1, 1] ^= change if change == 1 else 128
        return pixels

    monkeypatch.setattr(TiffReader, "read", wrong)
    assert open_slide(shared_data / "slides" / name).reader == "openslide"


def _zero_blocks(path: Path, chosen: slice) -> None:
    """Overwrite blocks of level 0, chosen among all from the fullest to the emptiest."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        blocks = sorted(zip(page.databytecounts, page.dataoffsets, strict=True), reverse=True)[chosen]
    with path.open("r+b") as file:
        for count, offset in blocks:
            file.seek(offset)
            file.write(bytes(count))


@pytest.mark.parametrize("name", [JPEG, JPEG2000])
def test_damage_does_not_choose_the_reader(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    shutil.copyfile(shared_data / "slides" / name, path)
    _zero_blocks(path, slice(None, None, 2))
    _zero_blocks(path, slice(0, 40))
    assert open_slide(path).reader == "tiff"


def test_a_slide_of_nothing_but_damage_is_refused(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / JPEG
    shutil.copyfile(shared_data / "slides" / JPEG, path)
    _zero_blocks(path, slice(None))
    with pytest.raises(SlideError, match=r"(?s)none of the pixels.*remedy"):
        open_slide(path)


def test_tiffs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "grey.tif"
    tifffile.imwrite(path, rng.integers(0, 255, (64, 64), np.uint8), tile=(32, 32))
    with pytest.raises(SlideError, match="8-bit RGB"):
        open_slide(path, reader="tiff")
    path = tmp_path / "deep.ome.tif"
    tifffile.imwrite(path, rng.integers(0, 9999, (64, 64, 3), np.uint16), tile=(32, 32), photometric="rgb")
    with pytest.raises(SlideError, match=r"(?s)8-bit RGB.*uint16.*vips"):
        open_slide(path, reader="tiff")
    path = tmp_path / "stack.ome.tif"
    tifffile.imwrite(path, rng.integers(0, 255, (4, 64, 64, 3), np.uint8), tile=(32, 32), photometric="rgb")
    with pytest.raises(SlideError, match="stack of planes"):
        open_slide(path, reader="tiff")


def _refused(folder: Path, name: str, tmp_path: Path) -> Path:
    """A file of the shared folder, or one that is made here."""
    path = tmp_path / name
    if name == "empty.svs":
        path.touch()
    elif name == "picture.svs":
        Image.new("RGB", (64, 64)).save(path, format="png")
    elif name == "cut.svs":
        path.write_bytes((folder / JPEG).read_bytes()[:500_000])  # its directories stand further back
    elif name == "folder.svs":
        path.mkdir()
    elif name == "CMU-1-Small-Regoin.svs":
        shutil.copyfile(folder / BOXES, tmp_path / JPEG)
    else:
        return folder / name
    return path


REFUSALS = {
    "CMU-1-Small-Regoin.svs": "does not exist.*did you mean CMU-1-Small-Region.svs",
    "unreadable.svs": "none of the pixels of this slide can be read.*remedy: +copy it again",
    "broken.svs": "does not know.*IJrE.*remedy: +check that it is the scanner's own file",
    "kidney-48-5.tif": "strips.*remedy:.*vips tiffsave kidney-48-5.tif kidney-48-5-tiled.tif --tile --pyramid",
    "empty.svs": "this file is empty.*remedy",
    "picture.svs": "a PNG picture, not a slide.*remedy:.*vips",
    "cut.svs": "remedy: +copy it again",
    "folder.svs": "this is a folder.*remedy: +give one of its files",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_says_why_and_what_to_do(shared_data: Path, tmp_path: Path, name: str) -> None:
    path = _refused(shared_data / "slides", name, tmp_path)
    with pytest.raises(SlideError, match=f"(?s){REFUSALS[name]}") as caught:
        open_slide(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("reader", ["openslide", "tiff"])
@pytest.mark.parametrize("name", ["broken.svs", "cut.svs", "empty.svs"])
def test_a_named_reader_refuses_too(shared_data: Path, tmp_path: Path, name: str, reader: str) -> None:
    with pytest.raises(SlideError, match="remedy"):
        open_slide(_refused(shared_data / "slides", name, tmp_path), reader=reader)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "first"), [(JPEG, 1_276_000), (BOXES, 0)])
def test_a_damaged_directory_gives_a_slide_or_a_slide_error(
    shared_data: Path, tmp_path: Path, name: str, first: int
) -> None:
    whole = (shared_data / "slides" / name).read_bytes()
    path = tmp_path / name
    rng = np.random.default_rng(0)
    opened = refused = 0
    for _ in range(60):
        harmed = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            harmed[rng.integers(first, min(len(whole), first + 3000))] = rng.integers(256)
        path.write_bytes(harmed)
        try:
            slide = open_slide(path)
        except SlideError:
            refused += 1
        else:
            opened += 1
            slide.close()
    assert opened > 5
    assert refused > 5


def test_no_comparison_beyond_4096_px(tmp_path: Path) -> None:
    """OpenSlide reads a larger region in pieces, and of an uneven level interpolates from the second on."""
    image = np.full((17_001, 260, 3), 240, np.uint8)
    write_aperio(tmp_path / "tall.svs", image, mpp=0.5, levels=(1, 4))
    with closing(OpenSlideReader(tmp_path / "tall.svs")) as slow:
        regions = list(_comparable(TiffReader(tmp_path / "tall.svs"), slow, 1))
    assert slow.levels[1].height == 4250
    assert len(regions) > 4
    assert all(y + height - top <= 4096 for (_, y, _, height), (_, top) in regions)
