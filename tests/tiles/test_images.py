from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histill.errors import DataError
from histill.tiles.images import ImageFolder, UnreadableTileError, decode, image_px, read_table


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 5, columns * 3, rows + columns], axis=-1).astype(np.uint8)


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.jpg", "a/1.JPG", "c.png", ".hidden/4.jpg", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"text" if name.endswith("txt") else encoded("PNG" if name.endswith("png") else "JPEG"))
    return tmp_path


def test_lossless_formats_come_back_as_they_were() -> None:
    for kind, name in (("PNG", "x.png"), ("TIFF", "x.tif"), ("BMP", "x.bmp")):
        np.testing.assert_array_equal(decode(encoded(kind), name), picture())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_grey(kind: str) -> None:
    grey_HW = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    file = io.BytesIO()
    Image.fromarray(grey_HW).save(file, kind)
    expected_HW = np.rint(grey_HW / 257)
    for channel in range(3):
        np.testing.assert_array_equal(decode(file.getvalue(), f"x.{kind.lower()}")[:, :, channel], expected_HW)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(dtype: type) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1, dtype=dtype)).save(file, "TIFF")
    with pytest.raises(UnreadableTileError, match="32 bits"):
        decode(file.getvalue(), "x.tif")


def test_what_shines_through_is_white() -> None:
    pixels = np.dstack([picture(), np.full((24, 40), 255, np.uint8)])
    pixels[:12, :, 3] = 0
    pixels[12, 0, 3] = 51
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    found = decode(file.getvalue(), "x.png")
    assert (found[:12] == 255).all()
    np.testing.assert_array_equal(found[13:], picture()[13:])
    np.testing.assert_allclose(found[12, 0], 0.2 * picture()[12, 0] + 0.8 * 255, atol=1)


def test_a_picture_beyond_the_limit_is_refused_from_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableTileError, match=r"x\.png"):
        image_px(tmp_path / "x.png")


def test_a_loop_of_links_shows_each_tile_once(folder: Path) -> None:
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    assert ImageFolder.scan(folder).paths == ("a/1.JPG", "b/2.jpg", "c.png")


def test_a_name_that_is_not_utf8_is_refused_by_name(folder: Path) -> None:
    import os

    os.close(os.open(os.fsencode(folder) + b"/\xff.jpg", os.O_CREAT))
    with pytest.raises(DataError, match="not UTF-8"):
        ImageFolder.scan(folder)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_equals_pillow(mode: str) -> None:
    data = encoded("JPEG", mode, quality=95, subsampling=0)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data, "x.jpg").astype(int) - expected).max() <= 2


def test_png_named_jpg_is_refused_with_its_name() -> None:
    with pytest.raises(UnreadableTileError, match=r"x\.jpg"):
        decode(encoded("PNG"), "x.jpg")


@pytest.mark.parametrize("keep", [0, 1, 100, -100])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_file_is_an_error_not_a_picture(kind: str, keep: int) -> None:
    name = "x.jpg" if kind == "JPEG" else "x.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    assert len(file.getvalue()) > 300
    with pytest.raises(UnreadableTileError, match=name):
        decode(file.getvalue()[:keep], name)


def test_scan_finds_images_sorted_and_skips_hidden(folder: Path) -> None:
    source = ImageFolder.scan(folder)
    assert source.paths == ("a/1.JPG", "b/2.jpg", "c.png")
    np.testing.assert_array_equal(source.read(2), picture())


def test_table_and_held_out(folder: Path) -> None:
    (folder / "t.csv").write_text("path,label\nb/2.jpg,x\nc.png,y\n")
    source = ImageFolder.scan(folder, table=folder / "t.csv", hold_out={"c.png"})
    assert source.paths == ("b/2.jpg",)
    assert source.held_out == 1


def test_missing_file_of_a_table_is_named_when_read(folder: Path) -> None:
    (folder / "t.csv").write_text("path\nb/2.jpg\ngone.jpg\n")
    source = ImageFolder.scan(folder, table=folder / "t.csv")
    with pytest.raises(UnreadableTileError, match=r"gone\.jpg"):
        source.read(1)


def test_missing_empty_and_wholly_held_out_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder.scan(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tiles to learn from"):
        ImageFolder.scan(tmp_path / "empty")
    with pytest.raises(DataError, match="3 of them held out"):
        ImageFolder.scan(folder, hold_out=ImageFolder.scan(folder).paths)
    with pytest.raises(DataError, match="must be a folder"):
        ImageFolder.scan(folder / "c.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column"),
        ("file\nx.jpg\n", "lacks the column path"),
        ("path,label\nx.jpg\n", "line 2"),
        ("path,label\nx.jpg,a,b\n", "line 2"),
        ("path\n", "no rows"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.csv", ["path"])


def test_fingerprint_changes_with_names_and_sizes(folder: Path) -> None:
    before = ImageFolder.scan(folder).fingerprint()
    assert ImageFolder.scan(folder).fingerprint() == before
    (folder / "c.png").write_bytes(encoded("PNG") + b"\0")
    assert ImageFolder.scan(folder).fingerprint() != before


def test_sizes_from_headers(folder: Path) -> None:
    assert image_px(folder / "c.png") == (24, 40)
    assert ImageFolder.scan(folder).median_side_px() == 24
