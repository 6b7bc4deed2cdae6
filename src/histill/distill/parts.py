"""Everything that a run is made of, built from its config before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from histill.distill.average import average_of
from histill.distill.checking import Checker, check_tables, held_out_paths
from histill.distill.config import DistillConfig
from histill.distill.precision import autocast_for, pick_device, plain_attention_on_cpu
from histill.distill.task import DistillTask
from histill.distill.teacher import Teacher
from histill.distill.views import make_views
from histill.errors import ConfigError
from histill.models import build_student, channel_statistics, fold_standardisation, load_encoder, wrap
from histill.models.encoder import Encoder
from histill.models.prune import prune_teacher, why_not_prunable
from histill.tiles.loader import batches
from histill.tiles.open import open_tiles
from histill.tiles.tile_set import TileSource

__all__ = ["Parts", "build", "resolve_views", "untrained_student"]

_LOCAL_SHARE = 98 / 224
_LARGEST_GLOBAL_PX = 224
_PRUNE_TILES, _ADAPTOR_TILES = 256, 1024
_FIT_STREAM = 1 << 40  # positions of the fitting pass, far from those of training


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The built run."""

    config: DistillConfig
    """With the sizes of the views filled in."""
    init: str
    """How the student started: random, pruned, layers or a bundle's name."""
    device: torch.device
    autocast: torch.autocast
    source: TileSource
    teacher: Teacher
    student: Encoder
    average: Encoder
    """Moving average of the student: the product."""
    task: DistillTask
    optimiser: torch.optim.Optimizer
    checker: Checker

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"student": self.student, "average": self.average, "task": self.task}


def resolve_views(config: DistillConfig, source: TileSource, teacher_px: int, patch_px: int) -> DistillConfig:
    """Fill in sizes of crops that are 0 (automatic).

    Global: the largest multiple of two patches that neither the tiles' median side, nor the teacher's input, nor
    224 px is smaller than. Local: 98/224 of it, to the nearest multiple of a patch.
    """
    views = config.views
    step_px = 2 * patch_px
    global_px = views.global_px or max(
        step_px, min(_LARGEST_GLOBAL_PX, teacher_px, source.median_side_px()) // step_px * step_px
    )
    local_px = views.local_px or max(patch_px, math.floor(global_px * _LOCAL_SHARE / patch_px + 0.5) * patch_px)
    for name, side in (("global_px", global_px), ("local_px", local_px)):
        if side % patch_px:
            raise ConfigError(
                "a crop must divide into the student's patches",
                where=f"--views.{name.replace('_', '-')}",
                got=side,
                allowed=f"a multiple of {patch_px}",
            )
    return dataclasses.replace(config, views=dataclasses.replace(views, global_px=global_px, local_px=local_px))


def build(config: DistillConfig, statistics: Path, *, fresh: bool = True) -> Parts:
    """Build a run.

    The teacher's statistics are read from ``statistics``, or fitted and written there. With ``fresh`` the student and
    its adaptors get their first weights; otherwise a checkpoint will set them.
    """
    assert config.tiles is not None
    device = pick_device(config.device)
    autocast = autocast_for(device, config.precision)
    tables = config.checks.tables or check_tables(config.tiles)
    held_out = held_out_paths(config.tiles, tables) if config.checks.hold_out_test else ()
    source = open_tiles(
        config.tiles,
        table=config.table,
        hold_out=held_out,
        sampling=config.sampling,
        hold_out_slides=config.hold_out_slides,
        index_folder=statistics.parent / "slides-index",
    )
    encoder = load_encoder(config.teacher, device=device)
    student_model, init = _student_model(config, encoder)
    student = wrap(student_model, name=config.student, mean=encoder.mean, std=encoder.std).to(device)
    student.train()
    for model in (encoder, student):
        plain_attention_on_cpu(model, device)
    config = resolve_views(config, source, encoder.input_px, student.patch_px)
    if init == "pruned" and fresh:
        with closing(_fit_crops(config, source, device, min(len(source), _PRUNE_TILES))) as crops:
            prune_teacher(student_model, encoder, crops)
        # The kept channels are principal axes of very unequal variance; a standardised class token starts level.
        with closing(_fit_crops(config, source, device, min(len(source), _PRUNE_TILES))) as crops:
            fold_standardisation(student_model, *channel_statistics(student, crops))
    teacher = Teacher(encoder, config.objective, config.views.global_px).to(device)
    if statistics.exists():
        teacher.load_statistics(statistics)
    else:
        tiles = min(len(source), config.objective.fit_tiles)
        with closing(_fit_crops(config, source, device, tiles)) as crops:
            teacher.fit(crops, tiles, config.seed, autocast)
        teacher.save_statistics(statistics)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        task = DistillTask(config.objective, student.embed_dim, teacher, config.seed).to(device)
    if fresh:
        with closing(_fit_crops(config, source, device, min(len(source), _ADAPTOR_TILES))) as crops:
            task.fit_adaptors(student, teacher, crops, autocast)
    return Parts(
        config=config,
        init=init,
        device=device,
        autocast=autocast,
        source=source,
        teacher=teacher,
        student=student,
        average=average_of(student),
        task=task,
        optimiser=_optimiser(config, student, task),
        checker=Checker(tables, source, config.views.global_px, config.checks.agreement_tiles, autocast),
    )


def _student_model(config: DistillConfig, encoder: Encoder) -> tuple[nn.Module, str]:
    """The student's model and how it starts; for ``pruned`` the weights are set later, when crops can be made."""
    model: nn.Module = build_student(config.student, seed=config.seed)
    init = config.init
    if init in ("auto", "pruned"):
        reason = why_not_prunable(model, encoder.model) if init == "auto" else None  # else pruning itself complains
        return model, f"random, since {reason}" if reason else "pruned"
    if init == "random":
        return model, init
    if init == "layers":
        return build_student(config.student, seed=config.seed, init="teacher", teacher=encoder.model), init
    return build_student(config.student, seed=config.seed, init="bundle", init_from=init), init


def untrained_student(parts: Parts) -> Encoder:
    """The student's architecture with random weights: the zero of every retention."""
    model = build_student(parts.config.student, seed=parts.config.seed)
    encoder = wrap(model, name="untrained", mean=parts.student.mean, std=parts.student.std)
    return encoder.to(parts.device).eval()


def _fit_crops(config: DistillConfig, source: TileSource, device: torch.device, tiles: int) -> Generator[torch.Tensor]:
    """One clean global crop of each of the first ``tiles`` tiles of a shuffled order, in batches."""
    views = dataclasses.replace(config.views, n_global=1, n_local=0, teacher_view="clean")
    size = config.batch_tiles

    def positions(step: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.arange(step * size, min(tiles, (step + 1) * size), dtype=np.int64)

    steps = math.ceil(tiles / size)
    with closing(batches(source, positions, 0, steps, config.seed, workers=config.loader_threads)) as stream:
        for batch in stream:
            if not len(batch.positions_B):
                continue
            crops = make_views(
                batch.tiles_BCHW.to(device), batch.sizes_B2, batch.positions_B + _FIT_STREAM, views, config.seed
            )
            yield crops.clean_GBCHW[0]


def _optimiser(config: DistillConfig, student: Encoder, task: DistillTask) -> torch.optim.AdamW:
    """AdamW in four groups: with and without weight decay, ordinary and last layers."""
    last = {id(parameter) for parameter in task.last_layers()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module in (student, task):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
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
