"""Every engine on the H0-mini architecture at 224 px, in turns in one run, against the processor's matrix peak.

    python benchmarks/inference.py --folder FOLDER --prepare     # bundle and exports, some minutes
    python benchmarks/inference.py --folder FOLDER               # measure

The weights are random: speed does not depend on them, once no scale is one and no shift is zero, which graph libraries
would leave out. int8 is calibrated on drawn tissue; how well int8 keeps the
numbers of a trained model is another question, which ``histill export`` answers on real tiles.

The peak is that of a plain matrix product of torch in the same type, the better of two sizes, measured in the same
turns: where the machine slows down for a moment, both fall. The share is the median over the turns.

Shape legend: B images, H and W pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from histill import files
from histill.evaluate.cost import count_macs
from histill.export.config import ExportConfig
from histill.export.run import export
from histill.models import STUDENTS, build_student, load_encoder, write_bundle
from histill.models.engines import Engine, open_engine
from histill.models.engines.choose import in_turns
from histill.synthetic import KINDS, SCANNERS, STAINS, draw_tile, render, slide_effects

SIZES = (1024, 2048)
PEAK_OF = {"torch-fp32": "fp32", "onnxruntime": "fp32", "openvino-fp32": "fp32", "openvino-int8": "int8"}


def prepare(folder: Path) -> None:
    """Write the bundle, drawn tiles and the exports, where they are missing."""
    bundle, tiles = folder / "bundle", folder / "tiles"
    if not bundle.exists():
        model = build_student("h0-mini", seed=0).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        mean, std = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
        write_bundle(bundle, model, STUDENTS["h0-mini"], mean=mean, std=std, input_px=224, provenance={})
    if not tiles.exists():
        with files.atomic_folder(tiles) as new:
            for seed in range(12):
                for kind in KINDS:
                    drawn = draw_tile(kind, 224, seed, slide_effects(seed))
                    pixels = render(drawn, STAINS["harris"], SCANNERS["aurora"], seed)
                    Image.fromarray(pixels).save(new / f"{kind}-{seed}.png")
    for target in ("onnx", "openvino", "int8"):
        if not (folder / target).exists():
            config = ExportConfig(
                bundle=bundle, to=target, out=folder / target, tiles=tiles, verify_tiles=8, calibrate_tiles=16
            )
            export(config, Console(stderr=True))


def engines(folder: Path, names: list[str], batch: int) -> dict[str, Engine]:
    """Open what is asked for; exports where there are some."""
    where = {"onnxruntime": "onnx", "openvino-fp32": "openvino", "openvino-bf16": "openvino", "openvino-int8": "int8"}
    return {name: open_engine(str(folder / where.get(name, "bundle")), engine=name, batch=batch) for name in names}


def products() -> dict[str, Callable[[], object]]:
    """Plain matrix products per type and size."""
    found: dict[str, Callable[[], object]] = {}
    for size in SIZES:
        repeats = 2 * (2048 // size) ** 3
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            matrix = torch.rand(size, size).to(dtype)
            found[f"{name} {size}"] = lambda matrix=matrix, n=repeats: [torch.mm(matrix, matrix) for _ in range(n)]
        small = torch.randint(-100, 100, (size, size), dtype=torch.int8)
        found[f"int8 {size}"] = lambda small=small, n=repeats: [torch._int_mm(small, small) for _ in range(n)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true", help="write bundle and exports, and measure nothing")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--engine",
        nargs="+",
        default=["torch-fp32", "torch-bf16", "onnxruntime", "openvino-fp32", "openvino-bf16", "openvino-int8"],
    )
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    if args.prepare:
        prepare(args.folder)
        return
    torch.set_num_threads(args.threads)
    encoder = load_encoder(str(args.folder / "bundle"))
    operations = 2 * count_macs(encoder, 224)
    shape = (args.batch, 224, 224, 3)
    images_BCHW = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).permute(0, 3, 1, 2)
    opened = engines(args.folder, args.engine, args.batch)
    runs: dict[str, Callable[[], object]] = {
        name: lambda engine=engine: engine(images_BCHW) for name, engine in opened.items()
    }
    times = in_turns(runs | products(), rounds=args.rounds)
    report(times, operations, args)


def report(times: dict[str, list[float]], operations: int, args: argparse.Namespace) -> None:
    """Print peaks and engines, and write them where asked."""
    peaks = {
        kind: [
            max(2 * size**3 * 2 * (2048 // size) ** 3 / times[f"{kind} {size}"][turn] for size in SIZES)
            for turn in range(args.rounds)
        ]
        for kind in ("fp32", "bf16", "int8")
    }
    for kind, found in peaks.items():
        print(f"matrix peak {kind}: {statistics.median(found) / 1e9:.0f} Gop/s, best {max(found) / 1e9:.0f}")
    table = Table("engine", "tiles/s", "best", "against the first", "peak of", "share of it")
    first = times[args.engine[0]]
    rows = []
    for name in args.engine:
        own, kind = times[name], PEAK_OF.get(name, "bf16")
        share = statistics.median(args.batch * operations / t / p for t, p in zip(own, peaks[kind], strict=True))
        ratio = statistics.median(base / t for base, t in zip(first, own, strict=True))
        rate = args.batch / statistics.median(own)
        rows.append({"engine": name, "tiles_per_second": rate, "ratio": ratio, "peak": kind, "share": share})
        best = f"{args.batch / min(own):.2f}"
        table.add_row(name, f"{rate:.2f}", best, f"{ratio:.2f}", kind, f"{share:.0%}")
    print(f"{operations / 1e9:.1f} Gop a tile, batch {args.batch}, {args.threads} threads, {args.rounds} turns")
    Console(width=100).print(table)
    if args.out is not None:
        medians = {kind: statistics.median(found) for kind, found in peaks.items()}
        args.out.write_text(json.dumps({"peaks": medians, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
