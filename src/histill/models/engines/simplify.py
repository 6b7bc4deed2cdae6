"""The same network in a form that graph libraries run faster, and that keeps more in 8 bits.

timm packs products that share an input into a wide one and cuts its result up again. A graph library fuses nothing
across such a cut: it copies, rounds, transposes and activates the parts in passes over memory of their own, in int8 a
tenth of the time. With a product for each part this becomes the end of a product.

Constants move as far down as they go: what a norm adds goes into the biases behind it; the bias of the keys adds the
same to all scores of a query, which the softmax takes out again; the weights of a query sum to one, so that the bias of
the values passes through the attention. Tensors without their constants need smaller ranges in 8 bits.

Shape legend: B images, N tokens, D width of a token, H heads, K width of a head, M width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp
from timm.models.vision_transformer import Block
from torch import nn

__all__ = ["simplify"]


@torch.no_grad()
def simplify(model: nn.Module) -> None:
    """Rewrite the blocks of timm's vision transformers, in place, for inference; other blocks stay as they are.

    The tokens stay the same, up to rounding.

    Parameters
    ----------
    model
        In evaluation mode.
    """
    for block in [module for module in model.modules() if type(module) is Block]:  # a subclass may do something else
        _simplify_attention(block)
        _simplify_mlp(block)


def _simplify_attention(block: Any) -> None:
    packed = block.attn
    if type(packed) is not Attention or packed.gate is not None or not isinstance(packed.norm, nn.Identity):
        return
    block.attn = attention = _Attention(packed)
    _move_shift(block.norm1, [attention.query, attention.key, attention.value])
    if isinstance(attention.key_norm, nn.Identity):
        _drop_bias(attention.key)
    if attention.value.bias is not None:
        _add_bias(attention.proj, attention.proj.weight @ attention.value.bias)
        _drop_bias(attention.value)
    block.ls1 = _without_scale(block.ls1, attention.proj)


def _simplify_mlp(block: Any) -> None:
    packed: Any = block.mlp
    if type(packed) not in (Mlp, GluMlp) or not isinstance(packed.fc1, nn.Linear):
        return
    if type(packed) is GluMlp:
        block.mlp = gated = _GatedMlp(packed)
        _move_shift(block.norm2, [gated.gate, gated.value])
    else:
        _move_shift(block.norm2, [packed.fc1])
    block.ls2 = _without_scale(block.ls2, packed.fc2)


class _Attention(nn.Module):
    """timm's attention with a product each for queries, keys and values."""

    def __init__(self, packed: Attention) -> None:
        super().__init__()
        self.heads = (packed.num_heads, packed.head_dim)
        self.query, self.key, self.value = _unpacked(packed.qkv, 3)
        self.query_norm, self.key_norm, self.proj = packed.q_norm, packed.k_norm, packed.proj

    def forward(self, x_BND: torch.Tensor, attn_mask: None = None, is_causal: bool = False) -> torch.Tensor:
        assert attn_mask is None, "an encoder's tokens all see each other"
        assert not is_causal, "an encoder's tokens all see each other"
        query_BHNK, key_BHNK, value_BHNK = (
            part(x_BND).unflatten(-1, self.heads).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed_BHNK = F.scaled_dot_product_attention(self.query_norm(query_BHNK), self.key_norm(key_BHNK), value_BHNK)
        projected_BND: torch.Tensor = self.proj(mixed_BHNK.transpose(1, 2).flatten(2))
        return projected_BND


class _GatedMlp(nn.Module):
    """timm's gated MLP with a product each for its two halves."""

    def __init__(self, packed: GluMlp) -> None:
        super().__init__()
        first, second = _unpacked(packed.fc1, 2)
        self.gate, self.value = (second, first) if packed.gate_last else (first, second)
        self.act, self.norm, self.fc2 = packed.act, packed.norm, packed.fc2

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        gated_BNM = self.act(self.gate(x_BND)) * self.value(x_BND)
        out_BND: torch.Tensor = self.fc2(self.norm(gated_BNM))
        return out_BND


def _unpacked(packed: nn.Module, parts: int) -> list[nn.Linear]:
    """Cut a product with several results side by side into one product for each."""
    assert isinstance(packed, nn.Linear)
    biases = [None] * parts if packed.bias is None else packed.bias.chunk(parts)
    found = []
    for weight, bias in zip(packed.weight.chunk(parts), biases, strict=True):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if bias is not None:
            _add_bias(linear, bias)
        found.append(linear)
    return found


def _move_shift(norm: nn.Module, into: Sequence[nn.Linear]) -> None:
    """Take what a layer norm adds into the biases of all products that read it."""
    if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
        return
    for linear in into:
        _add_bias(linear, linear.weight @ norm.bias)
    _drop_bias(norm)


def _without_scale(scale: nn.Module, linear: nn.Linear) -> nn.Module:
    """Take a layer scale into the product before it."""
    if not isinstance(scale, LayerScale):
        return scale
    linear.weight.mul_(scale.gamma[:, None])
    if linear.bias is not None:
        linear.bias.mul_(scale.gamma)
    return nn.Identity()


def _add_bias(linear: nn.Linear, more: torch.Tensor) -> None:
    linear.bias = nn.Parameter(more.clone() if linear.bias is None else linear.bias + more, requires_grad=False)


def _drop_bias(module: nn.Module) -> None:
    module.register_parameter("bias", None)
