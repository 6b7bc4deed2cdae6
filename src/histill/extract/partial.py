"""What is finished of a slide, on the disk: a killed run goes on after the last batch that it committed.

Three files only grow (``fates``, ``features``, ``tokens``); ``state.json`` is replaced as a whole and says how far they
count. Batches are the same however often a run was killed: batch k of a slide holds its kept tiles k * B up to
(k + 1) * B, in the order of the plan. So the features are too, to the last bit.

Shapes: N tiles of the slide, K kept ones, B of a batch, D features, H and W rows and columns of patch tokens.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histill import files
from histill.extract.reading import KEPT
from histill.tiles.cutting import SlidePlan

__all__ = ["BatchResult", "Partial"]

_COMMIT_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchResult:
    """One batch of a slide."""

    fates: bytes
    """Code of each row of the plan up to the batch's last tile, from the one after the last batch's."""
    reasons: tuple[str, ...]
    """Why, of the unreadable ones among them, in order."""
    features_BD: NDArray[np.float32]
    tokens_BHWD: NDArray[np.float16] | None


class Partial:
    """The unfinished files of a slide.

    Parameters
    ----------
    folder
        Theirs; what is in it is taken up when it is of the same plan, and thrown away otherwise.
    plan
        The slide's plan.
    width
        D.
    tokens_HWD
        Shape of a tile's patch tokens, when they are wanted.
    """

    def __init__(self, folder: Path, plan: SlidePlan, width: int, tokens_HWD: tuple[int, int, int] | None) -> None:
        self._folder, self._width, self._tokens_HWD = folder, width, tokens_HWD
        self._key = _digest(plan, width, tokens_HWD)
        state = self._state()
        self.rows: int = state["rows"]
        """Rows of the plan that are done."""
        self.kept: int = state["kept"]
        """Features that are there."""
        self.reasons: list[str] = state["reasons"]
        sizes = {"fates": self.rows, "features": self.kept * width * 4}
        if tokens_HWD is not None:
            sizes["tokens"] = self.kept * int(np.prod(tokens_HWD)) * 2
        self._files: dict[str, BufferedRandom] = {}
        for name, size in sizes.items():
            path = folder / name
            path.touch()
            self._files[name] = path.open("r+b")
            self._files[name].truncate(size)  # what came after the last commit
            self._files[name].seek(size)
        self._committed = time.monotonic()

    def _state(self) -> dict[str, Any]:
        path = self._folder / "state.json"
        try:
            state: dict[str, Any] = files.read_json(path)
            if state["key"] == self._key:
                return state
        except (OSError, ValueError, KeyError, TypeError):
            pass
        path.unlink(missing_ok=True)
        return {"key": self._key, "rows": 0, "kept": 0, "reasons": []}

    def add(self, result: BatchResult) -> None:
        """Append a batch; every few seconds all that was appended is committed."""
        self._files["fates"].write(result.fates)
        self._files["features"].write(np.ascontiguousarray(result.features_BD, np.float32).tobytes())
        if self._tokens_HWD is not None:
            assert result.tokens_BHWD is not None
            self._files["tokens"].write(np.ascontiguousarray(result.tokens_BHWD, np.float16).tobytes())
        self.rows += len(result.fates)
        self.kept += len(result.features_BD)
        self.reasons += result.reasons
        if time.monotonic() - self._committed > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Bring all that was appended to the disk, and then say so."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        state = {"key": self._key, "rows": self.rows, "kept": self.kept, "reasons": self.reasons}
        files.write_json(self._folder / "state.json", state)
        self._committed = time.monotonic()

    def close(self) -> None:
        """Release the files; what was not committed will be done again."""
        for file in self._files.values():
            file.close()

    def fates(self) -> NDArray[np.uint8]:
        """Code of each row that is done, uint8 (rows,)."""
        return np.frombuffer(self._read("fates"), np.uint8)

    def kept_rows(self) -> NDArray[np.int64]:
        """Rows of the plan that have a feature, ascending, (K,)."""
        return np.flatnonzero(self.fates() == KEPT)

    def features(self) -> NDArray[np.float32]:
        """The features (K, D), in the order of ``kept_rows``; on the disk."""
        return self._mapped("features", np.float32, (self._width,))

    def tokens(self) -> NDArray[np.float16] | None:
        """The patch tokens (K, H, W, D), likewise; None when they are not wanted."""
        return self._mapped("tokens", np.float16, self._tokens_HWD) if self._tokens_HWD is not None else None

    def _read(self, name: str) -> bytes:
        self._files[name].flush()
        return (self._folder / name).read_bytes()

    def _mapped(self, name: str, kind: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        self._files[name].flush()
        if not self.kept:
            return np.zeros((0, *shape), kind)
        return np.memmap(self._folder / name, kind, mode="r", shape=(self.kept, *shape))


def _digest(plan: SlidePlan, width: int, tokens_HWD: tuple[int, int, int] | None) -> str:
    """What a slide's features depend on, beside the settings of the folder."""
    told = (plan.slide_bytes, plan.mpp, plan.tile_mpp, plan.extent_px, plan.level, plan.reader, width, tokens_HWD)
    digest = hashlib.sha256(repr(told).encode())
    digest.update(plan.origins_N2.tobytes())
    return digest.hexdigest()
