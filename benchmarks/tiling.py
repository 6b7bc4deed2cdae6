"""Whole `histill tile` against a plain loop of openslide-python and Pillow that does the same work.

    python benchmarks/tiling.py SLIDE [--copies 5] [--repeats 3]

A slide of a realistic size is made from SLIDE (OpenSlide's test data CMU-1-Small-Region.svs): its level 0, repeated
--copies times across and down, written as a JPEG pyramid in Aperio's layout with 240 px blocks. Two cases: the pixels
are said to be 0.499 um (read about as they are) and 0.25 um (shrunk by 2), both to 224 px tiles at 0.5 um/px.

The plain loop is what one writes in an afternoon: thumbnail, Otsu on saturation, grid, share of tissue, read_region,
Pillow's BOX resize, a white share and a Laplacian variance by NumPy and SciPy, JPEG of quality 90 without chroma
subsampling by Pillow into a tar file by tarfile. It is one process. histill runs as a user runs it, with start-up,
index, thumbnail and fsync, with one worker process and with two. Runs are interleaved; the least of the repeats counts.
Beside the wall time stands the CPU time of all processes, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import openslide
from PIL import Image
from scipy import ndimage

from histill.slides.open import open_slide
from histill.synthetic.aperio import write_aperio
from histill.tiles.open import open_set

TILE_PX, MPP, TISSUE_MIN, QUALITY = 224, 0.5, 0.4, 90


def otsu(values: np.ndarray) -> int:
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * np.arange(256))
    with np.errstate(all="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return int(np.nanargmax(between))


def plain_loop(path: Path, out: Path) -> int:
    """Tiles of one slide into one tar file; returns their number."""
    slide = openslide.OpenSlide(path)
    mpp = float(slide.properties[openslide.PROPERTY_NAME_MPP_X])
    width, height = slide.dimensions
    small = slide.get_thumbnail((round(width * mpp / 8), round(height * mpp / 8)))
    saturation = np.asarray(small.convert("HSV"))[..., 1]
    mask = ndimage.binary_closing(saturation > otsu(saturation), iterations=2)
    extent = TILE_PX * MPP / mpp
    level = slide.get_best_level_for_downsample(MPP / mpp)
    side = round(extent / slide.level_downsamples[level])
    count = 0
    with tarfile.open(out, "w") as tar:
        for row in range(int(height / extent)):
            for column in range(int(width / extent)):
                x, y = round(column * extent), round(row * extent)
                box = [round(v * mask.shape[1] / width) for v in (x, x + extent)]
                rows = [round(v * mask.shape[0] / height) for v in (y, y + extent)]
                if mask[rows[0] : rows[1], box[0] : box[1]].mean() < TISSUE_MIN:
                    continue
                region = slide.read_region((x, y), level, (side, side)).convert("RGB")
                tile = region.resize((TILE_PX, TILE_PX), Image.Resampling.BOX)
                pixels = np.asarray(tile)
                if (pixels.min(axis=2) > 220).mean() > 0.97:
                    continue
                if ndimage.laplace(np.asarray(tile.convert("L"), dtype=np.float32)).var() < 25:
                    continue
                data = io.BytesIO()
                tile.save(data, "JPEG", quality=QUALITY, subsampling=0)
                member = tarfile.TarInfo(f"{x}_{y}.jpg")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)
                count += 1
    return count


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def seconds_of_histill(path: Path, out: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds."""
    command = [sys.executable, "-m", "histill", "tile", str(path), "--out", str(out), "--workers", str(workers)]
    began, used = time.perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began, cpu_seconds(resource.RUSAGE_CHILDREN) - used


def compare(name: str, path: Path, folder: Path, repeats: int) -> None:
    seconds: dict[str, list[tuple[float, float]]] = {
        "plain loop": [],
        "histill, 1 worker": [],
        "histill, 2 workers": [],
    }
    counts = {}
    for repeat in range(repeats):
        began, used = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
        counts["plain"] = plain_loop(path, folder / "plain.tar")
        seconds["plain loop"].append((time.perf_counter() - began, cpu_seconds(resource.RUSAGE_SELF) - used))
        for workers in (1, 2):
            out = folder / f"{name}-{workers}-{repeat}"
            plural = "s" if workers > 1 else ""
            seconds[f"histill, {workers} worker{plural}"].append(seconds_of_histill(path, out, workers))
            counts["histill"] = len(open_set(out))
    least = {key: tuple(map(min, zip(*values, strict=True))) for key, values in seconds.items()}
    print(f"\n{name}: {counts['plain']} tiles by the loop, {counts['histill']} by histill")
    base_wall, base_cpu = (value / counts["plain"] for value in least["plain loop"])
    for key, (wall, cpu) in least.items():
        tiles = counts["plain" if key == "plain loop" else "histill"]
        print(
            f"  {key:20}{wall:7.2f} s  {tiles / wall:6.0f} tiles/s  ratio {base_wall / (wall / tiles):5.2f}"
            f"   CPU {1e3 * cpu / tiles:5.2f} ms a tile  ratio {base_cpu / (cpu / tiles):5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    slide = open_slide(args.slide)
    full = slide.levels[0]
    whole = np.tile(slide.read(0, 0, 0, full.width, full.height), (args.copies, args.copies, 1))
    print(f"{os.cpu_count()} cores; {whole.shape[1]} x {whole.shape[0]} px")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, mpp in (("0.499 to 0.5 um/px", 0.499), ("0.25 to 0.5 um/px", 0.25)):
            path = folder / f"slide-{mpp}.svs"
            write_aperio(path, whole, mpp=mpp, levels=(1, 4, 16))
            compare(case, path, folder, args.repeats)


if __name__ == "__main__":
    main()
