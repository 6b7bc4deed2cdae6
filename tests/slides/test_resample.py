from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from histill.slides.resample import area_resample, area_weights


def _reference(
    image: NDArray[np.uint8], x0: float, y0: float, step_x: float, step_y: float, width: int, height: int
) -> NDArray[np.float64]:
    """Pixel by pixel, from the definition."""
    rows, columns, _ = image.shape
    out = np.zeros((height, width, 3))
    for i in range(height):
        for j in range(width):
            left, right, top, bottom = x0 + j * step_x, x0 + (j + 1) * step_x, y0 + i * step_y, y0 + (i + 1) * step_y
            total = 0.0
            for y in range(int(top), min(int(np.ceil(bottom)), rows)):
                for x in range(int(left), min(int(np.ceil(right)), columns)):
                    area = (min(right, x + 1) - max(left, x)) * (min(bottom, y + 1) - max(top, y))
                    out[i, j] += area * image[y, x]
                    total += area
            out[i, j] /= total
    return out


def _noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


steps = st.floats(0.4, 8.3)
origins = st.floats(0, 5)


@settings(max_examples=40, deadline=None)
@given(x0=origins, y0=origins, step_x=steps, step_y=steps, width=st.integers(1, 9), height=st.integers(1, 9))
def test_it_is_the_mean_by_area(x0: float, y0: float, step_x: float, step_y: float, width: int, height: int) -> None:
    image = _noise(int(np.ceil(y0 + height * step_y)) + 1, int(np.ceil(x0 + width * step_x)) + 1)
    expected = _reference(image, x0, y0, step_x, step_y, width, height)
    got = area_resample(image, x0, y0, step_x, step_y, width, height)
    assert got.shape == (height, width, 3)
    assert got.dtype == np.uint8
    # 1e-3: what float32 and the share that counts as nothing may move; then rounding to nearest
    assert np.abs(got - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("step", [1.002, 1.887, 2.0, 4.3, 8.0])
def test_large_tiles_are_cut_into_bands_without_a_seam(step: float) -> None:
    """At 224 px the work is cut; a separable float64 product of dense weights knows nothing of that."""
    image = _noise(int(np.ceil(224 * step + 1)), int(np.ceil(224 * step + 1)), seed=1)
    edges = 0.25 + step * np.arange(225)
    pixels = np.arange(image.shape[0])
    cover = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    dense = np.clip(cover, 0, None) / step
    expected = np.einsum("iy,yxc->ixc", dense, image, optimize=True)
    expected = np.einsum("jx,ixc->ijc", dense, expected, optimize=True)
    got = area_resample(image, 0.25, 0.25, step, step, 224, 224)
    assert np.abs(got - expected).max() <= 0.5 + 2e-3


def test_step_1_is_a_copy_of_the_pixels() -> None:
    image = _noise(40, 50)
    got = area_resample(image, 3.0, 5.0, 1.0, 1.0, 32, 20)
    np.testing.assert_array_equal(got, image[5:25, 3:35])
    got[:] = 0
    assert image.any()
    np.testing.assert_array_equal(area_resample(image, 3 + 1e-9, 5 - 1e-9, 1.0, 1.0, 32, 20), image[5:25, 3:35])


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_whole_steps_are_block_means(factor: int) -> None:
    image = _noise(20 * factor, 30 * factor, seed=factor)
    sums = image.reshape(20, factor, 30, factor, 3).astype(np.int64).sum(axis=(1, 3))
    got = area_resample(image, 0, 0, factor, factor, 30, 20).astype(np.int64)
    # nearest whole number of sum / factor**2, in integers; a tie (factor 2, 4, 8) goes either way
    assert (np.abs(2 * (got * factor**2 - sums)) <= factor**2).all()


@settings(max_examples=30, deadline=None)
@given(step=st.floats(1, 8), seed=st.integers(0, 99))
def test_the_mean_is_preserved(step: float, seed: int) -> None:
    """The outputs of 64 px tile the source exactly, so the mean of them is the integral over it."""
    size = 64 * step
    image = _noise(int(np.ceil(size)), int(np.ceil(size)), seed)
    weight = np.ones(image.shape[0])
    weight[-1] = size - (image.shape[0] - 1)
    mean = np.einsum("y,x,yxc->c", weight, weight, image) / size**2
    got = area_resample(image, 0, 0, step, step, 64, 64).mean(axis=(0, 1))
    np.testing.assert_allclose(got, mean, atol=0.05)  # rounding: 0.29 / 64 a channel


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("step", [1.002, 1.887, 3.7])
def test_a_flat_image_stays_flat(value: int, step: float) -> None:
    image = np.full((900, 900, 3), value, dtype=np.uint8)
    assert (area_resample(image, 0.3, 0.7, step, step, 224, 224) == value).all()


def test_axes_and_channels_are_not_mixed_up() -> None:
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[..., 0] = np.arange(60) * 4
    image[..., 1] = np.arange(40)[:, None] * 6
    got = area_resample(image, 0, 0, 3.0, 2.0, 20, 20)
    np.testing.assert_array_equal(got[..., 0], np.tile(4 * (3 * np.arange(20) + 1), (20, 1)))
    np.testing.assert_array_equal(got[..., 1], np.tile(6 * (2 * np.arange(20)[:, None]) + 3, (1, 20)))
    assert not got[..., 2].any()


def test_a_last_pixel_that_is_partly_absent_is_the_mean_of_the_rest() -> None:
    image = np.zeros((4, 7, 3), dtype=np.uint8)
    image[:, 6] = 200
    got = area_resample(image, 0, 0, 2.0, 2.0, 4, 2)
    assert (got[:, 3] == 200).all()


@pytest.mark.parametrize(
    ("x0", "width"), [(-0.5, 4), (0, 5), (9.0, 1), (2.0, 4)], ids=["left", "right", "outside", "shifted"]
)
def test_a_pixel_with_no_source_is_refused(x0: float, width: int) -> None:
    with pytest.raises(ValueError, match="source"):
        area_resample(_noise(8, 8), x0, 0, 2.0, 2.0, width, 4)


@given(origin=origins, step=steps, out_px=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_weights_sum_to_one(origin: float, step: float, out_px: int) -> None:
    weights = area_weights(origin, step, out_px, int(np.ceil(origin + step * out_px)))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (weights.data > 0).all()


def test_threads_do_not_share_memory() -> None:
    images = [_noise(430, 430, seed) for seed in range(4)]
    expected = [area_resample(image, 0, 0, 1.887, 1.887, 224, 224) for image in images]
    wrong = []

    def work(index: int) -> None:
        for _ in range(20):
            if not np.array_equal(area_resample(images[index], 0, 0, 1.887, 1.887, 224, 224), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
