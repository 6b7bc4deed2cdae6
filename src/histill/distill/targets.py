"""What teachers say of the images of a step: computed once, for all students and all parts of the batch.

Shapes: B tiles, M images (crops x tiles, crop by crop), D teacher channels, E width of the space that scores are taken
in, H x W = N the grid of patch tokens, T scored tokens, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histill.distill import losses
from histill.distill.config import ObjectiveConfig
from histill.distill.losses import BalancedTokens
from histill.distill.teacher import Targets, Teacher

__all__ = ["Said", "balance", "images_of"]


@dataclass(frozen=True, slots=True)
class Said:
    """One teacher's targets, and its scores balanced over the tiles of all ranks; no gradient."""

    cls_MD: Tensor
    """Standardised class tokens, float32."""
    patches_MHWD: Tensor
    """Standardised patch tokens, float32."""
    cls_scores_MK: Tensor | None
    """DINO's targets: each row sums to 1."""
    scored_MN: Tensor | None
    """Which patch tokens iBOT scores, bool."""
    tokens: BalancedTokens | None
    """iBOT's targets of the scored tokens, image by image."""

    def of(self, images_I: Tensor) -> Said:
        """The same for some of the images, by their numbers (int64, ascending)."""
        scored_MN, tokens = self.scored_MN, self.tokens
        if scored_MN is not None and tokens is not None:
            of_token_T = scored_MN.nonzero()[:, 0]
            tokens = tokens.of(torch.isin(of_token_T, images_I).nonzero().squeeze(1))
            scored_MN = scored_MN[images_I]
        return Said(
            self.cls_MD[images_I],
            self.patches_MHWD[images_I],
            None if self.cls_scores_MK is None else self.cls_scores_MK[images_I],
            scored_MN,
            tokens,
        )


def images_of(tiles: slice, of_tiles: int, crops: int, device: torch.device) -> Tensor:
    """Numbers of the images, crop by crop, that show some of the tiles: int64, ascending.

    Parameters
    ----------
    tiles
        Some of the ``of_tiles`` tiles of this rank; both ends stated.
    of_tiles, crops
        B, and crops of each tile: image m shows tile m % B.
    device
        Of the result.
    """
    tiles_I = torch.arange(tiles.start, tiles.stop, device=device)
    return (torch.arange(crops, device=device)[:, None] * of_tiles + tiles_I).flatten()


@torch.no_grad()
def balance(
    teacher: Teacher,
    targets: Targets,
    config: ObjectiveConfig,
    positions_B: NDArray[np.int64],
    temperature: float,
    *,
    seed: int,
    reduce: losses.Reduce | None = None,
) -> Said:
    """Balance a teacher's scores over its prototypes (Sinkhorn), over the tiles of all ranks.

    Parameters
    ----------
    teacher, targets
        The teacher, and what it says of this rank's images.
    config
        Which scores are needed.
    positions_B
        Places of the tiles in the shuffled stream; iBOT's masks depend on them alone.
    temperature
        Of the teacher's scores.
    seed
        Of iBOT's masks.
    reduce
        Sum of a tensor over the ranks; None with one rank.
    """
    cls_scores_MK = scored_MN = tokens = None
    if config.dino:
        assert targets.cls_scores_ME is not None
        assert teacher.cls_prototypes_KE is not None
        cls_scores_MK = losses.sinkhorn(
            targets.cls_scores_ME @ teacher.cls_prototypes_KE.T, temperature, config.sinkhorn_iterations, reduce
        )
    if config.ibot:
        assert targets.patch_scores_MHWE is not None
        assert teacher.patch_prototypes_KE is not None
        scored_MN = _scored(targets.patch_scores_MHWE, positions_B, config, seed)
        # As in DINOv2, tokens that are not scored take no part in Sinkhorn's balance either.
        chosen_T = scored_MN.flatten().nonzero().squeeze(1)
        tokens = losses.balance_tokens(
            targets.patch_scores_MHWE.flatten(0, 2)[chosen_T],
            teacher.patch_prototypes_KE,
            teacher_temperature=temperature,
            iterations=config.sinkhorn_iterations,
            reduce=reduce,
        )
    return Said(targets.cls_MD, targets.patches_MHWD, cls_scores_MK, scored_MN, tokens)


def _scored(patch_scores_MHWE: Tensor, positions_B: NDArray[np.int64], config: ObjectiveConfig, seed: int) -> Tensor:
    """Which tokens iBOT scores, bool (M, N)."""
    images, height, width = patch_scores_MHWE.shape[:3]
    kind = config.ibot_tokens
    if kind == "all":
        return torch.ones(images, height * width, dtype=torch.bool, device=patch_scores_MHWE.device)
    draw = losses.block_masks if kind == "block" else losses.random_masks
    crops = images // len(positions_B)
    masks = [draw(seed + crop, positions_B, (height, width), config.ibot_share) for crop in range(crops)]
    return torch.cat(masks).to(patch_scores_MHWE.device)
