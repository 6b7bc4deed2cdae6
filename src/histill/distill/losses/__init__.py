"""Losses between a teacher and a student: pure functions of tensors; sums over ranks are passed in as ``reduce``."""

from __future__ import annotations

from histill.distill.losses.chunked import (
    BalancedTokens,
    PrototypeLoss,
    balance_tokens,
    balanced_prototype_loss,
    chunked_prototype_loss,
)
from histill.distill.losses.koleo import koleo_loss
from histill.distill.losses.masks import block_masks, random_masks
from histill.distill.losses.prototype import dino_loss, ibot_loss, token_weights
from histill.distill.losses.relational import RelationalLoss, relational_loss, token_similarity_loss
from histill.distill.losses.sinkhorn import Reduce, centred_softmax, sinkhorn, update_centre
from histill.distill.losses.tokens import TokenLoss, token_loss, token_loss_by_image

__all__ = [
    "BalancedTokens",
    "PrototypeLoss",
    "Reduce",
    "RelationalLoss",
    "TokenLoss",
    "balance_tokens",
    "balanced_prototype_loss",
    "block_masks",
    "centred_softmax",
    "chunked_prototype_loss",
    "dino_loss",
    "ibot_loss",
    "koleo_loss",
    "random_masks",
    "relational_loss",
    "sinkhorn",
    "token_loss",
    "token_loss_by_image",
    "token_similarity_loss",
    "token_weights",
    "update_centre",
]
