"""A folder of drawn tiles: labelled ones, split by slide, and registered ones under several stains and scanners."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import simplejpeg

from histill.errors import ConfigError, DataError
from histill.files import atomic_folder
from histill.synthetic.scanners import SCANNERS, ScannerSpec, render
from histill.synthetic.scene import slide_effects
from histill.synthetic.stains import STAINS, StainSpec
from histill.synthetic.tissue import KINDS, draw_tile

__all__ = ["JPEG_QUALITY", "LABELS_CSV", "PAIRED_CSV", "write_tile_set"]

LABELS_CSV = "labels.csv"
"""Columns path, label, slide, scanner, split."""
PAIRED_CSV = "paired.csv"
"""Columns path, slide, scanner, x, y; rows with the same slide, x and y show the same field."""
JPEG_QUALITY = 92
"""Of the files, without chroma subsampling."""

_TEST_EVERY = 3  # every third slide is a test slide
_FIELDS_PER_ROW = 8
_LABEL_COLUMNS = ("path", "label", "slide", "scanner", "split")
_PAIR_COLUMNS = ("path", "slide", "scanner", "x", "y")

Look = tuple[StainSpec, ScannerSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    """One field to draw and the images to make of it."""

    kind: str
    seed: int
    effects_seed: int
    images: tuple[tuple[str, Look], ...]  # path in the folder, appearance
    rows: tuple[tuple[object, ...], ...]  # of the table, one per image


def write_tile_set(
    folder: Path,
    *,
    tiles: int,
    slides: int,
    tile_px: int = 128,
    fields: int = 120,
    seed: int = 0,
    stains: Sequence[StainSpec] = (STAINS["harris"], STAINS["mayer"]),
    scanners: Sequence[ScannerSpec] = (SCANNERS["aurora"], SCANNERS["cinder"]),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw tissue and write it as a folder of JPEG tiles with two tables.

    The folder holds ``tiles/<kind>/<slide>_<n>.jpg`` and ``labels.csv`` (each slide has one stain and one scanner;
    a third of the slides is the test split), and ``paired/<stain>-<scanner>/<slide>_x<x>_y<y>.jpg`` and
    ``paired.csv`` (each field of some further slides under every combination of stain and scanner, registered to
    the pixel). The column ``scanner`` holds ``<stain>-<scanner>``. It is whole or absent; the bytes depend on the
    arguments but not on ``workers``.

    Parameters
    ----------
    folder
        Where; must not exist, or be empty.
    tiles
        Number of labelled tiles, spread evenly over slides and kinds.
    slides
        Number of labelled slides, at least 3.
    tile_px
        Side of a tile, in pixels of 0.5 microns.
    fields
        Number of fields to pair; 0 leaves a table without rows.
    seed
        Of everything.
    stains, scanners
        The appearances are all their combinations.
    workers
        Number of processes; with more than 1 they are spawned, so a script needs its ``__main__`` guard.
    progress
        Called with the number of images done and the total.

    Raises
    ------
    ConfigError, DataError
        Too few slides or tiles, a repeated appearance, a count that is not positive; a folder that is not empty.
    """
    looks = tuple(product(stains, scanners))
    _check(folder, tiles=tiles, slides=slides, fields=fields, workers=workers, looks=looks)
    labelled, paired = _labelled(tiles, slides, seed, looks), _paired(fields, slides, tile_px, seed, looks)
    total, done = sum(len(item.images) for item in labelled + paired), 0
    with atomic_folder(folder) as temporary:
        for parent in {Path(path).parent for item in labelled + paired for path, _ in item.images}:
            (temporary / parent).mkdir(parents=True, exist_ok=True)
        _write_table(temporary / LABELS_CSV, _LABEL_COLUMNS, labelled)
        _write_table(temporary / PAIRED_CSV, _PAIR_COLUMNS, paired)
        for count in _draw_all(labelled + paired, partial(_draw, folder=temporary, tile_px=tile_px), workers):
            done += count
            if progress is not None:
                progress(done, total)


def _check(folder: Path, *, tiles: int, slides: int, fields: int, workers: int, looks: tuple[Look, ...]) -> None:
    if slides < _TEST_EVERY:
        raise ConfigError(
            "too few slides for a train and a test split", where="slides", got=slides, allowed=f"{_TEST_EVERY} or more"
        )
    if tiles < slides * len(KINDS):
        raise ConfigError(
            "too few tiles for every kind of tissue on every slide",
            where="tiles",
            got=tiles,
            allowed=f"{slides * len(KINDS)} or more with {slides} slides",
        )
    if fields < 0 or workers < 1:
        raise ConfigError("fields must be 0 or more and workers 1 or more", got=f"fields {fields}, workers {workers}")
    names = [_name(look) for look in looks]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            "the appearances must be at least one, and differ in name", where="stains, scanners", got=", ".join(names)
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            "this folder is not empty", where=folder, remedy="name a new folder, or delete this one if it is old"
        )


def _name(look: Look) -> str:
    return f"{look[0].name}-{look[1].name}"


def _seed(*path: int) -> int:
    """Make a seed for one thing, independent of those of all others."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])


def _labelled(tiles: int, slides: int, seed: int, looks: tuple[Look, ...]) -> list[_Field]:
    result = []
    for index in range(tiles):
        number, slide = divmod(index, slides)
        kind = KINDS[number % len(KINDS)]
        held_out, rank = slide % _TEST_EVERY == _TEST_EVERY - 1, slide // _TEST_EVERY
        if not held_out:  # count within the split, so that both splits go through all appearances
            rank = slide - rank
        look = looks[rank % len(looks)]
        name = f"slide-{slide:03d}"
        path = f"tiles/{kind}/{name}_{number:04d}.jpg"
        row = (path, kind, name, _name(look), "test" if held_out else "train")
        result.append(
            _Field(
                kind=kind,
                seed=_seed(seed, 1, slide, number),
                effects_seed=_seed(seed, 2, slide),
                images=((path, look),),
                rows=(row,),
            )
        )
    return result


def _paired(fields: int, slides: int, tile_px: int, seed: int, looks: tuple[Look, ...]) -> list[_Field]:
    result = []
    paired_slides = max(2, slides // 6)
    for index in range(fields):
        number, slide = divmod(index, paired_slides)
        y, x = (tile_px * value for value in divmod(number, _FIELDS_PER_ROW))
        name = f"pair-{slide:03d}"
        images = tuple((f"paired/{_name(look)}/{name}_x{x}_y{y}.jpg", look) for look in looks)
        result.append(
            _Field(
                kind=KINDS[number % len(KINDS)],
                seed=_seed(seed, 3, slide, number),
                effects_seed=_seed(seed, 4, slide),
                images=images,
                rows=tuple((path, name, _name(look), x, y) for path, look in images),
            )
        )
    return result


def _write_table(path: Path, columns: Sequence[str], items: Sequence[_Field]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for item in items:
            writer.writerows(item.rows)


def _draw(item: _Field, *, folder: Path, tile_px: int) -> int:
    """Draw one field and write its images; returns how many."""
    concentrations_HWS = draw_tile(item.kind, tile_px, item.seed, slide_effects(item.effects_seed))
    for number, (path, (stain, scanner)) in enumerate(item.images):
        image_HWC = render(concentrations_HWS, stain, scanner, _seed(item.seed, number))
        data = simplejpeg.encode_jpeg(image_HWC, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
        (folder / path).write_bytes(data)
    return len(item.images)


def _draw_all(items: Sequence[_Field], draw: Callable[[_Field], int], workers: int) -> Iterator[int]:
    if workers == 1:
        yield from map(draw, items)
        return
    # spawned, not forked: the caller may hold threads (torch), and a fork of those can hang
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(draw, items, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)
