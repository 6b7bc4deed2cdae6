"""KoLeo: spread the features of a batch. Shapes: B images, D features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from histill.errors import ConfigError

__all__ = ["koleo_loss"]

_EPS = 1e-8


def koleo_loss(x_BD: Tensor) -> Tensor:
    """Mean of -log of the distance to the nearest neighbour, on L2-normalised features.

    Source: Sablayrolles et al., *Spreading vectors for similarity search*, ICLR 2019, as in DINOv2: one
    call per view, the neighbour is the one with the largest inner product.

    Parameters
    ----------
    x_BD
        Features of one view, B >= 2; computed in float32 also under autocast.

    Returns
    -------
    Tensor
        float32 scalar; finite, with a finite gradient, also for equal rows.

    Raises
    ------
    ConfigError
        One image has no neighbour.
    """
    if x_BD.shape[0] < 2:
        raise ConfigError(
            "KoLeo needs a neighbour for every image",
            got=f"{x_BD.shape[0]} images in the batch of one rank",
            allowed="2 or more",
            remedy="raise the batch size, or give KoLeo weight 0",
        )
    with torch.autocast(x_BD.device.type, enabled=False):
        unit_BD = F.normalize(x_BD.float(), eps=_EPS, dim=-1)
        with torch.no_grad():
            neighbour_B = (unit_BD @ unit_BD.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        # The epsilon inside keeps the gradient of the root finite where two rows are equal.
        distance_B = F.pairwise_distance(unit_BD, unit_BD[neighbour_B], p=2.0, eps=_EPS)
        return -(distance_B + _EPS).log().mean()
