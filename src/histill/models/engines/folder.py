"""The folder that ``histill export`` makes: a model for another library, and ``export.json`` that describes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from histill import files
from histill.config import from_dict
from histill.errors import ModelError
from histill.models.encoder import Embedding

__all__ = ["ENGINES_OF", "RECORD", "Exported", "Kind", "is_export", "read_export"]

RECORD = "export.json"

Kind = Literal["onnx", "openvino", "int8"]

ENGINES_OF: dict[Kind, tuple[str, ...]] = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino-fp32", "openvino-bf16"),
    "int8": ("openvino-int8",),
}
"""What can run an export."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an engine must know of an export: the head of ``export.json``."""

    kind: Kind
    """What it was exported to."""
    file: str
    """The file that the library opens."""
    files: tuple[tuple[str, str], ...]
    """The files of the model, each with its SHA-256."""
    engines: tuple[str, ...]
    """Those of :data:`ENGINES_OF` that it was verified with."""
    pixels: bool
    """Whether it takes uint8 (B, rows, columns, 3), or float32 (B, 3, rows, columns) already normalised."""
    content_hash: str
    """Of the encoder that it was made from."""
    embed_dim: int
    """Width of a token."""
    patch_px: int
    """Side of a patch token, in pixels."""
    prefix_tokens: int
    """The class token and the registers of the bundle."""
    input_px: int
    """Side of the images, in pixels."""
    mean: tuple[float, float, float]
    """Mean of the RGB channels, images in 0..1."""
    std: tuple[float, float, float]
    """Standard deviation of the RGB channels, images in 0..1."""
    embedding: Embedding
    """The embedding rule."""
    licence: str | None
    """Licence of the weights; None if unknown."""
    parameters: int
    """Of the bundle."""
    macs: int
    """Multiplications with addition of one tile, in matrix products and convolutions."""
    mpp: tuple[float, ...] | None = None
    """Microns per pixel of the tiles that it was made for; None if unknown, and in older exports."""


def is_export(model: str) -> bool:
    """Whether a model's name is the path of an export folder."""
    return (Path(model).expanduser() / RECORD).is_file()


def read_export(folder: Path) -> Exported:
    """Read what an export says of itself, and check that its files are whole.

    Raises
    ------
    ModelError
        A file is missing or damaged.
    """
    path = folder / RECORD
    try:
        exported = from_dict(Exported, files.read_json(path)["model"], where=f"{path}: model")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("this file is damaged", where=path, got=str(error) or type(error).__name__) from None
    for name, expected in exported.files:
        part = folder / name
        if not part.is_file():
            raise ModelError("a file of this export is missing", where=part, remedy="export the model again")
        if files.sha256_file(part) != expected:
            raise ModelError(
                "a file of this export is not what was verified", where=part, remedy="export the model again"
            )
    return exported
