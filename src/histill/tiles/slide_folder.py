"""A folder that holds one result a slide, whatever it is: records, settings, locks, and what a killed process left.

A slide is finished when its record ``parts/<slide>.json`` is there: it is written last. What a killed process leaves
lies below ``.work``.
"""

from __future__ import annotations

import csv
import errno
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from histill import files
from histill.errors import DataError, RunError, nearest

__all__ = ["SlideFolder", "SlideRecord", "SlideStatus"]

SlideStatus = Literal["done", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideRecord:
    """One row of ``slides.csv``, and what a later run compares."""

    slide: str
    path: str
    status: SlideStatus
    tiles: int = 0
    """Tiles in the set."""
    mpp: float | None = None
    """Microns per pixel of level 0."""
    mpp_source: str | None = None
    """override, vendor, objective or tiff."""
    level: int | None = None
    """Level that was read."""
    width: int | None = None
    height: int | None = None
    vendor: str | None = None
    reader: str | None = None
    mask: str | None = None
    patient: str | None = None
    grid_tiles: int = 0
    """Tiles of the grid; those not counted below had too little tissue."""
    tissue_tiles: int = 0
    """Tiles with enough tissue: tiles + white + black + blur + pen + unreadable."""
    white: int = 0
    black: int = 0
    blur: int = 0
    pen: int = 0
    unreadable: int = 0
    """Tiles whose pixels are damaged: listed in ``unreadable.csv``."""
    slide_bytes: int = 0
    """Size of the slide's file."""
    set_bytes: int = 0
    """Size of its shards."""
    seconds: float = 0.0
    error: str | None = None
    shards: tuple[str, ...] = ()
    unreadable_tiles: tuple[tuple[int, int, str], ...] = field(default=())
    """x, y, reason."""

    @classmethod
    def read(cls, path: Path) -> SlideRecord:
        """Read a record.

        Raises
        ------
        DataError
            The record is damaged.
        """
        try:
            values = files.read_json(path)
            values["shards"] = tuple(values["shards"])
            values["unreadable_tiles"] = tuple((x, y, reason) for x, y, reason in values["unreadable_tiles"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "the record of a slide is damaged",
                where=path,
                got=repr(error),
                remedy="delete this file and give the command again: the slide is done anew",
            ) from None


# In files beside slides.csv, not in its cells.
_NOT_IN_CSV = ("shards", "unreadable_tiles")


@dataclass(frozen=True, slots=True)
class SlideFolder:
    """Paths of such a folder, and the moments at which it changes. A kind of folder is a subclass."""

    root: Path

    kind: ClassVar[str] = "folder of slides"
    """What it is called in messages."""
    settings_name: ClassVar[str]
    """The file that tells this kind of folder from others, and holds what it was made by."""
    command: ClassVar[str]
    """Who makes it."""
    version: ClassVar[int]
    """Version of its layout."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Settings that every folder of the kind has."""
    keeps_work: ClassVar[bool] = False
    """Whether the next process goes on with the unfinished files of a killed one; otherwise they are thrown away."""

    @property
    def _work(self) -> Path:
        """Locks and unfinished files."""
        return self.root / ".work"

    def record(self, slide: str) -> Path:
        """What makes a slide finished."""
        return self.root / "parts" / f"{slide}.json"

    @contextmanager
    def taken(self, slide: str) -> Iterator[Path | None]:
        """Take a slide among all processes that work on this folder.

        Yields a folder for its unfinished files (empty, or with those of a killed process where ``keeps_work``), or
        None when another process has the slide.
        """
        work, lock = self._work / "slides" / slide, self._work / "locks" / f"{slide}.lock"
        with self.writing(), files.lock(lock, wait=False) as ours:
            if not ours:
                yield None
                return
            if not self.keeps_work:
                shutil.rmtree(work, ignore_errors=True)  # a killed process's
            work.mkdir(parents=True, exist_ok=True)
            try:
                yield work
            finally:
                if not self.keeps_work or self.record(slide).exists():
                    shutil.rmtree(work, ignore_errors=True)
                lock.unlink(missing_ok=True)

    @contextmanager
    def index_lock(self) -> Iterator[None]:
        """Write the index and the tables, one process at a time."""
        with self.writing(), files.lock(self._work / "index.lock", wait=True):
            yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the file system says while something is written into one error of the whole run."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DataError(
                f"the {self.kind} cannot be written",
                where=error.filename or self.root,
                got=error.strerror or error,
                remedy=("free some space" if full else "see to it")
                + " and run the same command again: finished slides stay",
            ) from error

    def is_done(self, slide: str) -> bool:
        """Whether a slide is finished."""
        path = self.record(slide)
        if not path.exists():
            return False
        record = SlideRecord.read(path)
        return record.status == "done" and self.holds(record)

    def holds(self, record: SlideRecord) -> bool:
        """Whether the files of a finished slide are still there."""
        return True

    def sweep(self) -> None:
        """Remove what killed processes left half-written; only for the holder of :meth:`index_lock`.

        Files of the whole folder are written under that lock. Those of a slide are written by whoever holds the slide,
        so they are looked for first and removed only when then nobody holds any.
        """
        strays = [path for place in self.places for pattern in (".tmp-*", ".old-*") for path in place.glob(pattern)]
        for stray in self.root.glob(".tmp-*"):
            if stray.is_file():
                stray.unlink(missing_ok=True)
        for path in (self._work / "locks").glob("*.lock"):
            with files.lock(path, wait=False) as ours:
                if not ours:
                    return
        for stray in strays:
            shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink(missing_ok=True)

    @property
    def places(self) -> tuple[Path, ...]:
        """Folders into which the files of slides are written directly, not moved from a work folder."""
        return (self.root / "parts",)

    def place(self, path: Path, target: Path) -> None:
        """Move a finished file from a work folder to where it belongs; it and its name are on the disk after that."""
        target.parent.mkdir(parents=True, exist_ok=True)
        files.sync(path)
        path.replace(target)
        files.sync(target.parent)

    def records(self) -> list[SlideRecord]:
        """All records, sorted by slide."""
        found = [SlideRecord.read(path) for path in (self.root / "parts").glob("*.json") if path.name[0] != "."]
        return sorted(found, key=lambda record: record.slide)

    def claim(self, settings: dict[str, Any]) -> None:
        """Write the settings into a new folder, or compare them with those that are there.

        Raises
        ------
        RunError
            The folder holds something else, or was made with other settings.
        """
        path = self.root / self.settings_name
        with self.index_lock():
            if not path.exists():
                strangers = [entry.name for entry in self.root.iterdir() if entry != self._work]
                if strangers:
                    raise RunError(
                        f"this folder holds something that is not a {self.kind}",
                        where=self.root,
                        got=", ".join(sorted(strangers)[:5]),
                        remedy="give --out a new or an empty folder",
                    )
                files.write_json(path, settings)
                return
            there = self.settings()
            differing = [name for name in settings if there.get(name) != settings[name]]
            if differing:
                raise RunError(
                    f"this folder holds a {self.kind} with other settings",
                    where=self.root,
                    got="; ".join(f"{name}: {there.get(name)} there, {settings[name]} now" for name in differing),
                    remedy="give another --out, or the settings of that one",
                )

    def settings(self) -> dict[str, Any]:
        """What the folder was made by.

        Raises
        ------
        DataError
            The folder is not of this kind, or of another version.
        """
        path = self.root / self.settings_name
        try:
            there = files.read_json(path)
        except FileNotFoundError:
            beside = [entry.name for entry in self.root.parent.iterdir()] if self.root.parent.is_dir() else []
            near = None if self.root.is_dir() else nearest(self.root.name, beside)
            raise DataError(
                f"this is not a {self.kind}",
                where=self.root,
                got=f"no {self.settings_name} in it" if self.root.is_dir() else "no such folder",
                remedy=near or f"make one with {self.command}",
            ) from None
        except (ValueError, OSError) as error:
            raise DataError(f"this {self.kind}'s settings cannot be read", where=path, got=error) from None
        if not isinstance(there, dict) or there.get("format") != self.version:
            got = there.get("format") if isinstance(there, dict) else type(there).__name__
            raise DataError(f"a {self.kind} of another version", where=path, got=got, allowed=f"format {self.version}")
        missing = [name for name in self.needed if name not in there]
        if missing:
            raise DataError(f"this {self.kind}'s settings lack an entry", where=path, got=f"no {missing[0]}")
        return there

    def write_tables(self, records: Sequence[SlideRecord]) -> None:
        """Write ``slides.csv`` and ``unreadable.csv``."""
        columns = [entry.name for entry in fields(SlideRecord) if entry.name not in _NOT_IN_CSV]
        rows = [[_cell(getattr(record, name)) for name in columns] for record in records]
        files.write_text(self.root / "slides.csv", _csv(columns, rows))
        damaged = [[record.slide, x, y, reason] for record in records for x, y, reason in record.unreadable_tiles]
        files.write_text(self.root / "unreadable.csv", _csv(["slide", "x", "y", "reason"], damaged))

    def tidy(self) -> None:
        """Remove from ``.work`` what no running process holds, and ``.work`` itself when that was all."""
        for path in (self._work / "locks").glob("*.lock"):
            with suppress(OSError), files.lock(path, wait=False) as ours:
                if ours:
                    slide = path.name.removesuffix(".lock")
                    if not self.keeps_work or self.record(slide).exists():
                        shutil.rmtree(self._work / "slides" / slide, ignore_errors=True)
                    path.unlink(missing_ok=True)
        with suppress(OSError), files.lock(self._work / "index.lock", wait=False) as ours:
            if ours:
                (self._work / "index.lock").unlink(missing_ok=True)
        for path in (self._work / "slides", self._work / "locks", self._work):
            with suppress(OSError):  # another process is at work
                path.rmdir()


def _cell(value: object) -> object:
    return "" if value is None else str(value).replace("\n", "; ") if isinstance(value, str) else value


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
