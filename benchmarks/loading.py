"""Tiles per second of a tile set on one core, beside the bare decoder, PyTorch's ImageFolder, and webdataset.

    python benchmarks/loading.py FOLDER [--tiles 4096] [--repeats 5] [--jpeg-quality 90]

The images of FOLDER (224 px and more, cut to 224 in the middle) are encoded as JPEG (4:4:4) and repeated until there
are enough; the same bytes lie in a tile set and as files in a temporary folder. All read every tile once in one thread
of this process, from the page cache, shuffled in their own way.

**As arrays** of uint8 (224, 224, 3), one by one:

- bare decode: simplejpeg, on bytes that are in memory already, in their order: what no loader can beat;
- histill: `TileSet.read` in block-shuffled order (windows of 8 blocks of 64 tiles), asked for in batches of 64;
- ImageFolder + Pillow: torchvision's ImageFolder with its own loader, and `numpy.asarray`;
- webdataset: `WebDataset(shards, shardshuffle=100).shuffle(1000).decode("rgb8")`, on the same shards.

**As batches** of uint8 tensors (64, 3, 224, 224), as a training loop takes them:

- histill: `histill.tiles.loader.batches` without threads;
- ImageFolder + Pillow: `DataLoader(ImageFolder(..., PILToTensor()), 64, shuffle=True)`;
- webdataset: the same with `decode("torchrgb8")` and `batched(64)`.

Runs are interleaved and the fastest of each counts. Ratios are of CPU time, since the machine may do other work. How
far ImageFolder can be left behind as arrays is the ratio of the two decoders, which both use libjpeg-turbo.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from histill.tiles.config import FORMAT
from histill.tiles.index import TileRow, to_table, write_index
from histill.tiles.loader import batches
from histill.tiles.order import block_tile_at
from histill.tiles.shards import ShardWriter
from histill.tiles.tile_set import TileSet

TILE_PX, BATCH, SLIDE_TILES, SHARD_BYTES = 224, 64, 512, 8 * 10**6
SUFFIXES = {".jpg", ".jpeg", ".png"}


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
"""Reads all tiles; gives the sum of one value of each, so that all are seen to read the same."""


def arrays(root: Path, tiles: list[bytes]) -> dict[str, Run]:
    tile_set, image_folder = TileSet.open(root / "set"), ImageFolder(root / "files")
    shuffled = np.random.default_rng(0).permutation(len(tiles)).tolist()

    def total(images: Iterable[NDArray[np.uint8]]) -> int:
        return sum(int(image[100, 100, 1]) for image in images)

    def indices() -> Iterator[int]:
        for first in range(0, len(tiles), BATCH):
            positions = np.arange(first, first + BATCH)
            yield from block_tile_at(positions, len(tiles), 0, block_tiles=64, window_blocks=8).tolist()

    return {
        "bare decode": lambda: total(simplejpeg.decode_jpeg(data, "RGB", strict=True) for data in tiles),
        "histill": lambda: total(tile_set.read(index) for index in indices()),
        "ImageFolder + Pillow": lambda: total(np.asarray(image_folder[index][0]) for index in shuffled),
        "webdataset": lambda: total(image for (image,) in web(root).decode("rgb8").to_tuple("jpg")),
    }


def batched(root: Path, tiles: list[bytes]) -> dict[str, Run]:
    tile_set = TileSet.open(root / "set")
    image_folder = DataLoader(ImageFolder(root / "files", PILToTensor()), BATCH, shuffle=True)

    def total(found: Iterable[torch.Tensor]) -> int:
        return sum(int(tiles_BCHW[:, 1, 100, 100].sum()) for tiles_BCHW in found)

    def ours() -> int:
        with closing(batches(tile_set, positions_of_step, 0, len(tiles) // BATCH, 0, workers=0)) as stream:
            return total(batch.tiles_BCHW for batch in stream)

    return {
        "histill": ours,
        "ImageFolder + Pillow": lambda: total(images for images, _ in image_folder),
        "webdataset": lambda: total(
            images for (images,) in web(root).decode("torchrgb8").to_tuple("jpg").batched(BATCH)
        ),
    }


def positions_of_step(step: int) -> NDArray[np.int64]:
    return np.arange(step * BATCH, (step + 1) * BATCH)


def web(root: Path) -> webdataset.WebDataset:
    shards = sorted(str(path) for path in (root / "set" / "shards").iterdir())
    return webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images of 224 px or more")
    parser.add_argument("--tiles", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jpeg-quality", type=int, default=90)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiles = encoded_tiles(options.folder, options.tiles // BATCH * BATCH, options.jpeg_quality)
    size_kb = sum(map(len, tiles)) / len(tiles) / 1000
    print(f"{platform.machine()}; {len(tiles)} tiles of {size_kb:.1f} KB; fastest of {options.repeats}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        write_tile_set(Path(folder) / "set", tiles)
        write_files(Path(folder) / "files", tiles)
        arrays_needed = {"bare decode": 0.85, "webdataset": 1.0}
        compare("as arrays", arrays(Path(folder), tiles), len(tiles), options.repeats, arrays_needed)
        batches_needed = {"ImageFolder + Pillow": 1.8, "webdataset": 1.0}
        compare("as batches", batched(Path(folder), tiles), len(tiles), options.repeats, batches_needed)


def compare(label: str, runs: dict[str, Run], tiles: int, repeats: int, needed: dict[str, float]) -> None:
    """Interleave the runs and print their rates."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    sums: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            sums[name] = run()
            if repeat:  # the first run warms the caches
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    # Two decoders may round otherwise, by 1 or so.
    assert max(sums.values()) - min(sums.values()) <= 2 * tiles, sums
    cpu_ms = {name: 1e3 * min(cpu for _, cpu in found) / tiles for name, found in times.items()}
    print(f"\n{label:24}{'tiles/s':>9}{'tiles/CPU s':>13}{'CPU ms':>9}{'histill is':>13}{'needed':>9}")
    for name, found in times.items():
        rate = tiles / min(wall for wall, _ in found)
        ratio = "" if name == "histill" else f"{cpu_ms[name] / cpu_ms['histill']:.2f} times"
        least = f"{needed[name]:.2f}" if name in needed else ""
        print(f"{name:24}{rate:9.0f}{1e3 / cpu_ms[name]:13.0f}{cpu_ms[name]:9.3f}{ratio:>13}{least:>9}")


if __name__ == "__main__":
    main()
