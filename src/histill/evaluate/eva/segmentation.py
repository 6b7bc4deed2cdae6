"""Segmentation of the EVA protocol: a small convolutional decoder on frozen patch tokens and the image.

Tokens are enlarged twofold (nearest), convolved to 64 channels, enlarged to the image (bilinear), joined with the
normalised image, convolved twice to 32 channels and classified by a 1x1 convolution; every 3x3 convolution is
followed by batch normalisation and ReLU. The loss is the soft Dice over all classes and the whole batch.

Shapes: N images, H and W pixels, P and Q rows and columns of patches, D token features, C classes (0: background).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from histill.errors import DataError
from histill.evaluate.eva.probe import batch_order
from histill.evaluate.features import Array

__all__ = [
    "IGNORE",
    "SegmentationRun",
    "SegmentationSchedule",
    "TokenDecoder",
    "dice_loss",
    "image_dice",
    "mean_dice",
    "train_decoder",
]

IGNORE = 255
"""Label of pixels that neither train nor count."""

_SMOOTH = 1e-5
_EVAL_IMAGES = 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationSchedule:
    """How long and how fast; the defaults are the original's."""

    steps: int = 2_000
    """At most."""
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    patience: float = 0.2
    """Training stops after this share of all checks without a better stopping score.

    A check follows every epoch and the last step.
    """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentationRun:
    """A trained decoder at its best check."""

    decoder: TokenDecoder
    stop_score: float
    """Mean Dice without background on the stopping images, 0 to 1."""
    best_step: int
    steps: int

    def dice(self, tokens_NPQD: Array, images_NHW3: Array, masks_NHW: Array) -> Array:
        """Dice (N, C - 1) of the classes but background; NaN where an image has none of a class."""
        return _dice(self.decoder, tokens_NPQD, images_NHW3, masks_NHW)


class TokenDecoder(nn.Module):
    """Logits of every pixel from patch tokens and the image."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(*_block(dim, 64))
        self.joined = nn.Sequential(*_block(64 + 3, 32), *_block(32, 32))
        self.classify = nn.Conv2d(32, classes, kernel_size=1)

    def forward(self, tokens_NPQD: torch.Tensor, images_NHW3: torch.Tensor) -> torch.Tensor:
        """Logits (N, C, H, W).

        Parameters
        ----------
        tokens_NPQD
            float32.
        images_NHW3
            uint8, RGB.
        """
        image = images_NHW3.permute(0, 3, 1, 2).float() / 255
        image = (image - image.new_tensor(_MEAN).view(1, 3, 1, 1)) / image.new_tensor(_STD).view(1, 3, 1, 1)
        hidden = self.tokens(F.interpolate(tokens_NPQD.permute(0, 3, 1, 2), scale_factor=2.0))
        hidden = F.interpolate(hidden, size=image.shape[-2:], mode="bilinear")
        logits: torch.Tensor = self.classify(self.joined(torch.cat([hidden, image], dim=1)))
        return logits


def _block(channels: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, outputs, kernel_size=3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def dice_loss(logits_NCHW: torch.Tensor, masks_NHW: torch.Tensor) -> torch.Tensor:
    """1 - soft Dice, mean over all classes, background among them, sums over the whole batch.

    Pixels of :data:`IGNORE` are left out of all sums.
    """
    counts = (masks_NHW != IGNORE).unsqueeze(1)
    share = torch.softmax(logits_NCHW, dim=1) * counts
    target = (
        F.one_hot(torch.where(masks_NHW == IGNORE, 0, masks_NHW), logits_NCHW.shape[1]).permute(0, 3, 1, 2) * counts
    )
    over = (0, 2, 3)
    both, total = (share * target).sum(over), share.sum(over) + target.sum(over)
    return (1 - (2 * both + _SMOOTH) / (total + _SMOOTH)).mean()


def image_dice(predicted_HW: Array, mask_HW: Array, classes: int) -> Array:
    """Dice (C - 1,) of one image's classes but background; NaN for a class that the mask does not have.

    Parameters
    ----------
    predicted_HW
        Classes, 0 to ``classes`` - 1.
    mask_HW
        The true ones, or :data:`IGNORE`: such pixels do not count.
    classes
        C, with background.
    """
    counts = mask_HW != IGNORE
    pair = np.bincount(mask_HW[counts].astype(np.int64) * classes + predicted_HW[counts], minlength=classes**2)
    both_CC = pair.reshape(classes, classes)
    there, total = both_CC.sum(axis=1), both_CC.sum(axis=1) + both_CC.sum(axis=0)
    dice = np.divide(2.0 * np.diag(both_CC), total, out=np.full(classes, np.nan), where=there > 0)
    found: Array = dice[1:]
    return found


def mean_dice(dice_NC: Array) -> float:
    """Mean over the images that have any class of the mean over the classes that an image has."""
    some = dice_NC[np.isfinite(dice_NC).any(axis=1)]
    return float(np.nanmean(some, axis=1).mean()) if len(some) else 0.0


def train_decoder(
    tokens_NPQD: Array,
    images_NHW3: Array,
    masks_NHW: Array,
    stop: tuple[Array, Array, Array],
    *,
    classes: int,
    seed: int,
    schedule: SegmentationSchedule | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> SegmentationRun:
    """Train a decoder and keep its best check.

    Parameters
    ----------
    tokens_NPQD
        Frozen patch tokens, float32; may be mapped from a file.
    images_NHW3, masks_NHW
        uint8; a mask holds classes, or :data:`IGNORE`.
    stop
        The same of the stopping images.
    classes, seed
        Number of classes C with background; seed of the start and of the order.
    schedule, device
        The original's if None; where it is computed.
    progress
        Told after every epoch how many steps are done.

    Raises
    ------
    DataError
        Arrays that do not fit, or a mask with another class.
    """
    schedule, device = schedule or SegmentationSchedule(), torch.device(device)
    for part in ((tokens_NPQD, images_NHW3, masks_NHW), stop):
        _check(*part, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = TokenDecoder(tokens_NPQD.shape[-1], classes).to(device)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
    epoch_steps = -(-len(images_NHW3) // schedule.batch)
    patience = max(1, round(schedule.patience * -(-schedule.steps // epoch_steps)))
    best, best_step, state, step, epoch, waited = -1.0, 0, decoder.state_dict(), 0, 0, 0
    while step < schedule.steps and waited < patience:
        order_N = batch_order(seed, epoch, len(images_NHW3))[: (schedule.steps - step) * schedule.batch]
        batches = [order_N[first : first + schedule.batch] for first in range(0, len(order_N), schedule.batch)]
        _epoch(decoder, optimiser, (tokens_NPQD, images_NHW3, masks_NHW), batches, device)
        step, epoch = step + len(batches), epoch + 1
        score = mean_dice(_dice(decoder, *stop))
        if score > best:
            best, best_step, waited = score, step, 0
            state = {name: value.clone() for name, value in decoder.state_dict().items()}
        else:
            waited += 1
        if progress is not None:
            progress(step)
    decoder.load_state_dict(state)
    return SegmentationRun(decoder=decoder, stop_score=best, best_step=best_step, steps=step)


def _epoch(
    decoder: TokenDecoder,
    optimiser: torch.optim.Optimizer,
    arrays: tuple[Array, Array, Array],
    batches: list[Array],
    device: torch.device,
) -> None:
    decoder.train()
    for rows in batches:
        tokens, images, masks = (_tensor(array[np.sort(rows)], device) for array in arrays)  # a file is read forward
        loss = dice_loss(decoder(tokens, images), masks.long())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimiser.step()


@torch.no_grad()
def _dice(decoder: TokenDecoder, tokens_NPQD: Array, images_NHW3: Array, masks_NHW: Array) -> Array:
    device, found = decoder.classify.weight.device, []
    decoder.eval()
    for first in range(0, len(images_NHW3), _EVAL_IMAGES):
        part = slice(first, first + _EVAL_IMAGES)
        logits = decoder(_tensor(tokens_NPQD[part], device), _tensor(images_NHW3[part], device))
        predicted = logits.argmax(dim=1).cpu().numpy()
        found += [image_dice(*pair, logits.shape[1]) for pair in zip(predicted, masks_NHW[part], strict=True)]
    return np.stack(found)


def _tensor(values: Array, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values)).to(device)


def _check(tokens_NPQD: Array, images_NHW3: Array, masks_NHW: Array, classes: int) -> None:
    fits = len(tokens_NPQD) == len(images_NHW3) == len(masks_NHW) > 0 and images_NHW3.shape[:3] == masks_NHW.shape
    if not fits or tokens_NPQD.ndim != 4:
        raise DataError(
            "tokens, images and masks do not fit",
            got=f"{tokens_NPQD.shape}, {images_NHW3.shape}, {masks_NHW.shape}",
            allowed="(N, P, Q, D), (N, H, W, 3), (N, H, W)",
        )
    other = sorted({int(value) for value in np.unique(masks_NHW)} - set(range(classes)) - {IGNORE})
    if other:
        raise DataError("a mask holds another class", got=other, allowed=f"0 to {classes - 1}, or {IGNORE}")
