"""Calibration: a per-channel standardisation of the embedding, folded into the weights of the last norm.

A trained transformer's embedding has a large common component, which makes cosines of unlike images high. Centring
and scaling each channel removes it, and since the last LayerNorm ends in a per-channel scale and shift, both can
absorb the standardisation: y = w x + b becomes (y - mean) / std = (w / std) x + (b - mean) / std. The architecture
does not change, and a linear probe finds the same answers.

Shape legend: B images, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from histill.errors import DataError, ModelError
from histill.models.encoder import Encoder

__all__ = ["channel_statistics", "fold_standardisation"]


@torch.no_grad()
def channel_statistics(encoder: Encoder, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of the class token, in one pass.

    Parameters
    ----------
    encoder
        The model; it runs as it is (mode, device, autocast of the caller).
    batches
        Image batches as :meth:`Encoder.forward` takes them, already on the encoder's device.

    Returns
    -------
    (mean_D, std_D)
        float64, on the CPU; the standard deviation is that of the population.

    Raises
    ------
    DataError
        With fewer than two images.
    ModelError
        If a channel is constant or not finite.

    Notes
    -----
    Batches are merged by the update of Chan, Golub and LeVeque (1979), which does not lose digits when the mean is
    large against the spread.
    """
    count = 0
    mean_D = squares_D = torch.zeros(encoder.embed_dim, dtype=torch.float64)
    for images_BCHW in batches:
        cls_BD = encoder(images_BCHW).cls_BD.double().cpu()
        size = len(cls_BD)
        batch_mean_D = cls_BD.mean(dim=0)
        shift_D = batch_mean_D - mean_D
        total = count + size
        squares_D = squares_D + (cls_BD - batch_mean_D).square().sum(dim=0) + shift_D.square() * (count * size / total)
        mean_D = mean_D + shift_D * (size / total)
        count = total
    if count < 2:
        raise DataError("a standard deviation needs at least two images", where=encoder.name, got=f"{count} images")
    std_D = (squares_D / count).sqrt()
    _check(mean_D, std_D, encoder.name)
    return mean_D, std_D


def _check(mean_D: torch.Tensor, std_D: torch.Tensor, where: str) -> None:
    # float32 tokens of equal images still differ in the last digits of the largest channel, hence not just > 0
    rounding = 3e-6 * (mean_D.square() + std_D.square()).nan_to_num(0.0).mean().sqrt()
    good_D = mean_D.isfinite() & std_D.isfinite() & (std_D > rounding) & (std_D > 0)
    bad = (~good_D).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ModelError(
            "these channels do not vary, so they cannot be scaled to a standard deviation of 1",
            where=where,
            got=f"{len(bad)} of {len(std_D)} channels: {shown}",
            remedy="use more, and different, images; a collapsed model cannot be calibrated",
        )


def fold_standardisation(model: nn.Module, mean_D: torch.Tensor, std_D: torch.Tensor) -> None:
    """Fold ``(x - mean) / std`` into the last norm of a timm vision transformer, in place.

    Patch tokens pass through the same norm and get the same map.

    Parameters
    ----------
    model
        The timm model (``encoder.model``).
    mean_D, std_D
        From :func:`channel_statistics`; the sums are done in float64.

    Raises
    ------
    ModelError
        If the model's tokens do not come out of a LayerNorm with weight and bias, or a channel does not vary.
    """
    norm: Any = getattr(model, "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise ModelError(
            "only a last LayerNorm with weight and bias can absorb a standardisation",
            where=type(model).__name__,
            got=type(norm).__name__,
        )
    if mean_D.shape != norm.weight.shape or std_D.shape != norm.weight.shape:
        raise ModelError(
            "the statistics are those of another model",
            got=f"{tuple(mean_D.shape)} and {tuple(std_D.shape)}",
            allowed=tuple(norm.weight.shape),
        )
    _check(mean_D, std_D, type(model).__name__)
    with torch.no_grad():
        mean_D, std_D = mean_D.double().to(norm.weight.device), std_D.double().to(norm.weight.device)
        norm.bias.copy_((norm.bias.double() - mean_D) / std_D)
        norm.weight.copy_(norm.weight.double() / std_D)
