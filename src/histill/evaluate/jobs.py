"""One benchmark (or one task of EVA) with one embedder: where its results lie, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from histill import files
from histill.errors import ConfigError
from histill.evaluate.config import (
    BENCHMARKS,
    BenchmarkConfig,
    EvaConfig,
    HestConfig,
    PairedConfig,
    PathorobConfig,
    PlismConfig,
    TilesConfig,
)
from histill.evaluate.embedding import EncoderEmbedder, FeatureCache
from histill.evaluate.encoders import pick_device, safe_name, slide_embedder
from histill.evaluate.eva.run import run_eva
from histill.evaluate.eva.tasks import find_task
from histill.evaluate.hest.run import run_hest
from histill.evaluate.pathorob.run import run_pathorob
from histill.evaluate.plism.run import run_plism
from histill.evaluate.results import Result, write_result
from histill.evaluate.tables import run_paired, run_tiles

__all__ = ["Job", "jobs_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A part of a command that gives one result per embedder."""

    config: BenchmarkConfig
    task: str | None = None
    """Of EVA, whose tasks are data sets of their own."""

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
        """``OUT/BENCHMARK/ENCODER__POOLING``, with the task below it for EVA."""
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
            The folder holds the results of another encoder, whose name gives the same folder.
        """
        if embedder is None:
            assert isinstance(self.config, PlismConfig | PathorobConfig)
            assert self.config.features is not None
            name, pooling = self.config.features.resolve().name, "as-extracted"
        else:
            name, pooling = embedder.name, embedder.pooling
        folder = self.folder(name, pooling)
        _refuse_foreign(folder, name)
        cache = FeatureCache(self.config.cache or self.config.require_out() / "features")
        if embedder is None:
            return _run_features(self.config, cache, folder, console), folder
        return _run(self, embedder, cache, folder, console), folder


def jobs_of(config: BenchmarkConfig) -> list[Job]:
    """One job; for EVA one per task.

    Raises
    ------
    ConfigError
        There is no such task.
    """
    if isinstance(config, EvaConfig):
        return [Job(config=config, task=find_task(task).name) for task in dict.fromkeys(config.task)]
    return [Job(config=config)]


def _refuse_foreign(folder: Path, encoder: str) -> None:
    """Stop before one encoder's results replace another's; results that cannot be read are written anew."""
    try:
        found = files.read_json(folder / "results.json")["encoder"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if found != encoder:
        raise ConfigError(
            "this folder holds the results of another encoder",
            where=folder,
            got=encoder,
            allowed=found,
            remedy="choose another --out",
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
    result = run_eva(
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
    write_result(result, out)
    return result
