"""Memory that reader processes fill with tiles and the model's process empties: no copy through a pipe.

The memory is an anonymous file, reached by its path in the owner's ``/proc``: unlike POSIX shared memory it needs no
room in ``/dev/shm`` (64 MB in a container) and nothing of it is left when all processes are killed. Where the system
has no such files an unnamed temporary file serves.

Shapes: N tiles, H and W pixels.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "Place", "tiles_at"]

_SLOT_BYTES = 32 * 2**20
_SLOT_TILES = 196  # of a cell

Place = tuple[str, int, int, int]
"""Path of the memory, offset, tiles that fit, and their side in pixels: what a reader process is told."""


class Blocks:
    """Slots of tiles, each free or with one reader or the model.

    Parameters
    ----------
    count
        Number of slots.
    tile_px
        Side of a tile.
    """

    def __init__(self, count: int, tile_px: int) -> None:
        self.tile_px = tile_px
        tile_bytes = tile_px * tile_px * 3
        self.capacity = max(1, min(_SLOT_TILES, _SLOT_BYTES // tile_bytes))
        """Tiles of a slot."""
        self._stride = -(-self.capacity * tile_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("histill-tiles")
            self._path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="histill-")
            self._path = str(Path(self._folder.name) / "tiles")
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._file, count * self._stride)
        self._free = list(range(count))[::-1]

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    def take(self) -> int:
        """Take a free slot."""
        return self._free.pop()

    def give(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def place(self, slot: int) -> Place:
        """Where a reader process finds a slot."""
        return self._path, slot * self._stride, self.capacity, self.tile_px

    def close(self) -> None:
        """Release the memory."""
        _forget(self._path)
        os.close(self._file)
        if self._folder is not None:
            self._folder.cleanup()


_attached: dict[str, NDArray[np.uint8]] = {}
"""Path -> the whole memory, in this process."""


def _forget(path: str) -> None:
    _attached.pop(path, None)  # unmapped when the last view of it is gone


def tiles_at(place: Place) -> NDArray[np.uint8]:
    """The tiles of a slot, to fill or to read: uint8, (N, H, W, 3)."""
    path, offset, capacity, tile_px = place
    if path not in _attached:
        for other in list(_attached):  # of a pool that is gone
            _forget(other)
        with open(path, "r+b") as file:  # noqa: PTH123
            _attached[path] = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    size = capacity * tile_px * tile_px * 3
    return _attached[path][offset : offset + size].reshape(capacity, tile_px, tile_px, 3)
