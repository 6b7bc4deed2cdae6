"""What every benchmark gives: named scores with intervals, and all that is needed to read them later."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from histill import __version__, files
from histill.errors import DataError

__all__ = ["Result", "Score", "read_result", "write_result"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number of a benchmark."""

    name: str
    """As the benchmark calls it, with a slash for a task's own: ``pearson``, ``pearson/IDC``."""
    value: float | None
    """None when it cannot be computed; ``note`` then says why."""
    low: float | None = None
    """Lower end of the 95 % interval."""
    high: float | None = None
    """Upper end."""
    note: str | None = None
    """What a reader must know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One benchmark of one encoder with one pooling."""

    benchmark: str
    """plism, hest, eva, pathorob, tiles or paired."""
    encoder: str
    encoder_key: str
    """The embedder's key."""
    pooling: str
    headline: str
    """Name of the score that stands for the benchmark."""
    scores: tuple[Score, ...]
    data: dict[str, Any] = field(default_factory=dict)
    """What it was measured on: root, counts, subset, seeds, protocol."""
    details: dict[str, Any] = field(default_factory=dict)
    """The benchmark's own: pairs, folds, runs, matrices."""
    seconds: float = 0.0
    histill: str = __version__
    weights: str = ""
    """The encoder's ``content_hash()``; empty where features came without their encoder."""
    date: str = ""
    """Day on which these scores were first there, YYYY-MM-DD; empty until the command has added what it knows."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All that was asked for and may change a number."""


def write_result(result: Result, folder: Path) -> None:
    """Write ``results.json`` into a folder, atomically; ``details`` come at its top level (as ``pairs`` of PLISM)."""
    plain = asdict(result)
    details = plain.pop("details")
    clash = set(details) & set(plain)
    assert not clash, f"details may not be called {clash}"
    files.write_json(folder / "results.json", plain | details)


def read_result(folder: Path) -> Result:
    """Read what :func:`write_result` wrote.

    Raises
    ------
    DataError
        The file is missing, damaged or not a result.
    """
    path = folder / "results.json"
    try:
        plain = files.read_json(path)
        scores = tuple(Score(**score) for score in plain.pop("scores"))
        known = {name: plain.pop(name) for name in _FIELDS}
        known |= {name: plain.pop(name) for name in _LATER_FIELDS if name in plain}
        return Result(scores=scores, details=plain, **known)
    except FileNotFoundError:
        raise DataError("there are no results here", where=path, remedy="run histill evaluate first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("these results cannot be read", where=path, got=repr(error)) from None


_FIELDS = ("benchmark", "encoder", "encoder_key", "pooling", "headline", "data", "seconds", "histill")
_LATER_FIELDS = ("weights", "date", "settings")  # older results lack them
