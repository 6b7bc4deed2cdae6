"""The options of ``histill export`` and ``histill bench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from histill.errors import ConfigError

__all__ = ["BenchConfig", "ExportConfig", "Target"]

Target = Literal["onnx", "openvino", "int8", "hub"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """A bundle, what becomes of it, and the tiles that it is verified on."""

    bundle: Path
    """Folder of the model bundle."""
    to: Target | None = None
    """onnx: for onnxruntime, float32. openvino: for OpenVINO, float32 and bf16. int8: for OpenVINO, calibrated on
    tiles. hub: a folder ready for the Hugging Face hub."""
    out: Path | None = None
    """The new folder."""
    tiles: Path | None = None
    """A tile set or a folder of tile images: the export is verified on some of them, and int8 calibrated on others."""
    table: Path | None = None
    """A CSV table of labelled or paired tiles: the scores of bundle and export are compared on it."""
    pixels: bool = True
    """Normalise inside the graph: it takes uint8 (B, rows, columns, 3). Otherwise it takes float32 (B, 3, rows,
    columns), already normalised."""
    input_px: int = 0
    """Side of the images, in pixels; 0: the bundle's own."""
    verify_tiles: int = 64
    """Tiles that the export is compared on."""
    calibrate_tiles: int = 128
    """Tiles that int8 is calibrated on; others than those of the comparison."""
    push: str | None = None
    """With --to hub: upload to this repository, ORG/NAME; it is made, private, if there is none."""

    def __post_init__(self) -> None:
        """Check numbers and combinations."""
        for name in ("input_px", "verify_tiles", "calibrate_tiles"):
            least = 0 if name == "input_px" else 2
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError("too small a number", where=option, got=getattr(self, name), allowed=f">= {least}")
        if self.push is not None and (self.to != "hub" or self.push.count("/") != 1 or not all(self.push.split("/"))):
            raise ConfigError(
                "--push uploads a hub folder", where="--push", got=self.push, allowed="--to hub --push ORG/NAME"
            )

    def require_complete(self) -> None:
        """Refuse a command line that leaves out what has no default."""
        needed: list[tuple[str, object]] = [("to", self.to), ("out", self.out)]
        if self.to != "hub":
            needed.append(("tiles", self.tiles))
        for name, value in needed:
            if value is None:
                raise ConfigError(f"--{name} is missing", where="command line", remedy="see histill export --help")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Models and engines, measured in turns in one run."""

    models: tuple[str, ...]
    """Bundles, exports, or any model that histill knows; the first is what the others are compared with."""
    engine: tuple[str, ...] = ()
    """Engines; each model is measured with each that can run it. None given: torch for a model, and for an export the
    engines that it was verified with."""
    batch: int = 8
    """Tiles at once."""
    threads: int = 0
    """Threads on the processor; 0: as many as torch takes by itself."""
    input_px: int = 0
    """Side of the tiles, in pixels; 0: each model's own."""
    rounds: int = 10
    """Times that each one runs."""
    device: str = "cpu"
    """Where they run."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in (("batch", 1), ("threads", 0), ("input_px", 0), ("rounds", 2)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError("too small a number", where=option, got=getattr(self, name), allowed=f">= {least}")
        if not self.models:
            raise ConfigError("there is no model to measure", remedy="histill bench MODEL [MODEL ...]")
