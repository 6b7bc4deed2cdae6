"""The folder of features: where each file lies."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from histill.extract.config import FORMAT
from histill.tiles.slide_folder import SlideFolder, SlideRecord

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

    def holds(self, record: SlideRecord) -> bool:
        """Whether a finished slide has its feature file, as long as it was, and what else was asked for."""
        written = [self.features(record.slide)]
        form = self.settings().get("files")
        if form == "pt":
            written.append(self.pt(record.slide))
        if form == "zarr" and not self.zarr(record.slide).is_dir():
            return False
        return all(path.is_file() for path in written) and (
            sum(path.stat().st_size for path in written) == record.set_bytes
        )

    @property
    def places(self) -> tuple[Path, ...]:
        """All folders of slides."""
        return tuple(self.root / name for name in ("parts", "features", "pt_files", "zarr", "tissue"))

    def forget(self, slide: str) -> None:
        """Remove all that an earlier run finished of a slide that is done anew; the record goes first."""
        for path in (self.record(slide), self.features(slide), self.pt(slide), self.tissue(slide)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.zarr(slide), ignore_errors=True)
