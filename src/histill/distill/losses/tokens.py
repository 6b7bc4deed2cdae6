"""Regression of standardised teacher tokens. Shapes: M tokens (class or patch), D teacher features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TokenLoss", "token_loss", "token_loss_by_image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """The two parts of the token loss, float32 scalars."""

    cosine: Tensor
    """Mean over tokens of 1 - cosine similarity; 0 to 2."""
    smooth_l1: Tensor
    """Mean over tokens and features of the Huber function with its corner at 1."""


def token_loss(prediction_MD: Tensor, target_MD: Tensor, weights_M: Tensor | None = None) -> TokenLoss:
    """Cosine and smooth-L1 distance between predicted and real teacher tokens.

    Source: Ranzinger et al., AM-RADIO, CVPR 2024. The targets must be standardised: raw tokens share a
    large common component, and a student that has learnt that alone already has a small loss.

    Parameters
    ----------
    prediction_MD
        The student's tokens after the adaptor.
    target_MD
        Standardised teacher tokens; no gradient flows into them.
    weights_M
        Weight of each token, not negative; both parts are then weighted means (0 if all weights are 0).
    """
    assert prediction_MD.shape == target_MD.shape, (prediction_MD.shape, target_MD.shape)
    prediction_MD, target_MD = prediction_MD.float(), target_MD.detach().float()
    with torch.autocast(prediction_MD.device.type, enabled=False):
        cosine_M = 1.0 - F.cosine_similarity(prediction_MD, target_MD, dim=-1)
        if weights_M is None:
            return TokenLoss(cosine=cosine_M.mean(), smooth_l1=F.smooth_l1_loss(prediction_MD, target_MD))
        smooth_l1_M = F.smooth_l1_loss(prediction_MD, target_MD, reduction="none").mean(dim=-1)
        share_M = weights_M.float() / weights_M.float().sum().clamp_min(torch.finfo(torch.float32).tiny)
        return TokenLoss(cosine=share_M @ cosine_M, smooth_l1=share_M @ smooth_l1_M)


def token_loss_by_image(prediction_MND: Tensor, target_MND: Tensor) -> Tensor:
    """Both parts of :func:`token_loss` added up, as a mean over each image's tokens: (M,) float32."""
    prediction_MND, target_MND = prediction_MND.float(), target_MND.float()
    cosine_MN = 1.0 - F.cosine_similarity(prediction_MND, target_MND, dim=-1)
    smooth_l1_MN = F.smooth_l1_loss(prediction_MND, target_MND, reduction="none").mean(dim=-1)
    return (cosine_MN + smooth_l1_MN).mean(dim=1)
