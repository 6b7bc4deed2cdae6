"""The task: student predictions against teacher targets, as named losses.

Shapes: G global and L local crops, B tiles, M = G x B images, N patch tokens, H x W their grid, D teacher channels,
S student channels, T scored tokens, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.distill import losses
from histill.distill.config import ObjectiveConfig
from histill.distill.heads import Adaptor, PrototypeHead
from histill.distill.losses import Reduce
from histill.distill.teacher import Targets, Teacher
from histill.distill.views import Views
from histill.models.encoder import Encoder

__all__ = ["DistillTask", "Outcome", "Step"]

_RIDGE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the terms of one step need to know beside the tokens."""

    positions_B: NDArray[np.int64]
    """Places of the tiles in the shuffled stream; iBOT's masks depend on them."""
    teacher_temperature: float
    """Temperature of the teacher's scores."""
    autocast: torch.autocast
    """Precision of the networks; losses are taken outside of it, in float32."""
    reduce: Reduce | None = None
    """Sum of a tensor over the ranks."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The losses of one step."""

    loss: Tensor
    """The weighted sum, with its gradient."""
    terms: dict[str, Tensor]
    """Each loss before its weight, by name."""
    monitors: dict[str, Tensor]
    """What is logged but not minimised."""


class DistillTask(nn.Module):
    """The heads and adaptors between the student and the teacher, and how they are scored.

    Parameters
    ----------
    config
        Weights, temperatures and sizes.
    student_dim
        Width of the student's tokens.
    teacher
        The teacher with its statistics; held, but no part of this module's state.
    seed
        Seed of iBOT's masks.
    """

    def __init__(self, config: ObjectiveConfig, student_dim: int, teacher: Teacher, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self._teacher = (teacher,)  # in a tuple, so that torch does not take it for a submodule

        def head(prototypes_KE: Tensor | None) -> PrototypeHead:
            assert prototypes_KE is not None
            return PrototypeHead(
                student_dim, len(prototypes_KE), hidden=config.head_hidden, bottleneck=config.head_bottleneck
            )

        self.cls_head = head(teacher.cls_prototypes_KE) if config.dino else None
        self.patch_head = head(teacher.patch_prototypes_KE) if config.ibot else None
        teacher_dim, adaptor_hidden = teacher.encoder.embed_dim, config.adaptor_hidden
        self.cls_adaptor = Adaptor(student_dim, teacher_dim, hidden=adaptor_hidden) if config.token_cls else None
        self.patch_adaptor = Adaptor(student_dim, teacher_dim, hidden=adaptor_hidden) if config.token_patch else None

    def last_layers(self) -> list[nn.Parameter]:
        """The parameters that stand still at the start of a run."""
        heads = [head for head in (self.cls_head, self.patch_head) if head is not None]
        return [parameter for head in heads for parameter in head.last_layer.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def fit_adaptors(
        self, student: Encoder, teacher: Teacher, crops: Iterable[Tensor], autocast: torch.autocast
    ) -> None:
        """Start linear adaptors at the least-squares map from the student's tokens to the targets.

        Behind a random adaptor the first gradients are noise to the student, and they destroy a pruned start: in 20
        steps its effective rank fell from 29 to 6.

        Parameters
        ----------
        student, teacher
            The two sides, on one device.
        crops
            Batches of float images, (B, 3, H, W) in 0..1; some hundred images in all.
        autocast
            Precision of the networks.
        """
        adaptors = {"cls": self.cls_adaptor, "patch": self.patch_adaptor}
        linear = {name: it.layers[0] for name, it in adaptors.items() if it is not None and len(it.layers) == 1}
        if not linear:
            return
        fits = {name: _LeastSquares() for name in adaptors}
        for images_BCHW in crops:
            with autocast:
                tokens = student(images_BCHW)
                targets = teacher.targets(images_BCHW, tokens.patches_BHWD.shape[1])
            fits["cls"].add(tokens.cls_BD, targets.cls_MD)
            fits["patch"].add(tokens.patches_BHWD.flatten(0, 2), targets.patches_MHWD.flatten(0, 2))
        for name, layer in linear.items():
            fits[name].write(layer)

    def forward(self, student: Encoder, views: Views, targets: Targets, step: Step) -> Outcome:
        """Score the student on one batch of views; the terms are in float32."""
        crops, tiles = views.global_GBCHW.shape[:2]
        with step.autocast:
            tokens = student(views.global_GBCHW.flatten(0, 1))
            cls_MS, patches_MNS = tokens.cls_BD, tokens.patches_BHWD.flatten(1, 2)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        if self.cls_head is not None:
            terms["dino"], monitors["dino_target_entropy"] = self._dino(student, cls_MS, views, targets, step)
        if self.patch_head is not None:
            terms["ibot"], monitors["ibot_target_entropy"], monitors["ibot_effective_weight"] = self._ibot(
                patches_MNS, targets, step
            )
        if self.config.koleo:
            cls_GBS = cls_MS.float().unflatten(0, (crops, tiles))
            terms["koleo"] = torch.stack([losses.koleo_loss(cls_BS) for cls_BS in cls_GBS]).sum()
        if self.cls_adaptor is not None:
            terms["token_cls"] = _token_term(self.cls_adaptor, cls_MS, targets.cls_MD, step)
        if self.patch_adaptor is not None:
            terms["token_patch"] = _token_term(self.patch_adaptor, patches_MNS, targets.patches_MHWD, step)
        if self.config.relational:
            relational = losses.relational_loss(cls_MS.float(), targets.cls_MD)
            terms["relational"] = relational.distance + relational.angle
        weighted = [getattr(self.config, name) * term for name, term in terms.items()]
        return Outcome(torch.stack(weighted).sum(), terms, monitors)

    def _dino(
        self, student: Encoder, cls_MS: Tensor, views: Views, targets: Targets, step: Step
    ) -> tuple[Tensor, Tensor]:
        """DINO's loss, and the share of log K that the targets' entropy has."""
        assert self.cls_head is not None
        assert targets.cls_scores_ME is not None
        crops, tiles = views.global_GBCHW.shape[:2]
        n_local = views.local_LBCHW.shape[0]
        with step.autocast:
            logits_MK = self.cls_head(cls_MS).float()
            local_LBK = logits_MK.new_zeros((0, tiles, logits_MK.shape[1]))
            if n_local:
                local_cls = student(views.local_LBCHW.flatten(0, 1)).cls_BD
                local_LBK = self.cls_head(local_cls).float().unflatten(0, (n_local, tiles))
        prototypes_KE = self._teacher[0].cls_prototypes_KE
        assert prototypes_KE is not None
        targets_MK = losses.sinkhorn(
            targets.cls_scores_ME @ prototypes_KE.T,
            step.teacher_temperature,
            self.config.sinkhorn_iterations,
            step.reduce,
        )
        local, global_ = losses.dino_loss(
            logits_MK.unflatten(0, (crops, tiles)),
            local_LBK,
            targets_MK.unflatten(0, (crops, tiles)),
            self.config.student_temperature,
        )
        entropy = torch.special.entr(targets_MK).sum(1).mean() / math.log(targets_MK.shape[1])
        return local + global_, entropy

    def _ibot(self, patches_MNS: Tensor, targets: Targets, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """IBOT's loss, the entropy share of the targets, and the effective weight: weight x share of scored tokens."""
        assert self.patch_head is not None
        assert targets.patch_scores_MHWE is not None
        prototypes_KE = self._teacher[0].patch_prototypes_KE
        assert prototypes_KE is not None
        images = patches_MNS.shape[0]
        mask_MN = self._mask(targets.patch_scores_MHWE.shape[1:3], images, step).to(patches_MNS.device)
        weights_MN = losses.token_weights(mask_MN)
        # As in DINOv2, tokens that are not scored take no part in Sinkhorn's balance either.
        chosen_T = mask_MN.flatten().nonzero().squeeze(1)
        with step.autocast:
            hidden_TB = self.patch_head.hidden(patches_MNS.flatten(0, 1)[chosen_T]).float()
        scored = losses.chunked_prototype_loss(
            hidden_TB,
            self.patch_head.weight().float(),
            targets.patch_scores_MHWE.flatten(0, 2)[chosen_T],
            prototypes_KE,
            weights_MN.flatten()[chosen_T],
            teacher_temperature=step.teacher_temperature,
            student_temperature=self.config.student_temperature,
            iterations=self.config.sinkhorn_iterations,
            reduce=step.reduce,
        )
        effective = self.config.ibot * mask_MN.float().mean()
        return scored.loss, scored.target_entropy / math.log(len(prototypes_KE)), effective

    def _mask(self, grid_HW: torch.Size, images: int, step: Step) -> Tensor:
        """Which tokens iBOT scores, bool (M, N)."""
        kind = self.config.ibot_tokens
        if kind == "all":
            return torch.ones(images, grid_HW.numel(), dtype=torch.bool)
        draw = losses.block_masks if kind == "block" else losses.random_masks
        crops = images // len(step.positions_B)
        grid = (grid_HW[0], grid_HW[1])
        masks = [draw(self.seed + crop, step.positions_B, grid, self.config.ibot_share) for crop in range(crops)]
        return torch.cat(masks)


class _LeastSquares:
    """Ridge regression of targets (T, D) on tokens (T, S) with a constant, from summed products."""

    def __init__(self) -> None:
        self.inner_SS: Tensor | float = 0.0
        self.cross_SD: Tensor | float = 0.0

    def add(self, tokens_TS: Tensor, targets_TD: Tensor) -> None:
        one_TS = torch.nn.functional.pad(tokens_TS.float(), (0, 1), value=1.0)
        self.inner_SS = self.inner_SS + (one_TS.T @ one_TS).double()
        self.cross_SD = self.cross_SD + (one_TS.T @ targets_TD.float()).double()

    def write(self, linear: nn.Module) -> None:
        assert isinstance(linear, nn.Linear)
        assert isinstance(self.inner_SS, Tensor)
        assert isinstance(self.cross_SD, Tensor)
        diagonal = self.inner_SS.diagonal()
        ridge_SS = torch.diag_embed(_RIDGE * diagonal.mean().expand_as(diagonal))
        solution_SD = torch.linalg.solve(self.inner_SS + ridge_SS, self.cross_SD)
        linear.weight.copy_(solution_SD[:-1].T)
        linear.bias.copy_(solution_SD[-1])


def _token_term(adaptor: Adaptor, tokens: Tensor, targets: Tensor, step: Step) -> Tensor:
    """Cosine + smooth-L1 between adapted student tokens (..., S) and standardised teacher tokens (..., D)."""
    with step.autocast:
        predicted = adaptor(tokens).float()
    scored = losses.token_loss(predicted.reshape(-1, predicted.shape[-1]), targets.reshape(-1, targets.shape[-1]))
    return scored.cosine + scored.smooth_l1
