from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from histill.distill.losses import centred_softmax, sinkhorn, update_centre


@pytest.fixture(scope="module")
def reference(shared_parity: Path) -> dict[str, Tensor]:
    with np.load(shared_parity / "dinov2_losses.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def rows_of(seed: int, rows: int, prototypes: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed))


def on_ranks(parts: list[Tensor], function: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """Run the function once per part in threads, with a sum over them."""
    barrier = threading.Barrier(len(parts), timeout=30)
    held: list[Tensor] = [torch.empty(0)] * len(parts)

    def work(rank: int) -> Tensor:
        def reduce(tensor: Tensor) -> Tensor:
            held[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(held).sum(dim=0)
            barrier.wait()
            return total

        return function(parts[rank], reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, range(len(parts))))


def by_definition(logits_MK: Tensor, temperature: float, iterations: int) -> Tensor:
    """Alternate normalisation of the matrix itself, in float64."""
    scores_MK = torch.exp(logits_MK.double() / temperature)
    for _ in range(iterations):
        scores_MK = scores_MK / scores_MK.sum(dim=0)
        scores_MK = scores_MK / scores_MK.sum(dim=1, keepdim=True)
    return scores_MK


@pytest.mark.parametrize(("name", "temperature"), [("sinkhorn_T04", 0.04), ("sinkhorn_T07", 0.07)])
def test_equals_the_original_on_class_tokens(reference: dict[str, Tensor], name: str, temperature: float) -> None:
    targets_MK = sinkhorn(reference["teacher_cls_logits"].flatten(0, 1), temperature)
    torch.testing.assert_close(targets_MK, reference[name], rtol=1e-5, atol=1e-7)


def test_equals_the_original_on_all_patch_tokens(reference: dict[str, Tensor]) -> None:
    targets_MK = sinkhorn(reference["teacher_patch_logits"].flatten(0, 1), 0.07)
    torch.testing.assert_close(targets_MK, reference["sinkhorn_patch_all"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_equals_the_definition(iterations: int) -> None:
    logits_MK = rows_of(0, 40, 13)
    expected_MK = by_definition(logits_MK, 0.1, iterations).float()
    torch.testing.assert_close(sinkhorn(logits_MK, 0.1, iterations), expected_MK, rtol=2e-5, atol=1e-7)


def test_no_iteration_is_a_plain_softmax() -> None:
    logits_MK = rows_of(1, 5, 7)
    torch.testing.assert_close(sinkhorn(logits_MK, 0.1, 0), torch.softmax(logits_MK / 0.1, dim=1))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_large_logits_do_not_overflow(scale: float) -> None:
    logits_MK = scale * (2.0 * rows_of(2, 64, 32).sigmoid() - 1.0)
    logits_MK[0, 0], logits_MK[1, 1] = 100.0, -100.0
    targets_MK = sinkhorn(logits_MK, 0.04)
    assert targets_MK.isfinite().all()
    torch.testing.assert_close(targets_MK.sum(dim=1), torch.ones(64))


def test_rows_sum_to_one_and_many_iterations_spread_the_mass() -> None:
    targets_MK = sinkhorn(rows_of(3, 200, 10), 0.2, 60)
    assert targets_MK.dtype == torch.float32
    torch.testing.assert_close(targets_MK.sum(dim=1), torch.ones(200))
    torch.testing.assert_close(targets_MK.sum(dim=0), torch.full((10,), 20.0), rtol=1e-3, atol=0.0)


def test_a_permutation_of_rows_permutes_the_targets() -> None:
    logits_MK = rows_of(4, 30, 8)
    order_M = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(sinkhorn(logits_MK[order_M], 0.07), sinkhorn(logits_MK, 0.07)[order_M])


def test_a_shift_of_one_prototype_cancels_and_a_shift_of_one_row_does_not() -> None:
    logits_MK = rows_of(6, 30, 8)
    targets_MK = sinkhorn(logits_MK, 0.5)
    prototype_shift, row_shift = torch.zeros(8), torch.zeros(30, 1)
    prototype_shift[3] = row_shift[3] = 1.0
    torch.testing.assert_close(sinkhorn(logits_MK + prototype_shift, 0.5), targets_MK, rtol=1e-5, atol=1e-7)
    # The prototypes are normalised first: a heavier row takes more of each before it is normalised itself.
    assert (sinkhorn(logits_MK + row_shift, 0.5) - targets_MK).abs().max() > 1e-3


def test_no_gradient_and_no_change_of_the_input() -> None:
    logits_MK = rows_of(7, 6, 5).requires_grad_()
    before_MK = logits_MK.detach().clone()
    assert not sinkhorn(logits_MK, 0.07).requires_grad
    assert torch.equal(logits_MK, before_MK)


@pytest.mark.parametrize("sizes", [(24, 24), (5, 43), (0, 48), (16, 16, 16)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_ranks_equal_one(sizes: tuple[int, ...], scale: float) -> None:
    logits_MK = rows_of(8, 48, 32, scale)
    # One rank's values far from the other's, so that a careless reference of the exponents would overflow.
    logits_MK[: sizes[0]] += 2 * scale
    parts = on_ranks(list(logits_MK.split(list(sizes))), lambda part, reduce: sinkhorn(part, 0.04, 3, reduce))
    alone_MK = sinkhorn(logits_MK, 0.04)
    torch.testing.assert_close(torch.cat(parts), alone_MK, rtol=0.0, atol=1e-6)


def test_ranks_with_logits_of_plus_and_minus_100() -> None:
    high, low = 100.0 + rows_of(9, 6, 16), -100.0 + rows_of(10, 6, 16)
    parts = on_ranks([high, low], lambda part, reduce: sinkhorn(part, 0.04, 3, reduce))
    torch.testing.assert_close(torch.cat(parts), sinkhorn(torch.cat([high, low]), 0.04), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(torch.cat(parts).sum(dim=1), torch.ones(12))


def test_centring_equals_the_original(reference: dict[str, Tensor]) -> None:
    logits_MK = reference["teacher_cls_logits"].flatten(0, 1)
    centre_K = torch.zeros(logits_MK.shape[1])
    torch.testing.assert_close(
        centred_softmax(logits_MK, centre_K, 0.04), reference["centre_first"], rtol=1e-5, atol=1e-7
    )
    centre_K = update_centre(centre_K, logits_MK)
    torch.testing.assert_close(
        centred_softmax(logits_MK, centre_K, 0.04), reference["centre_second"], rtol=1e-5, atol=1e-7
    )


def test_the_centre_is_the_mean_over_the_rows_of_all_ranks() -> None:
    logits_MK, centre_K = rows_of(11, 20, 6), torch.full((6,), 0.5)
    parts = on_ranks(list(logits_MK.split([3, 17])), lambda part, reduce: update_centre(centre_K, part, reduce=reduce))
    expected_K = 0.9 * 0.5 + 0.1 * logits_MK.mean(dim=0)
    for part_K in parts:
        torch.testing.assert_close(part_K, expected_K)
    assert torch.equal(centre_K, torch.full((6,), 0.5))
