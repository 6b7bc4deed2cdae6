"""Headline scores as a table for the terminal, JSON, and Markdown for a model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from histill.evaluate.results import Result

__all__ = ["Absent", "Headline", "as_json", "as_markdown", "as_text"]

_COLUMNS = ("benchmark", "encoder", "pooling", "score", "value", "95 % interval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """The score that stands for one result."""

    benchmark: str
    """With the task for EVA: ``eva/mhist``."""
    encoder: str
    pooling: str
    score: str
    value: float | None
    low: float | None
    high: float | None
    note: str | None
    encoder_key: str
    seconds: float
    folder: str
    """Where the whole result is."""

    @classmethod
    def of(cls, title: str, result: Result, folder: str) -> Headline:
        """Take it from a result."""
        score = next(each for each in result.scores if each.name == result.headline)
        return cls(
            benchmark=title,
            encoder=result.encoder,
            pooling=result.pooling,
            score=score.name,
            value=score.value,
            low=score.low,
            high=score.high,
            note=score.note,
            encoder_key=result.encoder_key,
            seconds=result.seconds,
            folder=folder,
        )

    def cells(self) -> tuple[str, ...]:
        """Texts in the order of the columns."""
        value = "not defined" if self.value is None else f"{self.value:.4f}"
        ends = "none" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"
        return self.benchmark, self.encoder, self.pooling, self.score, value, ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A benchmark without a result, and why."""

    benchmark: str
    reason: str
    encoder: str | None = None
    """None when it concerns all encoders."""
    pooling: str | None = None

    @property
    def title(self) -> str:
        """Which one, in a few words."""
        return ", ".join(each for each in (self.benchmark, self.encoder, self.pooling) if each)


def as_text(headlines: Sequence[Headline]) -> str:
    """Aligned columns, never cut: also for a file or a pipe."""
    rows = [_COLUMNS, *(headline.cells() for headline in headlines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def as_json(headlines: Sequence[Headline], failed: Sequence[Absent], missing: Sequence[Absent]) -> dict[str, Any]:
    """Plain values."""
    return {
        "results": [asdict(headline) for headline in headlines],
        "failed": [asdict(absent) for absent in failed],
        "missing": [asdict(absent) for absent in missing],
    }


def as_markdown(headlines: Sequence[Headline], failed: Sequence[Absent], missing: Sequence[Absent]) -> str:
    """A table, its notes, and what is not in it."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(headline.cells() for headline in headlines)]
    lines = ["## Benchmarks", "", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]
    notes = [f"- {each.benchmark}, {each.encoder}, {each.pooling}: {each.note}" for each in headlines if each.note]
    lines += ["", "Notes:", "", *notes] if notes else []
    for name, absent in (("Failed", failed), ("Missing", missing)):
        if absent:
            lines += ["", f"{name}:", "", *(f"- {each.title}: {each.reason.splitlines()[0]}" for each in absent)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
