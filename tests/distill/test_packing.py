from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from histill.distill.packing import pack_attention
from histill.errors import ModelError
from histill.models import build_student


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit-nano", "vit-tiny"])
def test_packed_tokens_and_gradients_are_those_of_each_size_alone(name: str, fused: bool) -> None:
    groups = [torch.rand(3, 3, 56, 56), torch.rand(5, 3, 28, 28), torch.rand(1, 3, 42, 70)]
    grads: list[dict[str, Any]] = []
    outputs = []
    for packed in (False, True):
        model = build_student(name, seed=2)
        for block in model.blocks:
            block.attn.fused_attn = fused
            torch.nn.init.ones_(block.ls1.gamma)
        found = pack_attention(model).tokens(groups) if packed else [model.forward_features(each) for each in groups]
        sum((each.square() * (index + 1)).mean() for index, each in enumerate(found)).backward()
        outputs.append(found)
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for key, theirs in grads[0].items():
        torch.testing.assert_close(grads[1][key], theirs, rtol=1e-3, atol=1e-5)


def test_packing_keeps_to_recomputed_activations() -> None:
    """What autograd holds of a packed forward pass, in bytes; and the same gradients."""

    def step(*, again: bool) -> tuple[int, dict[str, Any]]:
        model, held = build_student("vit-tiny", seed=2), 0
        model.set_grad_checkpointing(again)

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel() * tensor.element_size()
            return tensor

        torch.manual_seed(0)
        groups = [torch.rand(3, 3, 56, 56), torch.rand(4, 3, 28, 28)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = pack_attention(model).tokens(groups)
        forward = held
        sum(each.square().mean() for each in found).backward()
        return forward, {key: parameter.grad for key, parameter in model.named_parameters()}

    (plain, expected), (again, found) = step(again=False), step(again=True)
    assert again < 0.3 * plain
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)


def test_a_packed_model_still_takes_one_batch_and_keeps_its_weights_names() -> None:
    images = torch.rand(2, 3, 56, 56)
    model = build_student("vit-nano", seed=2).eval()
    expected, names = model.forward_features(images), list(model.state_dict())
    pack_attention(model)
    assert torch.equal(model.forward_features(images), expected)
    assert list(model.state_dict()) == names


def test_attention_of_another_kind_is_refused() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", pretrained=False, num_classes=0)
    with pytest.raises(ModelError, match="cannot be packed"):
        pack_attention(model)
