from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from histill.distill.losses import dino_loss, ibot_loss, sinkhorn, token_weights
from histill.errors import ConfigError


@pytest.fixture(scope="module")
def reference(shared_parity: Path) -> dict[str, Tensor]:
    with np.load(shared_parity / "dinov2_losses.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def near(value: Tensor, expected: Tensor) -> None:
    """1e-5 relative to the largest entry, for values and gradients."""
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dino_equals_the_original_with_gradients(reference: dict[str, Tensor]) -> None:
    teacher_GBK = reference["teacher_cls_logits"]
    targets_GBK = sinkhorn(teacher_GBK.flatten(0, 1), 0.07).view_as(teacher_GBK)
    global_GBK = reference["student_global_cls_logits"].clone().requires_grad_()
    local_LBK = reference["student_local_cls_logits"].clone().requires_grad_()
    local, global_ = dino_loss(global_GBK, local_LBK, targets_GBK)
    near(local, reference["dino_local"])
    near(global_, reference["dino_global"])
    grad_global, grad_local = torch.autograd.grad(local + global_, (global_GBK, local_LBK))
    near(grad_global, reference["dino_grad_global"])
    near(grad_local, reference["dino_grad_local"])


@pytest.mark.parametrize(("crops", "locals_"), [(2, 0), (1, 3), (3, 2)])
def test_dino_is_the_mean_over_all_pairs_of_different_crops(crops: int, locals_: int) -> None:
    global_GBK, local_LBK = normal(0, crops, 4, 9), normal(1, locals_, 4, 9)
    targets_GBK = torch.softmax(normal(2, crops, 4, 9), dim=-1)

    def pair(student_BK: Tensor, target_BK: Tensor) -> float:
        return -(target_BK * torch.log_softmax(student_BK / 0.1, dim=-1)).sum(dim=-1).mean().item()

    pairs = crops * (crops - 1) + locals_ * crops
    expected_local = sum(pair(local_LBK[i], targets_GBK[g]) for i in range(locals_) for g in range(crops)) / pairs
    expected_global = sum(pair(global_GBK[a], targets_GBK[b]) for a, b in itertools.permutations(range(crops), 2))
    local, global_ = dino_loss(global_GBK, local_LBK, targets_GBK)
    assert local.item() == pytest.approx(expected_local, rel=1e-5)
    assert global_.item() == pytest.approx(expected_global / pairs, rel=1e-5, abs=1e-6)
    assert (local.item() == 0.0) == (locals_ == 0)
    assert (global_.item() == 0.0) == (crops == 1)


def test_one_crop_alone_has_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="1 global and 0 local crops"):
        dino_loss(torch.zeros(1, 2, 3), torch.zeros(0, 2, 3), torch.full((1, 2, 3), 1 / 3))


def test_ibot_on_masked_tokens_equals_the_original_with_gradient(reference: dict[str, Tensor]) -> None:
    teacher_BNK, mask_BN = reference["teacher_patch_logits"], reference["masks"]
    # Sinkhorn sees the masked tokens only; what stands elsewhere must not matter.
    targets_BNK = torch.full_like(teacher_BNK, torch.nan)
    targets_BNK[mask_BN] = sinkhorn(teacher_BNK[mask_BN], 0.07)
    student_BNK = reference["student_patch_logits"].clone().requires_grad_()
    loss = ibot_loss(student_BNK, targets_BNK.nan_to_num(0.0), mask_BN)
    near(loss, reference["ibot_block"])
    near(torch.autograd.grad(loss, student_BNK)[0], reference["ibot_block_grad"])
    assert torch.equal(ibot_loss(student_BNK, targets_BNK, mask_BN), loss)


def test_ibot_on_all_tokens_equals_the_original_with_gradient(reference: dict[str, Tensor]) -> None:
    teacher_BNK = reference["teacher_patch_logits"]
    targets_BNK = sinkhorn(teacher_BNK.flatten(0, 1), 0.07).view_as(teacher_BNK)
    student_BNK = reference["student_patch_logits"].clone().requires_grad_()
    loss = ibot_loss(student_BNK, targets_BNK)
    near(loss, reference["ibot_all"])
    near(torch.autograd.grad(loss, student_BNK)[0], reference["ibot_all_grad"])
    near(ibot_loss(student_BNK, targets_BNK, torch.ones(teacher_BNK.shape[:2], dtype=torch.bool)), loss)


def test_no_gradient_reaches_the_targets() -> None:
    targets = torch.softmax(normal(3, 2, 3, 4), dim=-1).requires_grad_()
    student = normal(4, 2, 3, 4).requires_grad_()
    total = ibot_loss(student, targets) + sum(dino_loss(student, student, targets))
    total.backward()
    assert targets.grad is None
    assert student.grad is not None


def test_an_image_without_masks_counts_in_the_divisor() -> None:
    mask_BN = torch.tensor([[True, True, False, False], [False] * 4, [True, True, True, True]])
    expected_BN = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0] * 4, [0.25] * 4]) / 3
    torch.testing.assert_close(token_weights(mask_BN), expected_BN)
    nothing = ibot_loss(normal(5, 3, 4, 6), torch.full((3, 4, 6), 1 / 6), torch.zeros(3, 4, dtype=torch.bool))
    assert nothing.item() == 0.0


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64])
def test_rows_outside_the_mask_may_be_anything(kind: torch.dtype) -> None:
    mask_BN = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(kind)
    student, targets = normal(6, 2, 3, 5), torch.softmax(normal(7, 2, 3, 5), dim=-1)
    broken_student, broken_targets = student.clone(), targets.clone()
    broken_student[0, 1], broken_targets[1, 0], broken_targets[0, 1] = math.nan, math.nan, math.inf
    plain, broken = student.requires_grad_(), broken_student.requires_grad_()
    expected, found = ibot_loss(plain, targets, mask_BN), ibot_loss(broken, broken_targets, mask_BN)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected.backward()
    found.backward()
    torch.testing.assert_close(broken.grad, plain.grad, rtol=0, atol=0)
