"""Drawn slides: pyramids that OpenSlide opens, with tissue of known kinds, and rulers of known length.

Shapes: H height, W width, S stains (haematoxylin, eosin, residual), C colours (red, green, blue), N neighbours.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from histill.errors import ConfigError, DataError
from histill.files import atomic_folder, write_json
from histill.synthetic.aperio import Compression, check_options, write_aperio
from histill.synthetic.layout import SlideTruth, TissuePlan, annotation, lay_out
from histill.synthetic.scanners import SCANNERS, ScannerSpec
from histill.synthetic.section import draw_section, scan
from histill.synthetic.stains import STAINS, StainSpec
from histill.synthetic.texture import Array

__all__ = ["SLIDE_LABELS_CSV", "slide_set_truths", "slide_truth", "write_ruler_slide", "write_slide", "write_slide_set"]

SLIDE_LABELS_CSV = "labels.csv"
"""Of a slide set: columns slide, stain, scanner, split (train, test, paired)."""

_TEST_EVERY = 3  # every third slide is a test slide
_LEAST_UM = 128.0

Look = tuple[StainSpec, ScannerSpec]


def slide_truth(
    *, width_px: int, height_px: int, mpp: float = 0.5, seed: int = 0, tissue: TissuePlan | None = None
) -> SlideTruth:
    """Give the regions of the slide that :func:`write_slide` makes of the same arguments; it draws nothing.

    Raises
    ------
    ConfigError
        A wrong size or scale.
    """
    _check_size(width_px, height_px, mpp)
    return lay_out(width_px=width_px, height_px=height_px, mpp=mpp, seed=seed, plan=tissue)[1]


def write_slide(
    path: Path,
    *,
    width_px: int,
    height_px: int,
    mpp: float = 0.5,
    seed: int = 0,
    stain: StainSpec = STAINS["harris"],
    scanner: ScannerSpec = SCANNERS["aurora"],
    tissue: TissuePlan | None = None,
    levels: Sequence[int] | None = None,
    jpeg_quality: int = 90,
    tile_px: int = 240,
    compression: Compression = "jpeg",
) -> SlideTruth:
    """Draw a slide and write it in Aperio's layout, with its regions beside it as GeoJSON.

    The tissue does not depend on stain and scanner: slides with the same size, mpp and seed are registered to the
    pixel. Everything is drawn at 0.5 microns per pixel and resampled to ``mpp``. The scanner's own compression is
    left out, since the file has one. It takes about 25 bytes of memory per pixel of 0.5 microns.

    Parameters
    ----------
    path
        The file, commonly ``*.svs``; the regions become ``<stem>.geojson`` (first). Each is whole or absent, and
        the same arguments give the same bytes.
    width_px, height_px
        Size of level 0, at least 128 microns each.
    mpp
        Microns per pixel of level 0.
    seed
        Of everything.
    stain, scanner
        How it looks.
    tissue
        What lies on it; one piece with every kind of tissue if None.
    levels, jpeg_quality, tile_px, compression
        As :func:`histill.synthetic.aperio.write_aperio` takes them.

    Raises
    ------
    ConfigError
        A wrong size, scale or option.
    """
    _check_size(width_px, height_px, mpp)
    options: dict[str, Any] = {"levels": levels, "jpeg_quality": jpeg_quality, "tile_px": tile_px}
    options |= {"mpp": mpp, "compression": compression}
    check_options(width_px, height_px, **options)
    layout, truth = lay_out(width_px=width_px, height_px=height_px, mpp=mpp, seed=seed, plan=tissue)
    section_HWS = draw_section(layout, truth.kinds, seed)
    image_HWC = scan(section_HWS, truth, mpp, stain, scanner, seed)
    write_json(path.with_suffix(".geojson"), annotation(truth))
    write_aperio(path, image_HWC, **options)
    return truth


def _check_size(width_px: int, height_px: int, mpp: float) -> None:
    if not 0.05 <= mpp <= 5.0:
        raise ConfigError("this is no scale of a slide", where="mpp", got=mpp, allowed="0.05 to 5 microns per pixel")
    if min(width_px, height_px) * mpp < _LEAST_UM:
        raise ConfigError(
            "a slide is too small to hold tissue",
            where="width_px, height_px",
            got=f"{width_px} x {height_px} pixels of {mpp} microns",
            allowed=f"{math.ceil(_LEAST_UM / mpp)} pixels or more each",
        )


def write_ruler_slide(
    path: Path,
    *,
    mpp: float,
    width_px: int,
    height_px: int,
    period_um: float = 50.0,
    line_um: float = 2.0,
    levels: Sequence[int] | None = None,
    jpeg_quality: int = 90,
    tile_px: int = 240,
    compression: Compression = "jpeg",
) -> None:
    """Write a slide with lines at exact distances, to test a reader's scale.

    The centres of the lines, vertical and horizontal, lie at whole multiples of ``period_um`` from the slide's left
    and top; each pixel has the share of ink that covers it. The ground is pink; a twentieth of the shorter side is
    white glass all around.

    Parameters
    ----------
    path
        The file, commonly ``*.svs``.
    mpp
        Microns per pixel of level 0.
    width_px, height_px
        Size of level 0.
    period_um, line_um
        Distance of the lines' centres, and their width, in microns.
    levels, jpeg_quality, tile_px, compression
        As :func:`histill.synthetic.aperio.write_aperio` takes them.

    Raises
    ------
    ConfigError
        Lines that are not narrower than their distance, or an option that ``write_aperio`` refuses.
    """
    if not 0 < line_um < period_um:
        raise ConfigError("lines are narrower than their distance", where="line_um", got=line_um, allowed=period_um)
    margin = min(width_px, height_px) // 20
    down, across = (_line_cover(size, mpp, period_um, line_um) for size in (height_px, width_px))
    ink_HW1 = 1.0 - (1.0 - down)[:, None, None] * (1.0 - across)[None, :, None]
    ground, ink, glass = (np.array(colour, dtype=np.float32) for colour in ((236, 190, 214), (92, 48, 128), 244))
    image_HWC = ground + (ink - ground) * ink_HW1
    inside = (slice(margin, height_px - margin), slice(margin, width_px - margin))
    whole_HWC = np.full((height_px, width_px, 3), glass, dtype=np.uint8)
    whole_HWC[inside] = np.rint(image_HWC[inside]).astype(np.uint8)
    write_aperio(
        path, whole_HWC, mpp=mpp, levels=levels, jpeg_quality=jpeg_quality, tile_px=tile_px, compression=compression
    )


def _line_cover(size_px: int, mpp: float, period_um: float, line_um: float) -> Array:
    """Share of each pixel that lines at the multiples of the period cover, (size,) float32."""
    past_um = np.arange(size_px + 1) * mpp - (period_um - line_um / 2)  # since the first line began
    whole = np.floor(past_um / period_um)
    covered_um = np.maximum(whole * line_um + np.minimum(past_um - whole * period_um, line_um), 0.0)
    return np.asarray(np.diff(covered_um) / mpp, dtype=np.float32)


# ------------------------------------------------------------------ a set of slides


def write_slide_set(
    folder: Path,
    *,
    slides: int,
    paired: int = 0,
    width_px: int = 2000,
    height_px: int = 2000,
    mpp: float = 0.5,
    seed: int = 0,
    stains: Sequence[StainSpec] = (STAINS["harris"], STAINS["mayer"]),
    scanners: Sequence[ScannerSpec] = (SCANNERS["aurora"], SCANNERS["cinder"]),
    tissue: TissuePlan | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw several slides, each under one appearance, and some under all of them.

    The folder holds ``slide-000.svs`` ... and ``pair-000_<stain>-<scanner>.svs`` ... (the same section under every
    combination, registered to the pixel), each with its ``.geojson``, and ``labels.csv``. Every third slide is the
    test split, and both splits go through all appearances. It is whole or absent; the bytes depend on the arguments
    but not on ``workers``. What lies where: :func:`slide_set_truths`.

    Parameters
    ----------
    folder
        Where; must not exist, or be empty.
    slides
        Number of slides under one appearance each, at least 3.
    paired
        Number of further sections that are written under every appearance.
    width_px, height_px, mpp, tissue
        As :func:`write_slide` takes them.
    seed
        Of everything.
    stains, scanners
        The appearances are all their combinations.
    workers
        Number of processes; with more than 1 they are spawned, so a script needs its ``__main__`` guard.
    progress
        Called with the number of slides done and the total.

    Raises
    ------
    ConfigError, DataError
        A count, a size or an appearance is wrong; the folder is not empty.
    """
    looks = tuple(product(stains, scanners))
    _check_set(folder, slides=slides, paired=paired, workers=workers, looks=looks)
    _check_size(width_px, height_px, mpp)
    jobs = _jobs(slides, paired, seed, looks)
    total, done = sum(len(job.images) for job in jobs), 0
    with atomic_folder(folder) as temporary:
        _write_labels(temporary / SLIDE_LABELS_CSV, jobs)
        draw = partial(_draw_job, folder=temporary, width_px=width_px, height_px=height_px, mpp=mpp, tissue=tissue)
        for count in _draw_all(jobs, draw, workers):
            done += count
            if progress is not None:
                progress(done, total)


def slide_set_truths(
    *,
    slides: int,
    paired: int = 0,
    width_px: int = 2000,
    height_px: int = 2000,
    mpp: float = 0.5,
    seed: int = 0,
    stains: Sequence[StainSpec] = (STAINS["harris"], STAINS["mayer"]),
    scanners: Sequence[ScannerSpec] = (SCANNERS["aurora"], SCANNERS["cinder"]),
    tissue: TissuePlan | None = None,
) -> dict[str, SlideTruth]:
    """Give the regions of each slide, by name, that :func:`write_slide_set` makes of the same arguments.

    Raises
    ------
    ConfigError
        A wrong size or scale.
    """
    size = {"width_px": width_px, "height_px": height_px}
    truths = {}
    for job in _jobs(slides, paired, seed, tuple(product(stains, scanners))):
        truth = slide_truth(**size, mpp=mpp, seed=job.seed, tissue=tissue)
        truths.update({name: truth for name, _ in job.images})
    return truths


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One section to draw, and the slides to make of it."""

    seed: int
    images: tuple[tuple[str, Look], ...]  # name, appearance
    split: str


def _jobs(slides: int, paired: int, seed: int, looks: tuple[Look, ...]) -> list[_Job]:
    jobs = []
    for slide in range(slides):
        held_out, rank = slide % _TEST_EVERY == _TEST_EVERY - 1, slide // _TEST_EVERY
        if not held_out:  # count within the split, so that both splits go through all appearances
            rank = slide - rank
        image = (f"slide-{slide:03d}", looks[rank % len(looks)])
        jobs.append(_Job(seed=_seed(seed, 5, slide), images=(image,), split="test" if held_out else "train"))
    for pair in range(paired):
        images = tuple((f"pair-{pair:03d}_{look[0].name}-{look[1].name}", look) for look in looks)
        jobs.append(_Job(seed=_seed(seed, 6, pair), images=images, split="paired"))
    return jobs


def _check_set(folder: Path, *, slides: int, paired: int, workers: int, looks: tuple[Look, ...]) -> None:
    if slides < _TEST_EVERY or paired < 0 or workers < 1:
        raise ConfigError(
            "a count is too small",
            got=f"slides {slides}, paired {paired}, workers {workers}",
            allowed=f"slides {_TEST_EVERY} or more, paired 0 or more, workers 1 or more",
        )
    names = [f"{stain.name}-{scanner.name}" for stain, scanner in looks]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            "the appearances must be at least one, and differ in name", where="stains, scanners", got=", ".join(names)
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            "this folder is not empty", where=folder, remedy="name a new folder, or delete this one if it is old"
        )


def _write_labels(path: Path, jobs: Sequence[_Job]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("slide", "stain", "scanner", "split"))
        for job in jobs:
            writer.writerows((name, stain.name, scanner.name, job.split) for name, (stain, scanner) in job.images)


def _draw_job(job: _Job, *, folder: Path, width_px: int, height_px: int, mpp: float, tissue: TissuePlan | None) -> int:
    """Draw one section and write its slides; returns how many."""
    layout, truth = lay_out(width_px=width_px, height_px=height_px, mpp=mpp, seed=job.seed, plan=tissue)
    section_HWS = draw_section(layout, truth.kinds, job.seed)
    for name, (stain, scanner) in job.images:
        write_json(folder / f"{name}.geojson", annotation(truth))
        image_HWC = scan(section_HWS, truth, mpp, stain, scanner, job.seed)
        write_aperio(folder / f"{name}.svs", image_HWC, mpp=mpp)
    return len(job.images)


def _draw_all(jobs: Sequence[_Job], draw: Callable[[_Job], int], workers: int) -> Iterator[int]:
    if workers == 1:
        yield from map(draw, jobs)
        return
    # spawned, not forked: the caller may hold threads (torch), and a fork of those can hang
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(draw, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _seed(*path: int) -> int:
    """Make a seed for one thing, independent of those of all others."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0])
