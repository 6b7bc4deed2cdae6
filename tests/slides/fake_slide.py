"""A slide in memory: the pixels of its levels, and a log of what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.slides.slide import Level, ScaleFacts, Thumbnail, UnreadableRegionError, level_downsample


class FakeSlide:
    def __init__(
        self,
        images: Sequence[NDArray[np.uint8]],
        *,
        scale_facts: ScaleFacts | None = None,
        damaged: tuple[int, int, int, int] | None = None,
        path: Path = Path("fake.svs"),
    ) -> None:
        """``images``: level by level, uint8 (H, W, 3); ``damaged``: left, top, right, bottom in level-0 pixels."""
        height, width, _ = images[0].shape
        self.path = path
        self.reader = "tiff"
        self.vendor = "fake"
        self.levels = tuple(
            Level(
                width=image.shape[1],
                height=image.shape[0],
                downsample_x=level_downsample(width, image.shape[1]),
                downsample_y=level_downsample(height, image.shape[0]),
            )
            for image in images
        )
        self.scale_facts = scale_facts or ScaleFacts()
        self.properties: Mapping[str, str] = {}
        self.reads: list[tuple[int, int, int, int, int]] = []
        self._images = list(images)
        self._damaged = damaged

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        self.reads.append((level, x, y, width, height))
        facts = self.levels[level]
        if width < 1 or height < 1 or x < 0 or y < 0 or x + width > facts.width or y + height > facts.height:
            raise ValueError(f"region {x, y, width, height} leaves level {level} of {facts}")
        if self._damaged is not None:
            left, top, right, bottom = self._damaged
            dx, dy = facts.downsample_x, facts.downsample_y
            if x * dx < right and (x + width) * dx > left and y * dy < bottom and (y + height) * dy > top:
                raise UnreadableRegionError("a block is damaged", where=f"{self.path}, level {level}, {x}, {y}")
        return self._images[level][y : y + height, x : x + width].copy()

    def thumbnail(self, longest_px: int) -> Thumbnail:
        raise NotImplementedError

    def close(self) -> None:
        pass
