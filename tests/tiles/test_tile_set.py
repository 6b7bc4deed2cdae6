from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from histill.errors import DataError
from histill.tiles.config import FORMAT
from histill.tiles.images import ImageFolder, UnreadableTileError, decode
from histill.tiles.index import TileRow, merge_indexes, to_table, write_index
from histill.tiles.order import balanced_tile_at, block_tile_at
from histill.tiles.shards import ShardWriter, slide_key
from histill.tiles.tile_set import TileSelection, TileSet, TileSource

PX = 24
SLIDES = {"a": 5, "b.c": 3, "d": 1, "e": 7}


def picture(slide: str, place: int) -> NDArray[np.uint8]:
    random = np.random.default_rng([place, *slide.encode()])
    return random.integers(0, 256, (PX, PX, 3), dtype=np.uint8)


def encode(image: NDArray[np.uint8], codec: str) -> bytes:
    if codec == "jpeg":
        return bytes(simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="444"))
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_slide(root: Path, slide: str, images: Sequence[NDArray[np.uint8]], made_with: dict[str, Any]) -> None:
    """What ``histill tile`` writes of one slide; three tiles to a shard or so."""
    codec = made_with["codec"]
    suffix = {"jpeg": "jpg", "png": "png"}.get(codec)
    rows = []
    with ShardWriter(lambda number: root / "shards" / f"{slide}-{number:05d}.tar", 8000) as writer:
        for place, image in enumerate(images):
            x, y = place % 3 * 48, place // 3 * 48
            shard, offset, length = None, None, None
            if suffix:
                data = encode(image, codec)
                shard, offset = writer.add(f"{slide_key(slide)}_{x}_{y}.{suffix}", data)
                length = len(data)
            rows.append(
                TileRow(
                    shard=shard,
                    offset=offset,
                    length=length,
                    slide=slide,
                    patient=None,
                    x=x,
                    y=y,
                    level=0,
                    mpp=0.5,
                    tissue=1.0,
                )
            )
    write_index(root / "parts" / f"{slide}.parquet", to_table(rows), made_with)
    (root / "parts" / f"{slide}.json").write_text('{"status": "done"}')


def write_set(root: Path, codec: str = "jpeg", slides: dict[str, int] = SLIDES) -> Path:
    made_with = {"format": FORMAT, "tile_px": PX, "mpp": 0.5, "codec": codec}
    root.mkdir(parents=True, exist_ok=True)
    (root / "tileset.json").write_text(json.dumps(made_with))
    for slide, tiles in slides.items():
        write_slide(root, slide, [picture(slide, place) for place in range(tiles)], made_with)
    merge_indexes(list((root / "parts").glob("*.parquet")), root / "index.parquet", made_with)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def all_pictures(slides: Sequence[str] = tuple(SLIDES)) -> list[NDArray[np.uint8]]:
    return [picture(slide, place) for slide in slides for place in range(SLIDES[slide])]


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_tiles_are_the_pictures_that_were_written(tmp_path: Path, codec: str) -> None:
    tiles = TileSet.open(write_set(tmp_path, codec))
    assert len(list((tmp_path / "shards").iterdir())) > len(SLIDES)
    assert len(tiles) == 16
    for index, image in enumerate(all_pictures()):
        found = tiles.read(index)
        assert found.shape == (PX, PX, 3)
        assert found.dtype == np.uint8
        if codec == "png":
            np.testing.assert_array_equal(found, image)
        else:
            expected = np.asarray(Image.open(io.BytesIO(encode(image, codec)))).astype(int)
            assert np.abs(found.astype(int) - expected).max() <= 2


def test_real_tiles_come_back_from_shards(tmp_path: Path, shared_data: Path) -> None:
    paths = sorted((shared_data / "tiles" / "unlabelled").rglob("*.jpg"))[:30]
    assert len(paths) == 30
    images = [decode(path.read_bytes(), path.name) for path in paths]
    side = min(images[0].shape[:2])
    made_with = {"format": FORMAT, "tile_px": side, "mpp": 0.5, "codec": "png"}
    (tmp_path / "tileset.json").write_text(json.dumps(made_with))
    cut = [np.ascontiguousarray(image[:side, :side]) for image in images]
    write_slide(tmp_path, "real", cut, made_with)
    merge_indexes([tmp_path / "parts" / "real.parquet"], tmp_path / "index.parquet", made_with)
    tiles = TileSet.open(tmp_path)
    for index, image in enumerate(cut):
        np.testing.assert_array_equal(tiles.read(index), image)


def test_many_threads_read_what_one_reads(folder: Path) -> None:
    tiles = TileSet.open(folder)
    tiles.shards.most = 2
    alone = [tiles.read(index) for index in range(16)]
    order = np.random.default_rng(0).integers(0, 16, 600).tolist()
    with ThreadPoolExecutor(5) as pool:
        for index, found in zip(order, pool.map(tiles.read, order), strict=True):
            np.testing.assert_array_equal(found, alone[index])


def test_the_sources_keep_the_protocol(folder: Path) -> None:
    source: TileSource = TileSet.open(folder)  # for the type checker
    assert source.root == folder
    assert source.held_out == 0
    assert source.median_side_px() == PX
    assert "slide b.c, x 96, y 0, shard b.c-" in source.name(7)
    image_folder: Callable[[Path], TileSource] = ImageFolder.scan
    assert image_folder
    for outside in (-1, 16):
        with pytest.raises(IndexError, match="16"):
            source.read(outside)


# ------------------------------------------------------------------ damage


def _message(tiles: TileSet, index: int) -> str:
    with pytest.raises(UnreadableTileError) as caught:
        tiles.read(index)
    return str(caught.value)


def test_a_missing_shard_concerns_its_tiles_alone(folder: Path) -> None:
    (folder / "shards" / "d-00000.tar").unlink()
    tiles = TileSet.open(folder)
    message = _message(tiles, 8)
    assert "slide d, x 0, y 0, shard d-00000.tar" in message
    assert "missing" in message
    tiles.read(7)
    tiles.read(9)


def test_a_truncated_shard_is_named_with_the_place(folder: Path) -> None:
    path = folder / "shards" / "d-00000.tar"
    path.write_bytes(path.read_bytes()[:900])
    message = _message(TileSet.open(folder), 8)
    assert "slide d, x 0, y 0, shard d-00000.tar at byte 512" in message
    assert "ends before" in message


@pytest.mark.parametrize("damage", ["zeros", "cut", "png", "larger"])
def test_bytes_that_are_not_the_tile_are_refused(folder: Path, damage: str) -> None:
    path = folder / "shards" / "d-00000.tar"
    data = bytearray(path.read_bytes())
    length = len(encode(picture("d", 0), "jpeg"))
    if damage == "zeros":
        data[512 : 512 + length] = bytes(length)
    elif damage == "cut":
        data[512 + length // 2 : 512 + length] = bytes(length - length // 2)
    elif damage == "png":
        data[512:600] = encode(picture("d", 0), "png")[:88]
    else:
        other = simplejpeg.encode_jpeg(np.zeros((PX + 8, PX, 3), dtype=np.uint8), quality=5)
        assert len(other) < length
        data[512 : 512 + len(other)] = other
    path.write_bytes(data)
    message = _message(TileSet.open(folder), 8)
    assert "slide d, x 0, y 0" in message
    assert ("another size" in message) == (damage == "larger")


# ------------------------------------------------------------------ which tiles


def test_slides_that_are_held_out_are_not_there(folder: Path) -> None:
    tiles = TileSet.open(folder, hold_out_slides=["b.c", "a"])
    assert (len(tiles), tiles.held_out) == (8, 8)
    for index, image in enumerate(all_pictures(["d", "e"])):
        expected = simplejpeg.decode_jpeg(encode(image, "jpeg"))
        np.testing.assert_array_equal(tiles.read(index), expected)
    assert "slide e, x 0, y 0" in tiles.name(1)
    middle = TileSelection.open(folder, hold_out_slides=["b.c"])
    assert [middle.row(index) for index in range(len(middle))] == [*range(5), *range(8, 16)]


def test_an_unknown_slide_or_nothing_left_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"not in the tile set[^$]*b\.d[^$]*did you mean b\.c"):
        TileSet.open(folder, hold_out_slides=["a", "b.d"])
    with pytest.raises(DataError, match=r"no tiles to learn from[^$]*16"):
        TileSet.open(folder, hold_out_slides=SLIDES)


def test_orders_are_those_of_the_kept_tiles(folder: Path) -> None:
    positions = np.arange(100)
    uniform = TileSet.open(folder, hold_out_slides=["d"])
    expected = block_tile_at(positions, 15, 4, block_tiles=64, window_blocks=512)
    np.testing.assert_array_equal(uniform.tile_at(positions, 4), expected)
    balanced = TileSet.open(folder, sampling="slide-balanced", hold_out_slides=["d"])
    expected = balanced_tile_at(positions, np.array([0, 5, 8]), np.array([5, 3, 7]), 4)
    np.testing.assert_array_equal(balanced.tile_at(positions, 4), expected)
    slides = np.searchsorted([0, 5, 8, 15], balanced.tile_at(np.arange(30), 4), side="right") - 1
    assert np.bincount(slides).tolist() == [10, 10, 10]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sets(st.integers(0, 5)))
def test_a_tile_number_leads_to_its_row(
    tmp_path_factory: pytest.TempPathFactory, tiles: list[int], left_out: set[int]
) -> None:
    names = [f"s{number}" for number in range(len(tiles))]
    root = write_set(tmp_path_factory.mktemp("rows"), "none", dict(zip(names, tiles, strict=True)))
    kept = [number for number in range(len(tiles)) if number not in left_out]
    if kept:
        held = [name for number, name in enumerate(names) if number not in kept]
        selection = TileSelection.open(root, hold_out_slides=held)
        first = np.cumsum([0, *tiles])
        expected = [int(row) for number in kept for row in range(first[number], first[number + 1])]
        assert [selection.row(index) for index in range(len(selection))] == expected
        assert selection.held_out == sum(tiles) - len(expected)


def test_fingerprint_follows_what_decides_the_order(folder: Path, tmp_path: Path) -> None:
    first = TileSet.open(folder).fingerprint()
    assert TileSet.open(folder).fingerprint() == first
    assert TileSet.open(write_set(tmp_path / "again")).fingerprint() == first
    others = [
        TileSet.open(folder, sampling="slide-balanced"),
        TileSet.open(folder, hold_out_slides=["d"]),
        TileSet.open(folder, hold_out_slides=["a"]),
        TileSet.open(write_set(tmp_path / "png", "png")),
        TileSet.open(write_set(tmp_path / "renamed", slides={"a": 5, "b.d": 3, "d": 1, "e": 7})),
        TileSet.open(write_set(tmp_path / "cut", slides={"a": 5, "b.c": 4, "d": 1, "e": 6})),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 7


# ------------------------------------------------------------------ refusals


def test_a_folder_that_is_no_tile_set_is_refused_with_the_remedy(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"not a tile set[^$]*no such folder[^$]*"):
        TileSet.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"not a tile set[^$]*no tileset\.json[^$]*histill tile"):
        TileSet.open(tmp_path / "empty")
    (folder / "index.parquet").unlink()
    with pytest.raises(DataError, match=r"no index[^$]*histill tile"):
        TileSet.open(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "another version"),
        ('{"format": 99}', r"another version[^$]*99"),
        (f'{{"format": {FORMAT}, "mpp": 0.5, "codec": "jpeg"}}', "no tile_px"),
        (f'{{"format": {FORMAT}, "mpp": 1.0, "codec": "jpeg", "tile_px": {PX}}}', "another mpp"),
    ],
)
def test_damaged_or_other_settings_are_refused(folder: Path, text: str, message: str) -> None:
    (folder / "tileset.json").write_text(text)
    with pytest.raises(DataError, match=message):
        TileSet.open(folder)


def test_an_index_that_is_older_than_its_parts_is_refused(folder: Path) -> None:
    made_with = json.loads((folder / "tileset.json").read_text())
    write_slide(folder, "f", [picture("f", 0)], made_with)
    with pytest.raises(DataError, match=r"older[^$]*4 slides with tiles in it, 5 finished[^$]*histill tile"):
        TileSet.open(folder)
    record = folder / "parts" / "f.json"
    record.write_text('{"status": "failed"}')  # rows of an earlier try do not count
    assert len(TileSet.open(folder)) == 16
    record.unlink()  # nor do those of a slide that is not finished
    assert len(TileSet.open(folder)) == 16


def test_a_set_that_was_copied_without_its_parts_opens(folder: Path) -> None:
    for path in (folder / "parts").iterdir():
        path.unlink()
    assert len(TileSet.open(folder)) == 16
    (folder / "parts").rmdir()
    assert len(TileSet.open(folder)) == 16


def test_a_set_without_pixels_is_a_selection_and_no_tile_set(tmp_path: Path) -> None:
    write_set(tmp_path, "none")
    with pytest.raises(DataError, match=r"no pixels[^$]*none[^$]*index-only"):
        TileSet.open(tmp_path)
    selection = TileSelection.open(tmp_path)
    assert selection.name(7) == "slide b.c, x 96, y 0"
    assert selection.tile_px == PX


def test_a_set_of_no_tiles_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, slides={"a": 0})
    with pytest.raises(DataError, match="no tiles to learn from"):
        TileSet.open(tmp_path)
