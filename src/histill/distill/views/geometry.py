"""Crop, flip, turn, blur and resize a batch of tiles: two sparse passes, one per axis.

Every output line is a weighted sum of a few source lines, so each pass is one ``embedding_bag`` (a sum of table rows
with weights), first over the lines of one axis and, after a transpose, over those of the other. A dense matrix per
crop would do the same with a hundred times the arithmetic. Blur is part of the weights and costs a few more taps;
mirrors and quarter turns only change which row is read, and cost nothing.

Shapes: B tiles, N crops, C colours, H and W of a tile, S side of the square that holds every tile of the batch,
P side of a crop, T taps (all crops, lines and source lines together), U draws per crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["GEOMETRY_DRAWS", "Boxes", "Resampler", "draw_boxes", "line_tables"]

GEOMETRY_DRAWS = 6
"""Uniform draws per crop: area, aspect, x, y, mirror, turn."""

BLUR_REACH = 3.0
"""The Gaussian is cut at this many standard deviations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """N crops: whole-pixel boxes in their tiles, and what is done with them.

    A crop is cut, transposed (rows become columns) where ``transpose_N``, then its columns are reversed where
    ``flip_x_N`` and its rows where ``flip_y_N``.
    """

    tile_N: NDArray[np.int64]
    """Which tile of the batch."""
    left_N: NDArray[np.int64]
    top_N: NDArray[np.int64]
    width_N: NDArray[np.int64]
    height_N: NDArray[np.int64]
    transpose_N: NDArray[np.bool_]
    flip_x_N: NDArray[np.bool_]
    flip_y_N: NDArray[np.bool_]


def draw_boxes(
    uniform_NU: NDArray[np.float64],
    tile_N: NDArray[np.int64],
    sizes_N2: NDArray[np.int64],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
    flips: bool,
    rotations: bool,
) -> Boxes:
    """Turn uniform draws into crops.

    The area is uniform and the logarithm of width / height is uniform among the ratios that fit into the tile: the
    distribution of torchvision's ``RandomResizedCrop`` without its rejected tries. Where no allowed ratio fits (a
    large share of a long, narrow tile), the nearest ratio is cut to the tile.

    Parameters
    ----------
    uniform_NU
        ``GEOMETRY_DRAWS`` draws in [0, 1) for each crop.
    tile_N
        Which tile of the batch each crop is from.
    sizes_N2
        Height and width of that tile, pixels.
    area, aspect
        Least and greatest share of the tile, and width / height.
    flips, rotations
        Whether crops are mirrored, and turned by quarters.
    """
    height_N, width_N = sizes_N2[:, 0].astype(np.float64), sizes_N2[:, 1].astype(np.float64)
    area_N = (area[0] + uniform_NU[:, 0] * (area[1] - area[0])) * height_N * width_N
    fits_low_N = np.maximum(aspect[0], area_N / height_N**2)
    fits_high_N = np.minimum(aspect[1], width_N**2 / area_N)
    low_N, high_N = np.log(np.clip(fits_low_N, *aspect)), np.log(np.clip(fits_high_N, *aspect))
    ratio_N = np.exp(low_N + uniform_NU[:, 1] * (high_N - low_N))
    crop_w_N = np.clip(np.rint(np.sqrt(area_N * ratio_N)), 1, width_N)
    crop_h_N = np.clip(np.rint(np.sqrt(area_N / ratio_N)), 1, height_N)
    left_N = np.floor(uniform_NU[:, 2] * (width_N - crop_w_N + 1))
    top_N = np.floor(uniform_NU[:, 3] * (height_N - crop_h_N + 1))
    mirror_N = (uniform_NU[:, 4] < 0.5) & flips
    turns_N = np.floor(uniform_NU[:, 5] * 4).astype(np.int64) * rotations
    # A mirror (x -> -x) and then k quarter turns against the clock, written as transpose, flip of x, flip of y.
    transpose_N = turns_N % 2 == 1
    return Boxes(
        tile_N=tile_N,
        left_N=left_N.astype(np.int64),
        top_N=top_N.astype(np.int64),
        width_N=crop_w_N.astype(np.int64),
        height_N=crop_h_N.astype(np.int64),
        transpose_N=transpose_N,
        flip_x_N=(turns_N >= 2) ^ (mirror_N & ~transpose_N),
        flip_y_N=((turns_N == 1) | (turns_N == 2)) ^ (mirror_N & transpose_N),
    )


def line_tables(tiles_BCHW: Tensor) -> Tensor:
    """Lay the tiles out as rows of numbers, by column and by row: (B, 2, S, C, S) float32, 0 to 255.

    Row ``[b, 0, x]`` holds column x of tile b, all colours; row ``[b, 1, y]`` holds its row y.
    """
    B, C, H, W = tiles_BCHW.shape
    S = max(H, W)
    tables_B2SCS = torch.empty(B, 2, S, C, S, dtype=torch.float32, device=tiles_BCHW.device)
    if H != W:
        tables_B2SCS.zero_()
    tables_B2SCS[:, 0, :W, :, :H] = tiles_BCHW.permute(0, 3, 1, 2)
    tables_B2SCS[:, 1, :H, :, :W] = tiles_BCHW.permute(0, 2, 1, 3)
    return tables_B2SCS


class Resampler:
    """Cuts, turns, blurs and resizes the crops of a batch, for any run of its tiles at a time.

    Without blur it equals torchvision's ``resized_crop`` (bilinear, antialias) of the float image: a triangle of
    half-width max(1, scale) source pixels, normalised inside the box. In a blurred crop the kernel is a Gaussian whose
    variance is the sum of the triangle's and the blur's (close to both in turn, at fewer taps).
    No pixel outside a crop's box is read.

    Parameters
    ----------
    boxes
        The crops of the whole batch, tile by tile, the same number for each.
    sigma_px_N
        Standard deviation of the blur of each crop, pixels of the crop; 0: none.
    crop_px
        P, side of the crops.
    tile_px
        S, side of the square that holds every tile.
    device
        Of the tiles and the crops.
    """

    def __init__(
        self,
        boxes: Boxes,
        sigma_px_N: NDArray[np.float64],
        *,
        crop_px: int,
        tile_px: int,
        device: torch.device,
    ) -> None:
        self.crop_px = crop_px
        self._lines: Tensor | None = None  # kept from call to call: fresh memory is slow on a CPU
        turned_N = boxes.transpose_N
        left_N, width_N = boxes.left_N, boxes.width_N
        top_N, height_N = boxes.top_N, boxes.height_N
        # First the axis that becomes the crop's columns, read from the tables, then the one that becomes its rows,
        # read from what the first pass made.
        self._columns = _Taps(
            (boxes.tile_N * 2 + turned_N) * tile_px + np.where(turned_N, top_N, left_N),
            np.where(turned_N, height_N, width_N),
            boxes.flip_x_N,
            sigma_px_N,
            crop_px,
            device,
            gain=1 / 255,
        )
        self._rows = _Taps(
            np.arange(len(turned_N)) * tile_px + np.where(turned_N, left_N, top_N),
            np.where(turned_N, width_N, height_N),
            boxes.flip_y_N,
            sigma_px_N,
            crop_px,
            device,
        )

    def crops(self, tables_B2SCS: Tensor, first_tile: int, crops: slice) -> Tensor:
        """Make some crops of the batch: (N, P, C, P) float32 in 0..1; rows, then colours, then columns.

        Parameters
        ----------
        tables_B2SCS
            From :func:`line_tables`, of the tiles that these crops are cut from.
        first_tile
            The place in the batch of the first of these tiles.
        crops
            Which crops.
        """
        _, _, S, C, _ = tables_B2SCS.shape
        N, P = crops.stop - crops.start, self.crop_px
        columns = self._columns.sum_lines(tables_B2SCS.view(-1, C * S), crops, first_tile * 2 * S).view(N, P, C, S)
        if self._lines is None or len(self._lines) < N:
            self._lines = torch.empty(N, S, C, P, dtype=torch.float32, device=tables_B2SCS.device)
        lines = self._lines[:N]
        for colour in range(C):  # three plain transposes are faster than one of four axes
            lines[:, :, colour] = columns[:, :, colour].transpose(1, 2)
        return self._rows.sum_lines(lines.view(-1, C * P), crops, crops.start * S).view(N, P, C, P)


class _Taps:
    """One axis: which table rows make up each output line of each crop, and with which weights.

    Parameters
    ----------
    row_N, length_N
        The first row of each crop's box in the table, and how many rows the box has.
    flip_N
        Whether the output lines come in reverse order.
    sigma_px_N
        Blur, output lines.
    crop_px
        Output lines per crop.
    device
        Where to keep the taps.
    gain
        What the weights of a line sum to.
    """

    def __init__(
        self,
        row_N: NDArray[np.int64],
        length_N: NDArray[np.int64],
        flip_N: NDArray[np.bool_],
        sigma_px_N: NDArray[np.float64],
        crop_px: int,
        device: torch.device,
        gain: float = 1.0,
    ) -> None:
        scale_N = length_N / crop_px
        # The kernel's width and reach, table rows: a triangle where sharp, a Gaussian (negative width) where blurred.
        half_N = np.maximum(scale_N, 1.0)
        deviation_N = np.sqrt((sigma_px_N * scale_N) ** 2 + half_N**2 / 6)
        width_N = np.where(sigma_px_N > 0, -deviation_N, half_N)
        reach_N = np.where(sigma_px_N > 0, BLUR_REACH * deviation_N, half_N)
        # An open interval of length 2 * reach holds at most this many whole numbers.
        taps_N = np.minimum(np.ceil(2 * reach_N), length_N).astype(np.int64)
        self.crop_px = crop_px
        self.first_tap_N = np.concatenate([[0], np.cumsum(taps_N * crop_px)])
        real_3N = torch.from_numpy(np.stack([scale_N, reach_N, 1 / width_N])).to(device, torch.float32)
        scale_N1, reach_N1, narrow_N1 = real_3N[:, :, None].unbind()
        whole_4N = torch.from_numpy(np.stack([row_N, length_N - taps_N, taps_N, flip_N])).to(device, torch.int32)
        row_N1, last_N1, taps_N1, flip_N1 = whole_4N[:, :, None].unbind()
        line_P = torch.arange(crop_px, device=device, dtype=torch.float32) + 0.5
        centre_NP = torch.where(flip_N1 > 0, crop_px - line_P, line_P) * scale_N1 - 0.5
        first_NP = (centre_NP - reach_N1).floor().int().add(1).clamp(min=0).minimum(last_N1)
        count_Q = taps_N1.expand(-1, crop_px).reshape(-1)
        self.start_Q = F.pad(count_Q.cumsum(0, dtype=torch.int32), (1, 0))
        # From here one entry per tap: crops differ in their number of taps. index_select is six times as fast as [].
        total = int(self.first_tap_N[-1])
        line_T = torch.repeat_interleave(count_Q, output_size=total)
        step_T = torch.arange(total, device=device, dtype=torch.int32) - self.start_Q.index_select(0, line_T)
        distance_T = step_T + (first_NP - centre_NP).view(-1).index_select(0, line_T)
        narrow_T = narrow_N1.expand(-1, crop_px).reshape(-1).index_select(0, line_T)
        weight_T = _kernel(distance_T * narrow_T, narrow_T > 0)
        sum_Q = torch.segment_reduce(weight_T, "sum", lengths=count_Q, unsafe=True)
        self.weight_T = weight_T * (gain / sum_Q).index_select(0, line_T)
        self.row_T = step_T + (first_NP + row_N1).view(-1).index_select(0, line_T)

    def sum_lines(self, table_RL: Tensor, crops: slice, first_row: int) -> Tensor:
        """Sum up the output lines of some crops, (crops * P, L), from a table that begins at row ``first_row``."""
        first, stop = int(self.first_tap_N[crops.start]), int(self.first_tap_N[crops.stop])
        return F.embedding_bag(
            self.row_T[first:stop] - first_row,
            table_RL,
            self.start_Q[crops.start * self.crop_px : crops.stop * self.crop_px + 1] - first,
            mode="sum",
            per_sample_weights=self.weight_T[first:stop],
            include_last_offset=True,
        )


def _kernel(distance_T: Tensor, sharp_T: Tensor) -> Tensor:
    """Give a triangle of half-width 1 where ``sharp_T``, elsewhere a Gaussian of deviation 1; not normalised."""
    return torch.where(sharp_T, (1 - distance_T.abs()).clamp(min=0), torch.exp(-0.5 * distance_T * distance_T))
