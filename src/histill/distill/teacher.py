"""The frozen teacher, and what the student learns from it.

Shapes: M images (crops x tiles), D teacher channels, E width of the space that the scores are taken in, K prototypes,
H and W the grid of patch tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from histill import files
from histill.distill.config import ObjectiveConfig
from histill.distill.heads import PrototypeHead
from histill.distill.prototypes import Collective, prototype_count, spherical_kmeans
from histill.distill.standardise import Moments, Standardiser
from histill.errors import ModelError, RunError
from histill.models.encoder import Encoder
from histill.tiles.order import uniforms

__all__ = ["FitStep", "Targets", "Teacher"]

_CLS_TILES_PER_PROTOTYPE = 8
_PATCH_TOKENS_PER_PROTOTYPE = 256
_SAMPLE_TOKENS_PER_PROTOTYPE, _LEAST_TOKENS_PER_PROTOTYPE = 128, 32
_SAMPLE_BYTES = 2**32
_LOTS = 0xF17  # stream of the draws


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher says of M images; no gradient."""

    cls_MD: torch.Tensor
    """Standardised class tokens, float32."""
    patches_MHWD: torch.Tensor
    """Standardised patch tokens, float32."""
    cls_scores_ME: torch.Tensor | None
    """What the class prototypes score: class scores = cls_scores_ME @ cls_prototypes.T."""
    patch_scores_MHWE: torch.Tensor | None
    """What the patch prototypes score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitStep:
    """What the fitting pass needs to know beside the tiles."""

    autocast: torch.autocast
    """Precision of the teacher."""
    reduce: Collective
    """Sum of a tensor over the ranks."""
    gather: Collective
    """Rows of all ranks, one below the other."""


class Teacher(nn.Module):
    """A frozen encoder with its token statistics and its prototypes (or heads).

    Parameters
    ----------
    encoder
        The frozen teacher.
    config
        Which standardiser and which kind of teacher head.
    image_px
        Side of the crops that it will be shown.
    """

    cls_prototypes_KE: torch.Tensor | None
    patch_prototypes_KE: torch.Tensor | None

    def __init__(self, encoder: Encoder, config: ObjectiveConfig, image_px: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        # A teacher with another patch size sees the crop at the nearest size that it can take.
        self.image_px = max(1, round(image_px / encoder.patch_px)) * encoder.patch_px
        self.cls_standardiser = Standardiser(encoder.embed_dim, config.standardiser)
        self.patch_standardiser = Standardiser(encoder.embed_dim, config.standardiser)
        self.register_buffer("cls_prototypes_KE", None)
        self.register_buffer("patch_prototypes_KE", None)
        self.cls_head: PrototypeHead | None = None
        self.patch_head: PrototypeHead | None = None
        if config.teacher_head == "checkpoint":
            assert config.head_checkpoint is not None
            self.cls_head, self.patch_head = _read_heads(config.head_checkpoint, encoder.embed_dim)
            self.cls_prototypes_KE = self.cls_head.weight().detach()
            self.patch_prototypes_KE = self.patch_head.weight().detach()
        self.requires_grad_(False)
        self.eval()

    def tokens(self, images_MCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw class tokens (M, D) and patch tokens (M, H, W, D) of float images in 0..1."""
        if images_MCHW.shape[-1] != self.image_px:
            images_MCHW = F.interpolate(
                images_MCHW, size=(self.image_px, self.image_px), mode="bilinear", antialias=True, align_corners=False
            )
        tokens = self.encoder(images_MCHW)
        return tokens.cls_BD, tokens.patches_BHWD

    @torch.no_grad()
    def targets(self, images_MCHW: torch.Tensor, grid: int) -> Targets:
        """The targets for a student whose grid of patch tokens is ``grid`` x ``grid``."""
        cls_MD, patches_MHWD = self.tokens(images_MCHW)
        raw_cls_MD, raw_patches_MHWD = cls_MD.float(), patches_MHWD.float()
        if raw_patches_MHWD.shape[1] != grid:
            # Tokens are interpolated where they stand, before the scores are taken.
            raw_patches_MHWD = F.interpolate(
                raw_patches_MHWD.permute(0, 3, 1, 2), size=(grid, grid), mode="bilinear", antialias=True
            ).permute(0, 2, 3, 1)
        with torch.autocast(images_MCHW.device.type, enabled=False):
            cls_MD = self.cls_standardiser(raw_cls_MD)
            patches_MHWD = self.patch_standardiser(raw_patches_MHWD)
            if self.config.teacher_head == "none":
                return Targets(cls_MD, patches_MHWD, None, None)
            if self.cls_head is not None and self.patch_head is not None:
                return Targets(
                    cls_MD, patches_MHWD, self.cls_head.hidden(raw_cls_MD), self.patch_head.hidden(raw_patches_MHWD)
                )
            return Targets(cls_MD, patches_MHWD, F.normalize(cls_MD, dim=-1), F.normalize(patches_MHWD, dim=-1))

    @torch.no_grad()
    def fit(
        self, crops: Iterable[tuple[NDArray[np.int64], torch.Tensor]], tiles: int, seed: int, step: FitStep
    ) -> None:
        """Fit the statistics and the prototypes in one pass over crops of some tiles.

        Moments are taken of every token. The tokens for k-means are a sample, of at most 4 GiB for patches; the numbers
        of prototypes, where they are automatic, follow from the size of the samples. Nothing depends on how the tiles
        are spread over ranks. A token that is not finite is a ModelError.

        Parameters
        ----------
        crops
            Batches of this rank: positions (B,) and float images, (B, 3, H, W) in 0..1; over all ranks they come from
            ``tiles`` tiles. An image without a position is run and left out.
        tiles
            Number of tiles that ``crops`` is drawn from.
        seed
            Seed of the sample and of k-means.
        step
            Precision of the teacher, and the collectives.
        """
        grid_tokens = (self.image_px // self.encoder.patch_px) ** 2
        per_tile = _sampled_tokens(self.config, tiles, grid_tokens, self.encoder.embed_dim)
        width, device = self.encoder.embed_dim, self.cls_standardiser.mean_D.device
        cls_moments, patch_moments = Moments(width), Moments(width)
        cls_sample, patch_sample = _Sample(width, device), _Sample(width, device)
        for positions_B, images_BCHW in crops:
            with step.autocast:
                cls_BD, patches_BHWD = self.tokens(images_BCHW)
            cls_BD, patches_BHWD = cls_BD[: len(positions_B)], patches_BHWD[: len(positions_B)]  # none of a filler
            patches_BND = patches_BHWD.flatten(1, 2)
            if not (torch.isfinite(cls_BD).all() and torch.isfinite(patches_BND).all()):
                raise ModelError(
                    "the teacher's tokens are not finite", where=self.encoder.name, remedy="check the teacher's weights"
                )
            cls_moments.add(cls_BD)
            patch_moments.add(patches_BND.flatten(0, 1))
            lots_BN = uniforms(seed, _LOTS, positions_B, grid_tokens + 1)
            cls_sample.add(cls_BD, lots_BN[:, -1])
            chosen_BN = lots_BN[:, :-1].argsort(axis=1)[:, :per_tile]
            rows_B1 = np.arange(len(positions_B))[:, None]
            patch_sample.add(
                patches_BND[torch.from_numpy(rows_B1), torch.from_numpy(chosen_BN)].flatten(0, 1),
                lots_BN[rows_B1, chosen_BN].ravel(),
            )
        self.cls_standardiser.fit(cls_moments.reduced(step.reduce))
        self.patch_standardiser.fit(patch_moments.reduced(step.reduce))
        if self.config.teacher_head != "prototypes":
            return
        if self.config.dino:
            count = cls_prototype_count(self.config, cls_sample.total(step.reduce))
            self.cls_prototypes_KE = cls_sample.prototypes(self.cls_standardiser, count, step)
        if self.config.ibot:
            count = patch_prototype_count(self.config, tiles, grid_tokens, patch_sample.total(step.reduce))
            self.patch_prototypes_KE = patch_sample.prototypes(self.patch_standardiser, count, step)

    def statistics(self) -> dict[str, torch.Tensor]:
        """Standardisers and prototypes: all that the run adds to the teacher. Never the teacher's weights."""
        state = {f"cls_standardiser.{key}": value for key, value in self.cls_standardiser.state_dict().items()}
        state |= {f"patch_standardiser.{key}": value for key, value in self.patch_standardiser.state_dict().items()}
        if self.config.teacher_head == "prototypes":
            found = {"cls_prototypes": self.cls_prototypes_KE, "patch_prototypes": self.patch_prototypes_KE}
            state |= {name: prototypes for name, prototypes in found.items() if prototypes is not None}
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}

    def save_statistics(self, path: Path) -> None:
        """Write :meth:`statistics` as safetensors, atomically."""
        with files.atomic_path(path) as temporary:
            save_file(self.statistics(), temporary)

    def load_statistics(self, path: Path) -> None:
        """Read what :meth:`save_statistics` wrote, in place of :meth:`fit`.

        Raises
        ------
        RunError
            The file is missing or damaged, or does not fit this teacher.
        """
        device = self.cls_standardiser.mean_D.device
        try:
            state = load_file(path, device=str(device))
            for name in ("cls_standardiser", "patch_standardiser"):
                part: dict[str, Any] = {
                    key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")
                }
                getattr(self, name).load_state_dict(part, strict=True)
            if self.config.teacher_head == "prototypes":
                self.cls_prototypes_KE = state["cls_prototypes"] if self.config.dino else None
                self.patch_prototypes_KE = state["patch_prototypes"] if self.config.ibot else None
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise RunError(
                "the run's teacher statistics cannot be read",
                where=path,
                got=error,
                remedy="start the run anew in another folder",
            ) from None


def cls_prototype_count(config: ObjectiveConfig, tokens: int) -> int:
    """Prototypes of class tokens: as set, or by the number of tokens that they are fitted to."""
    return config.cls_prototypes or prototype_count(tokens / _CLS_TILES_PER_PROTOTYPE, most=tokens)


def patch_prototype_count(config: ObjectiveConfig, tiles: int, grid_tokens: int, tokens: int) -> int:
    """Prototypes of patch tokens: as set, or by all tokens of the tiles and by those of them that are sampled.

    Parameters
    ----------
    config
        Of the objective.
    tiles, grid_tokens
        Tiles of the fit, and patch tokens of each.
    tokens
        Tokens in the sample.
    """
    wanted = min(tiles * grid_tokens / _PATCH_TOKENS_PER_PROTOTYPE, tokens / _LEAST_TOKENS_PER_PROTOTYPE)
    return config.patch_prototypes or prototype_count(wanted, most=tokens)


def planned_prototypes(config: ObjectiveConfig, tiles: int, grid_tokens: int, width: int) -> tuple[int, int]:
    """Class and patch prototypes of a fit on so many tiles, all of them readable; 0 without the term."""
    tokens = tiles * _sampled_tokens(config, tiles, grid_tokens, width)
    cls = cls_prototype_count(config, tiles) if config.dino else 0
    return cls, patch_prototype_count(config, tiles, grid_tokens, tokens) if config.ibot else 0


def _sampled_tokens(config: ObjectiveConfig, tiles: int, grid_tokens: int, width: int) -> int:
    """Patch tokens of each tile that k-means sees."""
    wanted = config.patch_prototypes or tiles * grid_tokens / _PATCH_TOKENS_PER_PROTOTYPE
    largest = min(_SAMPLE_BYTES / (4 * width), _SAMPLE_TOKENS_PER_PROTOTYPE * wanted)
    return min(grid_tokens, max(1, math.ceil(largest / tiles)))


class _Sample:
    """Tokens for k-means, with a random number of each."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._tokens, self._lots = [torch.zeros(0, channels, device=device)], [np.zeros(0)]

    def add(self, tokens_MD: torch.Tensor, lots_M: NDArray[np.float64]) -> None:
        self._tokens.append(tokens_MD.float())
        self._lots.append(lots_M)

    def total(self, reduce: Collective) -> int:
        """Tokens of all ranks."""
        return int(reduce(torch.tensor([sum(map(len, self._lots))], device=self._tokens[-1].device)))

    def prototypes(self, standardiser: Standardiser, count: int, step: FitStep) -> torch.Tensor:
        device = self._tokens[-1].device
        tokens_MD = standardiser(torch.cat([tokens.to(device) for tokens in self._tokens]))
        lots_M = torch.from_numpy(np.concatenate(self._lots)).to(device)
        return spherical_kmeans(tokens_MD, count, lots_M, reduce=step.reduce, gather=step.gather)


def _read_heads(path: Path, width: int) -> tuple[PrototypeHead, PrototypeHead]:
    """The DINO and iBOT heads of a checkpoint, by DINOv2's names; one shared head serves both."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError("the file of teacher heads cannot be read", where=path, got=error) from None
    heads = {
        name: _head_of(
            {key.split(f"{name}.", 1)[1]: value for key, value in state.items() if f"{name}." in key}, path, name, width
        )
        for name in ("dino_head", "ibot_head")
        if any(f"{name}." in key for key in state)
    }
    if "dino_head" not in heads:
        raise ModelError(
            "the file holds no DINO head", where=path, got=", ".join(list(state)[:5]), allowed="dino_head.*"
        )
    return heads["dino_head"], heads.get("ibot_head", heads["dino_head"])


def _head_of(state: dict[str, torch.Tensor], path: Path, name: str, width: int) -> PrototypeHead:
    """One head; its sizes are read off its tensors."""
    # torch's newer weight norm names the length original0 and the direction original1.
    for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
        key = f"last_layer.parametrizations.weight.{old}"
        if key in state:
            state[f"last_layer.{new}"] = state.pop(key)
    layers = sum(key.startswith("mlp.") and key.endswith(".weight") for key in state)
    try:
        first, directions = state["mlp.0.weight"], state["last_layer.weight_v"]
        head = PrototypeHead(
            first.shape[1], len(directions), hidden=len(first), bottleneck=directions.shape[1], layers=layers
        )
        head.load_state_dict({key: value.float() for key, value in state.items()}, strict=True)
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"the file's {name} is not a DINO head", where=path, got=error) from None
    if first.shape[1] != width:
        raise ModelError(
            f"the file's {name} is for another teacher", where=path, got=f"width {first.shape[1]}", allowed=f"{width}"
        )
    return head
