"""A distillation run of true shapes and random weights, for benchmarks: nothing is downloaded, read or learnt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from histill.distill.average import average_of
from histill.distill.config import DistillConfig
from histill.distill.learner import Lesson, learner_of
from histill.distill.parallel import compile_blocks
from histill.distill.parts import Parts
from histill.distill.plan import make_plan
from histill.distill.plan_config import PlanConfig
from histill.distill.precision import autocast_for, keep_freed_memory, plain_attention_on_cpu
from histill.distill.progress import Stopwatch
from histill.distill.share import StepShare
from histill.distill.step import train_step
from histill.distill.task import DistillTask
from histill.distill.teacher import Teacher
from histill.distributed import Ranks
from histill.models import build_student, wrap
from histill.models.encoder import Encoder
from histill.models.machine import pick_device
from histill.models.sources import build_empty, resolve
from histill.tiles.loader import Batch

MEAN, STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)


def random_teacher(name: str, device: torch.device, autocast: torch.autocast) -> Encoder:
    """The architecture of a teacher, filled with small random weights, products stored as autocast computes them."""
    model: Any = build_empty(resolve(name))
    if autocast._enabled:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight") or "norm1.weight" in key or "norm2.weight" in key:
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.zero_() if key.endswith("bias") else parameter.fill_(1.0)
    encoder = Encoder(model, name=name, mean=MEAN, std=STD, input_px=224).requires_grad_(False).eval()
    plain_attention_on_cpu(encoder, device)
    return encoder.to(device)


def random_parts(config: DistillConfig, plan: PlanConfig, *, keep_memory: bool = True) -> Parts:
    """A built run; prototypes are random directions."""
    device = pick_device(config.device)
    if keep_memory:
        keep_freed_memory(device)
    autocast = autocast_for(device, config.precision)
    generator = torch.Generator().manual_seed(1)
    teachers = []
    for name in config.teacher:
        encoder = random_teacher(name, device, autocast)
        if config.scale.compile:
            compile_blocks(encoder.model)
        teacher = Teacher(encoder, config.objective, config.views.global_px).to(device)
        for kind, wanted in (
            ("cls_prototypes", config.objective.dino and config.objective.cls_prototypes),
            ("patch_prototypes", config.objective.ibot and config.objective.patch_prototypes),
        ):
            if wanted:
                rows = torch.randn(int(wanted), encoder.embed_dim, generator=generator)
                setattr(teacher, f"{kind}_KE", nn.functional.normalize(rows, dim=1).to(device))
        teachers.append(teacher)
    learners = []
    for name in config.student:
        student = wrap(build_student(name, seed=0), name=name, mean=MEAN, std=STD).to(device).train()
        plain_attention_on_cpu(student, device)
        lesson = Lesson(student, DistillTask(config.objective, student.embed_dim, teachers), {}).to(device)
        learners.append(
            learner_of(
                config,
                lesson,
                average_of(student),
                name=name,
                folder=Path(),
                init="random",
                device=device,
                ranks=Ranks(),
            )
        )
    return Parts(
        config=config,
        ranks=Ranks(),
        device=device,
        autocast=autocast,
        source=None,  # type: ignore[arg-type]
        labelled=(),
        teachers=tuple(teachers),
        teacher_records=(),
        learners=tuple(learners),
        grid=config.views.global_px // learners[0].student.patch_px,
        checker=None,  # type: ignore[arg-type]
    )


def random_batch(tiles: int, px: int) -> Batch:
    """Noise in the place of tiles."""
    pixels = np.random.default_rng(0).integers(0, 256, (tiles, px, px, 3), dtype=np.uint8)
    return Batch(
        tiles_BCHW=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        sizes_B2=np.full((tiles, 2), px),
        positions_B=np.arange(tiles),
        unreadable={},
    )


def one_step(parts: Parts, batch: Batch, step: int) -> Stopwatch:
    """A real step, and where its time went."""
    watch = Stopwatch(parts.device)
    share = StepShare.agreed(parts, batch, [], asked=False, due=False)
    watch.start()
    train_step(parts, batch, [], share, step, 1000, watch)
    return watch


def flops_per_tile(config: DistillConfig) -> float:
    """As ``histill distill --plan`` reckons them."""
    return make_plan(config, PlanConfig()).flops


def with_students(config: DistillConfig, *names: str) -> DistillConfig:
    return dataclasses.replace(config, student=names)


__all__ = [
    "flops_per_tile",
    "one_step",
    "random_batch",
    "random_parts",
    "random_teacher",
    "with_students",
]
