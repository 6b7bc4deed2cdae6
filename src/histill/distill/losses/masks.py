"""Which tokens of an image enter the iBOT loss: blocks or single tokens, as pure functions of seed and position.

Shapes: B images, H x W token grid, N = H * W tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histill.tiles.order import uniforms

__all__ = ["block_masks", "random_masks"]

# Numbers that keep these draws apart from all other draws of a run.
_BLOCK_STREAM, _TOKEN_STREAM = 0xB10C, 0x70CE
_ATTEMPTS = 32
_SMALLEST_BLOCK = 4
_LOG_ASPECT = math.log(1 / 0.3)


def random_masks(
    seed: int, positions_B: NDArray[np.int64], grid_HW: tuple[int, int], share: float | NDArray[np.float64]
) -> Tensor:
    """Choose single tokens at random, each with the same chance.

    Parameters
    ----------
    seed
        The run's seed.
    positions_B
        Which sample of the run each row is for; a row depends on its own position only.
    grid_HW
        Rows and columns of the token grid.
    share
        Share of the tokens in the mask, 0 to 1; one number or one per image.

    Returns
    -------
    Tensor
        mask_BN, bool; every row has exactly ``round(share * N)`` tokens.
    """
    positions_B = np.asarray(positions_B, dtype=np.int64)
    none_BN = np.zeros((len(positions_B), grid_HW[0] * grid_HW[1]), dtype=bool)
    return torch.from_numpy(_filled(none_BN, seed, positions_B, _targets(share, none_BN)))


def block_masks(
    seed: int, positions_B: NDArray[np.int64], grid_HW: tuple[int, int], share: float | NDArray[np.float64]
) -> Tensor:
    """Choose rectangles of tokens until the share is reached.

    Source: Bao et al., BEiT, ICLR 2022, algorithm 1, with areas and aspect ratios (0.3 to 3.3) as in DINOv2. Single
    tokens fill what no block fits, so that the count is exact and batches have one shape.

    Parameters
    ----------
    seed, positions_B, grid_HW, share
        As in `random_masks`.

    Returns
    -------
    Tensor
        mask_BN, bool; every row has exactly ``round(share * N)`` tokens.
    """
    height, width = grid_HW
    positions_B = np.asarray(positions_B, dtype=np.int64)
    mask_BHW = np.zeros((len(positions_B), height, width), dtype=bool)
    target_B = _targets(share, mask_BHW)
    draws_BA4 = uniforms(seed, _BLOCK_STREAM, positions_B, _ATTEMPTS * 4).reshape(len(positions_B), _ATTEMPTS, 4)
    row_H, column_W = np.arange(height)[:, None], np.arange(width)
    left_B = target_B.copy()
    for attempt in range(_ATTEMPTS):
        if not left_B.any():
            break
        area_u, aspect_u, top_u, side_u = draws_BA4[:, attempt].T
        smallest_B = np.minimum(_SMALLEST_BLOCK, left_B)
        area_B = smallest_B + area_u * (left_B - smallest_B)
        aspect_B = np.exp((2 * aspect_u - 1) * _LOG_ASPECT)
        high_B = np.clip(np.rint(np.sqrt(area_B * aspect_B)), 1, height).astype(np.int64)
        wide_B = np.clip(np.rint(np.sqrt(area_B / aspect_B)), 1, width).astype(np.int64)
        top_B = (top_u * (height - high_B + 1)).astype(np.int64)
        side_B = (side_u * (width - wide_B + 1)).astype(np.int64)
        row_BH1 = row_H - top_B[:, None, None]
        column_B1W = column_W - side_B[:, None, None]
        block_BHW = (row_BH1 >= 0) & (row_BH1 < high_B[:, None, None])
        block_BHW = block_BHW & (column_B1W >= 0) & (column_B1W < wide_B[:, None, None])
        new_BHW = block_BHW & ~mask_BHW
        count_B = new_BHW.sum(axis=(1, 2))
        fits_B = count_B <= left_B
        mask_BHW |= new_BHW & fits_B[:, None, None]
        left_B -= np.where(fits_B, count_B, 0)
    mask_BN = mask_BHW.reshape(len(positions_B), height * width)
    return torch.from_numpy(_filled(mask_BN, seed, positions_B, target_B))


def _targets(share: float | NDArray[np.float64], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Turn the share into a number of tokens for each image, (B,)."""
    share_B = np.broadcast_to(np.asarray(share, dtype=np.float64), mask.shape[:1])
    assert np.all((share_B >= 0) & (share_B <= 1)), f"a share of tokens lies between 0 and 1, got {share}"
    return np.rint(share_B * math.prod(mask.shape[1:])).astype(np.int64)


def _filled(
    mask_BN: NDArray[np.bool_], seed: int, positions_B: NDArray[np.int64], target_B: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Add single tokens in a random order until each row has its count."""
    order_BN = uniforms(seed, _TOKEN_STREAM, positions_B, mask_BN.shape[1])
    # Tokens already chosen come first, so the first target_B ranks hold all of them.
    order_BN[mask_BN] -= 1.0
    rank_BN = np.argsort(np.argsort(order_BN, axis=1, kind="stable"), axis=1)
    return np.asarray(rank_BN < target_B[:, None])
