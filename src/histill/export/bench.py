"""What models cost to run: every one with every engine, in turns in one run, so that their ratios can be trusted.

Shape legend: B images, C = 3 colours, H and W pixels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from histill import __version__
from histill.errors import ConfigError
from histill.evaluate.cost import count_macs
from histill.export.config import BenchConfig
from histill.models.encoder import load_encoder
from histill.models.engines import ENGINES, Engine, open_engine
from histill.models.engines.choose import in_turns
from histill.models.engines.folder import is_export, read_export
from histill.models.engines.open import engine_of, full_name
from histill.models.machine import held_bytes, peak_bytes, pick_device, processor_name

__all__ = ["Row", "bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model with one engine."""

    model: str
    """As it was asked for."""
    engine: str
    """What ran it."""
    input_px: int
    """Side of the tiles."""
    tiles_per_second: float
    """By the median round."""
    latency_p50_ms: float
    """Of a batch, in milliseconds."""
    latency_p95_ms: float
    """Of a batch, in milliseconds."""
    ratio: float
    """Speed against the first row: the median of the ratios within each round."""
    memory_mb: float | None
    """What the process (or the GPU) held at the peak of a batch beyond what it held before the model was opened, in
    10^6 bytes; None where the system does not tell."""
    parameters: int
    """Of the model before any conversion."""
    macs: int
    """Multiplications with addition of one tile, in matrix products and convolutions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    engine: Engine
    run: Callable[[], None]
    memory: int | None
    parameters: int
    macs: int


def bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Open everything, then measure in turns.

    Parameters
    ----------
    config
        What to measure.
    console
        For what is going on.

    Returns
    -------
    dict
        ``rows`` (the fields of :class:`Row`), and what they were measured on.

    Raises
    ------
    ConfigError
        An engine that runs none of the models, and what ``open_engine`` raises.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        opened = {}
        for model, engine in _pairs(config):
            console.print(f"opening {model} with {engine}")
            opened[f"{model} {engine}"] = (model, _open(model, engine, config))
        console.print(f"measuring {len(opened)} in turns")
        times = in_turns({key: each.run for key, (_, each) in opened.items()}, rounds=config.rounds)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    first = next(iter(times.values()))
    rows = [asdict(_row(model, each, times[key], first, config.batch)) for key, (model, each) in opened.items()]
    return {
        "rows": rows,
        "batch": config.batch,
        "rounds": config.rounds,
        "threads": threads,
        "device": str(pick_device(config.device)),
        "processor": processor_name(pick_device(config.device)),
        "versions": {"histill": __version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


def _pairs(config: BenchConfig) -> list[tuple[str, str]]:
    """Which model runs with which engine."""
    asked = tuple(dict.fromkeys(map(full_name, config.engine)))
    found: list[tuple[str, str]] = []
    for model in config.models:
        if is_export(model):
            possible: tuple[str, ...] = read_export(Path(model).expanduser()).engines
            chosen = asked or possible
        else:
            possible = ("auto", *(name for name in ENGINES if name != "openvino-int8"))
            chosen = asked or ("torch-fp32",)
        runs = [(model, name) for name in chosen if name in possible]
        if not runs:
            raise ConfigError(
                "none of the engines that are asked for can run this model",
                where=f"--engine {' '.join(asked)}",
                got=model,
                allowed=", ".join(possible),
            )
        found += runs
    unused = [name for name in asked if not any(name == used for _, used in found)]
    if unused:
        raise ConfigError(
            "this engine can run none of these models",
            where="--engine",
            got=", ".join(unused),
            remedy="give an export that was made for it: histill export",
        )
    return found


def _open(model: str, name: str, config: BenchConfig) -> _Opened:
    """Open one and run it once, watching the memory."""
    device = pick_device(config.device)
    held = held_bytes(device)
    if is_export(model):
        exported = read_export(Path(model).expanduser())
        parameters, macs = exported.parameters, exported.macs
        engine = open_engine(
            model, engine=name, input_px=config.input_px or None, batch=config.batch, device=str(device)
        )
    else:
        encoder = load_encoder(model, input_px=config.input_px or None, device=device)
        parameters = sum(each.numel() for each in encoder.model.parameters())
        macs = count_macs(encoder, encoder.input_px)
        engine = engine_of(encoder, name, batch=config.batch)
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch, engine.input_px, engine.input_px, 3)
    images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)

    def run() -> None:
        engine(images_BCHW)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    peak = None if held is None else peak_bytes(run, device)
    memory = None if held is None or peak is None else max(0, peak - held)
    return _Opened(engine=engine, run=run, memory=memory, parameters=parameters, macs=macs)


def _row(model: str, opened: _Opened, times: list[float], first: list[float], batch: int) -> Row:
    def short(number: float) -> float:
        return float(f"{number:.4g}")

    return Row(
        model=model,
        engine=opened.engine.engine,
        input_px=opened.engine.input_px,
        tiles_per_second=short(batch / statistics.median(times)),
        latency_p50_ms=short(1e3 * statistics.median(times)),
        latency_p95_ms=short(1e3 * float(np.percentile(times, 95))),
        ratio=short(statistics.median(base / own for base, own in zip(first, times, strict=True))),
        memory_mb=None if opened.memory is None else short(opened.memory / 1e6),
        parameters=opened.parameters,
        macs=opened.macs,
    )
