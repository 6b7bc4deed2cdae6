"""The runs of a task as small files, so that a killed benchmark goes on with those that are missing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histill import files
from histill.errors import RunError
from histill.evaluate.parts import digest

__all__ = ["Parts"]

_VERSION = 1
"""Raised when the same inputs would give other runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The runs of one task, encoder and protocol; each named by all that decides it."""

    folder: Path
    name: str
    """Readable start of the file names: task and protocol."""
    decided_by: tuple[str, ...]
    """Keys of encoder and data, schedule, protocol."""

    def path(self, seed: int) -> Path:
        """File of a run."""
        return self.folder / f"{self.name}-{seed}-{digest([_VERSION, seed, *self.decided_by])[:16]}.json"

    def missing(self, seeds: range) -> list[int]:
        """Runs that are not there."""
        return [seed for seed in seeds if not self.path(seed).exists()]

    def write(self, seed: int, run: dict[str, Any]) -> None:
        """Keep a run."""
        files.write_json(self.path(seed), run)

    def read(self, seed: int) -> dict[str, Any]:
        """Get a run.

        Raises
        ------
        RunError
            The file is damaged.
        """
        try:
            run = files.read_json(self.path(seed))
            assert run["score"] is not None
            return dict(run)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise RunError(
                "a run of this task cannot be read", where=self.path(seed), got=repr(error), remedy="delete this file"
            ) from None
