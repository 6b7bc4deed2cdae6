"""Plan before you pay: parameters, operations, memory and time of a run, from shapes alone.

Operations are those of matrix products and convolutions, two for each multiplication with its addition. Networks are
counted by torch's own counter on empty tensors; a backward pass costs twice its forward pass; heads are reckoned from
their sizes. Tests hold all of it against torch's counter on a real step.
"""

from __future__ import annotations

import dataclasses
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
from histill.distill.parts import sized_views
from histill.distill.plan_config import GPUS, PlanConfig
from histill.distill.teacher import planned_prototypes
from histill.distill.views import ViewConfig
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
    tf32_flops: float
    """Those of ``head_flops`` that are taken in TF32: patch tokens against prototypes."""
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
        kind = GPUS[gpu]
        seconds = (self.flops - self.tf32_flops) / kind.bf16_tflops + self.tf32_flops / kind.tf32_tflops
        return self.world * 1e12 * utilisation / seconds


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
        Fewer tiles in a step than processes, crops that do not divide into patches, or what a plan does not know: other
        precisions than bf16, and the speed that turns minutes into steps.
    ModelError
        An unknown model, or one whose architecture is not known here.
    """
    _refuse(config, plan)
    world = plan.world
    teachers: list[Any] = [build_empty(resolve(name)) for name in config.teacher]
    students = _empty_students(config)
    views = sized_views(config.views, plan.tile_px, int(students[0].patch_embed.patch_size[0]))
    n_local = views.n_local if config.objective.dino else 0
    crops: list[tuple[int, float]] = [(views.global_px, views.n_global), (views.local_px, n_local)]
    labelled = len(config.labelled) * config.labelled_tiles / config.batch_tiles
    passes = 4 if config.scale.checkpoint_activations else 3
    student_flops = sum(
        passes * count * forward_flops(each, px)
        for each in students
        for px, count in [*crops, (views.global_px, labelled)]
    )
    teacher_flops = sum(views.n_global * forward_flops(each, _fitting(each, views.global_px)) for each in teachers)
    between = _between(config, plan, teachers, students, dataclasses.replace(views, n_local=n_local))
    teacher_parameters, student_parameters = (sum(map(_count, each)) for each in (teachers, students))
    trained = student_parameters + between.parameters
    kept = trained * _TRAINED_BYTES + student_parameters * _AVERAGE_BYTES
    if config.scale.students == "shard" and world > 1:
        kept = kept // world + student_parameters * _WEIGHT_BYTES  # and a whole average, for checks and bundle
    sharded = config.scale.teachers == "shard" and world > 1  # shards are float32
    tiles_here = math.ceil(config.batch_tiles / world)
    part = min(tiles_here, config.scale.micro_tiles or tiles_here)
    return Plan(
        teacher_parameters=teacher_parameters,
        student_parameters=student_parameters,
        head_parameters=between.parameters,
        teacher_flops=float(teacher_flops),
        student_flops=float(student_flops),
        head_flops=between.flops,
        tf32_flops=between.tf32_flops,
        batch_tiles=config.batch_tiles,
        steps=config.steps or math.ceil(plan.tiles / config.batch_tiles),
        world=world,
        teacher_bytes=teacher_parameters * _WEIGHT_BYTES // world if sharded else teacher_parameters * _BF16_BYTES,
        student_bytes=kept,
        prototype_bytes=between.prototype_bytes,
        activation_bytes=part
        * max(_activations(each, crops, remade=config.scale.checkpoint_activations) for each in students),
        gradient_bytes=_WEIGHT_BYTES * trained if world > 1 else 0,
    )


def _refuse(config: DistillConfig, plan: PlanConfig) -> None:
    config.require_tiles_for(plan.world)
    if config.precision == "fp32" or config.minutes:
        where = "--precision fp32" if config.precision == "fp32" else "--minutes"
        raise ConfigError("a plan does not know this", where=where, allowed="bf16, and --steps or --plan.tiles")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Between:
    """What stands between all students and all teachers: heads, adaptors, prototypes."""

    parameters: int
    flops: float
    tf32_flops: float
    prototype_bytes: int


def _between(config: DistillConfig, plan: PlanConfig, teachers: Any, students: Any, views: ViewConfig) -> _Between:
    tokens = views.n_global * (views.global_px // int(students[0].patch_embed.patch_size[0])) ** 2
    parameters, flops, tf32_flops, prototypes = 0, 0.0, 0.0, 0
    for teacher in teachers:
        width, counts = int(teacher.num_features), _prototypes(config, plan, teacher, views.global_px)
        cls, patches = _score_flops(config, counts, width, tokens)
        flops, tf32_flops, prototypes = flops + cls + patches, tf32_flops + patches, prototypes + sum(counts) * width
        for student in students:
            own, operations, in_tf32 = _heads(config, counts, student.num_features, width, tokens, views.n_local)
            parameters, flops, tf32_flops = parameters + own, flops + operations, tf32_flops + in_tf32
    return _Between(
        parameters=parameters, flops=flops, tf32_flops=tf32_flops, prototype_bytes=_WEIGHT_BYTES * prototypes
    )


def _empty_students(config: DistillConfig) -> list[Any]:
    with torch.device("meta"):
        return [build_student(name) for name in config.student]


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _fitting(model: Any, px: int) -> int:
    patch_px = int(model.patch_embed.patch_size[0])
    return max(1, round(px / patch_px)) * patch_px


def _prototypes(config: DistillConfig, plan: PlanConfig, teacher: Any, global_px: int) -> tuple[int, int]:
    """Class and patch prototypes of a teacher, as the fit would make them from at least ``fit_tiles`` tiles."""
    fitted = min(config.objective.fit_tiles, int(plan.tiles))
    grid_tokens = (_fitting(teacher, global_px) // int(teacher.patch_embed.patch_size[0])) ** 2
    return planned_prototypes(config.objective, fitted, grid_tokens, int(teacher.num_features))


def _scored(config: DistillConfig, tokens: int) -> float:
    return tokens * (1.0 if config.objective.ibot_tokens == "all" else config.objective.ibot_share)


def _heads(
    config: DistillConfig, counts: tuple[int, int], student_dim: int, teacher_dim: int, tokens: int, n_local: int
) -> tuple[int, float, float]:
    """Parameters and operations of what stands between one student and one teacher, and those in TF32."""
    objective = config.objective
    hidden, bottleneck = objective.head_hidden, objective.head_bottleneck
    parameters, operations = 0, 0.0
    crops = config.views.n_global + n_local
    in_tf32 = 3 * 2 * _scored(config, tokens) * bottleneck * counts[1]
    for count, rows in zip(counts, (crops, _scored(config, tokens)), strict=True):
        if count:
            parameters += student_dim * hidden + hidden * hidden + hidden * bottleneck + bottleneck * count
            operations += head_flops(rows, student_dim, hidden, bottleneck, count)
    widths = [student_dim, *([objective.adaptor_hidden] if objective.adaptor_hidden else []), teacher_dim]
    products = sum(width * wider for width, wider in itertools.pairwise(widths))
    for weight, rows in ((objective.token_cls, config.views.n_global), (objective.token_patch, tokens)):
        if weight:
            parameters += products
            operations += 3 * 2 * rows * products
    return parameters, operations, in_tf32


def _score_flops(config: DistillConfig, counts: tuple[int, int], teacher_dim: int, tokens: int) -> tuple[float, float]:
    """The teacher's scores: once for class tokens; for patch tokens again in each of Sinkhorn's streams."""
    streams = config.objective.sinkhorn_iterations + 1
    cls, patch = counts[0] * config.views.n_global, streams * counts[1] * _scored(config, tokens)
    return 2.0 * cls * teacher_dim, 2.0 * patch * teacher_dim


def _activations(model: Any, crops: list[tuple[int, float]], *, remade: bool) -> float:
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
