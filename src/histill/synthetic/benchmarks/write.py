"""Folders for every benchmark, and the table that says where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from histill.errors import ConfigError, DataError, nearest
from histill.files import atomic_folder, write_json
from histill.synthetic.benchmarks.eva import EVA_TASKS
from histill.synthetic.benchmarks.fields import Map, mapper
from histill.synthetic.benchmarks.hest import write_hest
from histill.synthetic.benchmarks.pathorob import write_pathorob
from histill.synthetic.benchmarks.plism import write_plism
from histill.synthetic.tiles import LABELS_CSV, PAIRED_CSV, write_tile_set

__all__ = ["BENCHMARKS", "ROOTS_JSON", "write_benchmarks"]

BENCHMARKS = ("plism", "hest", *(f"eva/{task}" for task in EVA_TASKS), "pathorob", "tiles", "paired")
"""What can be written, by the names that ``histill evaluate all`` prints."""
ROOTS_JSON = "roots.json"
"""What ``histill evaluate all --roots`` takes."""

_FEWEST_TILES = 16  # of which PathoROB's 11 neighbours on other slides, and every class in every split
_TABLE_SLIDES = 6


def write_benchmarks(
    folder: Path,
    *,
    seed: int = 0,
    tiles: int = 48,
    names: Sequence[str] = BENCHMARKS,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Draw tissue and write it as the benchmarks are distributed, small.

    PLISM: 6 slides of ``tiles`` tiles. HEST: one task, 4 sections of ``tiles`` spots. EVA: MHIST, BACH, PCam and CoNSeP
    with about ``tiles`` tiles to train on, and Camelyon16 with 18 slides. PathoROB: the data set Camelyon, 3 centres of
    ``tiles`` tiles. ``tiles`` and ``paired``: one folder of labelled and registered tiles. Results on them say that the
    benchmarks run and that a model sees drawn tissue; they compare to no published number.

    With an encoder of a few million parameters all of them take about ten seconds on one core, but for CoNSeP, whose
    decoder trains for many minutes there.

    Parameters
    ----------
    folder
        Where; must not exist, or be empty. It is whole or absent.
    seed
        Of everything: the same arguments give the same bytes, whatever the ``workers``.
    tiles
        How large, 16 or more.
    names
        Which benchmarks, of :data:`BENCHMARKS`.
    workers
        Number of processes; with more than 1 they are spawned, so a script needs its ``__main__`` guard.
    progress
        Told the name of each benchmark before it is drawn.

    Returns
    -------
    dict
        The table of roots, relative to ``folder``, as it stands in its ``roots.json``.

    Raises
    ------
    ConfigError, DataError
        An unknown benchmark, too few tiles; a folder that is not empty.
    """
    _check(folder, tiles=tiles, names=names, workers=workers)
    wanted = [name for name in BENCHMARKS if name in names]
    with atomic_folder(folder) as temporary, mapper(workers) as map_over:
        for name in wanted:
            if progress is not None:
                progress(name)
            _write(name, temporary, tiles=tiles, seed=seed, map_over=map_over)
        roots = _roots(wanted)
        write_json(temporary / ROOTS_JSON, roots)
    return roots


def _roots(names: Sequence[str]) -> dict[str, Any]:
    roots: dict[str, Any] = {}
    for name in names:
        benchmark, _, task = name.partition("/")
        if task:  # so few rows gain nothing from the whole schedule; runs as the original: two give no interval
            roots.setdefault(benchmark, {"quick": True, "runs": 5})[task] = name
        else:
            roots[name] = _ROOTS[name]
    return roots


_ROOTS: dict[str, Any] = {
    "plism": "plism",
    "hest": "hest",
    "pathorob": {"root": "pathorob", "repeats": 3},
    "tiles": f"tables/{LABELS_CSV}",
    "paired": f"tables/{PAIRED_CSV}",
}


def _write(name: str, folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    match name:
        case "plism":
            write_plism(folder / "plism", tiles=tiles, seed=seed, map_over=map_over)
        case "hest":
            write_hest(folder / "hest", spots=tiles, seed=seed, map_over=map_over)
        case "pathorob":
            write_pathorob(folder / "pathorob", tiles=tiles, seed=seed, map_over=map_over)
        case "tiles" | "paired":
            if not (folder / "tables").exists():  # one folder holds both tables
                labelled = 2 * max(tiles, 4 * _TABLE_SLIDES)
                write_tile_set(folder / "tables", tiles=labelled, slides=_TABLE_SLIDES, fields=tiles, seed=seed)
        case _:
            (folder / name).mkdir(parents=True)
            EVA_TASKS[name.partition("/")[2]](folder / name, tiles=tiles, seed=seed, map_over=map_over)


def _check(folder: Path, *, tiles: int, names: Sequence[str], workers: int) -> None:
    for name in names:
        if name not in BENCHMARKS:
            allowed = ", ".join(BENCHMARKS)
            raise ConfigError(
                "no such benchmark can be drawn", got=name, allowed=allowed, remedy=nearest(name, BENCHMARKS)
            )
    if not names or tiles < _FEWEST_TILES or workers < 1:
        raise ConfigError(
            "a count is too small",
            got=f"{len(names)} benchmarks, tiles {tiles}, workers {workers}",
            allowed=f"1 benchmark or more, tiles {_FEWEST_TILES} or more, workers 1 or more",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            "this folder is not empty", where=folder, remedy="name a new folder, or delete this one if it is old"
        )
