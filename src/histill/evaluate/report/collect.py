"""Read every result below some folders and put it in order: encoders by measures, with what is missing and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histill import files
from histill.errors import ConfigError, DataError, nearest
from histill.evaluate.results import Result, Score, read_result

__all__ = [
    "BENCHMARKS",
    "Absent",
    "Collection",
    "Column",
    "Encoder",
    "Role",
    "collect",
    "differing_facts",
    "find_roles",
    "find_score",
    "place_of",
]

BENCHMARKS = ("plism", "hest", "eva", "pathorob", "tiles", "paired")
"""In the order of the page."""

# facts of Result.data that may differ between encoders that are still comparable
_OWN_FACTS = {"root", "features", "device", "scikit-learn", "cost"}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Encoder:
    """A row of the page: an encoder with one pooling."""

    name: str
    pooling: str

    @property
    def shown(self) -> str:
        """The name on the page, which is passed on: of a path from the root, the last two parts."""
        path = Path(self.name)
        return "/".join(path.parts[-2:]) if path.is_absolute() else self.name

    def __str__(self) -> str:
        return f"{self.shown}, {self.pooling}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Column:
    """A measure of the headline table."""

    benchmark: str
    score: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """What has no result, and why."""

    benchmark: str
    """EVA's with the task: ``eva/mhist``."""
    encoder: str | None
    pooling: str | None
    """None: it concerns all."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """All that was found."""

    encoders: tuple[Encoder, ...]
    columns: tuple[Column, ...]
    results: dict[tuple[Encoder, Column], Result]
    absent: tuple[Absent, ...]
    """What ``histill evaluate all`` could not run."""

    def of(self, benchmark: str) -> dict[Encoder, list[Result]]:
        """Results of one benchmark by encoder, in the page's order; EVA has one for each task."""
        found: dict[Encoder, list[Result]] = {encoder: [] for encoder in self.encoders}
        for (encoder, column), result in self.results.items():
            if column.benchmark == benchmark:
                found[encoder].append(result)
        return {encoder: results for encoder, results in found.items() if results}

    def absence(self, encoder: Encoder, column: Column) -> Absent | None:
        """Why there is no result; None when nobody said. What was said of this encoder and pooling goes first."""
        titles = (f"eva/{column.score.partition('/')[2]}", "eva") if column.benchmark == "eva" else (column.benchmark,)
        fitting = [
            each
            for each in self.absent
            if each.benchmark in titles
            and each.encoder in (None, encoder.name)
            and (each.pooling in (None, encoder.pooling))
        ]
        fitting.sort(key=lambda each: (each.encoder is None, each.pooling is None))
        return fitting[0] if fitting else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Student, teacher and, where given, the untrained network."""

    student: Encoder
    teacher: Encoder
    untrained: Encoder | None


def collect(folders: Sequence[Path]) -> Collection:
    """Read every ``results.json`` and ``summary.json`` below the folders.

    Raises
    ------
    DataError
        A folder is not there or holds no result, a file is damaged, or two different files hold the same measure of
        the same encoder and pooling.
    """
    results: dict[tuple[Encoder, Column], Result] = {}
    origin: dict[tuple[Encoder, Column], Path] = {}
    summaries = {path.parent: summary for path in _find(folders, "summary.json") if (summary := _summary(path))}
    for path in _find(folders, "results.json"):
        if path.parent in summaries:  # the table of headlines that evaluate all writes beside its summary
            continue
        result = read_result(path.parent)
        if result.headline not in {score.name for score in result.scores}:
            raise DataError("a result without its own headline score", where=path, got=result.headline)
        encoder = Encoder(name=result.encoder, pooling=result.pooling)
        key = (encoder, Column(benchmark=result.benchmark, score=result.headline))
        if key in results:
            raise DataError(
                f"two results of {result.benchmark} ({result.headline}) for {encoder}",
                where=origin[key],
                got=path,
                remedy="give only the folder that counts",
            )
        results[key], origin[key] = result, path
    if not results:
        raise DataError("there is no results.json here", where=", ".join(map(str, folders)))
    absent = [each for folder, summary in summaries.items() for each in _absent(folder, summary)]
    known = sorted({encoder for encoder, _ in results})
    return Collection(
        encoders=tuple(sorted({*known, *_without_result(absent, known)})),
        columns=tuple(sorted({column for _, column in results}, key=_column_place)),
        results=results,
        absent=tuple(absent),
    )


def _find(folders: Sequence[Path], name: str) -> list[Path]:
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DataError("this folder is not there", where=folder)
        found |= dict.fromkeys(path.resolve() for path in sorted(folder.rglob(name)))
    return list(found)


def _without_result(absent: Sequence[Absent], known: Sequence[Encoder]) -> set[Encoder]:
    """Encoders of which nothing was run still get their row; ``?`` where they failed before a pooling was chosen."""
    names = {encoder.name for encoder in known}
    return {
        Encoder(name=each.encoder, pooling=each.pooling or "?")
        for each in absent
        if each.encoder is not None and (each.pooling is not None or each.encoder not in names)
    }


def _summary(path: Path) -> dict[str, Any] | None:
    """Read a summary of ``histill evaluate all``; None when the file is another command's, as of a demo."""
    try:
        summary = files.read_json(path)
    except ValueError as error:
        raise DataError("this summary cannot be read", where=path, got=repr(error)) from None
    return summary if isinstance(summary, dict) and {"failed", "missing"} <= set(summary) else None


def _absent(folder: Path, summary: dict[str, Any]) -> list[Absent]:
    """Take what could not be run from a summary: ``failed`` and ``missing``."""
    try:
        return [
            Absent(
                benchmark=row["benchmark"],
                encoder=row["encoder"],
                pooling=row["pooling"],
                reason="; ".join(" ".join(line.split()) for line in row["reason"].splitlines()),
            )
            for row in [*summary["failed"], *summary["missing"]]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError("this summary cannot be read", where=folder / "summary.json", got=repr(error)) from None


def _column_place(column: Column) -> tuple[tuple[int, str], str]:
    return place_of(column.benchmark), column.score


def place_of(benchmark: str) -> tuple[int, str]:
    """Order benchmarks as the page does."""
    return (BENCHMARKS.index(benchmark) if benchmark in BENCHMARKS else len(BENCHMARKS)), benchmark


def find_score(result: Result, name: str) -> Score | None:
    """Look a score up by name."""
    return next((score for score in result.scores if score.name == name), None)


def differing_facts(results: Sequence[Result]) -> list[str]:
    """Names of facts in ``data`` that are not equal in all results: these rows cannot simply be compared."""
    names = sorted({name for result in results for name in result.data} - _OWN_FACTS)

    def values(name: str) -> set[str]:
        return {json.dumps(result.data.get(name), sort_keys=True) for result in results}

    return [name for name in names if len(values(name)) > 1]


def find_roles(collection: Collection, student: str, teacher: str, untrained: str | None) -> tuple[Role, ...]:
    """Find who is compared: one role for each pooling that all have, where names are given without one.

    Raises
    ------
    ConfigError
        An encoder that has no results, or no pooling that all share.
    """
    asked = {"--student": student, "--teacher": teacher} | ({"--untrained": untrained} if untrained else {})
    options = {flag: _matching(collection, flag, name) for flag, name in asked.items()}
    several = [set(found) for found in options.values() if len(found) > 1]
    poolings: list[str] = sorted(set.intersection(*several)) if several else [""]
    if not poolings:
        got = "; ".join(f"{flag} {', '.join(found)}" for flag, found in options.items())
        raise ConfigError("no pooling is shared", got=got, remedy="name one of each, as NAME:POOLING")

    def chosen(flag: str, pooling: str) -> Encoder:
        found = options[flag]
        return found[pooling] if len(found) > 1 else next(iter(found.values()))

    return tuple(
        Role(
            student=chosen("--student", pooling),
            teacher=chosen("--teacher", pooling),
            untrained=chosen("--untrained", pooling) if untrained else None,
        )
        for pooling in poolings
    )


def _matching(collection: Collection, flag: str, name: str) -> dict[str, Encoder]:
    """By pooling."""
    found = {encoder.pooling: encoder for encoder in collection.encoders if encoder.name == name}
    found = found or {e.pooling: e for e in collection.encoders if f"{e.name}:{e.pooling}" == name}
    if not found:
        known = [f"{encoder.name}:{encoder.pooling}" for encoder in collection.encoders]
        raise ConfigError(
            "this encoder has no results", where=flag, got=name, allowed=", ".join(known), remedy=nearest(name, known)
        )
    return found
