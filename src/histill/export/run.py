"""``histill export``: convert, verify, and keep the result only if it is the same model."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from histill import __version__, files
from histill.config import to_dict
from histill.errors import ConfigError, ModelError
from histill.evaluate.cost import count_macs
from histill.export import int8
from histill.export.config import ExportConfig
from histill.export.verify import BOUNDS, as_record, check, compare, draw_tiles, scores
from histill.models.bundle import Bundle, read_bundle
from histill.models.card import licence_notices, teachers_of
from histill.models.engines import open_engine
from histill.models.engines.capture import need, to_openvino, write_onnx
from histill.models.engines.folder import ENGINES_OF, RECORD, Exported, Kind, is_export
from histill.models.engines.open import normaliser, pixels_last
from histill.models.engines.with_openvino import has_bf16
from histill.models.known import check_colours, known_of
from histill.tiles.open import open_tiles

__all__ = ["export", "refuse_to_replace"]

_LIBRARIES: dict[Kind, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "int8": ("openvino", "nncf"),
}
_FILE: dict[Kind, str] = {"onnx": "model.onnx", "openvino": "model.xml", "int8": "model.xml"}


def export(config: ExportConfig, console: Console) -> dict[str, Any]:
    """Write an export folder, whole or not at all; an older export in its place is replaced.

    Parameters
    ----------
    config
        Complete; not for ``--to hub``.
    console
        For what is going on.

    Returns
    -------
    dict
        The content of ``export.json``.

    Raises
    ------
    ModelError
        The bundle cannot be converted, or the export is out of bounds; nothing is left behind.
    ConfigError, DataError, MissingExtraError
        A place that is taken, tiles that cannot be used, a library that is not there.
    """
    assert config.to is not None
    assert config.to != "hub"
    assert config.out is not None
    assert config.tiles is not None
    kind: Kind = config.to
    refuse_to_replace(config.out, older=(config.out / RECORD).is_file())
    for library in _LIBRARIES[kind]:
        need(library, "onnx" if kind == "onnx" else "openvino")
    bundle = _bundle(config)
    calibration = config.calibrate_tiles if kind == "int8" else 0
    side = bundle.encoder.input_px
    tiles_NHW3 = draw_tiles(open_tiles(config.tiles), config.verify_tiles + calibration, side)
    if calibration and len(tiles_NHW3) < config.verify_tiles + 2:
        raise ConfigError(
            "too few tiles to calibrate on some and verify on others",
            where=config.tiles,
            got=len(tiles_NHW3),
            allowed=f"more than {config.verify_tiles + 2}",
            remedy="give more tiles, or a smaller --verify-tiles",
        )
    with files.atomic_folder(config.out) as folder:
        console.print(f"converting {config.bundle} to {kind}")
        _write_model(bundle, kind, folder, config, tiles_NHW3[config.verify_tiles :])
        record: dict[str, Any] = {"format": 1, "model": asdict(_describe(bundle, kind, folder, pixels=config.pixels))}
        files.write_json(folder / RECORD, record)
        found = _verify(bundle, folder, record["model"]["engines"], tiles_NHW3[: config.verify_tiles], config, console)
        record |= {"verification": found, **_provenance(bundle, kind, config, len(tiles_NHW3[config.verify_tiles :]))}
        files.write_json(folder / RECORD, record)
    return record


def refuse_to_replace(out: Path, *, older: bool) -> None:
    """Refuse a place that is taken by anything but an older result of the same command.

    Raises
    ------
    ConfigError
        ``out`` is a file, or a folder with content, and not ``older``.
    """
    if out.exists() and not older and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "this place holds something else, and is not overwritten",
            where=out,
            remedy="choose an empty or a new folder",
        )


def _bundle(config: ExportConfig) -> Bundle:
    if is_export(str(config.bundle)):
        raise ModelError("this is an export already", where=config.bundle, remedy="give the bundle that it came from")
    bundle = read_bundle(config.bundle)
    check_colours(config.bundle, bundle.encoder.mean, bundle.encoder.std, known_of(str(config.bundle)))
    if config.input_px:
        if config.input_px % bundle.encoder.patch_px:
            allowed = f"multiples of {bundle.encoder.patch_px}"
            raise ConfigError(
                "this size does not divide into patches", where="--input-px", got=config.input_px, allowed=allowed
            )
        bundle.encoder.input_px = config.input_px
    return bundle


def _write_model(
    bundle: Bundle, kind: Kind, folder: Path, config: ExportConfig, calibration_NHW3: NDArray[np.uint8]
) -> None:
    if kind == "onnx":
        write_onnx(bundle.encoder, folder / _FILE[kind], pixels=config.pixels)
        return
    openvino = need("openvino", "openvino")
    model = to_openvino(bundle.encoder, pixels=config.pixels)
    if kind == "int8":
        prepare = pixels_last if config.pixels else normaliser(bundle.encoder.mean, bundle.encoder.std)
        images_NCHW = torch.from_numpy(calibration_NHW3).permute(0, 3, 1, 2)
        model = int8.quantise(model, [prepare(image_1CHW) for image_1CHW in images_NCHW.split(1)])
    openvino.save_model(model, folder / _FILE[kind], compress_to_fp16=False)


def _describe(bundle: Bundle, kind: Kind, folder: Path, *, pixels: bool) -> Exported:
    encoder = bundle.encoder
    names = [engine for engine in ENGINES_OF[kind] if engine != "openvino-bf16" or has_bf16()]
    return Exported(
        kind=kind,
        file=_FILE[kind],
        files=tuple((path.name, files.sha256_file(path)) for path in sorted(folder.iterdir())),
        engines=tuple(names),
        pixels=pixels,
        content_hash=encoder.content_hash(),
        embed_dim=encoder.embed_dim,
        patch_px=encoder.patch_px,
        prefix_tokens=encoder.prefix_tokens,
        input_px=encoder.input_px,
        mean=encoder.mean,
        std=encoder.std,
        embedding=encoder.embedding,
        licence=encoder.licence,
        parameters=sum(each.numel() for each in encoder.model.parameters()),
        macs=count_macs(encoder, encoder.input_px),
        mpp=known_of(str(bundle.folder)).mpp,
    )


def _verify(
    bundle: Bundle,
    folder: Path,
    engines: tuple[str, ...],
    tiles_NHW3: NDArray[np.uint8],
    config: ExportConfig,
    console: Console,
) -> dict[str, Any]:
    """Compare every engine with the bundle; the first that is out of bounds ends the export."""
    found: dict[str, Any] = {}
    for name in engines:
        console.print(f"verifying {name} on {len(tiles_NHW3)} tiles")
        engine = open_engine(str(folder), engine=name)
        differences = compare(bundle.encoder, engine, tiles_NHW3)
        check(name, differences, None)
        scored = None if config.table is None else scores(bundle, engine, config.table)
        check(name, differences, scored)
        found[name] = {"bounds": asdict(BOUNDS[name]), **as_record(differences)}
        if scored is not None:
            found[name]["scores"] = scored
    return {"tiles": len(tiles_NHW3), "from": str(config.tiles), "engines": found}


def _provenance(bundle: Bundle, kind: Kind, config: ExportConfig, calibrated: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "input": _input(bundle, pixels=config.pixels),
        "outputs": {
            "cls": "float32 (B, D), the class token",
            "patches": "float32 (B, H, W, D), the patch tokens in their grid",
        },
        "bundle": {
            "name": config.bundle.resolve().name,
            "architecture": bundle.architecture,
            "teachers": teachers_of(bundle.provenance),
        },
        "licence_notice": licence_notices(bundle.provenance),
        "config": to_dict(config),
        "versions": {"histill": __version__}
        | {name: importlib.metadata.version(name) for name in ("torch", "timm", *_LIBRARIES[kind])},
    }
    if kind == "int8":
        facts["calibration"] = {"tiles": calibrated, "from": str(config.tiles), **int8.RECIPE}
    return facts


def _input(bundle: Bundle, *, pixels: bool) -> dict[str, Any]:
    side = bundle.encoder.input_px
    if pixels:
        return {"name": "images", "type": "uint8", "shape": ["B", side, side, 3], "scale": "RGB in 0..255"}
    return {
        "name": "images",
        "type": "float32",
        "shape": ["B", 3, side, side],
        "scale": "(RGB / 255 - mean) / std",
        "mean": list(bundle.encoder.mean),
        "std": list(bundle.encoder.std),
    }
