"""What `histill evaluate` can be told. Imports no torch and reads no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from histill.errors import ConfigError

__all__ = [
    "BENCHMARKS",
    "AllConfig",
    "BenchmarkConfig",
    "EvaConfig",
    "HestConfig",
    "PairedConfig",
    "PathorobConfig",
    "PlismConfig",
    "TilesConfig",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Who embeds, how, and where results go."""

    needs: ClassVar[dict[str, str]] = {}
    """Options without which the command cannot run -> what they are."""

    encoder: tuple[str, ...] = ()
    """Names as `histill models` prints them, timm:NAME, hf-hub:ORG/NAME, local-dir:FOLDER, or model folders."""
    out: Path | None = None
    """Folder of the results: OUT/BENCHMARK/ENCODER__POOLING. The same command again does only what is missing."""
    pooling: tuple[Literal["auto", "cls", "cls+mean"], ...] = ("auto",)
    """One or several; auto: the encoder's own rule."""
    input_px: int = 0
    """Side in pixels that tiles are resized to; 0: the encoder's own."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the encoder; auto: bf16 where the processor has it."""
    batch: int = 64
    """Tiles per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cache: Path | None = None
    """Folder of the embeddings, shared by all benchmarks; OUT/features if not given."""

    def __post_init__(self) -> None:
        """Check each field."""
        _at_least(self, "input_px", 0)
        _at_least(self, "batch", 1)
        if not self.pooling:
            raise ConfigError("no pooling is given", where="--pooling", allowed="auto, cls, cls+mean")

    def require_out(self) -> Path:
        """``out``, which has to be given."""
        if self.out is None:
            raise ConfigError("no folder is given for the results", where="--out", remedy="add --out OUT")
        return self.out

    def require_complete(self) -> None:
        """Refuse a command that lacks its folder for results, its encoder or its data."""
        self.require_out()
        for name, what in self.needs.items():
            _named(getattr(self, name), f"--{name}", what)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlismConfig(EncoderConfig):
    """PLISM: how much features change with the scanner and the staining."""

    root: Path | None = None
    """The data set's folder, which holds <slide>.tif.h5."""
    features: Path | None = None
    """Instead of an encoder and a root: a folder that holds <slide>/features.npy."""
    n_tiles: int | Literal["all"] = 8139
    """Tiles per slide."""
    compat: Literal["none", "fp16"] = "none"
    """none: exact. fp16: the numbers of the original, with its rounding."""
    memory_gb: float = 1.0
    """Limit (10^9 bytes) on slides and working memory while pairs are compared."""

    def __post_init__(self) -> None:
        """Check each field."""
        EncoderConfig.__post_init__(self)
        if self.n_tiles != "all":
            _at_least(self, "n_tiles", 1)
        if not self.memory_gb > 0:
            raise ConfigError("out of range", where="--memory-gb", got=self.memory_gb, allowed="above 0")

    def require_complete(self) -> None:
        """Refuse a command without features and without an encoder and its data, or with both."""
        self.require_out()
        _no_encoder_options(self, self.features)
        _features_or_encoder(self.encoder, self.root, self.features, root_too=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HestConfig(EncoderConfig):
    """HEST: gene expression from patches."""

    needs: ClassVar[dict[str, str]] = {"encoder": "an encoder", "root": "the benchmark's folder"}

    root: Path | None = None
    """The benchmark's folder, which holds a folder per task."""
    tasks: tuple[str, ...] = ()
    """The tasks that are wanted; all nine if none is named."""
    exact: bool = False
    """Solve the ridge exactly, and not with the original's solver that stops early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaConfig(EncoderConfig):
    """The EVA protocol: patch and slide classification, segmentation."""

    needs: ClassVar[dict[str, str]] = {"encoder": "an encoder", "task": "a task", "root": "the data set's folder"}

    root: Path | None = None
    """The task's data set; for several tasks a folder that holds one folder per task, called like the task."""
    task: tuple[str, ...] = ()
    """One or several: bach, breakhis, crc, gleason, mhist, pcam, cam16, panda, panda_full, consep, monusac."""
    runs: int = 0
    """Runs per task; 0: as many as the original (5, slides 20; 2 with --quick)."""
    quick: bool = False
    """A subset of the rows and a shorter training: a rough number."""

    def __post_init__(self) -> None:
        """Check each field."""
        EncoderConfig.__post_init__(self)
        _at_least(self, "runs", 0)

    def task_root(self, task: str) -> Path:
        """Folder of one task's data set."""
        assert self.root is not None
        return self.root if len(self.task) == 1 else self.root / task


@dataclass(frozen=True, slots=True, kw_only=True)
class PathorobConfig(EncoderConfig):
    """PathoROB: whether an embedding is ordered by biology or by the hospital."""

    root: Path | None = None
    """Folder of the metadata and the images."""
    datasets: tuple[str, ...] = ()
    """camelyon, tolkach_esca, tcga; all if none is named."""
    features: Path | None = None
    """Instead of an encoder: one encoder's feature files, as the original writes them."""
    repeats: int = 20
    """Draws of the performance drop; 0 leaves it out."""

    def __post_init__(self) -> None:
        """Check each field."""
        EncoderConfig.__post_init__(self)
        _at_least(self, "repeats", 0)

    def require_complete(self) -> None:
        """Refuse a command without features and without an encoder and its data, or with both."""
        self.require_out()
        _no_encoder_options(self, self.features)
        _features_or_encoder(self.encoder, self.root, self.features, root_too=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesConfig(EncoderConfig):
    """Probes on your own labelled tiles, or slides (--level slide)."""

    SLIDE_OPTIONS: ClassVar[tuple[str, ...]] = ("features", "folds", "runs", "max_tiles", "embeddings")
    """Fields that --level slide alone looks at."""

    level: Literal["tile", "slide"] = "tile"
    """tile: an encoder and labelled tiles. slide: extracted features and labelled slides."""
    table: Path | None = None
    """CSV with the columns path, label, slide, split and, where known, patient; with --level slide: slide, label and,
    where known, patient, and fold or split."""
    features: Path | None = None
    """slide: folder that histill extract wrote."""
    folds: int = 5
    """slide: folds that are made where the table has none; whole patients, stratified by class."""
    runs: int = 5
    """slide: networks per fold, whose probabilities are averaged."""
    max_tiles: int = 10_000
    """slide: tiles of a slide that the networks see at most; 0: all."""
    embeddings: bool = False
    """slide: also write what each slide is to both classifiers: embeddings.h5."""

    def __post_init__(self) -> None:
        """Check each field."""
        EncoderConfig.__post_init__(self)
        _at_least(self, "folds", 2)
        _at_least(self, "runs", 1)
        _at_least(self, "max_tiles", 0)

    def require_complete(self) -> None:
        """Refuse a command without what its level needs, or with what only the other looks at."""
        self.require_out()
        if self.level == "slide":
            if self.encoder:
                raise ConfigError(
                    "slides come as features, and an encoder is given too", where="--encoder", remedy="leave it out"
                )
            _named(self.features, "--features", "the folder that histill extract wrote")
            _named(self.table, "--table", "a table of slides")
            _no_encoder_options(self, self.features)
            return
        _named(self.encoder, "--encoder", "an encoder")
        _named(self.table, "--table", "a table of tiles")
        plain = TilesConfig()
        for name in self.SLIDE_OPTIONS:
            if getattr(self, name) != getattr(plain, name):
                where = f"--{name.replace('_', '-')}"
                raise ConfigError("this option is for slides", where=where, remedy="add --level slide, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedConfig(EncoderConfig):
    """PLISM's metrics on your own fields, each shown by several scanners."""

    needs: ClassVar[dict[str, str]] = {"encoder": "an encoder", "table": "a table of tiles"}

    table: Path | None = None
    """CSV with the columns path, slide, scanner, x, y."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllConfig(EncoderConfig):
    """All benchmarks whose data are there."""

    needs: ClassVar[dict[str, str]] = {"encoder": "an encoder", "roots": "a file that says where the data are"}

    roots: Path | None = None
    """JSON or TOML: benchmark -> folder (tiles, paired: table), or a group with root and the benchmark's options."""


BenchmarkConfig = PlismConfig | HestConfig | EvaConfig | PathorobConfig | TilesConfig | PairedConfig

BENCHMARKS: dict[str, type[BenchmarkConfig]] = {
    "plism": PlismConfig,
    "hest": HestConfig,
    "eva": EvaConfig,
    "pathorob": PathorobConfig,
    "tiles": TilesConfig,
    "paired": PairedConfig,
}
"""Benchmark -> its options."""


def _at_least(config: object, name: str, least: int) -> None:
    if (got := getattr(config, name)) < least:
        where = f"--{name.replace('_', '-')}"
        raise ConfigError("out of range", where=where, got=got, allowed=f"{least} or more")


def _named(value: object, where: str, what: str) -> None:
    if not value:
        raise ConfigError(f"{what} is needed", where=where, remedy=f"add {where}; see --help")


def _no_encoder_options(config: EncoderConfig, features: Path | None) -> None:
    """Features are as they were extracted: an option of the encoder would change nothing, and must not seem to."""
    plain = EncoderConfig()
    given = [name for name in ("pooling", "input_px", "precision") if getattr(config, name) != getattr(plain, name)]
    if features is not None and given:
        where = f"--{given[0].replace('_', '-')}"
        raise ConfigError("features are given, which this option cannot change", where=where, remedy="leave it out")


def _features_or_encoder(encoder: tuple[str, ...], root: Path | None, features: Path | None, *, root_too: bool) -> None:
    """Either an encoder and a root, or a folder of features (for PathoROB with the root of the metadata)."""
    if features is not None and encoder:
        raise ConfigError(
            "features are given, and an encoder too", where="--features, --encoder", remedy="leave one of them out"
        )
    if features is not None and root is not None and not root_too:
        raise ConfigError("features need no root", where="--features, --root", remedy="leave one of them out")
    if features is None:
        _named(encoder, "--encoder", "an encoder (or --features)")
    if features is None or root_too:
        _named(root, "--root", "the data set's folder")
