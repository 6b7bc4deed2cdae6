"""What `histill tile` can be told. Reads no slide and imports no reader."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from histill import config as configs
from histill.errors import ConfigError
from histill.slides.options import QualityOptions, TissueOptions

__all__ = ["FORMAT", "TileConfig"]

FORMAT = 1
"""Version of the layout of a tile set."""

# What decides the bytes of a set. The rest (workers, shards of a job array, overrides that are kept slide by slide)
# may change from one run on a folder to the next.
_LOCKED = (
    "mpp",
    "tile_px",
    "stride_px",
    "tissue_min",
    "lossless",
    "jpeg_quality",
    "jpeg_chroma",
    "index_only",
    "shard_mb",
    "tolerance",
    "upsample",
    "trust_tiff_resolution",
    "reader",
    "tissue",
    "quality",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """Slides -> a tile set."""

    slides: tuple[Path, ...]
    """Slides, DICOM folders, and folders of them at any depth."""
    out: Path | None = None
    """Folder of the tile set. A set that is there with the same settings gets only what it lacks."""
    mpp: float = 0.5
    """Microns per pixel of the tiles, exact: each slide is resampled to it by area."""
    tile_px: int = 224
    """Side of a tile in pixels."""
    stride_px: int = 0
    """Step of the grid in tile pixels; 0: tile_px, tiles that touch."""
    tissue_min: float = 0.4
    """Least share of tissue for a tile to be kept, 0 to 1."""
    jpeg_quality: int = 90
    """Quality of the JPEG files, 1 to 100."""
    jpeg_chroma: Literal["444", "420"] = "444"
    """Chroma subsampling: 444 keeps the full colour resolution; 420 needs a quarter less space."""
    lossless: bool = False
    """PNG instead of JPEG: for evaluation sets, four times the size."""
    index_only: bool = False
    """Write no pixels, only the index: tiles are then read from the slides in training, which is slower."""
    workers: int = 0
    """Worker processes; 0: one a core."""
    dry_run: bool = False
    """Write nothing: print tiles, size on disk and time to expect."""
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
    patients: Path | None = None
    """CSV with columns slide,patient, kept in the index."""
    shard: str = "0/1"
    """i/n: this process takes every n-th slide from the i-th, for job arrays; all may share one --out."""
    ray: str | None = None
    """Address of a Ray cluster (or local): each slide is a task there. Needs the extra cluster."""
    merge: tuple[Path, ...] = ()
    """Tile sets with the same settings that are put together in --out."""
    inspect: Path | None = None
    """Show what a tile set holds, as text and as a picture."""
    picture: Path | None = None
    """Where --inspect writes its picture; beside the set if not given."""
    reader: Literal["auto", "openslide", "tiff"] = "auto"
    """auto: the fast tiled-TIFF path where its pixels agree with OpenSlide's, else OpenSlide."""
    shard_mb: int = 1000
    """Size at which a new shard of a slide begins, in MB (10^6 bytes)."""
    tissue: TissueOptions = field(default_factory=TissueOptions)
    """How tissue is found."""
    quality: QualityOptions = field(default_factory=QualityOptions)
    """Which tiles are left out, and counted."""

    def __post_init__(self) -> None:
        """Check each field."""
        for name, holds, allowed in (
            ("mpp", 0.05 <= self.mpp <= 20, "0.05 to 20"),
            ("tile_px", 16 <= self.tile_px <= 8192, "16 to 8192"),
            ("stride_px", self.stride_px >= 0, "0 or more"),
            ("tissue_min", 0 <= self.tissue_min <= 1, "0 to 1"),
            ("jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100"),
            ("workers", self.workers >= 0, "0 or more"),
            ("tolerance", 0 <= self.tolerance < 1, "0 to 1"),
            ("shard_mb", self.shard_mb >= 1, "1 or more"),
        ):
            if not holds:
                where = f"--{name.replace('_', '-')}"
                raise ConfigError("out of range", where=where, got=getattr(self, name), allowed=allowed)
        self.shard_of()

    def shard_of(self) -> tuple[int, int]:
        """``shard`` as (i, n)."""
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            allowed = "i/n with 0 <= i < n"
            raise ConfigError("not a part of the slides", where="--shard", got=self.shard, allowed=allowed)
        return int(number), int(count)

    @property
    def stride(self) -> int:
        """Step of the grid in tile pixels."""
        return self.stride_px or self.tile_px

    @property
    def codec(self) -> Literal["jpeg", "png", "none"]:
        """What the shards hold."""
        return "none" if self.index_only else "png" if self.lossless else "jpeg"

    def settings(self) -> dict[str, Any]:
        """What a set is made by, ready for JSON: the content of ``tileset.json``."""
        assert set(_LOCKED) <= {entry.name for entry in fields(self)}
        whole = configs.to_dict(self)
        locked = {name: whole[name] for name in _LOCKED}
        return {"format": FORMAT, "codec": self.codec} | locked | {"stride_px": self.stride}
