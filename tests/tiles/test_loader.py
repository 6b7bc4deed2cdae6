from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from histill.tiles.images import ImageFolder
from histill.tiles.loader import Batch, batches
from histill.tiles.order import tile_at

TILES = 11


@pytest.fixture
def source(tmp_path: Path) -> ImageFolder:
    for number in range(TILES):
        side = 8 + number
        Image.fromarray(np.full((side, side + 2, 3), number * 20, np.uint8)).save(tmp_path / f"{number:02d}.png")
    return ImageFolder.scan(tmp_path)


def positions(step: int) -> NDArray[np.int64]:
    return np.arange(step * 4, (step + 1) * 4, dtype=np.int64)


def read(source: ImageFolder, first: int, last: int, workers: int) -> list[Batch]:
    with closing(batches(source, positions, first, last, 3, workers=workers, ahead=3)) as stream:
        return list(stream)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_step_is_the_same_with_any_workers_and_start(source: ImageFolder, workers: int) -> None:
    whole = read(source, 0, 7, 0)
    again = read(source, 2, 7, workers)
    for expected, got in zip(whole[2:], again, strict=True):
        assert torch.equal(expected.tiles_BCHW, got.tiles_BCHW)
        np.testing.assert_array_equal(expected.positions_B, got.positions_B)


def test_tiles_stand_at_the_top_left_with_their_true_sizes(source: ImageFolder) -> None:
    batch = read(source, 0, 1, 1)[0]
    for place, index in enumerate(tile_at(positions(0), TILES, 3)):
        height, width = batch.sizes_B2[place]
        assert (height, width) == (8 + index, 10 + index)
        assert (batch.tiles_BCHW[place, :, :height, :width] == index * 20).all()
        assert batch.tiles_BCHW[place, :, height:].sum() == 0
        assert batch.tiles_BCHW[place, :, :, width:].sum() == 0


def test_an_epoch_holds_each_tile_once(source: ImageFolder) -> None:
    sides = np.concatenate([batch.sizes_B2[:, 0] for batch in read(source, 0, TILES, 2)])
    for epoch in range(4):
        assert sorted(sides[epoch * TILES : (epoch + 1) * TILES]) == [8 + number for number in range(TILES)]


def test_damaged_tile_is_named_and_not_replaced(source: ImageFolder) -> None:
    (source.root / "05.png").write_bytes(b"no picture")
    found = read(source, 0, TILES, 2)
    assert sum(len(batch.positions_B) for batch in found) == 4 * TILES - 4
    assert {path for batch in found for path in batch.unreadable} == {"05.png"}
    clean = [batch for batch in found if not batch.unreadable]
    assert all(len(batch.positions_B) == 4 for batch in clean)


def test_batch_without_a_readable_tile_is_empty_and_names_them(source: ImageFolder) -> None:
    for path in source.paths:
        (source.root / path).write_bytes(b"")
    batch = read(source, 0, 1, 1)[0]
    assert len(batch.positions_B) == len(batch.tiles_BCHW) == len(batch.sizes_B2) == 0
    assert len(batch.unreadable) == 4
