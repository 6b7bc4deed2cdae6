"""Slides -> a feature folder: which slides are still to do, on which devices, and what is written at the end."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from histill.errors import ConfigError, HistillError, RunError
from histill.extract.config import FORMAT, ExtractConfig
from histill.extract.feature_file import require_zarr
from histill.extract.folder import FeatureFolder
from histill.extract.model import FeatureModel, devices_of, open_model, settle_mpp
from histill.extract.slides import Extraction
from histill.models.known import known_of, short_name
from histill.tiles.cluster import join_cluster, slides_on_ray
from histill.tiles.config import TileConfig
from histill.tiles.cutting import SlideJob
from histill.tiles.jobs import jobs_of
from histill.tiles.pool import Pool, cores
from histill.tiles.progress import TilingProgress
from histill.tiles.slide_folder import SlideRecord
from histill.tiles.write import Outcome, claim

__all__ = ["extract_part", "extract_slides"]

_OF_TILING = ("tile_px", "stride_px", "tissue_min", "tolerance", "upsample", "trust_tiff_resolution", "reader")
_OF_GRID = ("mpp", "tissue", "quality")


def extract_slides(config: ExtractConfig, console: Console) -> Outcome:
    """Make or complete a feature folder.

    Raises
    ------
    ConfigError, ModelError, RunError, DataError
        The command line, the model, the folder or the disk is at fault. A slide at fault gets a record with its error
        instead.
    """
    if config.model is None or config.out is None:
        missing = "--model" if config.model is None else "--out"
        raise ConfigError(f"{missing} is not given", remedy="histill extract SLIDES... --model M --out OUT")
    if config.format == "zarr":
        require_zarr()
    known = known_of(config.model)
    allowed_mpp = settle_mpp(config, known)
    folder, devices = FeatureFolder(config.out), ["cpu"] if config.ray is not None else devices_of(config.gpus)
    engine = _engine(config, folder)
    cluster = None if config.ray is None else join_cluster(config.ray, 0)
    model = open_model(config, known, engine, devices[0])
    if engine == "auto":
        console.print(f"engine: {model.engine.engine}, the fastest here", highlight=False)
    tiling = config.tiling(mpp=allowed_mpp[0] if allowed_mpp else 0.5, tile_px=model.engine.input_px)
    jobs = _jobs(config, tiling, console)
    try:
        finished = claim(folder, _settings(config, tiling, model), jobs)
    except RunError:
        begun = _engine(config, folder) if engine == "auto" else model.engine.engine
        if begun in ("auto", model.engine.engine):
            raise
        console.print(f"engine: {begun}, with which another process has begun this folder meanwhile", highlight=False)
        model = open_model(config, known, begun, devices[0])
        finished = claim(folder, _settings(config, tiling, model), jobs)
    outcome = Outcome(there=sum(job.id in finished for job in jobs))
    todo = [job for job in jobs if job.id not in finished]
    share = config.workers or (1 if config.ray is not None else max(1, cores() // len(devices)))
    part = _Part(config=config, engine=model.engine.engine, allowed_mpp=allowed_mpp, workers=share)
    try:
        _extract(part, todo, model, devices, outcome, console, cluster)
        # Another process had these. Unless it has finished them meanwhile, it may be gone.
        left = [job for job in todo if job.id in set(outcome.elsewhere) and not folder.is_done(job.id)]
        if left:
            outcome.elsewhere.clear()
            _extract(part, left, model, devices, outcome, console, cluster)
    except BaseException:
        with suppress(OSError, HistillError):  # the first error is the one to show
            _finish(folder)
        raise
    _finish(folder)
    return outcome


def _engine(config: ExtractConfig, folder: FeatureFolder) -> str:
    """The engine that was asked for; for ``auto`` the one that the folder was begun with."""
    if config.engine != "auto":
        return config.engine
    if (folder.root / folder.settings_name).exists():
        return str(folder.settings()["engine"])
    if config.ray is not None:
        raise ConfigError(
            "the fastest engine of this machine may not be that of the cluster's", where="--engine", remedy="name one"
        )
    return "auto"


def _jobs(config: ExtractConfig, tiling: TileConfig, console: Console) -> list[SlideJob]:
    """The slides of a command, each with its coordinates where some are given."""
    jobs = [dataclasses.replace(job, outline=True) for job in jobs_of(tiling, console)]
    given = config.coords
    if given is None:
        return jobs
    if given.is_file():
        if len(jobs) != 1:
            got = f"one file for {len(jobs)} slides"
            raise ConfigError("coordinates are of one slide", where="--coords", got=got, remedy="give their folder")
        return [dataclasses.replace(jobs[0], coords=given)]
    if not given.is_dir():
        raise ConfigError("these coordinates do not exist", where="--coords", got=given)
    everyone = jobs if tiling.shard_of()[1] == 1 else jobs_of(dataclasses.replace(tiling, shard="0/1"), console)
    stems = Counter(job.path.stem for job in everyone)
    found = [dataclasses.replace(job, coords=_coords_of(given, job, stems)) for job in jobs]
    for path, times in Counter(job.coords for job in found).items():
        if times > 1:
            got = ", ".join(job.id for job in found if job.coords == path)
            raise ConfigError("several slides would take one file of coordinates", where=path, got=got)
    return found


def _coords_of(folder: Path, job: SlideJob, stems: Mapping[str, int]) -> Path:
    """A slide's file of coordinates; where there is none, the name that it should have: the slide then fails.

    Named by the slide's id, or by its file alone where no other slide has a file of that name.
    """
    calls = (job.id, job.path.stem) if stems[job.path.stem] == 1 else (job.id,)
    names = [f"{name}{end}.h5" for name in calls for end in ("_patches", "")]
    there = list(dict.fromkeys(folder / name for name in names if (folder / name).is_file()))
    if len(there) > 1:
        got = " and ".join(path.name for path in there)
        raise ConfigError("a slide has two files of coordinates", where=folder, got=got, remedy="remove one")
    return there[0] if there else folder / names[0]


def _settings(config: ExtractConfig, tiling: TileConfig, model: FeatureModel) -> dict[str, Any]:
    """What decides the features: the content of ``features.json``."""
    engine, tiles = model.engine, tiling.settings()
    names = _OF_TILING if config.coords is not None else _OF_TILING + _OF_GRID
    return {
        "format": FORMAT,
        "model": short_name(engine.name),
        "model_hash": engine.content_hash(),
        "mean": list(engine.mean),
        "std": list(engine.std),
        "engine": engine.engine,
        "embedding": model.embedding,
        "width": model.width,
        "batch": config.batch,
        "tokens": config.tokens,
        "files": config.format,
        "tiles_by": "grid" if config.coords is None else "coordinates",
    } | {name: tiles[name] for name in names}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What another process needs to know."""

    config: ExtractConfig
    engine: str
    allowed_mpp: tuple[float, ...]
    workers: int
    """Processes that read, for each model."""


def _extract(
    part: _Part,
    todo: Sequence[SlideJob],
    model: FeatureModel,
    devices: Sequence[str],
    outcome: Outcome,
    console: Console,
    cluster: Any,
) -> None:
    if not todo:
        return
    if cluster is not None:
        _on_ray(cluster, part, todo, outcome, console)
    elif len(devices) == 1:
        _here(part, model, todo, outcome, console, "features")
    else:
        pool = Pool(len(devices))
        try:
            shares = [todo[number :: len(devices)] for number in range(len(devices))]
            futures = [pool.submit(extract_part, part, *each) for each in zip(devices, shares, strict=True)]
            for future in futures:
                theirs = future.result()
                for record in [*theirs.done, *theirs.failed]:
                    outcome.add(record)
                outcome.elsewhere += theirs.elsewhere
        finally:
            pool.close()


def _here(
    part: _Part, model: FeatureModel, jobs: Sequence[SlideJob], outcome: Outcome, console: Console, task: str
) -> None:
    assert part.config.out is not None
    folder = FeatureFolder(part.config.out)
    with TilingProgress(console, len(jobs), task) as bar:
        Extraction(part.config, model, folder, part.allowed_mpp, part.workers, outcome, bar).run(jobs)


def extract_part(part: _Part, device: str, jobs: Sequence[SlideJob]) -> Outcome:
    """What the process of one GPU, or of one slide on a cluster, does."""
    outcome = Outcome()
    _here(part, _opened(part, device), jobs, outcome, Console(stderr=True), f"features {device}")
    return outcome


@lru_cache(maxsize=1)
def _opened(part: _Part, device: str) -> FeatureModel:
    """The model of this process: on a cluster slide after slide comes to the same one."""
    assert part.config.model is not None
    return open_model(part.config, known_of(part.config.model), part.engine, device)


def _on_ray(ray: Any, part: _Part, todo: Sequence[SlideJob], outcome: Outcome, console: Console) -> None:
    """Each slide a task, with ``--workers`` cores and, with ``--gpus``, a GPU of the cluster."""
    device = "cuda:0" if part.config.gpus > 0 else "cpu"

    def one_slide(job: SlideJob, folder: FeatureFolder) -> SlideRecord | None:
        found = extract_part(part, device, [job])
        records = [*found.done, *found.failed]
        return records[0] if records else None

    with TilingProgress(console, len(todo), "features") as bar:
        folder = FeatureFolder(part.config.out or Path())
        needs = {"num_cpus": part.workers, "num_gpus": int(device != "cpu")}
        slides_on_ray(ray, one_slide, todo, folder, outcome, bar, **needs)


def _finish(folder: FeatureFolder) -> None:
    """Write the tables of all slides that are finished, by whichever process."""
    with folder.index_lock():
        folder.sweep()
        folder.write_tables(folder.records())
    folder.tidy()
