"""Everything that a run is made of, built from its config before the first step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from histill.distill.average import average_of
from histill.distill.checking import Checker, check_tables, held_out_paths
from histill.distill.checkpoint import TrainingState
from histill.distill.config import DistillConfig
from histill.distill.labelled import LabelledHead, LabelledSet, open_labelled
from histill.distill.learner import Learner, Lesson, learner_of
from histill.distill.parallel import blocks_of, compile_blocks, shard
from histill.distill.precision import autocast_for, plain_attention_on_cpu, store_products_in
from histill.distill.task import DistillTask
from histill.distill.teacher import FitStep, Teacher
from histill.distill.views import ViewConfig, make_views
from histill.distributed import Ranks
from histill.errors import ConfigError, DataError
from histill.models import build_student, channel_statistics, fold_standardisation, load_encoder, wrap
from histill.models.bundle import teacher_record
from histill.models.encoder import Encoder
from histill.models.machine import pick_device
from histill.models.prune import prune_teacher, why_not_prunable
from histill.tiles.loader import batches
from histill.tiles.open import open_tiles
from histill.tiles.order import positions_of
from histill.tiles.tile_set import TileSource

__all__ = ["Parts", "build", "resolve_views", "sized_views", "statistics_paths", "student_folder", "untrained_student"]

_LOCAL_SHARE = 98 / 224
_LARGEST_GLOBAL_PX = 224
_PRUNE_TILES, _ADAPTOR_TILES = 256, 1024
_FIT_STREAM = 1 << 40  # positions of the fitting pass, far from those of training


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The built run."""

    config: DistillConfig
    """With the sizes of the views filled in."""
    ranks: Ranks
    device: torch.device
    autocast: torch.autocast
    source: TileSource
    labelled: tuple[LabelledSet, ...]
    teachers: tuple[Teacher, ...]
    teacher_records: tuple[dict[str, Any], ...]
    """What is known of each teacher: name, content hash, licence."""
    learners: tuple[Learner, ...]
    grid: int
    """Rows of the students' grid of patch tokens in a global crop."""
    checker: Checker

    @property
    def alive(self) -> tuple[Learner, ...]:
        """The learners whose losses are finite."""
        return tuple(learner for learner in self.learners if not learner.failed)

    def alive_before(self, rows: Mapping[str, object]) -> tuple[Learner, ...]:
        """The learners that a step was for: those that took part, also one that failed in it, and those alive."""
        return tuple(learner for learner in self.learners if learner.name in rows or not learner.failed)

    @property
    def state(self) -> TrainingState:
        """What a checkpoint holds."""
        several = len(self.learners) > 1
        modules = {
            f"{learner.name}/{name}" if several else name: module
            for learner in self.learners
            for name, module in learner.modules.items()
        }
        failed = {learner.name: learner.failed for learner in self.learners if learner.failed}
        return TrainingState(modules, [learner.optimiser for learner in self.learners], failed)


def student_folder(config: DistillConfig, name: str) -> Path:
    """Where a student's metrics, summary and bundle go: the run's folder, or one below it when there are several."""
    assert config.out is not None
    return config.out if len(config.student) == 1 else config.out / name


def statistics_paths(config: DistillConfig, folder: Path) -> list[Path]:
    """The file with each teacher's statistics."""
    endings = [""] if len(config.teacher) == 1 else [f".{number}" for number in range(len(config.teacher))]
    return [folder / f"teacher_statistics{ending}.safetensors" for ending in endings]


def resolve_views(config: DistillConfig, source: TileSource, teacher_px: int, patch_px: int) -> DistillConfig:
    """Fill in sizes of crops that are 0 (automatic).

    Global: the largest multiple of two patches that neither the tiles' median side, nor the teacher's input, nor
    224 px is smaller than. Local: 98/224 of it, to the nearest multiple of a patch.

    Parameters
    ----------
    config
        Its ``views`` may have sizes of 0.
    source
        The tiles; their median side counts.
    teacher_px
        Smallest input size of the teachers, pixels.
    patch_px
        Side of a patch of the students, pixels.

    Returns
    -------
    DistillConfig
        A copy with both sizes; one that was stated stays as it is.

    Raises
    ------
    ConfigError
        A size, stated or found, is no multiple of ``patch_px``.
    """
    side_px = 0 if config.views.global_px else min(teacher_px, source.median_side_px())
    views = sized_views(config.views, side_px, patch_px)
    return dataclasses.replace(config, views=views)


def sized_views(views: ViewConfig, side_px: int, patch_px: int) -> ViewConfig:
    """Fill in sizes of crops as :func:`resolve_views` does, for tiles and teachers of at least ``side_px``."""
    step_px = 2 * patch_px
    global_px = views.global_px or max(step_px, min(_LARGEST_GLOBAL_PX, side_px) // step_px * step_px)
    local_px = views.local_px or max(patch_px, math.floor(global_px * _LOCAL_SHARE / patch_px + 0.5) * patch_px)
    for name, side in (("global_px", global_px), ("local_px", local_px)):
        if side % patch_px:
            raise ConfigError(
                "a crop must divide into the student's patches",
                where=f"--views.{name.replace('_', '-')}",
                got=side,
                allowed=f"a multiple of {patch_px}",
            )
    return dataclasses.replace(views, global_px=global_px, local_px=local_px)


def build(config: DistillConfig, folder: Path, *, ranks: Ranks | None = None, fresh: bool = True) -> Parts:
    """Build a run; every rank builds the same.

    The teachers' statistics are read from the run's folder, or fitted and written there. With ``fresh`` the students
    and their adaptors get their first weights; otherwise a checkpoint will set them.

    Raises
    ------
    ConfigError, DataError, ModelError, MissingExtraError
        A device, crops, tiles, labels or models that cannot be used.
    """
    ranks = ranks or Ranks()
    device = pick_device(config.device)
    autocast = autocast_for(device, config.precision)
    source, tables = _tiles(config, folder, ranks)
    labelled = tuple(open_labelled(task) for task in config.labelled_tasks())
    # A teacher that does not fit comes to its GPU block by block; pruning needs it whole.
    whole = config.scale.teachers == "replicate" or ranks.world == 1 or config.init in ("auto", "pruned")
    load = partial(load_encoder, device=device if whole else "cpu", trust_remote_code=config.trust_remote_code)
    encoders = [load(name) for name in config.teacher]
    records = tuple(teacher_record(encoder) for encoder in encoders)
    students = [_student(config, name, encoders[0], device) for name in config.student]
    for model in (*encoders, *(student for student, _ in students)):
        plain_attention_on_cpu(model, device)
    config = resolve_views(
        config, source, min(encoder.input_px for encoder in encoders), _common_patch_px([each for each, _ in students])
    )
    if fresh:
        for student, init in students:
            if init == "pruned":
                _prune(config, source, student, encoders[0], device)
    if autocast._enabled and config.scale.teachers == "replicate":
        for encoder in encoders:
            store_products_in(encoder.model, torch.bfloat16)
    teachers = _teachers(config, folder, encoders, source, device, autocast, ranks)
    learners = [
        _learner(config, student, init, teachers, labelled, source, device, autocast, ranks, fresh)
        for student, init in students
    ]
    return Parts(
        config=config,
        ranks=ranks,
        device=device,
        autocast=autocast,
        source=source,
        labelled=labelled,
        teachers=teachers,
        teacher_records=records,
        learners=tuple(learners),
        grid=config.views.global_px // students[0][0].patch_px,
        checker=Checker(
            tables,
            source,
            config.views.global_px,
            config.checks.agreement_tiles,
            autocast,
            lenient=not config.checks.tables,
        ),
    )


def _tiles(config: DistillConfig, folder: Path, ranks: Ranks) -> tuple[TileSource, tuple[Path, ...]]:
    """The training set, and the tables of the checks."""
    assert config.tiles is not None
    tables = config.checks.tables or check_tables(config.tiles)
    if not ranks.first:
        ranks.wait()  # the first one may write an index, which the others read
    source = open_tiles(
        config.tiles,
        table=config.table,
        hold_out=held_out_paths(config.tiles, tables) if config.checks.hold_out_test else (),
        sampling=config.sampling,
        hold_out_slides=config.hold_out_slides,
        index_folder=folder / "slides-index",
    )
    if ranks.first:
        ranks.wait()
    config.require_tiles_for(ranks.world)
    if len(source) < 2:
        raise DataError("a student learns from comparing tiles", where=source.root, got="1 tile", allowed="2 or more")
    return source, tables


def _student(config: DistillConfig, name: str, encoder: Encoder, device: torch.device) -> tuple[Encoder, str]:
    model, init = _student_model(config, name, encoder)
    if init not in ("random", "pruned", "layers") and not init.startswith("random, since"):
        encoder = load_encoder(init)  # a bundle's weights want images as the bundle normalises them
    student = wrap(model, name=name, mean=encoder.mean, std=encoder.std).to(device)
    return student.train(), init


def _common_patch_px(students: list[Encoder]) -> int:
    sizes = {student.name: student.patch_px for student in students}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            "students of one run need patches of one size",
            where="--student",
            got=", ".join(f"{name}: {size} px" for name, size in sizes.items()),
            remedy="start a run for each patch size",
        )
    return students[0].patch_px


def _prune(config: DistillConfig, source: TileSource, student: Encoder, encoder: Encoder, device: torch.device) -> None:
    tiles = min(len(source), _PRUNE_TILES)
    with closing(_fit_crops(config, source, device, tiles)) as crops:
        prune_teacher(student.model, encoder, (images for _, images in crops))
    # The kept channels are principal axes of very unequal variance; a standardised class token starts level.
    with closing(_fit_crops(config, source, device, tiles)) as crops:
        fold_standardisation(student.model, *channel_statistics(student, (images for _, images in crops)))


def _teachers(
    config: DistillConfig,
    folder: Path,
    encoders: list[Encoder],
    source: TileSource,
    device: torch.device,
    autocast: torch.autocast,
    ranks: Ranks,
) -> tuple[Teacher, ...]:
    """The teachers with their statistics, read or fitted."""
    teachers = []
    paths = statistics_paths(config, folder)
    # The first rank decides for all: it writes these very files while the others may still be looking.
    known = ranks.gather_json([path.exists() for path in paths])[0]
    step = FitStep(autocast=autocast, reduce=ranks.sum_, gather=ranks.gather)
    for encoder, path, is_known in zip(encoders, paths, known, strict=True):
        if config.scale.compile:
            compile_blocks(encoder.model)
        if ranks.world > 1 and config.scale.teachers == "shard":
            shard(encoder, blocks_of(encoder.model), device, ranks)
        teacher = Teacher(encoder, config.objective, config.views.global_px).to(device)
        if is_known:
            teacher.load_statistics(path)
        else:
            tiles = min(len(source), config.objective.fit_tiles)
            with closing(_fit_crops(config, source, device, tiles, ranks)) as crops:
                teacher.fit(crops, tiles, config.seed, step)
            if ranks.first:
                teacher.save_statistics(path)
            ranks.wait()
            if not ranks.first:  # the first rank's to the last bit: eigenvectors may differ between processors
                teacher.load_statistics(path)
        teachers.append(teacher)
    return tuple(teachers)


def _learner(
    config: DistillConfig,
    student: Encoder,
    init: str,
    teachers: tuple[Teacher, ...],
    labelled: tuple[LabelledSet, ...],
    source: TileSource,
    device: torch.device,
    autocast: torch.autocast,
    ranks: Ranks,
    fresh: bool,
) -> Learner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        task = DistillTask(
            config.objective,
            student.embed_dim,
            teachers,
            weights=config.teacher_weight,
            drop=config.teacher_drop,
            seed=config.seed,
        )
        heads = {each.name: LabelledHead(student.embed_dim, each) for each in labelled}
    lesson = Lesson(student, task, heads).to(device)
    if fresh:
        with closing(_fit_crops(config, source, device, min(len(source), _ADAPTOR_TILES))) as crops:
            task.fit_adaptors(student, teachers, (images for _, images in crops), autocast)
    return learner_of(
        config,
        lesson,
        average_of(student),
        name=student.name,
        folder=student_folder(config, student.name),
        init=init,
        device=device,
        ranks=ranks,
    )


def _student_model(config: DistillConfig, name: str, encoder: Encoder) -> tuple[nn.Module, str]:
    """The student's model and how it starts; for ``pruned`` the weights are set later, when crops can be made."""
    model: nn.Module = build_student(name, seed=config.seed)
    init = config.init
    if init in ("auto", "pruned"):
        reason = why_not_prunable(model, encoder.model) if init == "auto" else None  # else pruning itself complains
        return model, f"random, since {reason}" if reason else "pruned"
    if init == "random":
        return model, init
    if init == "layers":
        return build_student(name, seed=config.seed, init="teacher", teacher=encoder.model), init
    return build_student(name, seed=config.seed, init="bundle", init_from=init), init


def untrained_student(parts: Parts, learner: Learner) -> Encoder:
    """The student's architecture with random weights: the zero of every retention."""
    model = build_student(learner.name, seed=parts.config.seed)
    encoder = wrap(model, name="untrained", mean=learner.student.mean, std=learner.student.std)
    return encoder.to(parts.device).eval()


def _fit_crops(
    config: DistillConfig, source: TileSource, device: torch.device, tiles: int, ranks: Ranks | None = None
) -> Generator[tuple[NDArray[np.int64], torch.Tensor]]:
    """One clean global crop of each of the first ``tiles`` tiles of a shuffled order, in batches, with their places.

    With ``ranks`` each takes its share, and a batch of which a rank has none comes as one black crop without a place;
    otherwise every rank sees them all.
    """
    views = dataclasses.replace(config.views, n_global=1, n_local=0, teacher_view="clean")
    size, ranks = config.batch_tiles, ranks or Ranks()

    def positions(step: int) -> NDArray[np.int64]:
        own = positions_of(step * size, size, rank=ranks.rank, world=ranks.world)
        return own[own < tiles]

    steps = math.ceil(tiles / size)
    with closing(batches(source, positions, 0, steps, config.seed, workers=config.loader_threads)) as stream:
        lost: dict[str, str] = {}
        found = False
        for batch in stream:
            lost |= batch.unreadable
            if not len(batch.positions_B):
                if ranks.world > 1:  # a sharded teacher waits for every rank: an empty one takes part with nothing
                    yield batch.positions_B, torch.zeros(1, 3, views.global_px, views.global_px, device=device)
                continue
            found = True
            crops = make_views(
                batch.tiles_BCHW.to(device), batch.sizes_B2, batch.positions_B + _FIT_STREAM, views, config.seed
            )
            yield batch.positions_B, crops.clean_GBCHW[0]
    if lost and not found:
        raise DataError(
            "none of the tiles can be read",
            where=source.root,
            got="; ".join(f"{at}: {why}" for at, why in lost.items())[:300],
        )
