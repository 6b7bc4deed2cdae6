"""A small PLISM: the same fields under some of its stainings and scanners.

::

    <folder>/<STAINING>_<SCANNER>_to_GMH_S60.tif.h5      one dataset per tile, tile_<level>_<x>_<y>, uint8 (224, 224, 3)
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from histill.synthetic.benchmarks.fields import TILE_PX, Look, Map, Plan, draw, seed_of, write_datasets
from histill.synthetic.tissue import KINDS

__all__ = ["write_plism"]

_STAININGS = {"HR": "harris", "MY": "mayer"}
_SCANNERS = {"AT2": "aurora", "GT450": "boreas", "S60": "cinder"}
_SLIDES: dict[str, Look] = {
    f"{staining}_{scanner}": (_STAININGS[staining], _SCANNERS[scanner])
    for staining, scanner in product(_STAININGS, _SCANNERS)
}
"""PLISM's name of a staining and a scanner -> ours. The stains go by their haematoxylin; the scanners are invented."""

_LEVEL = 16
_PER_ROW = 8
_PER_REGION = 8  # fields that share the effects of a slide: PLISM's slide is an array of many tissues


def write_plism(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write six slides of ``tiles`` tiles: two stainings, each on three scanners."""
    plans = [
        Plan(
            kind=KINDS[number % len(KINDS)],
            tile_px=TILE_PX,
            seed=seed_of(seed, 1, number),
            slide_seed=seed_of(seed, 2, number // _PER_REGION),
            looks=tuple(_SLIDES.values()),
        )
        for number in range(tiles)
    ]
    fields = list(map_over(draw, plans))
    names = [f"tile_{_LEVEL}_{number % _PER_ROW}_{number // _PER_ROW}" for number in range(tiles)]
    for place, slide in enumerate(_SLIDES):
        pixels = {name: field.images[place] for name, field in zip(names, fields, strict=True)}
        write_datasets(folder / f"{slide}_to_GMH_S60.tif.h5", **pixels)
