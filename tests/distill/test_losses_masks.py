from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from histill.distill.losses import block_masks, random_masks

Maker = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("make", [block_masks, random_masks])


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("grid_HW", [(16, 16), (7, 5), (1, 3)])
def test_every_image_has_exactly_its_share(make: Maker, share: float, grid_HW: tuple[int, int]) -> None:
    mask_BN = make(3, np.arange(20), grid_HW, share)
    tokens = grid_HW[0] * grid_HW[1]
    assert mask_BN.dtype == torch.bool
    assert mask_BN.shape == (20, tokens)
    assert (mask_BN.sum(dim=1) == round(share * tokens)).all()


@BOTH
def test_each_image_may_have_its_own_share(make: Maker) -> None:
    mask_BN = make(0, np.arange(3), (4, 4), np.array([0.0, 0.25, 0.5]))
    assert mask_BN.sum(dim=1).tolist() == [0, 4, 8]


@BOTH
def test_a_row_depends_on_seed_and_position_alone(make: Maker) -> None:
    positions_B = np.array([900, 5, 17, 2**40])
    mask_BN = make(1, positions_B, (16, 16), 0.4)
    assert torch.equal(make(1, positions_B[[2]], (16, 16), 0.4)[0], mask_BN[2])
    assert torch.equal(make(1, positions_B[::-1].copy(), (16, 16), 0.4), mask_BN.flip(0))
    assert not torch.equal(make(2, positions_B, (16, 16), 0.4), mask_BN)
    assert len({tuple(row.tolist()) for row in mask_BN}) == 4


def neighbours(mask_BN: Tensor) -> float:
    """Share of masked tokens whose right neighbour is masked too."""
    grid = mask_BN.view(-1, 16, 16)
    return ((grid[:, :, :-1] & grid[:, :, 1:]).sum() / grid[:, :, :-1].sum()).item()


def test_blocks_hang_together_and_single_tokens_do_not() -> None:
    positions_B = np.arange(200)
    assert neighbours(random_masks(0, positions_B, (16, 16), 0.3)) == pytest.approx(0.3, abs=0.02)
    assert neighbours(block_masks(0, positions_B, (16, 16), 0.3)) > 0.7


@BOTH
def test_every_place_is_reached(make: Maker) -> None:
    often_N = make(0, np.arange(2000), (8, 8), 0.4).float().mean(dim=0)
    assert often_N.min() > 0.08
    assert often_N.max() < 0.75


def test_single_tokens_are_chosen_evenly() -> None:
    often_N = random_masks(0, np.arange(4000), (6, 6), 0.25).float().mean(dim=0)
    assert (often_N - 0.25).abs().max() < 0.03


@BOTH
def test_a_share_beyond_one_is_refused(make: Maker) -> None:
    with pytest.raises(AssertionError, match="between 0 and 1"):
        make(0, np.arange(2), (4, 4), 1.5)
