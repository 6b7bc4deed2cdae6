"""Parts of a benchmark (a fold, a pair, a repeat) as small JSON files, so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from histill import files
from histill.errors import DataError

__all__ = ["digest", "kept", "progress"]


def digest(decides: Any) -> str:
    """Hex SHA-256 of plain JSON values: all that decides a number, and nothing else."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True, allow_nan=False).encode()).hexdigest()


def kept(folder: Path, name: str, decides: Any, compute: Callable[[], Any]) -> Any:
    """Read a part, or compute and keep it.

    Parameters
    ----------
    folder
        Where the parts of this run are; made when needed.
    name
        For a reader's eye: ``IDC-fold-0``.
    decides
        Plain JSON values that decide the part: encoder, data, settings. Other values, another file.
    compute
        Gives plain JSON values (None for what is not a number).

    Returns
    -------
    Any
        What the file holds, whether it was computed now or earlier: both runs go on with the same values.

    Raises
    ------
    DataError
        The file is there but damaged.
    """
    path = folder / f"{name.replace('/', '_')}-{digest(decides)[:24]}.json"
    if not path.exists():
        files.write_json(path, {"decides": decides, "part": compute()})
    try:
        return files.read_json(path)["part"]
    except (ValueError, KeyError, TypeError):
        raise DataError("a kept part of this benchmark is damaged", where=path, remedy="delete the file") from None


def progress(console: Console) -> Progress:
    """Make a bar that is drawn on a terminal and nowhere else."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
