"""A small Camelyon16: real tiled TIFF slides, with or without a region of tumour.

::

    <folder>/training/{normal,tumor}/*.tif, testing/images/*.tif, testing/reference.csv
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from histill.synthetic.benchmarks.fields import Look, Map, seed_of
from histill.synthetic.layout import TissuePlan, lay_out
from histill.synthetic.scanners import SCANNERS
from histill.synthetic.section import draw_section, scan
from histill.synthetic.stains import STAINS

__all__ = ["SLIDE_MPP", "SLIDE_PX", "write_camelyon16"]

SLIDE_PX = 896
"""Side of a slide: 16 tiles of 224 pixels."""
SLIDE_MPP = 0.25
"""Microns per pixel, as in the original; the tissue itself is drawn at 0.5."""

_KINDS = {"normal": ("lymphoid", "stroma"), "tumor": ("lymphoid", "stroma", "tumour")}
_NUMBERS = {  # class -> slides to train on, and slides that PCam and eva validate on
    "normal": ((1, 2, 3, 4), (10, 13)),
    "tumor": ((2, 3, 4, 6), (1, 5)),
}
_TESTS = 6
_LOOKS: tuple[Look, ...] = (("harris", "aurora"), ("mayer", "cinder"))
_TIFF_TILE_PX = 256
_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slide:
    path: str
    kinds: tuple[str, ...]
    seed: int
    look: Look


def write_camelyon16(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write 12 training slides, of which 4 are the validation split, and 6 test slides; ``tiles`` is not used."""
    del tiles  # fewer slides would leave a class out, and a slide has the same tiles always
    rows, wanted = [], []
    for label, numbers in _NUMBERS.items():
        wanted += [(f"training/{label}/{label}_{number:03d}.tif", label) for part in numbers for number in part]
    for number in range(1, _TESTS + 1):
        label = ("normal", "tumor")[number % 2]
        wanted.append((f"testing/images/test_{number:03d}.tif", label))
        size, cancer = ("Large", "IDC") if label == "tumor" else ("None", "None")
        rows.append((f"test_{number:03d}", label.capitalize(), cancer, size))
    slides = [
        _Slide(path=path, kinds=_KINDS[label], seed=seed_of(seed, 14, number), look=_LOOKS[number % len(_LOOKS)])
        for number, (path, label) in enumerate(wanted)
    ]
    for path in {Path(slide.path).parent for slide in slides}:
        (folder / path).mkdir(parents=True)
    for _ in map_over(partial(_write_slide, folder=folder), slides):
        pass
    with (folder / "testing" / "reference.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_slide(slide: _Slide, *, folder: Path) -> None:
    plan = TissuePlan(kinds=slide.kinds, region_um=90.0)
    layout, truth = lay_out(width_px=SLIDE_PX, height_px=SLIDE_PX, mpp=SLIDE_MPP, seed=slide.seed, plan=plan)
    section_HWS = draw_section(layout, truth.kinds, slide.seed)
    stain, scanner = slide.look
    image_HW3 = scan(section_HWS, truth, SLIDE_MPP, STAINS[stain], SCANNERS[scanner], slide.seed)
    _write_tiff(folder / slide.path, image_HW3)


def _write_tiff(path: Path, image_HW3: NDArray[np.uint8]) -> None:
    """Write a tiled JPEG TIFF that states its scale in the resolution tags, as the original's slides do."""
    per_cm = 10_000 / SLIDE_MPP
    with tifffile.TiffWriter(path) as tif:
        tif.write(
            image_HW3,
            photometric="rgb",
            tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
            compression="jpeg",
            compressionargs={"level": _JPEG_QUALITY},
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
            metadata=None,
            software=False,
        )
