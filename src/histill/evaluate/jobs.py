"""One benchmark (or one task of EVA) with one embedder: where its results lie, and how it is called."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from histill import config as configs
from histill.errors import ConfigError, DataError
from histill.evaluate.config import (
    BENCHMARKS,
    BenchmarkConfig,
    EncoderConfig,
    EvaConfig,
    HestConfig,
    PairedConfig,
    PathorobConfig,
    PlismConfig,
    TilesConfig,
)
from histill.evaluate.cost import cost_of
from histill.evaluate.embedding import EncoderEmbedder, FeatureCache
from histill.evaluate.encoders import safe_name, slide_embedder
from histill.evaluate.eva.run import run_eva
from histill.evaluate.eva.tasks import find_task
from histill.evaluate.hest.run import run_hest
from histill.evaluate.pathorob.run import run_pathorob
from histill.evaluate.plism.run import run_plism
from histill.evaluate.results import Result, read_result, write_result
from histill.evaluate.slide_features import find_features
from histill.evaluate.slide_level import run_slides
from histill.evaluate.tables import run_paired, run_tiles
from histill.models.machine import pick_device

__all__ = ["Job", "jobs_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A part of a command that gives one result per embedder."""

    config: BenchmarkConfig
    task: str | None = None
    """Of EVA, whose tasks are data sets of their own; ``slide`` of tiles at that level."""

    @property
    def benchmark(self) -> str:
        """Its name on the command line."""
        return next(name for name, kind in BENCHMARKS.items() if isinstance(self.config, kind))

    @property
    def title(self) -> str:
        """What tables call it: ``plism``, ``eva/mhist``."""
        return f"{self.benchmark}/{self.task}" if self.task else self.benchmark

    @property
    def data(self) -> Path | None:
        """Where the data are."""
        match self.config:
            case EvaConfig():
                assert self.task is not None
                return self.config.task_root(self.task)
            case TilesConfig() | PairedConfig():
                return self.config.table
            case PlismConfig():
                return self.config.root or self.config.features
            case _:
                return self.config.root

    def folder(self, encoder: str, pooling: str) -> Path:
        """``OUT/BENCHMARK/ENCODER__POOLING``, with the task below it."""
        folder = self.config.require_out() / self.benchmark / f"{safe_name(encoder)}__{pooling}"
        return folder / self.task if self.task else folder

    def run(self, embedder: EncoderEmbedder | None, console: Console) -> tuple[Result, Path]:
        """Run it, or what is left of it.

        Parameters
        ----------
        embedder
            None for a folder of features.
        console
            For progress.

        Returns
        -------
        tuple
            The result, and the folder that holds it.

        Raises
        ------
        HistillError
            Of the benchmark: data that are not in their layout, features that are not finite, wrong options.
        ConfigError
            The folder holds results that were made otherwise: by another encoder, from other data, with other
            settings. They are not replaced.
        """
        name, pooling, weights = self._named(embedder)
        folder = self.folder(name, pooling)
        settings = self.settings(name, embedder)
        if weights:
            settings |= {"weights": weights, "pooling": pooling}
        before = _finished(folder)
        if before is not None:
            _keep_apart(folder, before.settings, settings)
        cache = FeatureCache(self.config.cache or self.config.require_out() / "features")
        if embedder is None:
            result = _run_features(self.config, cache, folder, console)
        else:
            result = _run(self, embedder, cache, folder, console)
        date = before.date if before and before.scores == result.scores else ""
        result = replace(result, date=date or time.strftime("%Y-%m-%d"), settings=settings)
        result = replace(result, weights=weights)
        if embedder is not None:
            result = replace(result, data=result.data | {"cost": cost_of(embedder, cache.folder)})
        write_result(result, folder)
        return result, folder

    def _named(self, embedder: EncoderEmbedder | None) -> tuple[str, str, str]:
        """Name, pooling and weights of the encoder; of features as far as they say."""
        if embedder is not None:
            return embedder.name, embedder.pooling, embedder.weights
        assert isinstance(self.config, TilesConfig | PlismConfig | PathorobConfig)
        assert self.config.features is not None
        if isinstance(self.config, TilesConfig):
            source = find_features(self.config.features)
            return source.encoder, source.pooling, source.weights
        return self.config.features.resolve().name, "as-extracted", ""

    def settings(self, encoder: str, embedder: EncoderEmbedder | None) -> dict[str, Any]:
        """All that was asked for and may change a number: encoder, data and the benchmark's own options."""
        found: dict[str, Any] = {"encoder": encoder}
        if embedder is not None:
            sizes = {"input_px": embedder.input_px, "precision": embedder.precision}
            found |= {"weights": embedder.weights, "pooling": embedder.pooling} | sizes
        places = {name: getattr(self.config, name, None) for name in ("root", "table", "features")}
        if isinstance(self.config, EvaConfig) and self.data is not None:
            places["root"] = self.data
        found |= {name: str(path.resolve()) for name, path in places.items() if path is not None}
        asked = configs.to_dict(self.config)
        elsewhere = {entry.name for entry in fields(EncoderConfig)} | {*places, "task", "memory_gb", "embeddings"}
        if isinstance(self.config, TilesConfig) and self.config.level == "tile":
            elsewhere |= {"level", *TilesConfig.SLIDE_OPTIONS}
        own = {name: value for name, value in asked.items() if name not in elsewhere}
        return found | {name: sorted(value) if isinstance(value, list) else value for name, value in own.items()}


def jobs_of(config: BenchmarkConfig) -> list[Job]:
    """One job; for EVA one per task.

    Raises
    ------
    ConfigError
        There is no such task.
    """
    if isinstance(config, EvaConfig):
        return [Job(config=config, task=find_task(task).name) for task in dict.fromkeys(config.task)]
    if isinstance(config, TilesConfig) and config.level == "slide":
        return [Job(config=config, task="slide")]
    return [Job(config=config)]


def _finished(folder: Path) -> Result | None:
    """Results that are there and whole. What cannot be read, or was killed in its last moment, is written anew."""
    try:
        found = read_result(folder)
    except DataError:
        return None
    return found if found.date else None


def _keep_apart(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Stop before a number is lost to one that was made otherwise."""
    names = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    if names:
        before, now = (", ".join(f"{name} {each.get(name, 'not stated')}" for name in names) for each in (there, asked))
        raise ConfigError(
            "this folder holds results that were made otherwise, and they are not replaced",
            where=folder,
            got=f"now {now}",
            allowed=f"as before: {before}",
            remedy="choose another --out (--cache FOLDER shares the embeddings), or remove the folder",
        )


def _run_features(config: BenchmarkConfig, cache: FeatureCache, out: Path, console: Console) -> Result:
    if isinstance(config, PlismConfig):
        return run_plism(
            features=config.features,
            root=None,
            embedder=None,
            cache=cache,
            out=out,
            n_tiles=config.n_tiles,
            compat=config.compat,
            memory_gb=config.memory_gb,
            device=pick_device(config.device),
            console=console,
        )
    if isinstance(config, TilesConfig):
        assert config.table is not None
        assert config.features is not None
        return run_slides(
            csv_path=config.table,
            features=config.features,
            out=out,
            folds=config.folds,
            runs=config.runs,
            max_tiles=config.max_tiles,
            embeddings=config.embeddings,
            device=str(pick_device(config.device)),
            console=console,
        )
    assert isinstance(config, PathorobConfig)
    assert config.root is not None
    return run_pathorob(
        root=config.root,
        datasets=config.datasets or None,
        embedder=None,
        cache=cache,
        out=out,
        features=config.features,
        repeats=config.repeats,
        console=console,
    )


def _run(job: Job, embedder: EncoderEmbedder, cache: FeatureCache, out: Path, console: Console) -> Result:
    config, device, data = job.config, pick_device(job.config.device), job.data
    assert data is not None
    match config:
        case PlismConfig():
            return run_plism(
                features=None,
                root=data,
                embedder=embedder,
                cache=cache,
                out=out,
                n_tiles=config.n_tiles,
                compat=config.compat,
                memory_gb=config.memory_gb,
                device=device,
                console=console,
            )
        case HestConfig():
            return run_hest(
                root=data,
                tasks=config.tasks or None,
                embedder=embedder,
                cache=cache,
                out=out,
                exact=config.exact,
                console=console,
            )
        case PathorobConfig():
            return run_pathorob(
                root=data,
                datasets=config.datasets or None,
                embedder=embedder,
                cache=cache,
                out=out,
                repeats=config.repeats,
                console=console,
            )
        case EvaConfig():
            return _run_eva(job, config, embedder, cache, out, console)
    run = run_tiles if isinstance(config, TilesConfig) else run_paired
    return run(csv_path=data, embedder=embedder, input_px=embedder.input_px, cache=cache, out=out, console=console)


def _run_eva(
    job: Job, config: EvaConfig, embedder: EncoderEmbedder, cache: FeatureCache, out: Path, console: Console
) -> Result:
    assert job.task is not None
    return run_eva(
        task=job.task,
        root=config.task_root(job.task),
        embedder=embedder,
        cache=cache,
        out=out / "runs",
        console=console,
        runs=config.runs or None,
        quick=config.quick,
        embed_slide=slide_embedder(embedder, block=embedder.batch),
        device=str(pick_device(config.device)),
    )
