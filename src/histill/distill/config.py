"""Everything that a distillation run can be told. No torch here: the command line reads this module alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from histill.distill.views.config import ViewConfig
from histill.errors import ConfigError

__all__ = ["CheckConfig", "DistillConfig", "ObjectiveConfig", "OptimiserConfig", "ScaleConfig"]


def _require(holds: bool, what: str, field_name: str, got: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(what, where=f"--{field_name.replace('_', '-')}", got=got, allowed=allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What the student is asked to match. A weight of 0 switches a term off."""

    dino: float = 1.0
    """Weight of the DINO loss: class token against teacher prototypes, across crops."""
    ibot: float = 1.0
    """Weight of the iBOT loss: patch tokens against teacher prototypes, same crop, same place."""
    koleo: float = 0.1
    """Weight of KoLeo on the student's class token, per view."""
    token_cls: float = 0.0
    """Weight of cosine + smooth-L1 from the class token to the standardised teacher class token."""
    token_patch: float = 0.0
    """Weight of cosine + smooth-L1 from patch tokens to the standardised teacher patch tokens."""
    relational: float = 0.0
    """Weight of the distance and angle loss between the class tokens of a batch."""
    teacher_head: Literal["prototypes", "checkpoint", "none"] = "prototypes"
    """Where the teacher's scores come from: k-means prototypes on its own tokens, heads in a file, or nowhere."""
    head_checkpoint: Path | None = None
    """For teacher_head = checkpoint: a safetensors file with the heads (dino_head.*, ibot_head.*)."""
    standardiser: Literal["mean-std", "phi-s"] = "mean-std"
    """How teacher tokens are standardised: per channel, or PHI-S (equal variance in every rotated channel)."""
    cls_prototypes: int = 0
    """Prototypes for the class token; 0: one for 8 fitted tiles, a power of two from 64 to 131,072."""
    patch_prototypes: int = 0
    """Prototypes for patch tokens; 0: one for 256 tokens of the fitted tiles, a power of two from 64 to 131,072."""
    ibot_tokens: Literal["all", "block", "random"] = "all"
    """Which patch tokens iBOT scores. The student's input is never masked."""
    ibot_share: float = 0.3
    """For block and random: the share of tokens that is scored in an image."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's scores after the warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's scores at step 0."""
    teacher_temperature_warmup: float = 0.1
    """Share of the run over which the temperature rises linearly."""
    student_temperature: float = 0.1
    """Temperature of the student's scores."""
    sinkhorn_iterations: int = 3
    """Sinkhorn-Knopp iterations that balance the teacher's scores over the prototypes."""
    head_hidden: int = 2048
    """Width of the student heads' hidden layers."""
    head_bottleneck: int = 256
    """Width of the student heads' bottleneck."""
    adaptor_hidden: int = 0
    """Hidden width of the adaptor from student to teacher tokens; 0: linear."""
    fit_tiles: int = 20_000
    """Tiles at most from which statistics and prototypes are fitted before step 0."""

    def __post_init__(self) -> None:
        """Check each field, and that the terms fit the teacher's head."""
        weights = ("dino", "ibot", "koleo", "token_cls", "token_patch", "relational")
        for name in weights:
            value = getattr(self, name)
            _require(value >= 0, "a loss weight cannot be negative", f"objective.{name}", value, "0 or more")
        if not any(getattr(self, name) for name in weights if name != "koleo"):
            raise ConfigError(
                "nothing ties the student to the teacher: every distilling loss has weight 0",
                where="--objective",
                remedy="give a weight to dino, ibot, token-cls, token-patch or relational",
            )
        prototype_terms = self.dino + self.ibot > 0
        if prototype_terms and self.teacher_head == "none":
            raise ConfigError(
                "DINO and iBOT need teacher scores",
                where="--objective.teacher-head",
                got="none",
                allowed="prototypes or checkpoint, or --objective.dino 0 --objective.ibot 0",
            )
        if self.teacher_head == "checkpoint" and self.head_checkpoint is None:
            raise ConfigError("teacher_head = checkpoint needs a file", where="--objective.head-checkpoint")
        for name in ("teacher_temperature", "teacher_temperature_start", "student_temperature"):
            value = getattr(self, name)
            _require(value > 0, "a temperature must be positive", f"objective.{name}", value, "above 0")
        for name in ("teacher_temperature_warmup", "ibot_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, "a share is between 0 and 1", f"objective.{name}", value, "0 to 1")
        for name in ("cls_prototypes", "patch_prototypes", "adaptor_hidden"):
            value = getattr(self, name)
            _require(value >= 0, "a count cannot be negative", f"objective.{name}", value, "0 or more")
            if name != "adaptor_hidden":
                _require(
                    value != 1, "one prototype tells nothing apart", f"objective.{name}", value, "0, or 2 and more"
                )
        for name in ("head_hidden", "head_bottleneck", "fit_tiles"):
            value = getattr(self, name)
            _require(value > 0, "a size must be positive", f"objective.{name}", value, "1 or more")
        _require(
            self.sinkhorn_iterations >= 1,
            "Sinkhorn needs an iteration",
            "objective.sinkhorn_iterations",
            self.sinkhorn_iterations,
            "1 or more",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW and its schedules."""

    base_lr: float = 2e-4
    """Learning rate for 1,024 tiles a step; the peak is base_lr * sqrt(batch_tiles / 1024)."""
    warmup: float = 0.1
    """Share of the run over which the learning rate rises linearly; after it, a cosine to final_lr."""
    final_lr: float = 1e-6
    """Learning rate at the end, not scaled."""
    weight_decay: float = 0.04
    """Weight decay at step 0; none on biases, norms and layer scales."""
    weight_decay_end: float = 0.2
    """Weight decay at the end (cosine)."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.999
    """AdamW's second decay rate."""
    clip: float = 3.0
    """Largest norm of the student's gradient; 0: no limit."""
    freeze_last_layer: float = 0.0125
    """Share of the run in which the heads' last layers stand still (DINOv2: 1 of 80 epochs or more)."""
    ema: float = 0.994
    """Momentum of the student's moving average at step 0, or 1 - 20 / steps if that is less; it rises to 1 along a
    cosine."""

    def __post_init__(self) -> None:
        """Check each field."""
        _require(self.base_lr > 0, "must be positive", "optimiser.base_lr", self.base_lr, "above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 < value < 1, "out of range", f"optimiser.{name}", value, "between 0 and 1")
        for name in ("warmup", "freeze_last_layer", "ema"):
            value = getattr(self, name)
            _require(0 <= value <= 1, "out of range", f"optimiser.{name}", value, "0 to 1")
        for name in ("final_lr", "weight_decay", "weight_decay_end", "clip"):
            value = getattr(self, name)
            _require(value >= 0, "cannot be negative", f"optimiser.{name}", value, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """Is it learning? Looked at every n steps and at the end."""

    every_steps: int = 0
    """Steps between two checks; 0: six checks over the run."""
    tables: tuple[Path, ...] = ()
    """CSV tables to check on: path,label,slide,split (probes) or path,slide,scanner,x,y (scanner retrieval).
    None given: every such table that lies directly in the folder of tiles."""
    agreement_tiles: int = 512
    """Tiles on which the agreement with the teacher is measured."""
    hold_out_test: bool = True
    """Keep the tiles that a labelled table marks as split = test out of the training set."""

    def __post_init__(self) -> None:
        """Check each field."""
        _require(self.every_steps >= 0, "cannot be negative", "checks.every_steps", self.every_steps, "0 or more")
        _require(
            self.agreement_tiles >= 32, "too few tiles", "checks.agreement_tiles", self.agreement_tiles, "32 or more"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledTask:
    """A labelled set that joins the run."""

    table: Path
    """CSV with `path` and the column; `split` where there is one."""
    column: str = "label"
    """Column with the class or the number."""
    kind: Literal["classification", "regression"] = "classification"
    """Cross-entropy with classes weighted to count the same, or squared error of the standardised number."""
    weight: float = 1.0
    """Weight of its loss."""

    @classmethod
    def read(cls, text: str) -> LabelledTask:
        """Read ``TABLE,column=NAME,kind=KIND,weight=NUMBER``; all but the table may be left out."""
        table, *settings = text.split(",")
        values: dict[str, Any] = dict(setting.partition("=")[::2] for setting in settings)
        for key in values:
            if key not in ("column", "kind", "weight"):
                raise ConfigError(
                    "a labelled set has no such setting", where="--labelled", got=key, allowed="column, kind, weight"
                )
        if values.get("kind", "regression") not in ("classification", "regression"):
            raise ConfigError(
                "there is no such kind of task",
                where="--labelled",
                got=values["kind"],
                allowed="classification, regression",
            )
        try:
            weight = float(values.pop("weight", 1.0))
        except ValueError:
            weight = -1.0
        _require(0 < weight < math.inf, "a weight is a positive number", "labelled", text, "weight=0.5")
        return cls(table=Path(table), weight=weight, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConfig:
    """How the work is laid out in memory and over processes (torchrun). Only micro-tiles changes what is learnt."""

    students: Literal["replicate", "shard"] = "replicate"
    """Every process holds each student and its optimizer whole (DDP), or its share of them (FSDP2)."""
    teachers: Literal["replicate", "shard"] = "replicate"
    """Every process holds each teacher whole, or its share of it (FSDP2), for teachers that do not fit."""
    micro_tiles: int = 0
    """Tiles of a process that a student holds activations for at once; 0: its whole share of the step. The teacher
    sees the whole share in one go. KoLeo and the relational loss then compare the tiles of one such part."""
    checkpoint_activations: bool = False
    """Compute the students' activations again in the backward pass instead of keeping them: less memory, more time."""
    pack: bool = False
    """Run the global and local crops of a student through its layers together; attention stays within each crop."""
    compile: bool = False
    """Compile the blocks of teachers and students (torch.compile): minutes at the start, faster steps on GPUs."""

    def __post_init__(self) -> None:
        """Check each field."""
        _require(
            self.micro_tiles >= 0 and self.micro_tiles != 1,
            "KoLeo and Sinkhorn compare tiles",
            "scale.micro_tiles",
            self.micro_tiles,
            "0, or 2 and more",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """One distillation run: teachers -> students."""

    teacher: tuple[str, ...] = ()
    """A name from `histill models`, or timm:NAME, hf-hub:ORG/NAME, local-dir:FOLDER; several may be given. The first
    one gives its normalisation, and its weights to a pruned start."""
    teacher_weight: tuple[float, ...] = ()
    """Weight of each teacher's losses; none given: 1 for all."""
    teacher_drop: float = 0.0
    """With several teachers: share of images in which a teacher's token losses are left out, never those of the teacher
    that the image is matched to worst (Sariyildiz et al., UNIC, ECCV 2024, section 3.2)."""
    student: tuple[str, ...] = ("h0-mini",)
    """A name from `histill models --students`; several learn from the same teacher forward."""
    tiles: Path | None = None
    """A tile set of `histill tile`, a folder of tile images at any depth, or slides (read online: slower)."""
    table: Path | None = None
    """CSV with a column `path`: take only these tiles of a folder of images."""
    sampling: Literal["uniform", "slide-balanced"] = "uniform"
    """Of a tile set: every tile equally often, or every slide equally often."""
    hold_out_slides: tuple[str, ...] = ()
    """Ids of slides of a tile set that are not learnt from."""
    out: Path | None = None
    """Folder of the run. The same command again goes on where it stopped."""
    steps: int = 0
    """Length of the run in optimizer steps."""
    minutes: float = 0.0
    """Length of the run in minutes, turned into steps by a short measurement at the start."""
    batch_tiles: int = 64
    """Tiles a step, over all processes."""
    seed: int = 0
    """Seed of everything that is drawn."""
    init: str = "random"
    """How the student starts: random, local-dir:FOLDER (a bundle), layers (a subset of the teacher's), pruned (the
    teacher with fewer channels, heads, neurons, layers), or auto (pruned where that fits, else random; printed)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast of the networks; auto: bf16 where the processor has it. Weights and losses are float32."""
    loader_threads: int = 1
    """Threads that decode tiles ahead of the step."""
    checkpoint_minutes: float = 5.0
    """Minutes between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (extra `tensorboard`)."""
    trust_remote_code: bool = False
    """Run the Python code that a teacher's repository brings (hibou-l). Read that code first."""
    labelled: tuple[str, ...] = ()
    """Labelled sets that join the run, each `TABLE,column=label,kind=classification,weight=1` (these are the defaults;
    the other kind is regression): a CSV with path and the column (and split: rows of split test are left out). Each has
    a linear head on the student's class token, saved beside the student."""
    labelled_tiles: int = 16
    """Tiles of each labelled set in a step, over all processes."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    checks: CheckConfig = field(default_factory=CheckConfig)

    def __post_init__(self) -> None:
        """Check each field and how they fit each other."""
        _require(self.steps >= 0, "cannot be negative", "steps", self.steps, "0 or more")
        _require(self.minutes >= 0, "cannot be negative", "minutes", self.minutes, "0 or more")
        if self.steps and self.minutes:
            raise ConfigError("a run has one length", where="--steps and --minutes", remedy="give one of the two")
        for name, given in (("teacher", self.teacher), ("student", self.student)):
            for value in given:
                if given.count(value) > 1:
                    raise ConfigError(f"a {name} is named twice", where=f"--{name}", got=value)
        _require(
            len(self.teacher_weight) in (0, len(self.teacher)),
            "one weight for each teacher",
            "teacher_weight",
            f"{len(self.teacher_weight)} weights, {len(self.teacher)} teachers",
            "as many as teachers, or none",
        )
        _require(
            all(weight > 0 for weight in self.teacher_weight),
            "a teacher's weight must be positive",
            "teacher_weight",
            ", ".join(map(str, self.teacher_weight)),
            "above 0",
        )
        _require(0 <= self.teacher_drop < 1, "out of range", "teacher_drop", self.teacher_drop, "0 to below 1")
        if self.teacher_drop and not self.objective.token_cls + self.objective.token_patch:
            raise ConfigError(
                "teachers are dropped from the token losses, which have weight 0",
                where="--teacher-drop",
                remedy="give --objective.token-cls or --objective.token-patch a weight",
            )
        _require(self.labelled_tiles >= 2, "too few", "labelled_tiles", self.labelled_tiles, "2 or more")
        tables = [task.table for task in self.labelled_tasks()]
        _require(
            len({table.stem for table in tables}) == len(tables),
            "two labelled sets of one name",
            "labelled",
            ", ".join(map(str, tables)),
            "tables of different file names",
        )
        _require(self.batch_tiles >= 2, "too few tiles a step", "batch_tiles", self.batch_tiles, "2 or more")
        _require(0 <= self.seed < 2**62, "out of range", "seed", self.seed, "0 to 2^62 - 1")
        _require(self.loader_threads >= 0, "cannot be negative", "loader_threads", self.loader_threads, "0 or more")
        _require(self.keep_checkpoints >= 1, "too few", "keep_checkpoints", self.keep_checkpoints, "1 or more")
        _require(
            self.checkpoint_minutes > 0, "must be positive", "checkpoint_minutes", self.checkpoint_minutes, "above 0"
        )
        if self.objective.dino and self.views.n_global * (self.views.n_global - 1 + self.views.n_local) == 0:
            raise ConfigError(
                "DINO compares a crop with another crop's teacher scores",
                where="--views",
                got=f"{self.views.n_global} global and {self.views.n_local} local crops",
                allowed="two global crops, or one and some local ones",
            )

    def labelled_tasks(self) -> tuple[LabelledTask, ...]:
        """The labelled sets, read."""
        return tuple(LabelledTask.read(text) for text in self.labelled)

    def require_tiles_for(self, world: int) -> None:
        """Check that each of ``world`` processes has a tile in each step."""
        if self.batch_tiles < world:
            raise ConfigError(
                "each process needs a tile in each step",
                where="--batch-tiles",
                got=f"{self.batch_tiles} tiles, {world} processes",
                remedy="raise --batch-tiles",
            )

    def require_complete(self) -> None:
        """Check that the fields without a usable default are given (presets leave them open)."""
        for name, value, remedy in (
            ("teacher", self.teacher, "give --teacher NAME; `histill models` lists the known ones"),
            ("student", self.student, "give --student NAME; `histill models --students` lists them"),
            ("tiles", self.tiles, "give --tiles FOLDER, a tile set or a folder of tile images"),
            ("out", self.out, "give --out FOLDER, where the run is written"),
        ):
            if not value:
                raise ConfigError(f"the {name} is missing", where=f"--{name}", remedy=remedy)
        if not self.steps and not self.minutes:
            raise ConfigError("the length of the run is missing", where="--steps", remedy="give --steps or --minutes")
