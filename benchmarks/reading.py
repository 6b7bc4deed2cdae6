"""CPU time of reading tiles with histill's TIFF reader against plain openslide-python.

    python benchmarks/reading.py SLIDE... [--tile-px 224] [--repeats 7]

Reads all whole tiles of level 0 of each slide (tiled TIFF or SVS), row by row, in one thread, to RGB arrays:

- **openslide-python**: `OpenSlide(path).read_region(...).convert("RGB")`, then numpy, with OpenSlide's own cache as it
  comes;
- **histill, OpenSlide**: `OpenSlideReader`, the reader for all other formats;
- **histill, TIFF**: `TiffReader`, the fast path.

Each repeat opens the slide anew, so that block caches are cold (opening is timed too, and shown; the file's bytes are
in memory after the first repeat). Repeats of all are interleaved; the least CPU time of each counts. The pixels are
compared while nothing is timed. A bound is printed too: decoding each block of the TIFF once and nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from histill.slides.openslide_reader import OpenSlideReader
from histill.slides.tiff_reader import TiffReader

Origins = list[tuple[int, int]]


def plain(path: Path, origins: Origins, tile_px: int) -> NDArray[np.uint8]:
    with openslide.OpenSlide(path) as slide:
        for origin in origins:
            tile = np.asarray(slide.read_region(origin, 0, (tile_px, tile_px)).convert("RGB"))
    return tile


def through(reader: type[OpenSlideReader] | type[TiffReader]) -> Callable[[Path, Origins, int], NDArray[np.uint8]]:
    def run(path: Path, origins: Origins, tile_px: int) -> NDArray[np.uint8]:
        slide = reader(path)
        for x, y in origins:
            tile = slide.read(0, x, y, tile_px, tile_px)
        slide.close()
        return tile

    return run


def decode_only(path: Path, origins: Origins, tile_px: int) -> None:
    """Decode the blocks below the tiles once each, into the same memory."""
    blocks = TiffReader(path).blocks[0]
    right, bottom = (max(origin[axis] for origin in origins) + tile_px for axis in (0, 1))
    block = np.empty((blocks.block_height, blocks.block_width, 3), np.uint8)
    file = os.open(path, os.O_RDONLY)
    for row in range(-(-bottom // blocks.block_height)):
        for column in range(-(-right // blocks.block_width)):
            index = row * blocks.across + column
            blocks.decode(os.pread(file, blocks.counts[index], blocks.offsets[index]), block)
    os.close(file)


RUNS = {
    "openslide-python": plain,
    "histill, OpenSlide": through(OpenSlideReader),
    "histill, TIFF": through(TiffReader),
    "bound, decode only": decode_only,
}


def largest_difference(path: Path, origins: Origins, tile_px: int) -> int:
    slide, fast = openslide.OpenSlide(path), TiffReader(path)
    worst = 0
    for x, y in origins:
        theirs = np.asarray(slide.read_region((x, y), 0, (tile_px, tile_px)).convert("RGB"), np.int16)
        worst = max(worst, int(np.abs(fast.read(0, x, y, tile_px, tile_px) - theirs).max()))
    return worst


def compare(path: Path, tile_px: int, repeats: int) -> None:
    level = TiffReader(path).levels[0]
    origins = [
        (x, y)
        for y in range(0, level.height - tile_px + 1, tile_px)
        for x in range(0, level.width - tile_px + 1, tile_px)
    ]
    if not origins:
        raise SystemExit(f"{path} is smaller than one tile")
    print(f"\n{path.name}: {len(origins)} tiles of {tile_px} px in row order, least of {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(repeats):
        for name, run in RUNS.items():
            start = time.process_time()
            run(path, origins, tile_px)
            seconds[name].append(time.process_time() - start)
    baseline = min(seconds["openslide-python"])
    for name, values in seconds.items():
        least = min(values)
        per_tile = 1e3 * least / len(origins)
        print(
            f"  {name:20}{per_tile:7.3f} ms a tile  ratio {baseline / least:5.2f}  (worst repeat {max(values):.2f} s)"
        )
    for reader in (OpenSlideReader, TiffReader):
        start = time.process_time()
        reader(path).close()
        print(f"  opening it, {reader.reader:12}{1e3 * (time.process_time() - start):7.1f} ms")
    print(f"  largest difference from OpenSlide in any pixel: {largest_difference(path, origins, tile_px)} of 255")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores seen" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "slides",
        type=Path,
        nargs="+",
        metavar="SLIDE",
        help="tiled TIFF or SVS files; OpenSlide's test data CMU-1-Small-Region.svs (JPEG) and an SVS with JPEG2000",
    )
    parser.add_argument("--tile-px", type=int, default=224, help="side of a tile, pixels of level 0 (default: 224)")
    parser.add_argument("--repeats", type=int, default=7, help="repeats, of which the least counts (default: 7)")
    args = parser.parse_args()
    print(f"{processor()}; openslide-python {openslide.__version__}, OpenSlide {openslide.__library_version__}")
    for path in args.slides:
        compare(path, args.tile_px, args.repeats)


if __name__ == "__main__":
    main()
