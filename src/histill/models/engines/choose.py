"""``--engine auto``: measure what is installed, in turns, and take the fastest."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from histill.models.engines.engine import Engine

__all__ = ["in_turns", "installed", "rates"]

_NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}
_SECONDS = 10.0
_ROUNDS = 3


def installed(engines: Sequence[str], *, exported: bool) -> list[str]:
    """Those engines whose libraries are here; an export needs no exporter."""
    found = []
    for engine in engines:
        needed = _NEEDS.get(engine.partition("-")[0], ())
        if all(importlib.util.find_spec(module) for module in (needed[:1] if exported else needed)):
            found.append(engine)
    return found


def in_turns(
    runs: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float | None = None
) -> dict[str, list[float]]:
    """Time several functions in turns, so that a busy moment of the machine hits all of them.

    Each runs once beforehand, untimed.

    Parameters
    ----------
    runs
        What to time.
    rounds
        Times that each is run.
    seconds
        Start no further round after this time; the first is always done.

    Returns
    -------
    dict
        The seconds of each run.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
        if seconds is not None and time.perf_counter() - start > seconds:
            break
    return times


def rates(engines: Mapping[str, Engine], batch: int) -> dict[str, float]:
    """Images per second of each engine, by its fastest of a few rounds in turns."""

    def job(engine: Engine) -> Callable[[], object]:
        images_BCHW = torch.randint(0, 256, (batch, 3, engine.input_px, engine.input_px), dtype=torch.uint8)

        def run() -> None:
            engine(images_BCHW)
            if engine.device != "cpu":
                torch.cuda.synchronize(engine.device)

        return run

    times = in_turns({name: job(engine) for name, engine in engines.items()}, rounds=_ROUNDS, seconds=_SECONDS)
    return {name: batch / min(each) for name, each in times.items()}
