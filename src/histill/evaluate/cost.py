"""What an encoder costs: parameters, multiplications, speed and memory, measured on this machine.

MACs (multiplications with addition) are counted, not estimated: those of every matrix product and convolution of one
tile, by torch's own counter; norms, softmax and activations are left out, as is usual. Speed is measured in rounds,
each of which also times a plain matrix product of fixed size: where another program slows the machine down, that
number falls too, so that the ratio of two encoders can be judged although they were measured at different moments.

Shapes: N tiles, H and W pixels.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from histill import files
from histill.evaluate.embedding import EncoderEmbedder
from histill.models.encoder import Encoder
from histill.models.machine import held_bytes, peak_bytes, processor_name
from histill.synthetic import KINDS, SCANNERS, STAINS, draw_tile, render, slide_effects

__all__ = ["Cost", "cost_of", "count_macs", "measure"]

_ROUNDS = 5
_ROUND_SECONDS = 0.6  # a round embeds as many tiles as fit into it, at most a batch
_MEMORY_TILES = 8  # at once on a processor, where the tiles of a round depend on how fast it is
_YARDSTICK = {"cpu": 1024, "cuda": 8192}  # side of the square matrices of the plain product
_PROTOCOL = "cost 1"
"""Changes when the same encoder would get other numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What was counted and measured, and on what."""

    parameters: int
    macs_per_tile: int
    """At ``input_px``."""
    tiles_per_second: float
    """Median of the rounds: from uint8 tiles of ``input_px`` in memory to features in memory, without decoding."""
    memory_bytes: int | None
    """Weights, and what ``memory_batch`` tiles at once need besides; None where the system does not tell."""
    memory_batch: int
    """The batch on a GPU; 8, or a smaller batch, on a processor."""
    memory_rule: str
    """How the memory was measured, or why not."""
    processor: str
    """Name of the processor or GPU."""
    threads: int
    """Of torch on the processor."""
    batch: int
    """Tiles at once when speed was measured."""
    input_px: int
    precision: str
    engine: str
    yardstick_gflops: float
    """Speed of the plain matrix product in the same rounds and precision, 10^9 operations a second."""
    tiles: str
    """What was embedded."""
    date: str


def cost_of(embedder: EncoderEmbedder, folder: Path | None) -> dict[str, Any]:
    """Measure once; afterwards read what was found.

    Parameters
    ----------
    embedder
        The encoder with its size and precision. The pooling costs next to nothing and is left out of account.
    folder
        Keeps ``cost-<key>.json``, by weights, size, precision, machine and threads; None: measure every time.

    Returns
    -------
    dict
        The fields of :class:`Cost`.
    """
    if folder is None:
        return asdict(measure(embedder))
    device = next(embedder.encoder.parameters()).device
    facts = (
        _PROTOCOL,
        embedder.weights,
        embedder.input_px,
        embedder.precision,
        processor_name(device),
        torch.get_num_threads(),
        _engine(),
    )
    path = folder / f"cost-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"
    if not path.exists():
        files.write_json(path, asdict(measure(embedder)))
    found: dict[str, Any] = files.read_json(path)
    return found


def measure(embedder: EncoderEmbedder) -> Cost:
    """Count and measure now; takes about 5 seconds on a processor, more where one tile takes longer than that."""
    device = next(embedder.encoder.parameters()).device
    tiles_NHW3, what = _tiles(embedder)
    embedder.embed(tiles_NHW3[:1])  # kernels are chosen and buffers made at the first call
    seconds = _seconds(lambda: embedder.embed(tiles_NHW3[:1]))
    count = embedder.batch if device.type == "cuda" else max(1, min(embedder.batch, int(_ROUND_SECONDS / seconds)))
    held = embedder.batch if device.type == "cuda" else min(embedder.batch, _MEMORY_TILES)
    timed_NHW3, held_NHW3 = (np.resize(tiles_NHW3, (n, *tiles_NHW3.shape[1:])) for n in (count, held))  # repeats tiles
    speed, yardstick = _rounds(lambda: embedder.embed(timed_NHW3), device, embedder.precision)
    grown, rule = _peak(lambda: embedder.embed(held_NHW3), device)
    weights = sum(each.nbytes for each in (*embedder.encoder.parameters(), *embedder.encoder.buffers()))
    return Cost(
        parameters=sum(each.numel() for each in embedder.encoder.parameters()),
        macs_per_tile=count_macs(embedder.encoder, embedder.input_px),
        tiles_per_second=float(f"{count / speed:.4g}"),
        memory_bytes=None if grown is None else weights + grown,
        memory_batch=held,
        memory_rule=rule,
        processor=processor_name(device),
        threads=torch.get_num_threads(),
        batch=count,
        input_px=embedder.input_px,
        precision=embedder.precision,
        engine=_engine(),
        yardstick_gflops=float(f"{yardstick / 1e9:.4g}"),
        tiles=what,
        date=time.strftime("%Y-%m-%d"),
    )


@torch.no_grad()
def count_macs(encoder: Encoder, input_px: int) -> int:
    """Multiplications with addition of one tile of ``input_px``, in matrix products and convolutions.

    Attention is computed by its definition meanwhile: torch's counter does not know every fused kernel, and counts 0
    for those that it does not know.
    """
    image_BCHW = torch.zeros(1, 3, input_px, input_px, device=next(encoder.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(image_BCHW)
    return int(counter.get_total_flops()) // 2


def _tiles(embedder: EncoderEmbedder) -> tuple[NDArray[np.uint8], str]:
    """Tiles of the encoder's side: those that a benchmark showed first, or drawn tissue where it showed none."""
    side = embedder.input_px
    if not embedder.sample:
        effects = slide_effects(0)
        drawn = [draw_tile(kind, max(side, 32), 0, effects)[:side, :side] for kind in KINDS]
        looks = [render(each, STAINS["harris"], SCANNERS["aurora"], 0) for each in drawn]
        return np.stack(looks), "drawn tissue"
    seen_NHW3 = embedder.sample[0]
    if seen_NHW3.shape[1:3] != (side, side):
        seen_NCHW = torch.from_numpy(seen_NHW3).permute(0, 3, 1, 2).float()
        resized = F.interpolate(seen_NCHW, size=(side, side), mode="bilinear", antialias=True)
        seen_NHW3 = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return seen_NHW3, "tiles of a benchmark"


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _rounds(run: Callable[[], object], device: torch.device, precision: str) -> tuple[float, float]:
    """Median seconds of ``run``, and operations a second of a plain product, in turns; the first turn warms up."""
    side = _YARDSTICK[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix_SS = torch.rand(side, side, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(matrix_SS, matrix_SS)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    turns = [(_seconds(run), _seconds(product)) for _ in range(1 + _ROUNDS)][1:]
    own, plain = (median(times) for times in zip(*turns, strict=True))
    return own, 2 * side**3 / plain


def _peak(run: Callable[[], object], device: torch.device) -> tuple[int | None, str]:
    """Bytes that a run needs beyond what was there before it, and how that was found."""
    before = held_bytes(device)
    peak = None if before is None else peak_bytes(run, device)
    if before is None or peak is None:
        return None, "not measured: this system does not tell the peak of a part of a process"
    what = "CUDA memory allocated by torch" if device.type == "cuda" else "resident memory less its start"
    return max(0, peak - before), f"weights and peak of {what}"


def _engine() -> str:
    return f"PyTorch {torch.__version__}"
