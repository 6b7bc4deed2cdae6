"""Exact resampling by area: each output pixel is the mean of the source below it, fractions of pixels included.

Both axes are sparse products (scipy's CSR times dense), cut into bands of rows that stay in the cache. Unlike a dense
product in BLAS, the sum is taken in the same order whatever the processor and the number of threads.

Shapes: H and W of the source, h and w of the output, n source rows of a band.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

__all__ = ["area_resample", "area_weights"]

_NOTHING = 1e-6  # share of an output pixel below which a source pixel does not count: rounding of the coordinates
_PRODUCT_BYTES = 120 * 1024  # below the 128 KiB from which malloc asks the system for fresh pages

_Band = tuple[slice, slice, sparse.csr_array]  # output rows, source rows, weights of these


def area_weights(origin: float, step: float, out_px: int, source_px: int) -> sparse.csr_array:
    """Weights of source pixels in output pixels along one axis, float32, shape (out_px, source_px); rows sum to 1.

    Output pixel j covers [origin + j * step, origin + (j + 1) * step). What lies beyond the source does not count;
    the mean is then taken over the rest.

    A weight is the length that both pixels share, divided by ``step``: the output is the mean of a signal that is
    constant within each source pixel. Shares below a millionth of an output pixel count as rounding, and are left out.

    Parameters
    ----------
    origin
        Where the first output pixel begins, in source pixels; source pixel k covers [k, k + 1).
    step
        Source pixels per output pixel; positive, below 1 it enlarges.
    out_px, source_px
        Pixels of the output and of the source.

    Returns
    -------
    csr_array
        float32 (out_px, source_px) with int32 indices; ``weights @ source`` resamples.

    Raises
    ------
    ValueError
        When an output pixel covers no source at all.
    """
    edges = origin + step * np.arange(out_px + 1)
    low, high = edges[:-1, None], edges[1:, None]
    reach = math.ceil(step) + 1  # an interval of this length meets at most so many pixels
    index_hk = np.floor(low).astype(np.int32) + np.arange(reach, dtype=np.int32)
    cover_hk = (np.minimum(high, index_hk + 1) - np.maximum(low, index_hk)) / step
    counts_hk = (cover_hk > _NOTHING) & (index_hk >= 0) & (index_hk < source_px)
    cover_hk = np.where(counts_hk, cover_hk, 0.0)
    total_h1 = cover_hk.sum(axis=1, keepdims=True)
    if not total_h1.all():
        raise ValueError(f"{out_px} pixels of {step} from {origin} leave a source of {source_px} pixels")
    starts = np.concatenate([[0], np.cumsum(counts_hk.sum(axis=1))]).astype(np.int32)
    weights = (cover_hk / total_h1)[counts_hk].astype(np.float32)
    return sparse.csr_array((weights, index_hk[counts_hk], starts), shape=(out_px, source_px))


@lru_cache(maxsize=1024)
def _bands(origin: float, step: float, out_px: int, source_px: int, line: int) -> tuple[_Band, ...]:
    """Cut the weights of one axis into bands whose products, with ``line`` numbers per output row, stay small."""
    weights = area_weights(origin, step, out_px, source_px)
    rows = max(1, _PRODUCT_BYTES // (4 * line))
    bands = []
    for first in range(0, out_px, rows):
        last = min(first + rows, out_px)
        starts = weights.indptr[first : last + 1]
        entries = slice(starts[0], starts[-1])
        indices = weights.indices[entries]
        source = slice(int(indices.min()), int(indices.max()) + 1)
        parts = (weights.data[entries], indices - source.start, starts - starts[0])
        bands.append((slice(first, last), source, sparse.csr_array(parts, (last - first, source.stop - source.start))))
    return tuple(bands)


class _Scratch(threading.local):
    """Memory that one thread uses again for each tile: fresh pages from the system cost more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[Any]] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        size = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.size < size:
            kept = self._kept[name] = np.empty(size, dtype)
        return kept[:size].reshape(shape)


_scratch = _Scratch()


def _axis(origin: float, step: float, out_px: int, source_px: int) -> tuple[float, slice]:
    """Cut the source to what is needed: the origin within it, and where it stands."""
    first = math.floor(origin)
    if not 0 <= first < source_px:
        raise ValueError(f"the origin {origin} lies outside a source of {source_px} pixels")
    last = min(math.ceil(origin + step * out_px - _NOTHING * step), source_px)
    return origin - first, slice(first, last)


def area_resample(
    image_HWC: NDArray[np.uint8], x0: float, y0: float, step_x: float, step_y: float, out_width: int, out_height: int
) -> NDArray[np.uint8]:
    """Resample a part of an RGB image by area.

    Output pixel (i, j) is the mean of the source over [x0 + j * step_x, x0 + (j + 1) * step_x) across and the same
    with y0, step_y and i down, where pixel k of the source covers [k, k + 1). It is summed in float32 and rounded to
    nearest, halves to even. Source beyond the image does not count: the last pixel is then the mean of what there is.

    Parameters
    ----------
    image_HWC
        uint8, shape (H, W, 3).
    x0, y0
        Left and top of the output, in source pixels; not negative.
    step_x, step_y
        Source pixels per output pixel; positive. Below 1 it enlarges.
    out_width, out_height
        Size of the output in pixels.

    Returns
    -------
    ndarray
        uint8, shape (out_height, out_width, 3); a new array.

    Raises
    ------
    ValueError
        When the output begins outside the image, or an output pixel covers no source at all.
    """
    height, width, channels = image_HWC.shape
    origin_x, columns = _axis(x0, step_x, out_width, width)
    origin_y, rows = _axis(y0, step_y, out_height, height)
    part_HWC = image_HWC[rows, columns]
    height, width, _ = part_HWC.shape
    if step_x == 1 and step_y == 1 and origin_x == 0 and origin_y == 0 and (height, width) == (out_height, out_width):
        return part_HWC.copy()
    out_hwC = np.empty((out_height, out_width, channels), dtype=np.uint8)
    # Down first. Between the axes the image lies as (column, channel, row), so that both products run along
    # contiguous memory; turning three planes of numbers is twice as fast as turning one of triples.
    down_WCh = _scratch.get("down", (width, channels, out_height), np.float32)
    for out_rows, source, weights in _bands(origin_y, step_y, out_height, height, width * channels):
        band_nX = _scratch.get("band", (source.stop - source.start, width * channels), np.float32)
        np.copyto(band_nX.reshape(-1, width, channels), part_HWC[source])
        band_hWC = (weights @ band_nX).reshape(-1, width, channels)
        for channel in range(channels):
            down_WCh[:, channel, out_rows] = band_hWC[:, :, channel].T
    down_WX = down_WCh.reshape(width, -1)
    for out_columns, source, weights in _bands(origin_x, step_x, out_width, width, out_height * channels):
        across_wX = weights @ down_WX[source]
        np.rint(across_wX, out=across_wX)  # halves to even: to round them up would brighten block means by 1/8
        whole_wX = _scratch.get("whole", across_wX.shape, np.uint8)
        np.copyto(whole_wX, across_wX, casting="unsafe")
        whole_wCh = whole_wX.reshape(-1, channels, out_height)
        for channel in range(channels):
            out_hwC[:, out_columns, channel] = whole_wCh[:, channel].T
    return out_hwC
