from __future__ import annotations

import multiprocessing
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from histill.slides.open import open_slide
from histill.slides.openslide_reader import OpenSlideReader, level0_start
from histill.slides.slide import ScaleFacts, Slide, UnreadableRegionError
from histill.slides.tiff_reader import TiffReader

JPEG, JPEG2000, BOXES = "CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "boxes.tiff"
DICOM = "CMU-1-Small-Region_dicom"
ALLOWED = {JPEG: 0, JPEG2000: 2, BOXES: 0}
LEVEL_PAGES = {JPEG: (0,), JPEG2000: (0, 2), BOXES: (0, 1, 2, 3)}
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def stored_pixels(path: Path, level: int) -> np.ndarray:
    """A whole level as another reader decodes it."""
    with tifffile.TiffFile(path) as tif:
        return tif.pages[LEVEL_PAGES[path.name][level]].asarray()


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(np.int16) - b).max())


def draw_region(data: st.DataObject, slide: Slide, largest: int = 300) -> tuple[int, int, int, int, int]:
    level = data.draw(st.integers(0, len(slide.levels) - 1), "level")
    width = data.draw(st.integers(1, min(largest, slide.levels[level].width)), "width")
    height = data.draw(st.integers(1, min(largest, slide.levels[level].height)), "height")
    x = data.draw(st.integers(0, slide.levels[level].width - width), "x")
    y = data.draw(st.integers(0, slide.levels[level].height - height), "y")
    return level, x, y, width, height


@pytest.fixture(scope="module", params=[JPEG, JPEG2000, BOXES])
def tiled(request: pytest.FixtureRequest, shared_data: Path) -> tuple[Path, list[np.ndarray]]:
    path = shared_data / "slides" / request.param
    return path, [stored_pixels(path, level) for level in range(len(LEVEL_PAGES[request.param]))]


@FEW
@given(data=st.data())
def test_tiff_regions_are_the_stored_pixels(tiled: tuple[Path, list[np.ndarray]], data: st.DataObject) -> None:
    path, pixels = tiled
    slide = TiffReader(path, cache_blocks=data.draw(st.sampled_from([1, 3, 512])))
    for _ in range(3):
        level, x, y, width, height = draw_region(data, slide)
        region = slide.read(level, x, y, width, height)
        assert difference(region, pixels[level][y : y + height, x : x + width]) == 0
        assert region.flags.writeable
    slide.close()


@FEW
@given(data=st.data())
def test_tiff_and_openslide_agree_on_level_0(tiled: tuple[Path, list[np.ndarray]], data: st.DataObject) -> None:
    path, _ = tiled
    fast = TiffReader(path)
    _, x, y, width, height = draw_region(data, _only_level_0(fast))
    with openslide.OpenSlide(path) as slow:
        theirs = np.asarray(slow.read_region((x, y), 0, (width, height)).convert("RGB"))
    assert difference(fast.read(0, x, y, width, height), theirs) <= ALLOWED[path.name]


def _only_level_0(slide: TiffReader) -> TiffReader:
    slide.levels = slide.levels[:1]
    return slide


@FEW
@given(data=st.data())
def test_openslide_regions_are_the_stored_pixels(shared_data: Path, data: st.DataObject) -> None:
    # The levels of this file are 2.0, 4.016 and 8.086 times smaller to OpenSlide.
    slide = OpenSlideReader(shared_data / "slides" / BOXES)
    level, x, y, width, height = draw_region(data, slide)
    whole = stored_pixels(slide.path, level)
    assert difference(slide.read(level, x, y, width, height), whole[y : y + height, x : x + width]) == 0


@pytest.mark.parametrize(("x", "y"), [(0, 0), (50, 60), (1880, 40), (960, 1000), (1300, 1100), (1003, 1401)])
def test_openslide_regions_of_an_uneven_level_are_not_displaced(shared_data: Path, x: int, y: int) -> None:
    slide = OpenSlideReader(shared_data / "slides" / JPEG2000)
    whole = stored_pixels(slide.path, 1).astype(np.float64)
    region = slide.read(1, x, y, 300, 300)
    if x in (0, 50, 1880) and y < 64:
        assert difference(region, whole[y : y + 300, x : x + 300].astype(np.uint8)) <= 2
    errors = {
        (right, down): np.abs(region - whole[y + down : y + down + 300, x + right : x + right + 300]).mean()
        for right in (-1, 0, 1)
        for down in (-1, 0, 1)
        if x + right >= 0 and y + down >= 0
    }
    assert min(errors, key=errors.__getitem__) == (0, 0)


@given(st.integers(0, 10**6), st.floats(1, 64), st.integers(0, 64))
def test_level0_start(start: int, downsample: float, reach: int) -> None:
    begin, location = level0_start(start, downsample, reach)
    assert start - reach <= begin <= start
    assert begin >= 0
    assert abs(location / downsample - begin) <= 0.5 / downsample + 1e-9
    if begin != start:
        assert abs(location / downsample - begin) < 1 / 500


@pytest.mark.parametrize("reader", [TiffReader, OpenSlideReader])
def test_regions_must_lie_inside(shared_data: Path, reader: Callable[[Path], Slide]) -> None:
    slide = reader(shared_data / "slides" / BOXES)
    for x, y, width, height in [
        (-1, 0, 4, 4),
        (0, -1, 4, 4),
        (297, 0, 4, 4),
        (0, 247, 4, 4),
        (0, 0, 0, 4),
        (0, 0, 4, 0),
    ]:
        with pytest.raises(ValueError, match="leaves the level, 300 x 250 px"):
            slide.read(0, x, y, width, height)


def test_earlier_regions_stay_when_blocks_are_overwritten(shared_data: Path) -> None:
    slide = TiffReader(shared_data / "slides" / JPEG, cache_blocks=1)
    first = slide.read(0, 1000, 1000, 200, 200)
    copy = first.copy()
    for x in range(0, 2000, 240):
        slide.read(0, x, 480, 240, 240)
    assert (first == copy).all()


def test_readers_travel_to_a_spawned_process(shared_data: Path) -> None:
    slides = [reader(shared_data / "slides" / JPEG) for reader in (TiffReader, OpenSlideReader)]
    expected = [slide.read(0, 700, 900, 50, 40) for slide in slides]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for slide, here in zip(slides, expected, strict=True):
            assert (pool.submit(slide.read, 0, 700, 900, 50, 40).result() == here).all()


def test_closing_twice_and_reading_on(shared_data: Path) -> None:
    for reader in (TiffReader, OpenSlideReader):
        slide = reader(shared_data / "slides" / JPEG)
        before = slide.read(0, 0, 0, 10, 10)
        slide.close()
        slide.close()
        assert (slide.read(0, 0, 0, 10, 10) == before).all()


# Damage ----------------------------------------------------------------------------------------------------------


def damage(source: Path, target: Path, page: int, index: int, how: str) -> Path:
    """Copy a slide and harm one block of it."""
    if not target.exists():
        shutil.copyfile(source, target)
    with tifffile.TiffFile(target) as tif:
        level = tif.pages[page]
        offset, count = level.dataoffsets[index], level.databytecounts[index]
        tags = {name: level.tags[name] for name in ("TileOffsets", "TileByteCounts")}
        sizes = {name: struct.calcsize(tag.dataformat[-1]) for name, tag in tags.items()}

    def write(name: str, value: int) -> None:
        file.seek(tags[name].valueoffset + sizes[name] * index)
        file.write(value.to_bytes(sizes[name], "little"))

    with target.open("r+b") as file:
        if how == "count 0":
            write("TileByteCounts", 0)
        elif how == "cut short":
            write("TileByteCounts", count * 2 // 3)
        elif how == "cut by 2 bytes":
            write("TileByteCounts", count - 2)
        elif how == "beyond the end":
            write("TileOffsets", target.stat().st_size - 10)
        else:
            first, last = {"zeroed": (0, 1), "zeroed tail": (0.6, 1), "zeroed middle": (0.5, 0.6)}[how]
            file.seek(offset + int(first * count))
            file.write(bytes(int(last * count) - int(first * count)))
    return target


DAMAGES = ["zeroed", "zeroed tail", "zeroed middle", "cut short", "cut by 2 bytes", "count 0", "beyond the end"]
# name -> page, level, block, blocks across, block side; the blocks are full of tissue
PLACES = {JPEG: (0, 0, 45, 10, 240), JPEG2000: (2, 1, 40, 9, 256)}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", PLACES)
def test_a_damaged_block_is_named_and_never_a_picture(shared_data: Path, tmp_path: Path, name: str, how: str) -> None:
    page, level, index, across, side = PLACES[name]
    source = shared_data / "slides" / name
    slide, whole = TiffReader(damage(source, tmp_path / name, page, index, how)), TiffReader(source)
    row, column = divmod(index, across)
    x, y = column * side, row * side
    for region in [(x, y, side, side), (x - 5, y - 5, 6, 6), (x + side - 1, y + side - 1, 9, 9)]:
        for _ in range(2):
            with pytest.raises(UnreadableRegionError, match=rf"level {level}, block column {column}, row {row}"):
                slide.read(level, *region)
    around = [(x - 5, y - 5, 5, 200), (x + side, y, 30, side), (x, y - 40, side, 40), (x, y + side, side, 10)]
    for region in around:
        assert difference(slide.read(level, *region), whole.read(level, *region)) == 0


def test_openslide_errors_do_not_last(shared_data: Path, tmp_path: Path) -> None:
    page, level, index, across, side = PLACES[JPEG]
    source = shared_data / "slides" / JPEG
    slide = OpenSlideReader(damage(source, tmp_path / JPEG, page, index, "zeroed"))
    row, column = divmod(index, across)
    for _ in range(2):
        with pytest.raises(UnreadableRegionError, match=f"level 0, x {column * side}, y {row * side}, 50 x 50 px"):
            slide.read(level, column * side, row * side, 50, 50)
        expected = TiffReader(source).read(0, column * side - 100, row * side, 100, 100)
        assert difference(slide.read(level, column * side - 100, row * side, 100, 100), expected) == 0


@pytest.mark.parametrize("name", PLACES)
def test_openslide_pixels_that_were_never_stored(shared_data: Path, tmp_path: Path, name: str) -> None:
    _, _, index, _, side = PLACES[name]
    slide = OpenSlideReader(damage(shared_data / "slides" / name, tmp_path / name, 0, index, "count 0"))
    row, column = divmod(index, slide.levels[0].width // side + 1)
    with pytest.raises(UnreadableRegionError, match="no pixels are stored there"):
        slide.read(0, column * side - 20, row * side, 21, 10)
    assert slide.read(0, column * side - 20, row * side, 20, 10).shape == (10, 20, 3)


@pytest.mark.parametrize("reader", [TiffReader, OpenSlideReader])
@pytest.mark.parametrize("how", ["zeroed", "count 0"])
def test_a_thumbnail_marks_damaged_blocks(
    shared_data: Path, tmp_path: Path, reader: Callable[[Path], Slide], how: str
) -> None:
    source = shared_data / "slides" / JPEG
    small = reader(damage(source, tmp_path / JPEG, 0, 45, how)).thumbnail(989)  # a third
    image, present, whole = small.image_HW3, small.present_HW, TiffReader(source).thumbnail(989)
    assert whole.present_HW.all()
    assert not whole.damaged_HW.any()
    expected = np.ones(present.shape, bool)
    expected[320:400, 400:480] = False  # block column 5, row 4, of 240 px
    assert (present == expected).all()
    assert (image[~present] == 255).all()
    assert (small.damaged_HW == ~present).all()
    assert difference(image[present], whole.image_HW3[present]) == 0


@pytest.mark.parametrize("reader", [TiffReader, OpenSlideReader])
@pytest.mark.parametrize(("name", "longest"), [(JPEG, 400), (JPEG2000, 600), (BOXES, 60), (BOXES, 9999)])
def test_thumbnails_average_by_area(
    shared_data: Path, reader: Callable[[Path], Slide], name: str, longest: int
) -> None:
    slide = reader(shared_data / "slides" / name)
    small = slide.thumbnail(longest)
    image, present = small.image_HW3, small.present_HW
    full = slide.levels[0]
    longest = min(longest, max(full.width, full.height))
    scale = longest / max(full.width, full.height)
    assert present.all()
    assert image.shape == (round(full.height * scale), round(full.width * scale), 3)
    level = max(n for n, size in enumerate(slide.levels) if max(size.width, size.height) >= longest)
    pixels = Image.fromarray(stored_pixels(slide.path, level))
    reference = np.asarray(pixels.resize((image.shape[1], image.shape[0]), Image.Resampling.BOX))
    # BOX takes whole pixels; where cells cut pixels it differs at edges, but not on the whole.
    assert np.abs(image.astype(np.float64) - reference).mean() < (0.6 if pixels.width % image.shape[1] == 0 else 4)


# Formats ---------------------------------------------------------------------------------------------------------


def tissue(shared_data: Path) -> np.ndarray:
    return TiffReader(shared_data / "slides" / JPEG).read(0, 300, 300, 700, 500)


def write_ome(path: Path, pixels: np.ndarray, **options: Any) -> list[np.ndarray]:
    """An OME-TIFF of three levels, the smaller ones as sub-IFDs."""
    metadata = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.00025, "PhysicalSizeYUnit": "mm"}
    levels = [pixels, pixels[::2, ::2].copy(), pixels[::4, ::4].copy()]
    options = {"tile": (128, 112), "photometric": "rgb", **options}
    with tifffile.TiffWriter(path, ome=True) as tif:
        tif.write(levels[0], subifds=2, metadata={"axes": "YXS", **metadata}, resolution=(1e4, 1e4), **options)
        for level in levels[1:]:
            tif.write(level, subfiletype=1, **options)
    return levels


LOSSLESS = {
    "none": {},
    "lzw": {"compression": "lzw"},
    "deflate, predictor": {"compression": "zlib", "predictor": True},
    "lzw, big": {"compression": "lzw", "predictor": True, "bigtiff": True},
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_ome_tiff_pyramids(shared_data: Path, tmp_path: Path, kind: str) -> None:
    options = dict(LOSSLESS[kind])
    path = tmp_path / "slide.ome.tif"
    options.pop("bigtiff", None)
    levels = write_ome(path, tissue(shared_data), **options)
    slide = open_slide(path)
    assert (slide.reader, slide.vendor) == ("tiff", "ome-tiff")
    assert [level.downsample_x for level in slide.levels] == [1, 2, 4]
    assert slide.scale_facts.vendor_mpp_xy == pytest.approx((0.25, 0.25))
    for number, pixels in enumerate(levels):
        height, width = pixels.shape[:2]
        assert difference(slide.read(number, 0, 0, width, height), pixels) == 0
        assert difference(slide.read(number, 3, 70, 100, 50), pixels[70:120, 3:103]) == 0


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_in_ycbcr_gives_openslides_pixels(shared_data: Path, tmp_path: Path, subsampling: tuple[int, int]) -> None:
    path = tmp_path / "slide.tif"
    options: dict[str, Any] = {"photometric": "ycbcr", "subsampling": subsampling}
    tifffile.imwrite(path, tissue(shared_data), tile=(128, 112), compression="jpeg", **options)
    slide, slow = open_slide(path), OpenSlideReader(path)
    assert slide.reader == "tiff"
    assert difference(slide.read(0, 0, 0, 700, 500), slow.read(0, 0, 0, 700, 500)) == 0


def test_jpeg2000_in_ycbcr_gives_openslides_pixels(shared_data: Path, tmp_path: Path) -> None:
    rgb = tissue(shared_data)[:256, :512]
    ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    blocks = [
        imagecodecs.jpeg2k_encode(np.ascontiguousarray(block), codecformat="j2k", mct=False, reversible=True)
        for block in (ycbcr[:, :256], ycbcr[:, 256:])
    ]
    path = tmp_path / "ycbcr.svs"
    with tifffile.TiffWriter(path) as tif:
        tif.write(
            iter(blocks),
            shape=rgb.shape,
            dtype="uint8",
            tile=(256, 256),
            photometric="rgb",
            compression=33003,
            description="Aperio Image Library v11\r\n512x256 (256x256) J2K/YUV16 Q=70|AppMag = 40|MPP = 0,2520",
            metadata=None,
        )
    slide, slow = open_slide(path), OpenSlideReader(path)
    assert slide.reader == "tiff"
    assert difference(slide.read(0, 0, 0, 512, 256), slow.read(0, 0, 0, 512, 256)) <= 1
    assert np.abs(slide.read(0, 0, 0, 512, 256).astype(int) - rgb).mean() < 1
    assert slide.scale_facts == ScaleFacts(vendor_mpp_xy=(0.252, 0.252), objective_power=40)


@pytest.mark.parametrize("kind", ["none", "lzw", "deflate, predictor"])
@pytest.mark.parametrize("how", ["zeroed", "cut short", "count 0"])
def test_damaged_lossless_blocks(shared_data: Path, tmp_path: Path, kind: str, how: str) -> None:
    sound, path = tmp_path / "sound.tif", tmp_path / "slide.tif"
    pixels = tissue(shared_data)
    tifffile.imwrite(sound, pixels, tile=(128, 112), photometric="rgb", **LOSSLESS[kind])
    slide = TiffReader(damage(sound, path, 0, 8, how))
    with pytest.raises(UnreadableRegionError, match="level 0, block column 1, row 1"):
        slide.read(0, 200, 200, 1, 1)
    assert difference(slide.read(0, 0, 0, 700, 128), pixels[:128]) == 0


def test_dicom_has_the_pixels_of_its_svs(shared_data: Path) -> None:
    files = sorted((shared_data / "slides" / DICOM).iterdir())
    slides = [open_slide(file) for file in (files[0], files[-1])]
    svs = open_slide(shared_data / "slides" / JPEG)
    for dicom in slides:
        assert (dicom.reader, dicom.vendor) == ("openslide", "dicom")
        assert dicom.levels == svs.levels
        assert dicom.scale_facts.vendor_mpp_xy == (0.499, 0.499)
    size = 0, 0, 0, 2220, 2967
    off = slides[0].read(*size).astype(np.float64) - svs.read(*size)
    # The twin was compressed once more, with the colours at half resolution (JPEG 4:2:0): brightness agrees best.
    assert np.abs(off @ [0.299, 0.587, 0.114]).mean() < 1.5
    assert np.abs(off).mean() < 3
