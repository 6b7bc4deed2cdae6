"""A learner: one student, and all that is trained and kept along with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from histill.distill.config import DistillConfig
from histill.distill.labelled import LabelledBatch, LabelledHead
from histill.distill.packing import pack_attention
from histill.distill.parallel import blocks_of, compile_blocks, replicate, same_as_first, shard, whole
from histill.distill.targets import Said
from histill.distill.task import DistillTask, Outcome, Step
from histill.distill.views import Views
from histill.distributed import Ranks
from histill.models.encoder import Encoder

__all__ = ["Learner", "Lesson", "learner_of"]


class Lesson(nn.Module):
    """A student with its heads: one forward pass a step, so that DDP and FSDP2 can stand around it."""

    def __init__(self, student: Encoder, task: DistillTask, labelled: dict[str, LabelledHead]) -> None:
        super().__init__()
        self.student, self.task = student, task
        self.labelled = nn.ModuleDict({_key(name): head for name, head in labelled.items()})

    def forward(
        self, views: Views, said: Sequence[Said], step: Step, labelled: Sequence[LabelledBatch] = ()
    ) -> Outcome:
        """The distilling terms, and those of the labelled sets."""
        outcome: Outcome = self.task(self.student, views, said, step)
        loss, terms = outcome.loss, dict(outcome.terms)
        for batch in labelled:
            head = self.labelled[_key(batch.name)]
            assert isinstance(head, LabelledHead)
            with step.autocast:
                cls_BS = self.student(batch.images_BCHW).cls_BD
                value = head(cls_BS, batch.targets_B)
            if batch.seen:
                terms[f"labelled_{batch.name}"] = batch.share * value
            loss = loss + head.weight * batch.share * value
        return Outcome(loss, terms, outcome.monitors)


def _key(name: str) -> str:
    """The name of a set as torch takes it for a module: without a dot, and never that of one of its own methods."""
    return "set " + name.replace(".", "\\")


@dataclass(slots=True, kw_only=True)
class Learner:
    """One student of a run."""

    name: str
    folder: Path
    """Where its metrics, its summary and its bundle go."""
    init: str
    """How it started: random, pruned, layers or a bundle's name."""
    lesson: Lesson
    wrapped: nn.Module
    """What is called: the lesson, or DDP around it."""
    average: Encoder
    """Moving average of the student: the product."""
    optimiser: torch.optim.Optimizer
    shell: Encoder | None
    """For a sharded student: an encoder that its average is written into when it is needed whole."""
    failed: str | None = None
    """Why it learns no more."""

    @property
    def student(self) -> Encoder:
        """The student as it is being trained."""
        return self.lesson.student

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        parts: dict[str, nn.Module] = {"student": self.student, "average": self.average, "task": self.lesson.task}
        return parts | ({"labelled": self.lesson.labelled} if len(self.lesson.labelled) else {})

    def heads(self) -> dict[str, torch.Tensor]:
        """The heads of labelled sets as plain tensors; every rank must ask for it."""
        return {
            key.removeprefix("set ").replace("\\", "."): whole(value.detach())
            for key, value in self.lesson.labelled.state_dict().items()
        }

    def product(self) -> Encoder:
        """The average as a plain encoder; every rank must ask for it."""
        if self.shell is None:
            return self.average
        with torch.no_grad():
            for target, source in zip(self.shell.parameters(), self.average.parameters(), strict=True):
                target.copy_(whole(source))
        return self.shell


def learner_of(
    config: DistillConfig,
    lesson: Lesson,
    average: Encoder,
    *,
    name: str,
    folder: Path,
    init: str,
    device: torch.device,
    ranks: Ranks,
) -> Learner:
    """Lay a student out in memory and over the ranks, and give it its optimizer.

    Parameters
    ----------
    config
        Its ``scale`` and ``optimiser``.
    lesson, average
        Student with heads, and the start of its average, both on ``device``; sharded in place where students are.
    name, folder, init
        See :class:`Learner`.
    device, ranks
        Where it runs, and with how many others.
    """
    student: Any = lesson.student.model
    if config.scale.checkpoint_activations:
        student.set_grad_checkpointing(True)
    if config.scale.pack:
        lesson.task.packing = pack_attention(student)
    if config.scale.compile:
        compile_blocks(student)
    wrapped: nn.Module = lesson
    shell = None
    if ranks.world > 1:  # each made them by itself, and eigenvectors may differ between processors
        same_as_first(lesson, average)
    if ranks.world > 1 and config.scale.students == "shard":
        shell = copy.deepcopy(average)
        shard(average, blocks_of(average.model), device, ranks)
        shard(lesson, blocks_of(student), device, ranks)
    elif ranks.world > 1:
        wrapped = replicate(lesson)
    return Learner(
        name=name,
        folder=folder,
        init=init,
        lesson=lesson,
        wrapped=wrapped,
        average=average,
        optimiser=_optimiser(config, lesson),
        shell=shell,
    )


def _optimiser(config: DistillConfig, lesson: Lesson) -> torch.optim.AdamW:
    """AdamW in four groups: with and without weight decay, ordinary and last layers."""
    last = {id(parameter) for parameter in lesson.task.last_layers()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in _trained(lesson):
        # Biases, norms, layer scales and single tokens are vectors; position embeddings and tokens are
        # stored as (1, N, D) and decay as in DINOv2.
        decays = parameter.ndim > 1 and not name.endswith("bias")
        groups.setdefault((decays, id(parameter) in last), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "decays": decays, "last_layer": is_last}
            for (decays, is_last), parameters in groups.items()
        ],
        lr=0.0,
        betas=(config.optimiser.beta1, config.optimiser.beta2),
        fused=True,
    )


def _trained(lesson: Lesson) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in lesson.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
