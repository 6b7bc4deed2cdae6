"""The folder of features: where each file lies."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from histill.extract.config import FORMAT
from histill.tiles.slide_folder import SlideFolder

__all__ = ["FeatureFolder"]


@dataclass(frozen=True, slots=True)
class FeatureFolder(SlideFolder):
    """Paths of a feature folder. A killed process's unfinished slide goes on where it stopped."""

    kind: ClassVar[str] = "feature folder"
    settings_name: ClassVar[str] = "features.json"
    command: ClassVar[str] = "histill extract"
    version: ClassVar[int] = FORMAT
    needed: ClassVar[tuple[str, ...]] = ("model_hash", "engine")
    keeps_work: ClassVar[bool] = True

    def features(self, slide: str) -> Path:
        """The slide's features and coordinates."""
        return self.root / "features" / f"{slide}.h5"

    def pt(self, slide: str) -> Path:
        """The features alone, as CLAM reads them."""
        return self.root / "pt_files" / f"{slide}.pt"

    def zarr(self, slide: str) -> Path:
        """Features and coordinates for lazy reading; a folder."""
        return self.root / "zarr" / f"{slide}.zarr"

    def tissue(self, slide: str) -> Path:
        """Outline of the tissue."""
        return self.root / "tissue" / f"{slide}.geojson"

    def forget(self, slide: str) -> None:
        """Remove all that an earlier run finished of a slide that is done anew; the record goes first."""
        for path in (self.record(slide), self.features(slide), self.pt(slide), self.tissue(slide)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.zarr(slide), ignore_errors=True)
