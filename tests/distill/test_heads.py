from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from histill.distill.heads import Adaptor, PrototypeHead


@pytest.fixture(scope="module")
def reference(shared_parity: Path) -> dict[str, Tensor]:
    with np.load(shared_parity / "dinov2_losses.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def original(reference: dict[str, Tensor]) -> PrototypeHead:
    head = PrototypeHead(32, 64, hidden=32, bottleneck=8)
    head.load_state_dict({name[5:]: value for name, value in reference.items() if name.startswith("head.")})
    return head


def test_the_original_head_loads_and_gives_its_logits(reference: dict[str, Tensor]) -> None:
    logits = original(reference)(reference["head_in"])
    torch.testing.assert_close(logits, reference["head_out"], rtol=1e-5, atol=1e-6)


def test_hidden_and_weight_multiply_to_the_logits(reference: dict[str, Tensor]) -> None:
    head = original(reference)
    hidden = head.hidden(reference["head_in"])
    torch.testing.assert_close(hidden.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(head.weight().norm(dim=-1, keepdim=True), head.last_layer.weight_g)
    torch.testing.assert_close(hidden @ head.weight().T, head(reference["head_in"]))


def test_scales_stay_one_unless_they_are_trained() -> None:
    head = PrototypeHead(8, 20, hidden=16, bottleneck=4)
    assert torch.equal(head.last_layer.weight_g, torch.ones(20, 1))
    head(torch.randn(3, 8)).square().sum().backward()
    assert head.last_layer.weight_g.grad is None
    assert head.last_layer.weight_v.grad is not None
    assert PrototypeHead(8, 20, hidden=16, bottleneck=4, train_scale=True).last_layer.weight_g.requires_grad


def test_logits_are_cosines_and_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(8, 20, hidden=16, bottleneck=4)
    x = 100 * torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, logits = head.hidden(x), head(x)
    assert logits.shape == (2, 3, 20)
    assert logits.dtype == hidden.dtype == torch.float32
    assert logits.abs().max() <= 1.0 + 1e-6
    assert torch.equal(logits, torch.nn.functional.linear(hidden, head.weight()))


@pytest.mark.parametrize(("layers", "linears"), [(1, [(4, 8)]), (3, [(16, 8), (16, 16), (4, 16)])])
def test_the_number_of_layers(layers: int, linears: list[tuple[int, int]]) -> None:
    head = PrototypeHead(8, 20, hidden=16, bottleneck=4, layers=layers)
    assert [tuple(m.weight.shape) for m in head.mlp if isinstance(m, torch.nn.Linear)] == linears
    assert not isinstance(head.mlp[-1], torch.nn.GELU)


def test_initial_weights_follow_the_seed_and_the_truncated_normal() -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(PrototypeHead(64, 100, hidden=256, bottleneck=32))
    first, second = (head.state_dict() for head in heads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["mlp.2.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert not first["mlp.2.bias"].any()


def test_an_adaptor_is_linear_unless_it_has_a_hidden_layer() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    linear, mlp = Adaptor(8, 12), Adaptor(8, 12, hidden=16)
    assert linear(a).shape == mlp(a).shape == (2, 3, 12)
    torch.testing.assert_close(linear(a + b), linear(a) + linear(b))
    assert (mlp(a + b) - mlp(a) - mlp(b)).abs().max() > 1e-4
    assert [tuple(p.shape) for p in mlp.parameters()] == [(16, 8), (16,), (12, 16), (12,)]
