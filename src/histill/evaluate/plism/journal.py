"""Pairs that are done, one JSON line each: a process may be killed at any moment.

A line counts once its end is on the disk; what a killed process left of a last line is cut off. A pair is named by all
that decides it, so that a line of other features, other tiles or another mode is never taken.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from histill.errors import DataError
from histill.evaluate.plism.engine import PairMetrics

__all__ = ["Journal"]


class Journal:
    """The file of finished pairs; one process at a time writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read()
        self._file = path.open("ab")
        if self._file.tell() != kept:
            self._file.truncate(kept)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self) -> int:
        """Fill ``done`` and return the length of the whole lines."""
        self.done: dict[str, PairMetrics] = {}
        """Pair key -> its metrics."""
        self.seconds: dict[str, float] = {}
        """Pair key -> seconds that it took."""
        text = self._path.read_bytes() if self._path.exists() else b""
        whole = text.rfind(b"\n") + 1
        for number, line in enumerate(text[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                metrics = {name: math.nan if got is None else float(got) for name, got in entry["metrics"].items()}
                self.done[entry["key"]] = PairMetrics(**metrics)
                self.seconds[entry["key"]] = float(entry["seconds"])
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(
                    "the journal of finished pairs is damaged",
                    where=f"{self._path}, line {number}",
                    got=repr(error),
                    remedy="delete this line; its pair is then computed again",
                ) from None
        return whole

    def add(self, key: str, slides: tuple[str, str], metrics: PairMetrics, seconds: float) -> None:
        """Write one pair and wait until it is on the disk."""
        numbers = {name: None if math.isnan(value) else value for name, value in asdict(metrics).items()}
        entry = {"key": key, "slides": slides, "metrics": numbers, "seconds": round(seconds, 4)}
        self._file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[key], self.seconds[key] = metrics, seconds
