"""Relations instead of features: distances and angles between images, similarities between tokens of one image.

No adaptor is needed: student and teacher may have different widths.
Shapes: B images, N tokens, D student features, E teacher features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from histill.errors import ConfigError

__all__ = ["RelationalLoss", "relational_loss", "token_similarity_loss"]

# Images nearer than this share of the mean distance count as equal: they span no angle.
_EQUAL = 1e-5
# Triplets that are held at once; each takes some 30 bytes until its backward pass.
_HELD_TRIPLETS = 2**24
# Leaves a token out of its own softmax; finite, so that 0 * (difference of two such logits) is 0.
_OUT = -1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RelationalLoss:
    """The two parts of the relational loss, float32 scalars."""

    distance: Tensor
    """Mean over pairs of images of the Huber function of the difference of normalised distances."""
    angle: Tensor
    """Mean over triplets of images of the Huber function of the difference of cosines; 0 with two images."""


def relational_loss(student_BD: Tensor, teacher_BE: Tensor) -> RelationalLoss:
    """Relational knowledge distillation on class tokens.

    Source: Park et al., *Relational knowledge distillation*, CVPR 2019, section 3.2. Distances are divided by
    their mean over the batch; the angle at each image between every two others comes from the distances by the law
    of cosines. Work grows with B^3, memory with B^2: beyond 256 images the triplets are made in parts, and again in
    the backward pass.

    Parameters
    ----------
    student_BD
        Student features, B >= 2.
    teacher_BE
        Teacher features of the same images, best standardised; no gradient flows into them.

    Raises
    ------
    ConfigError
        One image has no relations.
    """
    assert student_BD.shape[0] == teacher_BE.shape[0], (student_BD.shape, teacher_BE.shape)
    images = student_BD.shape[0]
    if images < 2:
        raise ConfigError(
            "the relational loss compares pairs of images",
            got=f"{images} images in the batch of one rank",
            allowed="2 or more",
            remedy="raise the batch size, or give the relational loss weight 0",
        )
    with torch.autocast(student_BD.device.type, enabled=False):
        student_BB = _normalised_distances(student_BD.float())
        with torch.no_grad():
            teacher_BB = _normalised_distances(teacher_BE.float())
        # The diagonals are 0 in both and add nothing to the sums.
        distance = F.smooth_l1_loss(student_BB, teacher_BB, reduction="sum") / (images * (images - 1))
        if images == 2:
            return RelationalLoss(distance=distance, angle=torch.zeros_like(distance))
        triplets = images * (images - 1) * (images - 2)
        angle = _angle_sum(student_BB, teacher_BB) / triplets
    return RelationalLoss(distance=distance, angle=angle)


def _angle_sum(student_BB: Tensor, teacher_BB: Tensor) -> Tensor:
    """Sum of the Huber function over all triplets; those of some vertices at a time, so that memory is bounded."""
    images = len(student_BB)
    step = max(1, _HELD_TRIPLETS // images**2)
    if step >= images:
        return _angles(student_BB, teacher_BB, 0, images)
    parts = [
        checkpoint(_angles, student_BB, teacher_BB, first, first + step, use_reentrant=False)
        for first in range(0, images, step)
    ]
    return torch.stack(parts).sum()


def _angles(student_BB: Tensor, teacher_BB: Tensor, first: int, last: int) -> Tensor:
    return F.smooth_l1_loss(_cosines(student_BB, first, last), _cosines(teacher_BB, first, last), reduction="sum")


def _normalised_distances(x_BD: Tensor) -> Tensor:
    """Pairwise distances divided by the mean over pairs, (B, B); the diagonal is exactly 0, also in the gradient."""
    # Differences, not inner products: the latter lose all digits for near images.
    distance_BB = torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = distance_BB.shape[0] * (distance_BB.shape[0] - 1)
    return distance_BB / (distance_BB.sum() / pairs).clamp_min(torch.finfo(torch.float32).tiny)


def _cosines(distance_BB: Tensor, first: int, last: int) -> Tensor:
    """Cosine of the angle at image j between i and k, at [j, i, k]; 0 where i or k is the image j or equal to it.

    Of the images j from ``first`` up to but not including ``last``: J of them.

    At i = k it is 1 for every batch, and so cancels in the loss.
    """
    distance_JB = distance_BB[first:last]
    apart_JB = distance_JB.detach() > _EQUAL
    safe_JB = distance_JB.where(apart_JB, 1.0)
    square_JB = distance_JB.square()
    numerator_JBB = square_JB[:, :, None] + square_JB[:, None, :] - distance_BB.square()[None]
    cosine_JBB = numerator_JBB / (2.0 * safe_JB[:, :, None] * safe_JB[:, None, :])
    return cosine_JBB.where(apart_JB[:, :, None] & apart_JB[:, None, :], 0.0)


def token_similarity_loss(student_BND: Tensor, teacher_BNE: Tensor, temperature: float = 0.1) -> Tensor:
    """KL divergence between the teacher's and the student's token similarities within each image.

    For each token the cosine similarities to the image's *other* tokens, divided by the temperature, give a
    distribution; the loss is the mean over images and tokens of KL(teacher || student).
    The idea is that of Tung and Mori, *Similarity-preserving knowledge distillation*, ICCV 2019, between the tokens of
    one image instead of the images of a batch, and with a softmax instead of a squared difference.

    Parameters
    ----------
    student_BND
        Student patch tokens, N >= 2.
    teacher_BNE
        Teacher patch tokens at the same places, best standardised; no gradient flows into them.
    temperature
        Divides the cosines of both.

    Returns
    -------
    Tensor
        float32 scalar, 0 when all similarities agree.
    """
    assert student_BND.shape[:2] == teacher_BNE.shape[:2], (student_BND.shape, teacher_BNE.shape)
    assert student_BND.shape[1] >= 2, "one token has no similarities"
    with torch.autocast(student_BND.device.type, enabled=False):
        student_BNN = _log_similarities(student_BND.float(), temperature)
        with torch.no_grad():
            teacher_BNN = _log_similarities(teacher_BNE.float(), temperature)
        total = F.kl_div(student_BNN, teacher_BNN, reduction="sum", log_target=True)
    return total / (student_BND.shape[0] * student_BND.shape[1])


def _log_similarities(x_BND: Tensor, temperature: float) -> Tensor:
    unit_BND = F.normalize(x_BND, dim=-1)
    logits_BNN = unit_BND @ unit_BND.mT / temperature
    own_NN = torch.eye(x_BND.shape[1], dtype=torch.bool, device=x_BND.device)
    return F.log_softmax(logits_BNN.masked_fill(own_NN, _OUT), dim=-1)
