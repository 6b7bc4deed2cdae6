"""Tiles per second of a tile set on one core, beside the bare decoder, PyTorch's ImageFolder, and webdataset.

    python benchmarks/loading.py FOLDER [--tiles 4096] [--repeats 5] [--jpeg-quality 90]

The images of FOLDER (224 px and more, cut to 224 in the middle) are encoded as JPEG (4:4:4) and repeated until there
are enough; the same bytes lie in a tile set and as files in a temporary folder. All read every tile once to uint8 RGB
arrays of (224, 224, 3), in one thread of this process, from the page cache:

- **bare decode**: simplejpeg, on bytes that are in memory already, in their order: what no loader can beat;
- **histill**: `TileSet.read` in block-shuffled order (windows of 8 blocks of 64 tiles), asked for in batches of 64;
- **histill, as trained**: the same in the order of `TileSet.tile_at`, which shuffles a set as small as this as a whole;
- **ImageFolder + Pillow**: torchvision's ImageFolder with its own loader, shuffled, as `numpy.asarray`;
- **webdataset**: `WebDataset(shards, shardshuffle=100).shuffle(1000).decode("rgb8")`, on the same shards.

Runs are interleaved and the fastest of each counts. Ratios are of CPU time, since the machine may do other work.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import ImageFolder

from histill.tiles.config import FORMAT
from histill.tiles.index import TileRow, to_table, write_index
from histill.tiles.order import block_tile_at
from histill.tiles.shards import ShardWriter
from histill.tiles.tile_set import TileSet

TILE_PX, BATCH, SLIDE_TILES, SHARD_BYTES = 224, 64, 512, 8 * 10**6
SUFFIXES = {".jpg", ".jpeg", ".png"}
NEEDED = {"bare decode": 0.85, "ImageFolder + Pillow": 1.8, "webdataset": 1.0}


def encoded_tiles(folder: Path, count: int, quality: int) -> list[bytes]:
    tiles: list[bytes] = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        with Image.open(path) as image:
            if min(image.size) < TILE_PX:
                continue
            left, top = (image.width - TILE_PX) // 2, (image.height - TILE_PX) // 2
            pixels = np.asarray(image.convert("RGB").crop((left, top, left + TILE_PX, top + TILE_PX)))
        tiles.append(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="444"))
        if len(tiles) == count:
            break
    if not tiles:
        raise SystemExit(f"no images of {TILE_PX} px or more in {folder}")
    return [tiles[number % len(tiles)] for number in range(count)]


def write_tile_set(root: Path, tiles: list[bytes]) -> None:
    """Slides of 512 tiles, in shards small enough that several are open at a time."""
    rows = []
    for first in range(0, len(tiles), SLIDE_TILES):
        slide = f"slide-{first // SLIDE_TILES:04d}"
        with ShardWriter(
            lambda number, slide=slide: root / "shards" / f"{slide}-{number:05d}.tar", SHARD_BYTES
        ) as writer:  # type: ignore[misc]
            for place, data in enumerate(tiles[first : first + SLIDE_TILES]):
                x, y = place % 32 * TILE_PX, place // 32 * TILE_PX
                shard, offset = writer.add(f"{slide}_{x}_{y}.jpg", data)
                rows.append(
                    TileRow(
                        shard=shard,
                        offset=offset,
                        length=len(data),
                        slide=slide,
                        patient=None,
                        x=x,
                        y=y,
                        level=0,
                        mpp=0.5,
                        tissue=1.0,
                    )
                )
    about = {"format": FORMAT, "tile_px": TILE_PX, "mpp": 0.5, "codec": "jpeg"}
    write_index(root / "index.parquet", to_table(rows), about)
    (root / "tileset.json").write_text(json.dumps(about))


def write_files(root: Path, tiles: list[bytes]) -> None:
    for number, data in enumerate(tiles):
        path = root / f"{number // SLIDE_TILES:04d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


Run = Callable[[], int]
"""Reads all tiles; gives the sum of one pixel of each, so that all are seen to read the same."""


def first_pixel(image: NDArray[np.uint8]) -> int:
    assert image.shape == (TILE_PX, TILE_PX, 3)
    return int(image[100, 100, 1])


def runs_of(root: Path, tiles: list[bytes]) -> dict[str, Run]:
    tile_set = TileSet.open(root / "set")
    image_folder = ImageFolder(root / "files")
    shards = sorted(str(path) for path in (root / "set" / "shards").iterdir())
    shuffled = np.random.default_rng(0).permutation(len(tiles)).tolist()

    def bare() -> int:
        return sum(first_pixel(simplejpeg.decode_jpeg(data, "RGB", strict=True)) for data in tiles)

    def ours(order: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Run:
        def run() -> int:
            total = 0
            for first in range(0, len(tiles), BATCH):
                positions = np.arange(first, min(first + BATCH, len(tiles)))
                total += sum(first_pixel(tile_set.read(int(index))) for index in order(positions))
            return total

        return run

    def folder() -> int:
        return sum(first_pixel(np.asarray(image_folder[index][0])) for index in shuffled)

    def web() -> int:
        source = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("rgb8").to_tuple("jpg")
        return sum(first_pixel(image) for (image,) in source)

    return {
        "bare decode": bare,
        "histill": ours(lambda positions: block_tile_at(positions, len(tiles), 0, block_tiles=64, window_blocks=8)),
        "histill, as trained": ours(lambda positions: tile_set.tile_at(positions, 0)),
        "ImageFolder + Pillow": folder,
        "webdataset": web,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images of 224 px or more")
    parser.add_argument("--tiles", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jpeg-quality", type=int, default=90)
    options = parser.parse_args()
    tiles = encoded_tiles(options.folder, options.tiles, options.jpeg_quality)
    with tempfile.TemporaryDirectory() as folder:
        write_tile_set(Path(folder) / "set", tiles)
        write_files(Path(folder) / "files", tiles)
        compare(runs_of(Path(folder), tiles), tiles, options.repeats)


def compare(runs: dict[str, Run], tiles: list[bytes], repeats: int) -> None:
    """Interleave the runs and print their rates."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    sums: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            sums[name] = run()
            if repeat:  # the first run warms the caches
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    # Pillow's decoder may round otherwise, by 1 or so.
    assert max(sums.values()) - min(sums.values()) <= 2 * len(tiles), sums
    size = statistics.mean(map(len, tiles)) / 1000
    print(f"{platform.machine()}; {len(tiles)} tiles of {size:.1f} KB; fastest of {repeats}, one thread")
    cpu_ms = {name: 1e3 * min(cpu for _, cpu in found) / len(tiles) for name, found in times.items()}
    print(f"{'':24}{'tiles/s':>9}{'tiles/CPU s':>13}{'CPU ms':>9}{'histill is':>13}{'needed':>9}")
    for name, found in times.items():
        rate = len(tiles) / min(wall for wall, _ in found)
        ratio = "" if name == "histill" else f"{cpu_ms[name] / cpu_ms['histill']:.2f} times"
        needed = f"{NEEDED[name]:.2f}" if name in NEEDED else ""
        print(f"{name:24}{rate:9.0f}{1e3 / cpu_ms[name]:13.0f}{cpu_ms[name]:9.3f}{ratio:>13}{needed:>9}")


if __name__ == "__main__":
    main()
