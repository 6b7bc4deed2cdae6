"""Plan before you pay: parameters, operations, memory and time of a run, from shapes alone.

Operations are those of matrix products and convolutions, two for each multiplication with its addition. Networks are
counted by torch's own counter on empty tensors; a backward pass costs twice its forward pass; heads are reckoned from
their sizes. Tests hold all of it against torch's counter on a real step.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from histill.distill.config import DistillConfig
from histill.distill.plan_config import GPUS, PlanConfig
from histill.distill.prototypes import prototype_count
from histill.errors import ConfigError
from histill.models import build_student
from histill.models.sources import build_empty, resolve

__all__ = ["Plan", "forward_flops", "head_flops", "make_plan", "print_plan"]

_WEIGHT_BYTES, _TRAINED_BYTES, _AVERAGE_BYTES = 4, 16, 4  # a trained weight: itself, gradient, two moments of AdamW
_BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run costs."""

    teacher_parameters: int
    student_parameters: int
    head_parameters: int
    teacher_flops: float
    """Operations for one tile: all of its crops that the teacher sees."""
    student_flops: float
    """Of all students, forward and backward."""
    head_flops: float
    """Of all students' heads, forward and backward, and the teachers' scores."""
    batch_tiles: int
    steps: int
    world: int
    teacher_bytes: int
    """Weights of the teachers on one GPU."""
    student_bytes: int
    """Weights, gradients, optimizer and moving average of students and heads on one GPU."""
    prototype_bytes: int
    """The teachers' prototypes on one GPU."""
    activation_bytes: float
    """What the largest student keeps for its backward pass, on one GPU."""
    gradient_bytes: int
    """What each GPU sends, and gets, in each step."""

    @property
    def flops(self) -> float:
        """Operations for one tile."""
        return self.teacher_flops + self.student_flops + self.head_flops

    @property
    def memory_bytes(self) -> float:
        """On one GPU; the framework's own gigabyte or two, and the teacher's passing buffers, come on top."""
        return self.teacher_bytes + self.student_bytes + self.prototype_bytes + self.activation_bytes

    def tiles_per_second(self, gpu: str, utilisation: float) -> float:
        """Of all GPUs together."""
        return self.world * GPUS[gpu].bf16_tflops * 1e12 * utilisation / self.flops


@torch.no_grad()
def forward_flops(model: nn.Module, px: int) -> int:
    """Operations of a forward pass over one image; the model may be empty (on ``meta``)."""
    device = next(model.parameters()).device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward: Any = model
        forward.forward_features(torch.zeros(1, 3, px, px, device=device))
    return int(counter.get_total_flops())


def head_flops(rows: float, dim: int, hidden: int, bottleneck: int, prototypes: int) -> float:
    """Operations of a prototype head over ``rows`` tokens, forward and backward.

    Parameters
    ----------
    rows
        Tokens.
    dim, hidden, bottleneck, prototypes
        Widths of the head's layers.

    Returns
    -------
    float
        Two for each multiply-add; the backward pass counts twice the forward.
    """
    return 3 * 2 * rows * (dim * hidden + hidden * hidden + hidden * bottleneck + bottleneck * prototypes)


def make_plan(config: DistillConfig, plan: PlanConfig) -> Plan:
    """Reckon a run; nothing is downloaded, read or trained.

    Raises
    ------
    ConfigError
        Fewer tiles in a step than processes.
    ModelError
        An unknown model, or one whose architecture is not known here.
    """
    if config.batch_tiles < plan.world:
        raise ConfigError(
            "each process needs a tile in each step",
            where="--batch-tiles",
            got=f"{config.batch_tiles} tiles, {plan.world} processes",
            remedy="raise --batch-tiles",
        )
    views, objective, world = config.views, config.objective, plan.world
    teachers: list[Any] = [build_empty(resolve(name)) for name in config.teacher]
    students = _empty_students(config)
    patch_px = int(students[0].patch_embed.patch_size[0])
    global_px = views.global_px or min(224, plan.tile_px) // (2 * patch_px) * 2 * patch_px
    local_px = views.local_px or max(1, round(global_px * 98 / 224 / patch_px)) * patch_px
    n_local = views.n_local if objective.dino else 0
    tokens = views.n_global * (global_px // patch_px) ** 2
    crops = [(global_px, views.n_global), (local_px, n_local)]
    teacher_flops = float(sum(views.n_global * forward_flops(each, _fitting(each, global_px)) for each in teachers))
    passes = 4 if config.scale.checkpoint_activations else 3
    student_flops = float(sum(passes * count * forward_flops(each, px) for each in students for px, count in crops))
    pairs = [
        _heads(config, plan, student.num_features, teacher.num_features, tokens, n_local)
        for student in students
        for teacher in teachers
    ]
    head_parameters, heads = sum(count for count, _ in pairs), sum(operations for _, operations in pairs)
    prototypes = sum(_prototypes(config, plan, tokens))
    scores = sum(_score_flops(config, plan, teacher.num_features, tokens) for teacher in teachers)
    teacher_parameters, student_parameters = (sum(map(_count, each)) for each in (teachers, students))
    trained = student_parameters + head_parameters
    kept = trained * _TRAINED_BYTES + student_parameters * _AVERAGE_BYTES
    sharded = config.scale.teachers == "shard" and world > 1  # shards are float32
    tiles_here = math.ceil(config.batch_tiles / world)
    part = min(tiles_here, config.scale.micro_tiles or tiles_here)
    return Plan(
        teacher_parameters=teacher_parameters,
        student_parameters=student_parameters,
        head_parameters=head_parameters,
        teacher_flops=teacher_flops,
        student_flops=student_flops,
        head_flops=heads + scores,
        batch_tiles=config.batch_tiles,
        steps=config.steps or math.ceil(plan.tiles / config.batch_tiles),
        world=world,
        teacher_bytes=teacher_parameters * _WEIGHT_BYTES // world if sharded else teacher_parameters * _BF16_BYTES,
        student_bytes=kept // (world if config.scale.students == "shard" else 1),
        prototype_bytes=4 * prototypes * sum(each.num_features for each in teachers),
        activation_bytes=part
        * max(_activations(each, crops, remade=config.scale.checkpoint_activations) for each in students),
        gradient_bytes=_WEIGHT_BYTES * trained if world > 1 else 0,
    )


def _empty_students(config: DistillConfig) -> list[Any]:
    with torch.device("meta"):
        return [build_student(name) for name in config.student]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fitting(model: Any, px: int) -> int:
    patch_px = int(model.patch_embed.patch_size[0])
    return max(1, round(px / patch_px)) * patch_px


def _prototypes(config: DistillConfig, plan: PlanConfig, tokens: int) -> tuple[int, int]:
    """Class and patch prototypes; automatic numbers as for a set of at least ``fit_tiles`` tiles."""
    objective = config.objective
    fitted = min(objective.fit_tiles, int(plan.tiles))
    per_crop = tokens // config.views.n_global
    cls = objective.cls_prototypes or prototype_count(fitted / 8, most=fitted)
    patch = objective.patch_prototypes or prototype_count(fitted * per_crop / 256, most=fitted * per_crop)
    return (cls if objective.dino else 0), (patch if objective.ibot else 0)


def _scored(config: DistillConfig, tokens: int) -> float:
    return tokens * (1.0 if config.objective.ibot_tokens == "all" else config.objective.ibot_share)


def _heads(
    config: DistillConfig, plan: PlanConfig, student_dim: int, teacher_dim: int, tokens: int, n_local: int
) -> tuple[int, float]:
    """Parameters and operations of what stands between one student and one teacher."""
    objective = config.objective
    hidden, bottleneck = objective.head_hidden, objective.head_bottleneck
    parameters, operations = 0, 0.0
    crops = config.views.n_global + n_local
    for count, rows in zip(_prototypes(config, plan, tokens), (crops, _scored(config, tokens)), strict=True):
        if count:
            parameters += student_dim * hidden + hidden * hidden + hidden * bottleneck + bottleneck * count
            operations += head_flops(rows, student_dim, hidden, bottleneck, count)
    widths = [student_dim, *([objective.adaptor_hidden] if objective.adaptor_hidden else []), teacher_dim]
    products = sum(width * wider for width, wider in itertools.pairwise(widths))
    for weight, rows in ((objective.token_cls, config.views.n_global), (objective.token_patch, tokens)):
        if weight:
            parameters += products
            operations += 3 * 2 * rows * products
    return parameters, operations


def _score_flops(config: DistillConfig, plan: PlanConfig, teacher_dim: int, tokens: int) -> float:
    """The teacher's scores: once for the class token; for patch tokens again in each of Sinkhorn's streams."""
    cls, patch = _prototypes(config, plan, tokens)
    streams = config.objective.sinkhorn_iterations + 1
    rows = cls * config.views.n_global + streams * patch * _scored(config, tokens)
    return 2 * rows * teacher_dim


def _activations(model: Any, crops: list[tuple[int, int]], *, remade: bool) -> float:
    """Bytes that a vision transformer keeps of one tile for its backward pass, under bf16 autocast.

    Of each token and block: the residual stream in float32 before both norms; in bf16 what both norms give, queries,
    keys and values, what attention gives, what both branches give to their layer scale; and the hidden layer before and
    after its activation (of a gated one the activated half and the product: as much).
    With activations computed again only the residual stream between blocks.
    """
    dim, blocks = int(model.num_features), len(model.blocks)
    mlp = model.blocks[0].mlp
    hidden = int(mlp.fc1.out_features)
    patch_px = int(model.patch_embed.patch_size[0])
    tokens = sum(count * ((px // patch_px) ** 2 + int(model.num_prefix_tokens)) for px, count in crops)
    if remade:
        return 4.0 * tokens * dim * (blocks + 1)
    per_token = 2 * 4 * dim + 8 * _BF16_BYTES * dim + 2 * _BF16_BYTES * hidden
    return float(tokens * blocks * per_token)


def print_plan(config: DistillConfig, wanted: PlanConfig, plan: Plan, console: Console) -> None:
    """Show a plan."""
    console.print(
        f"{', '.join(config.teacher)} -> {', '.join(config.student)}: "
        f"{plan.batch_tiles} tiles a step over {plan.world} processes, {plan.steps:,} steps, "
        f"{plan.steps * plan.batch_tiles:.3g} tiles seen",
        highlight=False,
        soft_wrap=True,
    )
    parts = Table("", "parameters", "TFLOP a tile", "share")
    for name, parameters, flops in (
        ("teacher, forward", plan.teacher_parameters, plan.teacher_flops),
        ("student, forward and backward", plan.student_parameters, plan.student_flops),
        ("heads and teacher scores", plan.head_parameters, plan.head_flops),
        ("all", plan.teacher_parameters + plan.student_parameters + plan.head_parameters, plan.flops),
    ):
        parts.add_row(name, f"{parameters:,}", f"{flops / 1e12:.4f}", f"{flops / plan.flops:.0%}")
    console.print(parts)
    memory = Table("memory of one GPU", "GB")
    for name, held in (
        ("teacher weights", plan.teacher_bytes),
        ("student and heads: weights, gradients, AdamW, average", plan.student_bytes),
        ("teacher prototypes", plan.prototype_bytes),
        ("student activations (estimate)", plan.activation_bytes),
        ("all, before the framework's own", plan.memory_bytes),
    ):
        memory.add_row(name, f"{held / 1e9:.2f}")
    console.print(memory)
    seen = plan.steps * plan.batch_tiles
    rates = Table("GPU", "tiles/s", "days", "GPU-hours", "fits")
    for name in wanted.gpu:
        rate = plan.tiles_per_second(name, wanted.utilisation)
        seconds = seen / rate
        fits = plan.memory_bytes < 0.9e9 * GPUS[name].memory_gb
        rates.add_row(
            f"{plan.world} x {GPUS[name].title}",
            f"{rate:,.0f}",
            f"{seconds / 86400:.2f}",
            f"{plan.world * seconds / 3600:,.0f}",
            "yes" if fits else "no: --scale.micro-tiles, --scale.checkpoint-activations True, or sharding",
        )
    console.print(rates)
    console.print(
        f"Rates assume that {wanted.utilisation:.0%} of the data sheet's bf16 rate is reached (--plan.utilisation): "
        "an assumption, not a measurement. "
        f"Each step moves {plan.gradient_bytes / 1e9:.2f} GB of gradients in and out of each GPU.",
        highlight=False,
        soft_wrap=True,
    )
