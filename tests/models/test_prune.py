"""A pruned start: exact where nothing is cut, better than random where something is."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked

from histill.errors import ModelError
from histill.models import wrap
from histill.models.encoder import Encoder
from histill.models.prune import prune_teacher, why_not_prunable

GATED = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 5.5}


def vit(seed: int, **changes: Any) -> Any:
    settings: dict[str, Any] = {"embed_dim": 64, "num_heads": 4, "depth": 3, "img_size": 56, "num_classes": 0}
    torch.manual_seed(seed)
    model = timm.create_model("vit_small_patch14_dinov2", dynamic_img_size=True, **(settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may be at a value that hides a mistake (0 or 1)
            parameter.add_(0.3 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter) + 0.02)
        for block in model.blocks:
            block.ls1.gamma.fill_(0.7)
            block.ls2.gamma.fill_(1.3)
    return model.eval()


def encoder(model: Any) -> Encoder:
    return wrap(model, name="x", mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2))


def images(seed: int = 0, count: int = 48) -> torch.Tensor:
    # smooth blobs, so that images differ by more than noise
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, 3, 7, 7, generator=generator), size=56, mode="bilinear")


@torch.no_grad()
def agreement(student: Any, teacher: Any) -> float:
    """Correlation between the two models' cosines of all pairs of centred class tokens."""
    grams = []
    for model in (student, teacher):
        cls_BD = encoder(model)(images(seed=1)).cls_BD
        unit_BD = F.normalize(cls_BD - cls_BD.mean(0), dim=1)
        grams.append((unit_BD @ unit_BD.T)[torch.tril_indices(48, 48, -1).unbind()])
    return float(torch.corrcoef(torch.stack(grams))[0, 1])


@pytest.mark.parametrize("changes", [{}, GATED, {"no_embed_class": True}])
def test_nothing_cut_is_the_teacher_itself(changes: dict[str, Any]) -> None:
    teacher, student = vit(0, **changes), vit(1, **changes)
    with torch.no_grad():  # then the last norm changes nothing that a student without scale and shift cannot show
        teacher.norm.weight.fill_(1.0)
        teacher.norm.bias.zero_()
    share = prune_teacher(student, encoder(teacher), images().split(16))
    assert share == pytest.approx(1.0, abs=1e-6)
    with torch.no_grad():
        ours, theirs = (encoder(model)(images(seed=1)).patches_BHWD.flatten(0, 2) for model in (student, teacher))
    # The same tokens in rotated channels: all lengths and angles agree.
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=2e-3, atol=2e-2)


def test_cut_channels_heads_neurons_and_blocks_still_follow_the_teacher() -> None:
    teacher = vit(0, depth=4)
    student = vit(1, embed_dim=32, num_heads=2, depth=2)
    before = agreement(student, teacher)
    share = prune_teacher(student, encoder(teacher), images().split(16))
    assert 0.5 < share < 1.0
    assert agreement(student, teacher) > before + 0.1


def test_registers_of_the_student_disturb_little() -> None:
    teacher = vit(0)
    student = vit(1, reg_tokens=4, no_embed_class=True)
    prune_teacher(student, encoder(teacher), images().split(16))
    assert agreement(student, teacher) > 0.9


def test_the_same_images_give_the_same_weights_and_leave_the_teacher_alone() -> None:
    teacher = vit(0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    states = []
    for seed in (1, 2):  # the student's own start does not matter
        student = vit(seed, embed_dim=32, num_heads=2, depth=2)
        prune_teacher(student, encoder(teacher), images().split(16))
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher.norm._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embed_dim": 128, "num_heads": 8}, "width"),
        ({"num_heads": 2}, "width of a head"),
        ({"depth": 5}, "blocks"),
        ({"patch_size": 28}, "patch size"),
        ({"mlp_ratio": 8.0}, "neurons"),
        (GATED, "kind of MLP"),
        ({"qk_norm": True}, "queries and keys"),
        ({"qkv_bias": False}, "no bias"),
        ({"pre_norm": True}, "before its first block"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, Any], words: str) -> None:
    teacher, student = vit(0), vit(1, **changes)
    reason = why_not_prunable(student, teacher)
    assert reason is not None
    assert words in reason
    with pytest.raises(ModelError, match="--init auto"):
        prune_teacher(student, encoder(teacher), [])
