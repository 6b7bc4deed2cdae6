"""The true shapes: ViT-g/14 (H-optimus-0) teaches ViT-B/14 (H0-mini), with random weights.

On a GPU: tiles/s, peak memory and the share of the data sheet's bf16 rate, for several batches and layouts. On a CPU
(``--device cpu --batch 2 --steps 1``): that a step of the preset `h0-mini` fits into memory, and what it costs.

    python benchmarks/gpu.py --device cpu --batch 2 --steps 1
    python benchmarks/gpu.py --batch 32 64 128 --peak-tflops 989
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import time

import torch
from random_run import flops_per_tile, one_step, random_batch, random_parts

from histill.distill.plan_config import PlanConfig
from histill.distill.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after as many untimed ones (at most 3)")
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="the data sheet's dense bf16 rate")
    parser.add_argument("--compile", nargs="+", type=int, default=[0], help="0, 1 or both")
    parser.add_argument("--pack", nargs="+", type=int, default=[0], help="0, 1 or both")
    options = parser.parse_args()
    for batch in options.batch:
        for compiled in options.compile:
            for packed in options.pack:
                run(options, batch, bool(compiled), bool(packed))


def run(options: argparse.Namespace, batch: int, compiled: bool, packed: bool) -> None:
    preset = PRESETS["h0-mini"]
    config = dataclasses.replace(
        preset,
        teacher=("h-optimus-0",),
        device=options.device,
        batch_tiles=batch,
        scale=dataclasses.replace(preset.scale, compile=compiled, pack=packed),
        objective=dataclasses.replace(
            preset.objective, cls_prototypes=options.prototypes, patch_prototypes=options.prototypes
        ),
    )
    parts = random_parts(config, PlanConfig())
    tiles = random_batch(batch, 224)
    on_gpu = parts.device.type == "cuda"
    for step in range(min(3, options.steps) if on_gpu else 0):
        one_step(parts, tiles, step)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for step in range(options.steps):
        watch = one_step(parts, tiles, step)
    seconds = (time.perf_counter() - began) / options.steps
    rate = batch / seconds
    flops = flops_per_tile(config)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    shares = " ".join(f"{key} {part:.0%}" for key, part in watch.shares().items())
    print(
        f"{name}  batch {batch:4d}  compile {int(compiled)}  pack {int(packed)}  {seconds:8.3f} s a step  "
        f"{rate:8.2f} tiles/s  {flops * rate / 1e12:7.2f} TFLOP/s"
        + (f" = {flops * rate / options.peak_tflops / 1e12:.0%} of {options.peak_tflops:g}" if on_gpu else "")
        + f"  peak {peak / 1e9:.1f} GB  {shares}",
        flush=True,
    )
    del parts
    gc.collect()


if __name__ == "__main__":
    main()
