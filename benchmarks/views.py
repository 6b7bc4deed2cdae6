"""Crops per second of histill's batched view maker against a per-sample torchvision v2 pipeline.

    python benchmarks/views.py [FOLDER] [--tiles 128] [--repeats 5]

Both make 2 crops of 224 px and 8 of 98 px from each 224 px uint8 tile (those of FOLDER, centre-cut or padded, or noise
when no folder is given; decoding is not timed) and use two cores:

- **torchvision v2**: a DataLoader with 2 persistent worker processes of one torch thread each, uint8 tensors all the
  way (the fastest form of these transforms), batches of 32 sent as uint8 and turned into 0..1 in the main process. For
  each crop: RandomResizedCrop (bilinear, antialias), RandomHorizontalFlip, a quarter turn by torch.rot90, stain jitter
  in optical density (float32, the same draws and formula as histill's), ColorJitter with histill's ranges, and
  GaussianBlur(9, 0.2 to 1.5) in as many crops as histill blurs.
- **histill**: `make_views` with its defaults in this process, 2 threads, batches of 32.

Runs of both are interleaved and medians printed, with and without stain jitter. Wall time on a machine that does other
work is unkind to whatever uses threads that wait for each other, so the CPU time is printed too: histill on one thread
in all, the baseline inside its transforms only (without collating, sending and converting the batches).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from histill.distill.views import ViewConfig, Views, colour, geometry, make, make_views

TILE_PX, GLOBAL_PX, LOCAL_PX, CROPS = 224, 224, 98, 10
BATCH, THREADS = 32, 2


class Crops(torch.nn.Module):
    """The baseline: one tile to a list of crops, uint8 in and out."""

    def __init__(self, config: ViewConfig) -> None:
        super().__init__()
        self.config = config
        jitter = v2.ColorJitter(colour.BRIGHTNESS, colour.CONTRAST, colour.SATURATION, colour.HUE_TURNS)
        self.after = v2.Compose(
            [jitter, v2.RandomApply([v2.GaussianBlur(9, config.blur_sigma_px)], p=config.blur_probability)]
        )
        self.kinds = [
            (
                count,
                v2.Compose([v2.RandomResizedCrop(px, area, config.aspect, antialias=True), v2.RandomHorizontalFlip()]),
            )
            for count, px, area in (
                (config.n_global, config.global_px, config.global_area),
                (config.n_local, config.local_px, config.local_area),
            )
        ]

    def forward(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Make both kinds of crops."""
        large, small = (torch.stack([self.one(crop, tile) for _ in range(count)]) for count, crop in self.kinds)
        return large, small

    def one(self, crop: Callable[[Tensor], Tensor], tile: Tensor) -> Tensor:
        """Make one crop."""
        image = torch.rot90(crop(tile), int(torch.randint(4, ())), (1, 2))
        if self.config.stain:
            uniform = torch.rand(1, colour.STAIN_DRAWS).numpy().astype(np.float64)
            stain = torch.from_numpy(colour.draw_stain(uniform, self.config.stain)[0]).float()
            density = image.reshape(3, -1).float().mul_(1 / 255).clamp_(min=colour.DARKEST).log_()
            density = torch.addmm(-stain[:, 3:], stain[:, :3], density).exp_().clamp_(max=1).mul_(255).round_()
            image = density.to(torch.uint8).view(image.shape)
        return torch.as_tensor(self.after(image))


class Tiles(Dataset[tuple[Tensor, Tensor, float]]):
    """Tiles in memory and the baseline's transform."""

    def __init__(self, tiles: Tensor, transform: Crops) -> None:
        self.tiles, self.transform = tiles, transform

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, float]:
        start = time.process_time()
        large, small = self.transform(self.tiles[index])
        return large, small, time.process_time() - start


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def load_tiles(folder: Path | None, count: int) -> Tensor:
    if folder is None:
        return torch.randint(0, 256, (count, 3, TILE_PX, TILE_PX), dtype=torch.uint8)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not paths:
        raise SystemExit(f"no images in {folder}")
    cut = v2.CenterCrop(TILE_PX)
    step = max(1, len(paths) // count)
    tiles = [cut(decode_image(str(path), ImageReadMode.RGB)) for path in paths[::step][:count]]
    return torch.stack([tiles[index % len(tiles)] for index in range(count)])


Run = Callable[[], tuple[float, float]]
"""Makes the views of all tiles; gives wall and CPU seconds."""


def baseline(tiles: Tensor, config: ViewConfig) -> Run:
    loader = DataLoader(
        Tiles(tiles, Crops(config)), BATCH, num_workers=2, persistent_workers=True, worker_init_fn=one_thread
    )

    def run() -> tuple[float, float]:
        start, cpu = time.perf_counter(), 0.0
        for large, small, seconds in loader:
            large.float().mul_(1 / 255)
            small.float().mul_(1 / 255)
            cpu += float(seconds.sum())
        return time.perf_counter() - start, cpu

    return run


def ours(tiles: Tensor, config: ViewConfig, threads: int) -> Run:
    sizes = np.full((BATCH, 2), TILE_PX)
    views: Views | None = None

    def run() -> tuple[float, float]:
        nonlocal views
        torch.set_num_threads(threads)
        start, cpu = time.perf_counter(), time.process_time()
        for first in range(0, len(tiles), BATCH):
            positions = np.arange(first, first + BATCH)
            views = make_views(tiles[first : first + BATCH], sizes, positions, config, seed=0, out=views)
        return time.perf_counter() - start, time.process_time() - cpu

    return run


def stages(run: Run) -> dict[str, float]:
    """CPU seconds of each stage of one run on one thread, by timing the functions that make it up."""
    spent: dict[str, float] = defaultdict(float)

    places: list[tuple[Any, str, str]] = [
        (make._Kind, "__init__", "draws, boxes, taps"),
        (make, "line_tables", "uint8 to float lines"),
        (geometry.Resampler, "crops", "resample and blur"),
        (make, "apply_stain", "stain"),
        (make, "apply_affine", "colour"),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            spent[label] += time.process_time() - start
            return result

        return call

    for (owner, name, label), function in zip(places, originals, strict=True):
        setattr(owner, name, timed(function, label))
    try:
        _, total = run()
    finally:
        for (owner, name, _), function in zip(places, originals, strict=True):
            setattr(owner, name, function)
    spent["cut to 0..1 and store"] = total - sum(spent.values())
    return dict(spent)


def bound() -> tuple[float, float, float, float]:
    """Find the multiply-adds and bytes per tile that no method avoids, and the ms here for storing and log-exp."""
    pixels = 2 * GLOBAL_PX**2 + 8 * LOCAL_PX**2
    # Two taps per axis at least (rows of the whole tile width are not needed by a perfect method), two 3 x 3 maps.
    multiply_adds = pixels * 3 * (2 + 2 + 3 + 3)
    moved = TILE_PX**2 * 3 + pixels * 3 * 4
    cached = torch.rand(3 * GLOBAL_PX**2)
    large = torch.rand(2**24)
    target = torch.empty_like(large)

    def fastest(work: Callable[[], object], repeats: int = 30) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    transcendental = fastest(lambda: cached.log_().exp_()) / len(cached)
    store = fastest(lambda: target.copy_(large)) / len(large)
    return multiply_adds, moved, 1e3 * pixels * 3 * store, 1e3 * pixels * 3 * transcendental


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores seen" if names else platform.processor()


def compare(label: str, tiles: Tensor, config: ViewConfig, repeats: int) -> None:
    """Interleave runs of both and print their crops per second."""
    runs = {
        "torchvision v2": baseline(tiles, config),
        "histill": ours(tiles, config, THREADS),
        "histill, 1 thread": ours(tiles, config, 1),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            result = run()
            if repeat:  # the first run starts the workers and warms the caches
                times[name].append(result)
    crops = len(tiles) * CROPS
    wall = {name: statistics.median(crops / seconds for seconds, _ in values) for name, values in times.items()}
    cpu = {name: statistics.median(crops / seconds for _, seconds in values) for name, values in times.items()}
    print(f"\n{label}, medians of {repeats}")
    for name, values in times.items():
        rates = [crops / seconds for seconds, _ in values]
        print(f"  {name:20}{wall[name]:7.0f} crops/s ({min(rates):.0f} to {max(rates):.0f})", end="")
        print(f"{cpu[name]:8.0f} crops per CPU second" if name != "histill" else "")
    print(f"  ratio, 2 cores      {wall['histill'] / wall['torchvision v2']:7.1f}")
    print(f"  ratio, CPU time     {cpu['histill, 1 thread'] / cpu['torchvision v2']:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="real tiles; noise when left out")
    parser.add_argument("--tiles", type=int, default=128, help="tiles per run, a multiple of 32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    tiles = load_tiles(args.folder, args.tiles // BATCH * BATCH)
    print(f"{processor()}; torch {torch.__version__}; {len(tiles)} tiles from {args.folder or 'noise'}")
    full = ViewConfig(global_px=GLOBAL_PX, local_px=LOCAL_PX)
    compare("with stain jitter", tiles, full, args.repeats)
    compare("without stain jitter", tiles, replace(full, stain=0.0), args.repeats)
    all_stages = [stages(run) for run in [ours(tiles, full, 1)] * (args.repeats + 1)][1:]
    spent = min(all_stages, key=lambda stage: sum(stage.values()))
    total = sum(spent.values())
    print(f"\nstages of histill on one thread, {1e3 * total / len(tiles):.2f} ms per tile")
    for name, seconds in spent.items():
        print(f"  {name:24}{100 * seconds / total:6.0f} %")
    multiply_adds, moved, store_ms, transcendental_ms = bound()
    print(
        f"\nbound per tile: {multiply_adds / 1e6:.1f} M multiply-adds, {moved / 1e6:.1f} MB in and out "
        f"({store_ms:.2f} ms as a plain copy here), log and exp {transcendental_ms:.2f} ms"
    )


if __name__ == "__main__":
    main()
