"""The folder of a tile set: where each file lies.

A slide is finished when its record ``parts/<slide>.json`` is there: it is written last, after shards, rows and
thumbnail. What a killed process leaves lies below ``.work`` and is thrown away by whoever takes the slide next.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from histill.tiles.config import FORMAT
from histill.tiles.slide_folder import SlideFolder, SlideRecord, SlideStatus

__all__ = ["SetFolder", "SlideRecord", "SlideStatus"]


@dataclass(frozen=True, slots=True)
class SetFolder(SlideFolder):
    """Paths of a tile set, and the moments at which it changes."""

    kind: ClassVar[str] = "tile set"
    settings_name: ClassVar[str] = "tileset.json"
    command: ClassVar[str] = "histill tile"
    version: ClassVar[int] = FORMAT
    needed: ClassVar[tuple[str, ...]] = ("tile_px", "mpp", "codec")

    @property
    def index(self) -> Path:
        """The index of all tiles."""
        return self.root / "index.parquet"

    @property
    def shards(self) -> Path:
        """Folder of the shards."""
        return self.root / "shards"

    def shard(self, slide: str, number: int) -> Path:
        """A slide's n-th shard, from 0."""
        return self.shards / f"{slide}-{number:05d}.tar"

    def rows(self, slide: str) -> Path:
        """The slide's rows of the index."""
        return self.root / "parts" / f"{slide}.parquet"

    def thumbnail(self, slide: str) -> Path:
        """Picture of the slide with the kept tiles."""
        return self.root / "thumbnails" / f"{slide}.jpg"

    def forget(self, slide: str) -> None:
        """Remove all that an earlier run left of a slide that is cut anew; an index with its tiles goes first."""
        if self.rows(slide).exists():
            self.index.unlink(missing_ok=True)
        for path in (self.record(slide), self.rows(slide), self.thumbnail(slide)):
            path.unlink(missing_ok=True)
        shards = list(itertools.takewhile(Path.exists, (self.shard(slide, number) for number in itertools.count())))
        for path in reversed(shards):  # a kill in between leaves no gap, which would hide the later ones
            path.unlink(missing_ok=True)
