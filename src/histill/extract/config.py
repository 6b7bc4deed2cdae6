"""What `histill extract` can be told. Imports no torch and no reader."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from histill.errors import ConfigError
from histill.slides.options import QualityOptions, TissueOptions
from histill.tiles.config import TileConfig

__all__ = ["FORMAT", "ExtractConfig"]

FORMAT = 1
"""Version of the layout of a feature folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """Slides and a model -> feature files."""

    slides: tuple[Path, ...]
    """Slides, DICOM folders, and folders of them at any depth."""
    model: str | None = None
    """A bundle's folder, a name of ``histill models``, ``timm:NAME`` or ``hf-hub:ORG/NAME``."""
    out: Path | None = None
    """Folder of the features. One that is there with the same settings gets only what it lacks."""
    format: Literal["h5", "pt", "zarr"] = "h5"
    """h5: features/<slide>.h5. pt: beside it pt_files/<slide>.pt, as CLAM reads. zarr: beside it zarr/<slide>.zarr."""
    tokens: bool = False
    """Store the patch tokens too, in float16: a hundred times the size and more."""
    embedding: Literal["auto", "cls", "cls+mean"] = "auto"
    """A tile's feature: the class token, or that and the mean of the patch tokens; auto: the model's own rule."""
    engine: str = "auto"
    """What runs the model, as torch-fp32 or openvino-bf16; auto: the fastest here, which the folder then keeps."""
    batch: int = 32
    """Tiles that the model takes at once. Part of the settings: the last bits of a feature may depend on it."""
    gpus: int = -1
    """GPUs to use, each by a process with its own share of the slides; 0: the processor; -1: all there are."""
    mpp: float = 0.0
    """Microns per pixel of the tiles; 0: what the model was made for, or what the coordinates come to."""
    tile_px: int = 0
    """Side of a tile in pixels; 0: the model's."""
    stride_px: int = 0
    """Step of the grid in tile pixels; 0: tile_px, tiles that touch."""
    any_mpp: bool = False
    """Take a scale that the model was not made for."""
    coords: Path | None = None
    """Coordinates made by TRIDENT or CLAM instead of a grid: a file for one slide, or a folder of <slide>.h5 or
    <slide>_patches.h5."""
    tissue_min: float = 0.4
    """Least share of tissue for a tile to be kept, 0 to 1."""
    mpp_override: str | None = None
    """Microns per level-0 pixel that replace the slides' own: a number for all, or a CSV with columns slide,mpp."""
    trust_tiff_resolution: bool = False
    """Take the scale from bare TIFF resolution tags when there is nothing better."""
    tolerance: float = 0.05
    """How much coarser than mpp a slide's finest level may be without --upsample, as a share."""
    upsample: bool = False
    """Also take slides that are coarser than mpp, by interpolation."""
    masks: Path | None = None
    """Folder with tissue masks <slide>.geojson (level-0 pixels, as QuPath writes) or <slide>.png instead of Otsu's."""
    workers: int = 0
    """Processes that read, for each model; 0: one a core."""
    shard: str = "0/1"
    """i/n: this process takes every n-th slide from the i-th, for job arrays; all may share one --out."""
    ray: str | None = None
    """Address of a Ray cluster (or local): each slide is a task there. Needs the extra cluster."""
    reader: Literal["auto", "openslide", "tiff"] = "auto"
    """auto: the fast tiled-TIFF path where its pixels agree with OpenSlide's, else OpenSlide."""
    tissue: TissueOptions = field(default_factory=TissueOptions)
    """How tissue is found."""
    quality: QualityOptions = field(default_factory=QualityOptions)
    """Which tiles are left out, and counted; with --coords none is."""

    def __post_init__(self) -> None:
        """Check each field; those of tiling are checked by what they become."""
        for name, holds, allowed in (
            ("batch", self.batch >= 1, "1 or more"),
            ("gpus", self.gpus >= -1, "-1 or more"),
            ("mpp", self.mpp == 0 or 0.05 <= self.mpp <= 20, "0, or 0.05 to 20"),
            ("tile_px", self.tile_px == 0 or self.tile_px >= 16, "0, or 16 and more"),
        ):
            if not holds:
                where = f"--{name.replace('_', '-')}"
                raise ConfigError("out of range", where=where, got=getattr(self, name), allowed=allowed)
        if self.coords is not None and (self.masks is not None or self.stride_px):
            raise ConfigError(
                "coordinates settle where the tiles are",
                where="--coords",
                got="--masks" if self.masks is not None else "--stride-px",
                remedy="leave it out",
            )
        self.tiling(mpp=self.mpp or 0.5, tile_px=self.tile_px or 224)

    def tiling(self, *, mpp: float, tile_px: int) -> TileConfig:
        """How the slides are read, as ``histill tile`` is told."""
        return TileConfig(
            slides=self.slides,
            mpp=mpp,
            tile_px=tile_px,
            stride_px=self.stride_px,
            tissue_min=self.tissue_min,
            index_only=True,
            workers=self.workers,
            mpp_override=self.mpp_override,
            trust_tiff_resolution=self.trust_tiff_resolution,
            tolerance=self.tolerance,
            upsample=self.upsample,
            masks=self.masks,
            shard=self.shard,
            ray=self.ray,
            reader=self.reader,
            tissue=self.tissue,
            quality=self.quality,
        )
