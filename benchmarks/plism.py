"""PLISM's exact engine: seconds a pair, share of the processor's peak, growth, and the direct evaluation beside it.

Slides are random features with a falling spectrum and a common mean; n = 8,139 tiles, d = 768. A pair needs 2 n^2 d
operations, counted for the one product. The peak is the best rate of plain float32 products of several sizes in the
same process, in turn with the pairs. Wall time says something on an idle machine only, hence processor time beside it:
what all threads together were at work.

    python benchmarks/plism.py [--threads 2] [--tiles 8139] [--features 768] [--rounds 3] [--slides 4]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

DIRECT_TILES = 2713
DEMAND_S, DEMAND_SHARE, DEMAND_GB = 1.5, 0.5, 1.0
Seconds = tuple[float, float]
"""Wall, processor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiles", type=int, default=8139)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument("--slides", type=int, default=4, help="of the whole benchmark, with its memory")
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.whole:
        whole(options)
        return
    import torch

    print(
        f"{options.tiles:,} tiles x {options.features} features, {options.threads} threads, torch {torch.__version__}"
    )
    with ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        engine(options, pool)
        direct(options, pool)
    with tempfile.TemporaryDirectory() as folder:
        write_slides(options, Path(folder) / "features")
        command = [sys.executable, __file__, *sys.argv[1:], "--whole", folder]
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="")


def slide(tiles: int, dim: int, seed: int) -> np.ndarray:
    """The same fields for all seeds, with other noise; about the similarities of a good encoder."""
    spectrum_D = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    field, own = np.random.default_rng(0), np.random.default_rng(seed)
    mean_D = field.normal(size=dim).astype(np.float32)
    field_ND = field.standard_normal((tiles, dim), dtype=np.float32)
    noise_ND = own.standard_normal((tiles, dim), dtype=np.float32)
    features_ND: np.ndarray = (mean_D + field_ND + 0.8 * noise_ND) * spectrum_D
    return features_ND


def timed(work: Callable[[int], object], pool: ThreadPoolExecutor, threads: int) -> Seconds:
    """Seconds of one call, when every thread makes one at once."""
    wall, cpu = time.perf_counter(), time.process_time()
    list(pool.map(work, range(threads)))
    return (time.perf_counter() - wall) / threads, (time.process_time() - cpu) / threads


def engine(options: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
    import torch

    from histill.evaluate.plism.engine import compare, prepare

    sides = (1024, 2048, 3072)
    factors = {side: torch.randn(side, side) for side in sides}
    targets = [{side: torch.empty(side, side) for side in sides} for _ in range(options.threads)]
    sizes = [options.tiles // 4, options.tiles // 2, options.tiles]
    table = [slide(options.tiles, options.features, seed) for seed in (1, 2)]
    pairs = {size: [prepare(x[:size], name="slide") for x in table] for size in sizes}
    rates: list[Seconds] = []
    found: dict[int, list[Seconds]] = {size: [] for size in sizes}
    for _ in range(options.rounds):
        for side in sides:
            plain = timed(
                lambda thread, s=side: torch.mm(factors[s], factors[s], out=targets[thread][s]), pool, options.threads
            )
            rates.append((2 * side**3 / plain[0], 2 * side**3 / plain[1]))
        for size, (a, b) in pairs.items():
            found[size].append(timed(lambda _, a=a, b=b: compare(a, b), pool, options.threads))
    peak = [max(rate[kind] for rate in rates) for kind in range(2)]
    print(
        f"plain float32 product: {peak[0] / 1e9:.0f} GFLOP/s; a thread: {peak[1] / 1e9:.0f} GFLOP per processor second"
    )
    heads = ("s/pair", "cpu s", "GFLOP/s", "of peak", "per cpu s", "of peak", "n^2", "cpu")
    print(f"{'tiles':>6}" + "".join(f"{head:>10}" for head in heads))
    best = {size: [min(times[kind] for times in found[size]) for kind in range(2)] for size in sizes}
    for size, (wall, cpu) in best.items():
        work = 2 * size**2 * options.features
        rate, cpu_rate = work / wall, work / cpu
        print(
            f"{size:>6}{wall:>10.3f}{cpu:>10.3f}{rate / 1e9:>10.0f}{rate / peak[0]:>10.0%}{cpu_rate / 1e9:>10.0f}"
            f"{cpu_rate / peak[1]:>10.0%}{(size / sizes[0]) ** 2:>10.1f}{cpu / best[sizes[0]][1]:>10.1f}"
        )
    wall, cpu = best[options.tiles]
    share = 2 * options.tiles**2 * options.features / cpu / peak[1]
    said("seconds a pair", wall, wall <= DEMAND_S, f"at most {DEMAND_S}")
    said(
        "the same from processor time", cpu / options.threads, cpu / options.threads <= DEMAND_S, f"at most {DEMAND_S}"
    )
    said("share of the peak, by processor time", share, share >= DEMAND_SHARE, f"at least {DEMAND_SHARE}")
    print(f"4,095 pairs: {4095 * wall / 3600:.2f} h (by processor time {4095 * cpu / options.threads / 3600:.2f} h)")


def direct(options: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
    """The definition as it stands: 2n x 2n similarities in float32, and the ten nearest of each row."""
    import torch

    from histill.evaluate.plism.engine import compare, prepare

    a, b = (prepare(slide(DIRECT_TILES, options.features, seed), name="slide") for seed in (1, 2))

    def definition(_: int) -> list[float]:
        both_MD = torch.cat([a.unit_PD[:DIRECT_TILES], b.unit_PD[:DIRECT_TILES]])
        similarity_MM = both_MD @ both_MD.T
        similarity_MM.fill_diagonal_(-2)
        twin_M1 = torch.arange(2 * DIRECT_TILES).roll(-DIRECT_TILES)[:, None]
        hit_MK = similarity_MM.topk(10, dim=1)[1] == twin_M1
        return [hit_MK[:, :k].any(dim=1).double().mean().item() for k in (1, 3, 5, 10)]

    times = {
        name: [timed(work, pool, options.threads) for _ in range(options.rounds)]
        for name, work in (("direct", definition), ("engine", lambda _: compare(a, b)))
    }
    (slow, slow_cpu), (fast, fast_cpu) = ([min(t[kind] for t in times[name]) for kind in range(2)] for name in times)
    print(
        f"direct float32 evaluation, {DIRECT_TILES:,} tiles: {slow:.3f} s, {slow_cpu:.3f} cpu s; ours {fast:.3f} s, ",
        end="",
    )
    print(f"{fast_cpu:.3f} cpu s: {slow / fast:.1f} times (cpu {slow_cpu / fast_cpu:.1f} times) faster")
    ours = compare(a, b)
    print(f"  top-1 and top-10: direct {definition(0)[0]:.6f} {definition(0)[3]:.6f}, ", end="")
    print(f"ours {ours.top_1_accuracy:.6f} {ours.top_10_accuracy:.6f}")


def write_slides(options: argparse.Namespace, folder: Path) -> None:
    names = [f"{staining}_{scanner}_to_GMH_S60.tif" for staining in ("GM", "GV", "HR", "KR") for scanner in ("P", "SQ")]
    places_N3 = np.array([[16, place // 150, place % 150] for place in range(options.tiles)], dtype=np.float32)
    for seed, name in enumerate(names[: options.slides], start=1):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "features.npy", np.hstack([places_N3, slide(options.tiles, options.features, seed)]))


def whole(options: argparse.Namespace) -> None:
    """The whole benchmark in a process of its own."""
    import torch
    from rich.console import Console

    from histill.evaluate.embedding import FeatureCache
    from histill.evaluate.plism.run import run_plism

    torch.set_num_threads(options.threads)
    before = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    features, out = options.whole / "features", options.whole / "out"
    result = run_plism(
        features=features,
        root=None,
        embedder=None,
        cache=FeatureCache(None),
        out=out,
        n_tiles="all",
        memory_gb=DEMAND_GB,
        console=Console(quiet=True),
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    memory = (peak_memory() - before) / 1e9
    held = options.slides * options.tiles * options.features * 4 / 1e9
    count = len(result.details["pairs"])
    print(
        f"whole benchmark, {options.slides} slides, {count} pairs, reading and writing: {wall:.1f} s, {cpu:.1f} cpu s"
    )
    said(
        "memory beyond the program, features included, GB",
        memory,
        memory - held <= DEMAND_GB,
        f"{DEMAND_GB} + {held:.2f}",
    )


def peak_memory() -> int:
    """Bytes; not of getrusage, whose peak a process inherits from the one that starts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def said(what: str, value: float, met: bool, demand: str) -> None:
    print(f"demand: {what}: {value:.2f}, {demand}: {'met' if met else 'NOT MET'}")


if __name__ == "__main__":
    main()
