"""Cross-entropy between the teacher's and the student's scores over prototypes: DINO on crops, iBOT on tokens.

Shapes: G global crops, L local crops, B images, N tokens of an image, K prototypes.
The functions here hold all logits; ``chunked`` has the same loss for many tokens and many prototypes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from histill.errors import ConfigError

__all__ = ["dino_loss", "ibot_loss", "token_weights"]


def dino_loss(
    student_global_GBK: Tensor, student_local_LBK: Tensor, targets_GBK: Tensor, student_temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each student crop with the teacher's scores of every *other* global crop of its image.

    Source: Caron et al., DINO, ICCV 2021, equation 3; weights as in DINOv2: every pair of crops counts the same, so
    both sums are divided by the number of pairs, G (G - 1) + L G.

    Parameters
    ----------
    student_global_GBK, student_local_LBK
        Student logits of the class tokens; L may be 0.
    targets_GBK
        Teacher scores of the same global crops, each row summing to 1; no gradient flows into them.
    student_temperature
        Divides the student's logits.

    Returns
    -------
    tuple of Tensor
        (local, global_): the two parts, float32 scalars; their sum is the loss.

    Raises
    ------
    ConfigError
        With one global crop and no local crop there is no pair.
    """
    crops, locals_ = targets_GBK.shape[0], student_local_LBK.shape[0]
    assert student_global_GBK.shape == targets_GBK.shape, (student_global_GBK.shape, targets_GBK.shape)
    assert student_local_LBK.shape[1:] == targets_GBK.shape[1:], (student_local_LBK.shape, targets_GBK.shape)
    pairs = crops * (crops - 1) + locals_ * crops
    if pairs == 0:
        raise ConfigError(
            "the DINO loss has no pair of crops to compare",
            got=f"{crops} global and {locals_} local crops",
            allowed="2 or more global crops, or 1 global crop and 1 or more local crops",
            remedy="raise the number of crops, or give the DINO loss weight 0",
        )
    targets_GBK = targets_GBK.detach()
    all_targets_BK = targets_GBK.sum(dim=0)
    scale = -1.0 / (pairs * targets_GBK.shape[1])
    local_LBK = F.log_softmax(student_local_LBK.float() / student_temperature, dim=-1)
    global_GBK = F.log_softmax(student_global_GBK.float() / student_temperature, dim=-1)
    local = scale * (local_LBK * all_targets_BK).sum()
    # A crop's own teacher scores are left out: it would only have to copy.
    global_ = scale * (global_GBK * (all_targets_BK - targets_GBK)).sum()
    return local, global_


def ibot_loss(
    student_BNK: Tensor, targets_BNK: Tensor, mask_BN: Tensor | None = None, student_temperature: float = 0.1
) -> Tensor:
    """Cross-entropy of each student token with the teacher's scores of the token at the same place.

    Source: Zhou et al., iBOT, ICLR 2022, section 3.1; weights as in DINOv2, see `token_weights`.

    Parameters
    ----------
    student_BNK
        Student logits of the patch tokens.
    targets_BNK
        Teacher scores, each row summing to 1; no gradient flows into them. Rows outside the mask are not used.
    mask_BN
        True (or not zero) where a token counts; None for all tokens. Other rows may hold anything, also NaN.
    student_temperature
        Divides the student's logits.

    Returns
    -------
    Tensor
        float32 scalar: mean over the images of the mean over an image's counted tokens.
    """
    assert student_BNK.shape == targets_BNK.shape, (student_BNK.shape, targets_BNK.shape)
    targets_BNK = targets_BNK.detach()
    if mask_BN is not None:
        # Before anything is computed: a row outside the mask may be anything, and 0 * NaN would reach the gradient.
        mask_BN = mask_BN.bool()
        student_BNK = student_BNK.masked_fill(~mask_BN[..., None], 0.0)
        targets_BNK = targets_BNK.masked_fill(~mask_BN[..., None], 0.0)
    log_scores_BNK = F.log_softmax(student_BNK.float() / student_temperature, dim=-1)
    entropy_BN = -(targets_BNK * log_scores_BNK).sum(dim=-1)
    return entropy_BN.mean() if mask_BN is None else (entropy_BN * token_weights(mask_BN)).sum()


def token_weights(mask_BN: Tensor) -> Tensor:
    """Weight of each token, (B, N) float32: 1 / (the image's number of counted tokens), divided by B.

    An image without counted tokens has weight 0 and still counts in B, as in DINOv2.
    """
    counted_BN = mask_BN.float()
    return counted_BN / (counted_BN.sum(dim=1, keepdim=True).clamp_min(1.0) * mask_BN.shape[0])
