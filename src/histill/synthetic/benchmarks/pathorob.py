"""A small PathoROB: two classes from several centres, each with its own stain and scanner.

::

    <folder>/metadata/camelyon.csv                      subset,slide_id,patch_id,biological_class,medical_center
    <folder>/PathoROB-camelyon/data/*.parquet           image {bytes, path}, slide_id, patch_id
"""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa
import simplejpeg
from pyarrow import parquet

from histill.synthetic.benchmarks.fields import TILE_PX, Look, Map, Plan, draw, seed_of

__all__ = ["write_pathorob"]

_CENTRES: dict[str, tuple[str, Look]] = {
    "RUMC": ("ID", ("harris", "aurora")),
    "UMCU": ("ID", ("carazzi", "dusk")),
    "CWZ": ("OOD", ("mayer", "cinder")),
}
"""Centre -> subset and look. Its look is all that a centre is."""
_CLASSES = {"normal": "lymphoid", "tumor": "tumour"}
_SLIDES = 4  # of a centre
_JPEG_QUALITY = 92
_COLUMNS = ("subset", "slide_id", "patch_id", "biological_class", "medical_center")


def write_pathorob(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write the data set Camelyon: ``tiles`` tiles of each of three centres, on four slides, half of them tumour."""
    rows: list[tuple[str, ...]] = []
    plans: list[Plan] = []
    for centre, (name, (subset, look)) in enumerate(_CENTRES.items()):
        for tile in range(tiles):
            number, slide = divmod(tile, _SLIDES)
            biology = tuple(_CLASSES)[number % len(_CLASSES)]
            rows.append((subset, f"{name.lower()}_patient_{slide:03d}", f"{number:04d}", biology, name))
            plans.append(
                Plan(
                    kind=_CLASSES[biology],
                    tile_px=TILE_PX,
                    seed=seed_of(seed, 7, centre, tile),
                    slide_seed=seed_of(seed, 8, centre, slide),
                    looks=(look,),
                )
            )
    table = folder / "metadata" / "camelyon.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(rows)
    images = [
        {
            "bytes": simplejpeg.encode_jpeg(
                field.images[0], quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"
            ),
            "path": f"{row[1]}-{row[2]}.jpg",
        }
        for field, row in zip(map_over(draw, plans), rows, strict=True)
    ]
    data = folder / "PathoROB-camelyon" / "data"
    data.mkdir(parents=True)
    columns = {"image": images, "slide_id": [row[1] for row in rows], "patch_id": [row[2] for row in rows]}
    parquet.write_table(pa.table(columns), data / "train-00000-of-00001.parquet", row_group_size=100)
