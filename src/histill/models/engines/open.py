"""Open a model with an engine."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from histill.errors import ConfigError, ModelError, nearest
from histill.models.encoder import Encoder, load_encoder
from histill.models.engines.capture import need, to_openvino, write_onnx
from histill.models.engines.choose import installed, rates
from histill.models.engines.engine import ENGINES, Engine, LoadedEngine, Prepare, Run
from histill.models.engines.folder import Exported, is_export, read_export
from histill.models.engines.with_onnxruntime import onnxruntime_run
from histill.models.engines.with_openvino import has_bf16, openvino_run
from histill.models.engines.with_torch import torch_run

__all__ = ["engine_of", "full_name", "normaliser", "open_engine", "pixels_last"]

Triple = tuple[float, float, float]

_BUNDLE_ENGINES = tuple(name for name in ENGINES if name != "openvino-int8")
_EXACT = ("torch-fp32", "onnxruntime", "openvino-fp32")  # the bundle's numbers, to 1e-4


def open_engine(
    model: str, *, engine: str = "torch", input_px: int | None = None, batch: int = 32, device: str = "cpu"
) -> Engine:
    """Open a model, ready to run.

    Parameters
    ----------
    model
        Anything that :func:`histill.models.load_encoder` takes, or a folder that ``histill export`` made.
    engine
        One of :data:`ENGINES`; ``torch``, short for ``torch-fp32``; or ``auto``: each engine that is installed is
        measured for some seconds, all in turns, and the choice and the rates are printed to stderr. ``auto`` may
        choose bf16, and does not try ``torch-compile-bf16``, which takes minutes to start.
    input_px
        Side of the images; the model's own if None. An export has one size.
    batch
        Most images that run at once; more are cut up.
    device
        ``cpu``, or for torch any of its devices.

    Returns
    -------
    Engine
        A model that is not an export is turned into the engine's own form in memory, which takes some seconds.

    Raises
    ------
    ConfigError
        There is no such engine, or not for this device.
    ModelError
        As ``load_encoder``; a damaged export; an engine that cannot run this model.
    MissingExtraError
        The engine's library is not installed.
    """
    engine = full_name(engine)
    _check_device(engine, device)
    if is_export(model.removeprefix("local-dir:")):
        return _open_export(Path(model.removeprefix("local-dir:")).expanduser(), engine, input_px, batch, device)
    if engine == "openvino-int8":
        raise ModelError(
            "int8 needs an export that was calibrated on tiles",
            where=model,
            remedy=f"histill export {model} --to int8 --tiles TILES --out FOLDER",
        )
    encoder = load_encoder(model, input_px=input_px, device=device)
    return engine_of(encoder, engine, batch=batch)


def _check_device(engine: str, device: str) -> None:
    if device != "cpu" and not engine.startswith("torch") and engine != "auto":
        raise ConfigError("this engine runs on the processor only", got=f"{engine} on {device}", allowed="device cpu")


def full_name(engine: str) -> str:
    """Check the name of an engine; ``torch`` becomes ``torch-fp32``.

    Raises
    ------
    ConfigError
        There is no such engine.
    """
    offered = ("auto", "torch", *ENGINES)
    if engine not in offered:
        remedy = nearest(engine, offered)
        raise ConfigError("there is no such engine", got=repr(engine), allowed=", ".join(offered), remedy=remedy)
    return "torch-fp32" if engine == "torch" else engine


def engine_of(encoder: Encoder, engine: str, *, batch: int = 32) -> Engine:
    """Run a loaded encoder, on its device, with an engine; arguments and errors as of :func:`open_engine`."""
    engine, device = full_name(engine), str(next(encoder.parameters()).device)
    _check_device(engine, device)
    graphs = _Graphs(encoder)

    def build(name: str) -> Engine:
        return LoadedEngine(
            name=encoder.name,
            engine=name,
            embed_dim=encoder.embed_dim,
            patch_px=encoder.patch_px,
            prefix_tokens=encoder.prefix_tokens,
            input_px=encoder.input_px,
            mean=encoder.mean,
            std=encoder.std,
            embedding=encoder.embedding,
            licence=encoder.licence,
            device=device,
            batch=batch,
            fixed_batch="compile" in name,
            run=graphs.run(name, batch),
            digest=lambda: _digest(encoder.content_hash(), name),
        )

    allowed = [name for name in _BUNDLE_ENGINES if device == "cpu" or name.startswith("torch")]
    if engine == "auto":
        return _fastest(build, [name for name in installed(allowed, exported=False) if "compile" not in name], batch)
    return build(engine)


class _Graphs:
    """An encoder in the form that each library runs; a conversion is done once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @cached_property
    def openvino(self) -> Any:
        return to_openvino(self.encoder, pixels=True)

    def run(self, engine: str, batch: int) -> Run:
        if engine.startswith("torch"):
            return torch_run(self.encoder, engine)
        if engine.startswith("openvino"):
            return openvino_run(self.openvino, engine, pixels_last, batch=batch)
        need("onnxruntime", "onnx")  # before the export, which takes longer
        with tempfile.TemporaryDirectory() as folder:
            write_onnx(self.encoder, Path(folder) / "model.onnx", pixels=True)
            return onnxruntime_run(Path(folder) / "model.onnx", pixels_last)


def pixels_last(images_BCHW: torch.Tensor) -> Any:
    """Turn a batch into contiguous uint8 (B, H, W, 3); free of charge when the tiles lie so in memory."""
    return images_BCHW.permute(0, 2, 3, 1).contiguous().numpy()


def normaliser(mean: Triple, std: Triple) -> Prepare:
    """Make of a batch what a graph without preprocessing takes, by the arithmetic of ``Encoder.normalise``."""
    mean_C11, std_C11 = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return lambda images_BCHW: ((images_BCHW.float() / 255 - mean_C11) / std_C11).contiguous().numpy()


def _open_export(folder: Path, engine: str, input_px: int | None, batch: int, device: str) -> Engine:
    exported = read_export(folder)
    allowed = exported.engines
    if engine not in (*allowed, "auto"):
        raise ConfigError(
            "this export was not verified with this engine",
            where=folder,
            got=engine,
            allowed=", ".join((*allowed, "auto")),
        )
    if device != "cpu":
        raise ConfigError("an export runs on the processor only", where=folder, got=device, allowed="device cpu")
    if input_px not in (None, exported.input_px):
        raise ModelError(
            "an export has one size of images",
            where=folder,
            got=f"{input_px} px",
            allowed=f"{exported.input_px} px",
            remedy="export the bundle again with --input-px",
        )
    prepare = pixels_last if exported.pixels else normaliser(exported.mean, exported.std)
    path = folder / exported.file

    def build(name: str) -> Engine:
        return LoadedEngine(
            name=str(folder),
            engine=name,
            embed_dim=exported.embed_dim,
            patch_px=exported.patch_px,
            prefix_tokens=exported.prefix_tokens,
            input_px=exported.input_px,
            mean=exported.mean,
            std=exported.std,
            embedding=exported.embedding,
            licence=exported.licence,
            device=device,
            batch=batch,
            fixed_batch=False,
            run=(
                onnxruntime_run(path, prepare)
                if name == "onnxruntime"
                else openvino_run(path, name, prepare, batch=batch)
            ),
            digest=lambda: _digest(_weights_of(exported), name),
        )

    return _fastest(build, installed(allowed, exported=True), batch) if engine == "auto" else build(engine)


def _weights_of(exported: Exported) -> str:
    """Of a float32 export those of the bundle; int8 weights depend on the calibration."""
    if exported.kind != "int8":
        return exported.content_hash
    return hashlib.sha256(repr(exported.files).encode()).hexdigest()


def _digest(weights: str, engine: str) -> str:
    return weights if engine in _EXACT else hashlib.sha256(f"{weights} {engine}".encode()).hexdigest()


def _fastest(build: Callable[[str], Engine], names: Sequence[str], batch: int) -> Engine:
    """Open every engine, measure them in turns and keep the fastest."""
    if "openvino-bf16" in names and not has_bf16():
        names = [name for name in names if name != "openvino-bf16"]
    if not names:
        need("openvino", "openvino")  # only an export can have no engine at all
    opened = {name: build(name) for name in names}
    if len(opened) == 1:
        (only,) = opened.values()
        print(f"engine auto: {only.engine}, the only one that is installed for this model", file=sys.stderr)
        return only
    found = rates(opened, batch)
    best = max(found, key=lambda name: found[name])
    listed = ", ".join(f"{name} {found[name]:.4g}" for name in sorted(found, key=lambda name: -found[name]))
    print(f"engine auto: {best} (images/s at batch {batch}: {listed})", file=sys.stderr)
    return opened[best]
