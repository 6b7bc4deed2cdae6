"""What the report can be told. Imports no torch: the command line reads this module alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from histill.errors import ConfigError

__all__ = ["ReportConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Put results on one page. A role is an encoder's name as in its results, or NAME:POOLING."""

    folders: tuple[Path, ...]
    """Folders that `histill evaluate` wrote; every results.json below them is read."""
    out: Path = Path("report.html")
    """The page; beside it, with the ending .md, comes the headline table for a model card."""
    title: str = "Benchmarks of pathology encoders"
    """Written at the top."""
    student: str | None = None
    """The encoder whose retention is shown; needs --teacher."""
    teacher: str | None = None
    """The encoder that the student learned from; needs --student."""
    untrained: str | None = None
    """The student's architecture at its random start: retention then counts from there."""
    card: Path | None = None
    """A model bundle: the scores of its own weights also go into its README.md and histill.json."""

    def __post_init__(self) -> None:
        """Check what goes together."""
        if not self.folders:
            raise ConfigError("no folder of results is given", remedy="histill report OUT... --out report.html")
        if (self.student is None) != (self.teacher is None):
            raise ConfigError("--student and --teacher go together", where="histill report")
        if self.untrained is not None and self.student is None:
            raise ConfigError("--untrained needs --student and --teacher", where="histill report")
        if self.out.suffix != ".html":
            raise ConfigError("the page is an .html file", where="--out", got=self.out, allowed="NAME.html")
