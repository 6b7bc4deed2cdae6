"""The batched resampler against torchvision's per-image functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from histill.distill.views.geometry import GEOMETRY_DRAWS, Boxes, Resampler, draw_boxes, line_tables

SIZES = np.array([[64, 64], [40, 71], [80, 33], [57, 80]])


def noise_tiles(sizes, filling=0, seed=0):
    """Noise in the true size of each tile, ``filling`` beside it."""
    side = sizes.max(axis=0)
    tiles = torch.full((len(sizes), 3, *side), filling, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    for tile, (height, width) in zip(tiles, sizes, strict=True):
        tile[:, :height, :width] = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    return tiles


def some_boxes(sizes, per_tile=6, area=(0.05, 1.0), seed=0):
    tile_N = np.repeat(np.arange(len(sizes)), per_tile)
    uniform = np.random.default_rng(seed).random((len(tile_N), GEOMETRY_DRAWS))
    return draw_boxes(uniform, tile_N, sizes[tile_N], area=area, aspect=(0.5, 2.0), flips=True, rotations=True)


def resample(tiles, boxes, crop_px, sigma=0.0):
    tile_px = max(tiles.shape[2:])
    sigma_N = np.broadcast_to(np.float64(sigma), len(boxes.tile_N))
    resampler = Resampler(boxes, sigma_N, crop_px=crop_px, tile_px=tile_px, device=tiles.device)
    return resampler.crops(line_tables(tiles), 0, slice(0, len(boxes.tile_N))).transpose(1, 2)


def reference(tiles, boxes, crop_px):
    crops = []
    for n, tile in enumerate(boxes.tile_N):
        place = boxes.top_N[n], boxes.left_N[n], boxes.height_N[n], boxes.width_N[n]
        size = [crop_px, crop_px]
        crop = tv.resized_crop(tiles[tile].float() / 255, *(int(value) for value in place), size=size, antialias=True)
        if boxes.transpose_N[n]:
            crop = crop.transpose(1, 2)
        dims = [axis for axis, flip in ((2, boxes.flip_x_N[n]), (1, boxes.flip_y_N[n])) if flip]
        crops.append(crop.flip(dims))
    return torch.stack(crops)


@pytest.mark.parametrize("crop_px", [7, 24, 48, 100])
def test_equals_torchvision_for_every_size_and_turn(crop_px):
    tiles, boxes = noise_tiles(SIZES), some_boxes(SIZES, per_tile=24)
    assert {*zip(boxes.transpose_N, boxes.flip_x_N, boxes.flip_y_N, strict=True)} == {
        (a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)
    }
    torch.testing.assert_close(resample(tiles, boxes, crop_px), reference(tiles, boxes, crop_px), rtol=0, atol=2e-5)


def test_equals_torchvision_on_real_tiles(shared_data):
    from PIL import Image

    paths = sorted((shared_data / "tiles" / "multiscanner").rglob("*.jpg"))[:2]
    tiles = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
    boxes = some_boxes(np.full((2, 2), 224), area=(0.05, 1.0))
    for crop_px in (98, 224):
        difference = resample(tiles, boxes, crop_px) - reference(tiles, boxes, crop_px)
        assert difference.abs().max() < 2e-5


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_what_lies_beside_a_tile_is_never_read(sigma):
    boxes = some_boxes(SIZES)
    crops = [resample(noise_tiles(SIZES, filling), boxes, 32, sigma) for filling in (0, 255)]
    assert torch.equal(*crops)


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_what_lies_outside_a_box_is_never_read(sigma):
    sizes = np.array([[50, 50]])
    whole = noise_tiles(sizes)
    boxes = some_boxes(sizes, per_tile=1, area=(0.3, 0.3))
    inside = torch.zeros(50, 50, dtype=torch.bool)
    top, left = boxes.top_N[0], boxes.left_N[0]
    inside[top : top + boxes.height_N[0], left : left + boxes.width_N[0]] = True
    assert 0 < inside.sum() < 2500
    assert torch.equal(resample(whole, boxes, 40, sigma), resample(whole * inside, boxes, 40, sigma))
    assert not torch.equal(resample(whole, boxes, 40, sigma), resample(whole * ~inside, boxes, 40, sigma))


@pytest.mark.parametrize("crop_px", [30, 64, 150])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_ramp_keeps_its_place_to_a_part_of_a_pixel(crop_px, sigma):
    ramp = torch.arange(0, 128, 2, dtype=torch.uint8)
    tiles = ramp.expand(1, 3, 64, 64).contiguous()
    box = Boxes(
        tile_N=np.zeros(1, int),
        left_N=np.array([5]),
        top_N=np.array([0]),
        width_N=np.array([50]),
        height_N=np.array([64]),
        transpose_N=np.array([False]),
        flip_x_N=np.array([False]),
        flip_y_N=np.array([False]),
    )
    line = resample(tiles, box, crop_px, sigma)[0, 0, crop_px // 2] * 255 / 2
    expected = 5 + (torch.arange(crop_px) + 0.5) * 50 / crop_px - 0.5
    margin = crop_px // 5
    error = (line - expected)[margin:-margin].abs().max()
    # Linear interpolation is exact; a wider sampled kernel, torchvision's antialias too, strays by a part of a pixel.
    assert error < (1e-4 if sigma == 0 and crop_px >= 50 else 0.1)


def test_blur_has_the_asked_standard_deviation_and_keeps_the_brightness():
    tiles = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    tiles[:, :, 32, 32] = 255
    box = some_boxes(np.array([[64, 64]]), per_tile=1, area=(1.0, 1.0))
    place = torch.arange(64.0)

    def variance(sigma):
        line = resample(tiles, box, 64, sigma)[0, 0].sum(dim=0)
        mean = (line * place).sum() / line.sum()
        assert line.sum() == pytest.approx(1, abs=1e-3)
        return float((line * (place - mean) ** 2).sum() / line.sum())

    for sigma in (0.5, 1.0, 2.0):
        # The triangle of resizing adds 1/6. The Gaussian is cut at 3 deviations, so a little is missing.
        assert variance(sigma) == pytest.approx(sigma**2 + 1 / 6, rel=0.06)
    assert variance(0.0) == pytest.approx(0, abs=1e-6)


def test_blur_looks_like_torchvisions():
    sizes = np.array([[64, 64]])
    tiles, boxes = noise_tiles(sizes), some_boxes(sizes, per_tile=4, area=(0.3, 0.6))
    for sigma in (0.8, 1.5):
        expected = tv.gaussian_blur(reference(tiles, boxes, 96), [13, 13], [sigma, sigma])
        difference = (resample(tiles, boxes, 96, sigma) - expected)[:, :, 12:-12, 12:-12].abs()
        unblurred = (resample(tiles, boxes, 96) - expected)[:, :, 12:-12, 12:-12].abs()
        assert difference.mean() < 0.15 * unblurred.mean()  # of white noise, the hardest case


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_mirror_and_turns_are_those_of_numpy(turns, mirrored):
    tiles = noise_tiles(np.array([[24, 24]]))
    uniform = np.array([[0.5, 0.5, 0.5, 0.5, 0.2 if mirrored else 0.7, (turns + 0.5) / 4]])
    box = draw_boxes(
        uniform, np.zeros(1, int), np.array([[24, 24]]), area=(1, 1), aspect=(1, 1), flips=True, rotations=True
    )
    image = tiles[0].numpy().transpose(1, 2, 0)
    expected = np.rot90(image[:, ::-1] if mirrored else image, turns)
    crop = (resample(tiles, box, 24)[0] * 255).permute(1, 2, 0)
    np.testing.assert_allclose(crop, expected, atol=1e-4)


def test_without_flips_and_rotations_crops_stand_upright():
    tile_N = np.zeros(50, int)
    uniform = np.random.default_rng(0).random((50, GEOMETRY_DRAWS))
    sizes = np.full((50, 2), 64)
    box = draw_boxes(uniform, tile_N, sizes, area=(0.1, 1), aspect=(1, 1), flips=False, rotations=False)
    assert not (box.transpose_N | box.flip_x_N | box.flip_y_N).any()
    box = draw_boxes(uniform, tile_N, sizes, area=(0.1, 1), aspect=(1, 1), flips=False, rotations=True)
    # Turns alone never mirror: an odd number of (transpose, flip, flip) would.
    assert not (box.transpose_N ^ box.flip_x_N ^ box.flip_y_N).any()
    assert 0 < box.transpose_N.sum() < 50


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), seed=st.integers(0, 99))
def test_boxes_lie_in_their_tile(height, width, seed):
    sizes = np.array([[height, width]])
    boxes = some_boxes(sizes, per_tile=16, area=(0.05, 1.0), seed=seed)
    assert (boxes.left_N >= 0).all()
    assert (boxes.top_N >= 0).all()
    assert (boxes.width_N >= 1).all()
    assert (boxes.height_N >= 1).all()
    assert (boxes.left_N + boxes.width_N <= width).all()
    assert (boxes.top_N + boxes.height_N <= height).all()


def test_areas_and_aspects_fill_their_ranges():
    count = 4000
    uniform = np.random.default_rng(1).random((count, GEOMETRY_DRAWS))
    sizes = np.full((count, 2), 1000)
    boxes = draw_boxes(
        uniform, np.zeros(count, int), sizes, area=(0.32, 1.0), aspect=(0.75, 4 / 3), flips=True, rotations=True
    )
    area, aspect = boxes.width_N * boxes.height_N / 1e6, boxes.width_N / boxes.height_N
    assert area.min() >= 0.318
    assert area.max() <= 1
    assert area.mean() == pytest.approx(0.66, abs=0.01)
    assert aspect.min() >= 0.748
    assert aspect.max() <= 1.336
    small = area < 0.5  # here every aspect fits, so its logarithm is uniform
    assert np.log(aspect[small]).std() == pytest.approx(np.log(4 / 3) / np.sqrt(3), rel=0.06)
    assert boxes.transpose_N.mean() == pytest.approx(0.5, abs=0.03)
    assert (boxes.transpose_N ^ boxes.flip_x_N ^ boxes.flip_y_N).mean() == pytest.approx(0.5, abs=0.03)
    # The crop is as often at the left edge as at the right, and as often at the top as at the bottom.
    for start, length in ((boxes.left_N, boxes.width_N), (boxes.top_N, boxes.height_N)):
        assert (start / (1000 - length + 1)).mean() == pytest.approx(0.5, abs=0.02)
