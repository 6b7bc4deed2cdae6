"""Crops of several sizes through a vision transformer at once: one long row of tokens, attention within each crop.

Every layer but attention treats tokens one by one, so that all crops of a step can share its kernels; attention runs
once for each size of crop, as dense batches. No padding, no mask, no kernel of our own.

Shapes: B images of one size, N tokens of an image, T tokens of all images, D channels, H heads, E channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from histill.errors import ModelError

__all__ = ["Packing", "pack_attention"]


class Packing:
    """How the tokens of a row belong to crops; one for all blocks of a model, made by :func:`pack_attention`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layout: tuple[tuple[int, int], ...] | None = None
        """(images, tokens of each) by size of crop; None while crops of one size run in the ordinary way."""

    def tokens(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (B, N, D) after the last norm, for each batch of images (B, 3, height, width) of one size."""
        model = self._model
        rows = [model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))) for images in groups]
        layout = tuple((row.shape[0], row.shape[1]) for row in rows)
        row_1TD = torch.cat([row.flatten(0, 1) for row in rows])[None]
        again = model.grad_checkpointing and torch.is_grad_enabled()
        for block in model.blocks:
            if again:  # timm does so in its own forward pass, which is not used here
                row_1TD = checkpoint(self._block, block, row_1TD, layout, use_reentrant=False)
            else:
                row_1TD = self._block(block, row_1TD, layout)
        row_TD = model.norm(row_1TD)[0]
        parts = row_TD.split([images * tokens for images, tokens in layout])
        return [part.unflatten(0, (images, tokens)) for part, (images, tokens) in zip(parts, layout, strict=True)]

    def _block(self, block: Any, row_1TD: Tensor, layout: tuple[tuple[int, int], ...]) -> Tensor:
        self.layout = layout
        try:
            out_1TD: Tensor = block(row_1TD)
            return out_1TD
        finally:
            self.layout = None


def pack_attention(model: Any) -> Packing:
    """Teach the attention of a timm vision transformer to work within the crops of a row, in place.

    Raises
    ------
    ModelError
        For attention of another kind than timm's plain one.
    """
    packing = Packing(model)
    for block in model.blocks:
        attention: Any = block.attn
        if type(attention).__name__ != "Attention":  # timm has moved the class between modules
            raise ModelError(
                "the crops of this student cannot be packed",
                got=type(attention).__name__,
                allowed="timm's plain Attention",
                remedy="--scale.pack False",
            )
        plain = attention.forward

        def forward(self: Any, x: Tensor, *args: Any, plain: Any = plain, **kwargs: Any) -> Tensor:
            if packing.layout is None:
                ordinary: Tensor = plain(x, *args, **kwargs)
                return ordinary
            return _attend(self, x, packing.layout)

        attention.forward = MethodType(forward, attention)
    return packing


def _attend(attention: Any, x_1TD: Tensor, layout: tuple[tuple[int, int], ...]) -> Tensor:
    qkv_TX = attention.qkv(x_1TD)[0]
    found = []
    for part_TX, (images, tokens) in zip(qkv_TX.split([b * n for b, n in layout]), layout, strict=True):
        q, k, v = part_TX.view(images, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q), attention.k_norm(k)
        if attention.fused_attn:
            out_BHNE = F.scaled_dot_product_attention(
                q, k, v, dropout_p=attention.attn_drop.p if attention.training else 0.0
            )
        else:
            scores = (q * attention.scale) @ k.transpose(-2, -1)
            out_BHNE = attention.attn_drop(scores.softmax(dim=-1)) @ v
        found.append(out_BHNE.transpose(1, 2).flatten(2).flatten(0, 1))
    row_1TD = torch.cat(found)[None]
    projected: Tensor = attention.proj_drop(attention.proj(attention.norm(row_1TD)))
    return projected
