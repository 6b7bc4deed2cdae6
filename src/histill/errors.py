"""The error tree. Every error that a user can cause is one of these.

::

    HistillError (ValueError)
    +-- ConfigError        an option, a config file, a combination of settings
    +-- DataError          a folder, a table, an image, a tile set
    +-- ModelError         a model name, a checkpoint, a model bundle
    +-- RunError           a run folder, a resume, a loss that is not finite
    +-- MissingExtraError  an optional dependency that is not installed

The text always says what happened, and where known: where (file, field, step), what was got, what is
allowed and what to do. The command line prints it without a traceback and exits with status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DataError",
    "HistillError",
    "MissingExtraError",
    "ModelError",
    "RunError",
    "nearest",
]


class HistillError(ValueError):
    """Base of all errors that a user can cause and mend.

    Parameters
    ----------
    what
        One sentence: what went wrong.
    where
        The file, field, slide or step that it concerns.
    got
        The value that was met.
    allowed
        What would have been accepted.
    remedy
        What to do now.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        parts = [("where", where), ("got", got), ("allowed", allowed), ("remedy", remedy)]
        lines = [what] + [f"  {name + ':':<9}{value}" for name, value in parts if value is not None]
        super().__init__("\n".join(lines))


class ConfigError(HistillError):
    """An option, a config file or a combination of settings is wrong."""


class DataError(HistillError):
    """A folder, table, image or tile set cannot be used."""


class ModelError(HistillError):
    """A model name, checkpoint or model bundle cannot be used."""


class RunError(HistillError):
    """A run cannot go on: another config in its folder, a damaged checkpoint, a loss that is not finite."""


class MissingExtraError(HistillError):
    """An optional dependency is not installed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str | None:
    """Find the known names most like ``name``, whatever the case, as text for ``remedy``; None when nothing is near."""
    by_lower = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.4)
    return f"did you mean {' or '.join(by_lower[entry] for entry in close)}?" if close else None
