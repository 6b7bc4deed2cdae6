"""``histill models``: the known teachers, or the students, as a table or as JSON. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from histill import config
from histill.models.students import STUDENTS
from histill.models.teachers import TEACHERS, TeacherSpec

__all__ = ["Options", "run"]

WIDTH = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``histill models``."""

    students: bool = False
    """Show the students instead of the teachers."""
    json: bool = False
    """Print JSON with every known field."""


def run(argv: list[str]) -> int:
    """Print the table that is asked for."""
    options = config.parse(Options, _flags(argv), prog="histill models", description="The known teachers and students.")
    rows: list[Any] = list(STUDENTS.values() if options.students else TEACHERS.values())
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.students:
        console.print(_students())
        return 0
    console.print(_teachers(), "? not verified. no: ND, the licence forbids derived works.\n", _sources(), sep="\n")
    console.print("Any other vision transformer: timm:NAME, hf-hub:ORG/NAME, local-dir:FOLDER.")
    return 0


def _flags(argv: list[str]) -> list[str]:
    """Let ``--json`` and ``--students`` stand alone, where the common parser wants a value after them."""
    words: list[str] = []
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        words.append(word)
        if word in ("--json", "--students") and following.lower() not in ("true", "false"):
            words.append("True")
    return words


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        number = column in ("params", "dim", "patch", "px", "depth", "heads")
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def _millions(params: int | None) -> str:
    return "?" if params is None else f"{params / 1e6:,.1f} M"


def _known(value: bool | None, yes: str, no: str) -> str:
    return "?" if value is None else (yes if value else no)


def _resolution(spec: TeacherSpec) -> str:
    if spec.mpp is None:
        return "?"
    return f"{spec.mpp[0]:g}" if len(spec.mpp) == 1 else f"{min(spec.mpp):g}-{max(spec.mpp):g}"


def _teachers() -> Table:
    table = _table("teacher", "params", "dim", "patch", "px", "mpp", "embedding", "licence", "gated", "derived")
    for spec in TEACHERS.values():
        table.add_row(
            spec.name,
            _millions(spec.params),
            str(spec.embed_dim),
            str(spec.patch_px),
            str(spec.input_px),
            _resolution(spec),
            spec.embedding,
            spec.licence or "?",
            _known(spec.gated, "yes", "no"),
            _known(spec.derivatives, "yes", "no: ND"),
        )
    return table


def _sources() -> Table:
    table = _table("teacher", "source")
    for spec in TEACHERS.values():
        table.add_row(spec.name, spec.source)
    return table


def _students() -> Table:
    table = _table("student", "params", "dim", "depth", "heads", "for")
    for spec in STUDENTS.values():
        table.add_row(
            spec.name, _millions(spec.params), str(spec.embed_dim), str(spec.depth), str(spec.heads), spec.purpose
        )
    return table
