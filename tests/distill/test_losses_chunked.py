from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from histill.distill.losses import PrototypeLoss, Reduce, chunked_prototype_loss, ibot_loss, sinkhorn, token_weights

TEACHER_T, STUDENT_T = 0.05, 0.1


class Inputs(NamedTuple):
    hidden_MB: Tensor
    weight_KB: Tensor
    teacher_ME: Tensor
    prototypes_KE: Tensor
    weights_M: Tensor


def inputs(tokens: int = 37, prototypes: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int, width: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=1)

    weights_M = torch.rand(tokens, generator=generator, dtype=dtype)
    return Inputs(
        unit(tokens, 6).requires_grad_(),
        unit(prototypes, 6).requires_grad_(),
        unit(tokens, 9),
        unit(prototypes, 9),
        weights_M,
    )


def chunked(
    x: Inputs, chunk_rows: int | None, iterations: int = 3, reduce: Reduce | None = None, held_tokens: int = 0
) -> PrototypeLoss:
    return chunked_prototype_loss(
        *x,
        teacher_temperature=TEACHER_T,
        student_temperature=STUDENT_T,
        iterations=iterations,
        reduce=reduce,
        chunk_rows=chunk_rows,
        held_bytes=held_tokens * 24 * 4,
    )


def plain(x: Inputs, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Loss and weighted mean entropy with everything held."""
    targets_MK = sinkhorn(x.teacher_ME @ x.prototypes_KE.T, TEACHER_T, iterations)
    log_scores_MK = F.log_softmax(x.hidden_MB @ x.weight_KB.T / STUDENT_T, dim=1)
    entropy_M = torch.special.entr(targets_MK).sum(dim=1)
    loss = (x.weights_M * -(targets_MK * log_scores_MK).sum(dim=1)).sum()
    return loss, (x.weights_M @ entropy_M) / x.weights_M.sum()


def near(grad: Tensor, reference: Tensor) -> None:
    """1e-5 relative to the largest entry."""
    torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("chunk_rows", [1, 5, 36, 37, 1000, None])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("held_tokens", [0, 13, 37])
def test_equals_the_plain_path_in_values_and_gradients(
    chunk_rows: int | None, iterations: int, held_tokens: int
) -> None:
    x = inputs()
    result = chunked(x, chunk_rows, iterations, held_tokens=held_tokens)
    loss, entropy = plain(x, iterations)
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(result.target_entropy, entropy, rtol=1e-5, atol=0.0)
    assert not result.target_entropy.requires_grad
    # A factor after the loss must reach the gradients.
    grads = torch.autograd.grad(0.7 * result.loss, (x.hidden_MB, x.weight_KB))
    expected = torch.autograd.grad(0.7 * loss, (x.hidden_MB, x.weight_KB))
    for grad, reference in zip(grads, expected, strict=True):
        near(grad, reference)


def test_equals_ibot_on_masked_tokens() -> None:
    x = inputs(tokens=48)
    mask_BN = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    mask_BN[2] = False
    rows = mask_BN.flatten()
    weights_M = token_weights(mask_BN).flatten()[rows]
    result = chunked(Inputs(x.hidden_MB[rows], x.weight_KB, x.teacher_ME[rows], x.prototypes_KE, weights_M), 7)
    targets_MK = torch.zeros(48, 24)
    targets_MK[rows] = sinkhorn(x.teacher_ME[rows] @ x.prototypes_KE.T, TEACHER_T)
    student_BNK = (x.hidden_MB @ x.weight_KB.T).view(4, 12, 24)
    expected = ibot_loss(student_BNK, targets_MK.view(4, 12, 24), mask_BN, STUDENT_T)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("iterations", [0, 3])
def test_gradients_in_float64(iterations: int) -> None:
    x = inputs(tokens=5, prototypes=4, dtype=torch.float64)

    def loss(hidden_MB: Tensor, weight_KB: Tensor) -> Tensor:
        return chunked(x._replace(hidden_MB=hidden_MB, weight_KB=weight_KB), 2, iterations).loss

    assert torch.autograd.gradcheck(loss, (x.hidden_MB, x.weight_KB))


@pytest.mark.parametrize("sizes", [(20, 17), (0, 37)])
def test_ranks_equal_one(sizes: tuple[int, int]) -> None:
    x = inputs()
    barrier, held = threading.Barrier(2, timeout=30), [torch.empty(0)] * 2

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        def reduce(tensor: Tensor) -> Tensor:
            held[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(held[0] + held[1])
            barrier.wait()
            return tensor

        part = Inputs(
            x.hidden_MB.detach().split(list(sizes))[rank].requires_grad_(),
            x.weight_KB.detach().clone().requires_grad_(),
            x.teacher_ME.split(list(sizes))[rank],
            x.prototypes_KE,
            x.weights_M.split(list(sizes))[rank],
        )
        result = chunked(part, 6, reduce=reduce)
        return result.loss.detach(), *torch.autograd.grad(result.loss, (part.hidden_MB, part.weight_KB))

    with ThreadPoolExecutor(2) as pool:
        (loss_0, hidden_0, weight_0), (loss_1, hidden_1, weight_1) = pool.map(work, range(2))
    loss, _ = plain(x)
    hidden, weight = torch.autograd.grad(loss, (x.hidden_MB, x.weight_KB))
    torch.testing.assert_close(loss_0 + loss_1, loss, rtol=1e-5, atol=0.0)
    near(torch.cat([hidden_0, hidden_1]), hidden)
    near(weight_0 + weight_1, weight)


def test_a_frozen_last_layer_gets_no_gradient_and_a_frozen_student_none_at_all() -> None:
    x = inputs()
    frozen = x._replace(weight_KB=x.weight_KB.detach())
    loss = chunked(frozen, 8).loss
    loss.backward()
    assert x.hidden_MB.grad is not None
    near(x.hidden_MB.grad, torch.autograd.grad(plain(x)[0], x.hidden_MB)[0])
    assert frozen.weight_KB.grad is None
    assert not chunked(frozen._replace(hidden_MB=x.hidden_MB.detach()), 8).loss.requires_grad


def test_float32_under_autocast_and_gradients_in_the_inputs_precision() -> None:
    x = inputs()
    half = x.hidden_MB.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = chunked(x._replace(hidden_MB=half, teacher_ME=x.teacher_ME.bfloat16()), 8)
    exact = x._replace(hidden_MB=half.detach().float(), teacher_ME=x.teacher_ME.bfloat16().float())
    torch.testing.assert_close(result.loss.detach(), plain(exact)[0].detach(), rtol=1e-5, atol=0.0)
    result.loss.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_teacher_logits_of_plus_and_minus_100_stay_finite() -> None:
    x = inputs()
    large = x._replace(teacher_ME=100 * x.teacher_ME)
    result = chunked(large, 8)
    result.loss.backward()
    assert result.loss.isfinite()
    assert large.hidden_MB.grad is not None
    assert large.hidden_MB.grad.isfinite().all()
    torch.testing.assert_close(result.loss, plain(large)[0], rtol=1e-3, atol=0.0)


def test_no_tokens_cost_nothing() -> None:
    x = inputs(tokens=0)
    result = chunked(x, 8)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert result.target_entropy.item() == 0.0
    assert x.weight_KB.grad is not None
    assert not x.weight_KB.grad.any()


def test_no_tensor_as_large_as_the_logits_is_made() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    x = inputs(tokens=600, prototypes=500)
    with Watch():
        chunked(x, 20).loss.backward()
    assert largest == 4 * 20 * 500
