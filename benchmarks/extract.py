"""Slides to features: reader alone, model alone, both together, and a plain loop of openslide and timm.

    python benchmarks/extract.py SLIDES... --model FOLDER --mpp 0.5 [--engines torch-fp32 torch-bf16] [--repeat 2]

All ways run in turn on the same tiles and the same number of cores. Printed: tiles a second, CPU seconds, and

- overlap: wall time together / that of the slower of reader and model alone (1: perfectly hidden). On a processor both
  want the same cores: no schedule is faster than (CPU seconds of the reader + of the model) / cores. Where that exceeds
  the slower of the two, it is the limit, and the share of it that was reached is printed too;
- speed: tile rate / that of the plain loop in the same precision. The plain loop opens each slide, places a DataLoader
  with two workers on its coordinates (openslide, Pillow's resize, torchvision's normalisation) and calls timm, in
  float32 or under bf16 autocast.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console

if __name__ == "__main__":  # reader processes import this file too: seconds of torch, for nothing
    import openslide
    import timm
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from histill.extract.blocks import Blocks
    from histill.extract.config import ExtractConfig
    from histill.extract.folder import FeatureFolder
    from histill.extract.model import FeatureModel, Known, open_model
    from histill.extract.reading import Ahead
    from histill.extract.run import extract_slides
    from histill.extract.slides import Extraction
    from histill.tiles.cutting import SlideJob
    from histill.tiles.jobs import jobs_of
    from histill.tiles.pool import Pool, cores
    from histill.tiles.progress import TilingProgress
    from histill.tiles.write import Outcome

QUIET = Console(file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
PLAIN_WORKERS = 2


class PlainTiles:
    """The tiles of one slide, as a textbook reads them."""

    def __init__(self, path: Path, coords: np.ndarray, extent: float, side: int, transform: Callable) -> None:
        self.path, self.coords, self.extent, self.side, self.transform = path, coords, round(extent), side, transform
        self.slide: openslide.OpenSlide | None = None

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.slide is None:
            self.slide = openslide.OpenSlide(self.path)
        tile = self.slide.read_region(tuple(self.coords[index].tolist()), 0, (self.extent, self.extent)).convert("RGB")
        if tile.size != (self.side, self.side):
            tile = tile.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return self.transform(tile)


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """Wall and CPU seconds, those of ended children included."""
    told, cpu, wall = dict[str, float](), cpu_seconds(), time.perf_counter()
    yield told
    told["wall"] = time.perf_counter() - wall
    told["cpu"] = cpu_seconds() - cpu


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def plain(features: Path, jobs: list[SlideJob], folder: Path, batch: int, bf16: bool) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    config = model.pretrained_cfg
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])])
    for job in jobs:
        with h5py.File(features / "features" / f"{job.id}.h5") as file:
            coords, extent = file["coords"][:], float(file.attrs["tile_extent_px"])
        tiles = PlainTiles(job.path, coords, extent, job.config.tile_px, transform)
        found = []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for images in DataLoader(tiles, batch_size=batch, num_workers=PLAIN_WORKERS):
                found.append(model(images).float())
        torch.save(torch.cat(found), features / f"{job.id}.plain.pt")


def reader_alone(jobs: list[SlideJob], workers: int) -> np.ndarray:
    pool, blocks, todo, kept = Pool(workers), Blocks(2 * workers + 2, jobs[0].config.tile_px), list(jobs), []
    ahead = Ahead(pool, blocks, lambda: todo.pop(0) if todo else None, lambda job, plan: 0)
    for reading in ahead.slides():
        for piece, tiles in ahead.tiles(reading):
            kept.append(tiles[: piece.fates.count(0)].copy())
    pool.close()
    blocks.close()
    return np.concatenate(kept)


def model_alone(model: FeatureModel, tiles: np.ndarray, batch: int) -> None:
    for start in range(0, len(tiles), batch):
        model.finish(model.start(torch.from_numpy(tiles[start : start + batch])))


def together(config: ExtractConfig, model: FeatureModel, jobs: list[SlideJob], out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with TilingProgress(QUIET, len(jobs)) as bar:
        Extraction(config, model, FeatureFolder(out), (), config.workers, Outcome(), bar).run(jobs)


def measure(config: ExtractConfig, engine: str, scratch: Path, repeat: int) -> None:
    model = open_model(config, Known(), engine, "cpu")
    jobs = jobs_of(config.tiling(mpp=config.mpp, tile_px=model.engine.input_px), QUIET)
    tiles = reader_alone(jobs, config.workers)
    model_alone(model, tiles[: config.batch], config.batch)  # warm
    bf16, best = "fp32" not in engine, dict[str, dict[str, float]]()
    ways = {
        "reader alone": lambda: reader_alone(jobs, config.workers),
        "model alone": lambda: model_alone(model, tiles, config.batch),
        "together": lambda: together(config, model, jobs, scratch / "out"),
        "plain loop": lambda: plain(scratch / "first", jobs, Path(config.model or ""), config.batch, bf16),
    }
    for _ in range(repeat):
        for name, way in ways.items():
            with clock() as told:
                way()
            if name not in best or told["wall"] < best[name]["wall"]:
                best[name] = told
    precision = "bf16 autocast" if bf16 else "float32"
    print(f"\n{engine}, {len(tiles)} tiles of {model.engine.input_px} px, {len(jobs)} slides; plain loop: {precision}")
    for name, told in best.items():
        rate = len(tiles) / told["wall"]
        print(f"  {name:<13}{rate:8.1f} tiles/s {told['wall']:7.1f} s wall {told['cpu']:7.1f} s CPU")
    wall = {name: told["wall"] for name, told in best.items()}
    slower = max(wall["reader alone"], wall["model alone"])
    spent = best["reader alone"]["cpu"] + best["model alone"]["cpu"]
    limit = max(slower, spent / cores())
    print(
        f"  overlap: {wall['together'] / slower:.2f}, of which the cores allow no less than {limit / slower:.2f} "
        f"({spent:.1f} CPU s on {cores()} cores): "
        f"together / limit {wall['together'] / limit:.2f}, CPU together / apart "
        f"{best['together']['cpu'] / spent:.2f}   speed: {wall['plain loop'] / wall['together']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mpp", type=float, default=0.5)
    parser.add_argument("--mpp-override")
    parser.add_argument("--tile-px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["torch-fp32", "torch-bf16"])
    parser.add_argument("--repeat", type=int, default=2)
    told = parser.parse_args()
    options = {key: value for key, value in vars(told).items() if key not in ("engines", "repeat", "slides")}
    with tempfile.TemporaryDirectory() as scratch:
        options |= {"out": Path(scratch) / "first", "any_mpp": True, "engine": told.engines[0]}
        config = ExtractConfig(slides=tuple(told.slides), **options)
        extract_slides(config, QUIET)  # for the plain loop's coordinates
        print(f"{cores()} cores, load {os.getloadavg()[0]:.1f}, torch threads {torch.get_num_threads()}")
        for engine in told.engines:
            measure(config, engine, Path(scratch), told.repeat)


if __name__ == "__main__":
    main()
