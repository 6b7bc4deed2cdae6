"""The task: student predictions against teacher targets, as named losses.

Each term is the share that these tiles have in the term of the whole step: summed over the parts of a batch and over
the ranks they give what one rank with the whole batch would have.

Shapes: G global and L local crops, B tiles, M = G x B images, A = M or B over all ranks, N patch tokens, H x W their
grid, D teacher channels, S student channels, T scored tokens, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histill.distill import losses
from histill.distill.config import ObjectiveConfig
from histill.distill.heads import Adaptor, PrototypeHead
from histill.distill.packing import Packing
from histill.distill.targets import Said
from histill.distill.teacher import Teacher
from histill.distill.views import Views
from histill.models.encoder import Encoder
from histill.tiles.order import uniforms

__all__ = ["DistillTask", "Outcome", "Step"]

_RIDGE = 0.05
_DROP = 0xD409  # stream of the draws


def _own(rows: Tensor) -> Tensor:
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the terms of one step need to know beside the tokens."""

    positions_B: NDArray[np.int64]
    """Places of the tiles in the shuffled stream; which teachers are dropped depends on them."""
    autocast: torch.autocast
    """Precision of the networks; losses are taken outside of it, in float32."""
    share: float = 1.0
    """Tiles here / tiles of the step over all ranks: weight of terms that are means over tiles."""
    pair_share: float = 1.0
    """The same for terms that compare the tiles of all ranks, which every rank computes whole."""
    gather: Callable[[Tensor], Tensor] = _own
    """Rows of all ranks, one below the other, with a gradient."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The losses of one step, or of a part of it."""

    loss: Tensor
    """The weighted sum, with its gradient."""
    terms: dict[str, Tensor]
    """Each loss before its weight, by name; with several teachers its name ends in the teacher's number."""
    monitors: dict[str, Tensor]
    """What is logged but not minimised."""


class TeacherHeads(nn.Module):
    """What stands between a student and one teacher.

    Parameters
    ----------
    config
        Which terms there are, and sizes.
    student_dim
        Width of the student's tokens.
    teacher
        The teacher with its prototypes.
    """

    def __init__(self, config: ObjectiveConfig, student_dim: int, teacher: Teacher) -> None:
        super().__init__()

        def head(prototypes_KE: Tensor | None) -> PrototypeHead:
            assert prototypes_KE is not None
            return PrototypeHead(
                student_dim, len(prototypes_KE), hidden=config.head_hidden, bottleneck=config.head_bottleneck
            )

        self.cls_head = head(teacher.cls_prototypes_KE) if config.dino else None
        self.patch_head = head(teacher.patch_prototypes_KE) if config.ibot else None
        teacher_dim, hidden = teacher.encoder.embed_dim, config.adaptor_hidden
        self.cls_adaptor = Adaptor(student_dim, teacher_dim, hidden=hidden) if config.token_cls else None
        self.patch_adaptor = Adaptor(student_dim, teacher_dim, hidden=hidden) if config.token_patch else None


class DistillTask(nn.Module):
    """The heads and adaptors between the student and its teachers, and how they are scored.

    Parameters
    ----------
    config
        Weights, temperatures and sizes.
    student_dim
        Width of the student's tokens.
    teachers
        The teachers with their statistics.
    weights
        Weight of each teacher.
    drop
        Share of images in which a teacher's token losses are left out, never those of the worst matched teacher.
    seed
        Seed of what is drawn.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        student_dim: int,
        teachers: Sequence[Teacher],
        *,
        weights: Sequence[float] = (),
        drop: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.drop, self.seed = config, drop, seed
        self.weights = tuple(weights) or (1.0,) * len(teachers)
        self.packing: Packing | None = None
        self.heads = nn.ModuleList(TeacherHeads(config, student_dim, teacher) for teacher in teachers)

    def _heads(self) -> list[TeacherHeads]:
        return [heads for heads in self.heads if isinstance(heads, TeacherHeads)]

    def last_layers(self) -> list[nn.Parameter]:
        """The parameters that stand still at the start of a run."""
        found = [head for each in self._heads() for head in (each.cls_head, each.patch_head) if head is not None]
        return [parameter for head in found for parameter in head.last_layer.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def fit_adaptors(
        self,
        student: Encoder,
        teachers: Sequence[Teacher],
        crops: Iterable[Tensor],
        autocast: torch.autocast,
    ) -> None:
        """Start linear adaptors at the least-squares map from the student's tokens to the targets.

        Behind a random adaptor the first gradients are noise to the student, and they destroy a pruned start: in 20
        steps its effective rank fell from 29 to 6.

        Parameters
        ----------
        student, teachers
            The two sides, on one device.
        crops
            Batches of float images, (B, 3, H, W) in 0..1; some hundred images in all.
        autocast
            Precision of the networks.
        """
        kinds = [("cls", each.cls_adaptor) for each in self._heads()]
        kinds += [("patch", each.patch_adaptor) for each in self._heads()]
        wanted = [adaptor is not None and len(adaptor.layers) == 1 for _, adaptor in kinds]
        if not any(wanted):
            return
        fits = [_LeastSquares() for _ in kinds]
        for images_BCHW in crops:
            with autocast:
                tokens = student(images_BCHW)
                targets = [teacher.targets(images_BCHW, tokens.patches_BHWD.shape[1]) for teacher in teachers]
            for fit, target in zip(fits, targets, strict=False):
                fit.add(tokens.cls_BD, target.cls_MD)
            for fit, target in zip(fits[len(targets) :], targets, strict=True):
                fit.add(tokens.patches_BHWD.flatten(0, 2), target.patches_MHWD.flatten(0, 2))
        for fit, (_, adaptor), linear in zip(fits, kinds, wanted, strict=True):
            if linear and adaptor is not None:
                fit.write(adaptor.layers[0])

    def forward(self, student: Encoder, views: Views, said: Sequence[Said], step: Step) -> Outcome:
        """Score the student on one batch of views; the terms are in float32.

        Parameters
        ----------
        student
            The model; float images in 0..1 go in.
        views
            Global and local crops of this rank's tiles.
        said
            Targets of each teacher for the global crops.
        step
            What the step is about.

        Returns
        -------
        Outcome
            The weighted sum with a gradient, its terms before they are weighted, and monitors.
        """
        crops = views.global_GBCHW.shape[0]
        with step.autocast:
            cls_MS, patches_MNS, local_LBS = self._seen(student, views)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        weighted: list[Tensor] = []
        if self.config.koleo:
            cls_GBS = cls_MS.float().unflatten(0, (crops, -1))
            koleo = torch.stack([losses.koleo_loss(step.gather(cls_BS)) for cls_BS in cls_GBS]).sum()
            terms["koleo"] = step.pair_share * koleo
            weighted.append(self.config.koleo * terms["koleo"])
        all_cls_AS = step.gather(cls_MS.float()) if self.config.relational else None
        keep_TM = self._kept(cls_MS, patches_MNS, said, step)
        for number, (heads, words) in enumerate(zip(self._heads(), said, strict=True)):
            found: dict[str, Tensor] = {}
            seen: dict[str, Tensor] = {}
            if heads.cls_head is not None:
                found["dino"], seen["dino_target_entropy"] = self._dino(heads.cls_head, cls_MS, local_LBS, words, step)
            if heads.patch_head is not None:
                found["ibot"], seen["ibot_target_entropy"], seen["ibot_effective_weight"] = self._ibot(
                    heads.patch_head, patches_MNS, words, step
                )
            keep_M = None if keep_TM is None else keep_TM[number]
            if heads.cls_adaptor is not None:
                found["token_cls"] = _token_term(
                    heads.cls_adaptor, cls_MS[:, None], words.cls_MD[:, None], keep_M, step
                )
            if heads.patch_adaptor is not None:
                targets_MND = words.patches_MHWD.flatten(1, 2)
                found["token_patch"] = _token_term(heads.patch_adaptor, patches_MNS, targets_MND, keep_M, step)
            found = {name: step.share * term for name, term in found.items()}
            if all_cls_AS is not None:
                relational = losses.relational_loss(all_cls_AS, step.gather(words.cls_MD))
                found["relational"] = step.pair_share * (relational.distance + relational.angle)
            weight = self.weights[number]
            weighted += [weight * getattr(self.config, name) * term for name, term in found.items()]
            ending = f".{number}" if len(said) > 1 else ""
            terms |= {f"{name}{ending}": term for name, term in found.items()}
            monitors |= {f"{name}{ending}": step.share * value for name, value in seen.items()}
        return Outcome(torch.stack(weighted).sum(), terms, monitors)

    def _seen(self, student: Encoder, views: Views) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class and patch tokens of the global crops; class tokens of the local ones, (L, B, S), if DINO needs them."""
        count = views.local_LBCHW.shape[0] if self.config.dino else 0
        groups = [views.global_GBCHW.flatten(0, 1), *([views.local_LBCHW.flatten(0, 1)] if count else [])]
        if self.packing is not None and count:
            found = self.packing.tokens([student.normalise(images) for images in groups])
            patches_MNS = found[0][:, student.prefix_tokens :]
            return found[0][:, 0], patches_MNS, found[1][:, 0].unflatten(0, (count, -1))
        tokens = [student(images) for images in groups]
        local_LBS = tokens[1].cls_BD.unflatten(0, (count, -1)) if count else None
        return tokens[0].cls_BD, tokens[0].patches_BHWD.flatten(1, 2), local_LBS

    def _dino(
        self, head: PrototypeHead, cls_MS: Tensor, local_LBS: Tensor | None, said: Said, step: Step
    ) -> tuple[Tensor, Tensor]:
        """DINO's loss, and the share of log K that the targets' entropy has."""
        assert said.cls_scores_MK is not None
        tiles = len(step.positions_B)
        with step.autocast:
            logits_GBK = head(cls_MS).float().unflatten(0, (-1, tiles))
            local_LBK = logits_GBK[:0] if local_LBS is None else head(local_LBS).float()
        local, global_ = losses.dino_loss(
            logits_GBK,
            local_LBK,
            said.cls_scores_MK.unflatten(0, (-1, tiles)),
            self.config.student_temperature,
        )
        entropy = torch.special.entr(said.cls_scores_MK).sum(1).mean() / math.log(said.cls_scores_MK.shape[1])
        return local + global_, entropy

    def _ibot(self, head: PrototypeHead, patches_MNS: Tensor, said: Said, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """IBOT's loss, the entropy share of the targets, and the effective weight: weight x share of scored tokens."""
        assert said.scored_MN is not None
        assert said.tokens is not None
        chosen_T = said.scored_MN.flatten().nonzero().squeeze(1)
        with step.autocast:
            hidden_TB = head.hidden(patches_MNS.flatten(0, 1)[chosen_T]).float()
        scored = losses.balanced_prototype_loss(
            hidden_TB,
            head.weight().float(),
            said.tokens,
            losses.token_weights(said.scored_MN).flatten()[chosen_T],
            student_temperature=self.config.student_temperature,
        )
        prototypes = said.tokens.potential_K.shape[0]
        effective = self.config.ibot * said.scored_MN.float().mean()
        return scored.loss, scored.target_entropy / math.log(prototypes), effective

    @torch.no_grad()
    def _kept(self, cls_MS: Tensor, patches_MNS: Tensor, said: Sequence[Said], step: Step) -> Tensor | None:
        """Whether each teacher's token losses count for each image, bool (teachers, M); None where all do."""
        if not self.drop or len(said) == 1:
            return None
        worst_TM = []
        for heads, words in zip(self._heads(), said, strict=True):
            sum_M = torch.zeros(len(cls_MS), device=cls_MS.device)
            for adaptor, tokens_MNS, targets_MND in (
                (heads.cls_adaptor, cls_MS[:, None], words.cls_MD[:, None]),
                (heads.patch_adaptor, patches_MNS, words.patches_MHWD.flatten(1, 2)),
            ):
                if adaptor is not None:
                    with step.autocast:
                        predicted_MND = adaptor(tokens_MNS).float()
                    sum_M += losses.token_loss_by_image(predicted_MND, targets_MND)
            worst_TM.append(sum_M)
        teachers, crops = len(said), len(cls_MS) // len(step.positions_B)
        draws_BX = uniforms(self.seed, _DROP, step.positions_B, teachers * crops)
        draws_TGB = torch.from_numpy(draws_BX).T.reshape(teachers, crops, -1).to(cls_MS.device)
        keep_TM = torch.ge(draws_TGB.flatten(1), self.drop)
        keep_TM[torch.stack(worst_TM).argmax(0), torch.arange(len(cls_MS), device=cls_MS.device)] = True
        return keep_TM


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


def _token_term(adaptor: Adaptor, tokens_MNS: Tensor, targets_MND: Tensor, keep_M: Tensor | None, step: Step) -> Tensor:
    """Cosine + smooth-L1 between adapted student tokens and standardised teacher tokens, mean over all images."""
    with step.autocast:
        predicted_MND = adaptor(tokens_MNS).float()
    weights = None if keep_M is None else keep_M.float().repeat_interleave(targets_MND.shape[1])
    scored = losses.token_loss(predicted_MND.flatten(0, 1), targets_MND.flatten(0, 1), weights)
    term = scored.cosine + scored.smooth_l1
    return term if keep_M is None else term * keep_M.float().mean()
