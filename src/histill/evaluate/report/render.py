"""``report.html`` and ``report.md``: what was collected, as one page and as a table for a model card."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2

from histill import __version__, files
from histill.evaluate.report import charts
from histill.evaluate.report.card import write_card
from histill.evaluate.report.collect import Collection, Role, collect, find_roles
from histill.evaluate.report.config import ReportConfig
from histill.evaluate.report.differences import difference_tables
from histill.evaluate.report.sections import cost_table, plism_parts, provenance_table, retention_table, task_groups
from histill.evaluate.report.tables import Notes, Page, columns_of, eva_columns, headline, sources

__all__ = ["render", "render_markdown", "write_report"]


def write_report(config: ReportConfig) -> Path:
    """Collect, and write the page and, beside it, the Markdown table; both whole or absent.

    Raises
    ------
    ConfigError, DataError, ModelError
        As :func:`~histill.evaluate.report.collect.collect`, :func:`~histill.evaluate.report.collect.find_roles` and
        :func:`~histill.evaluate.report.card.write_card`.
    """
    found = collect(config.folders)
    if config.card is not None:  # a wrong bundle is refused before anything is written
        write_card(found, config.card)
    roles: tuple[Role, ...] = ()
    if config.student is not None and config.teacher is not None:
        roles = find_roles(found, config.student, config.teacher, config.untrained)
    files.write_text(config.out, render(found, roles, title=config.title))
    files.write_text(config.out.with_suffix(".md"), render_markdown(found))
    return config.out


def render(found: Collection, roles: Sequence[Role] = (), *, title: str) -> str:
    """Write the page: HTML without a reference to any other file."""
    page = Page(found=found, roles=tuple(roles), notes=Notes())
    tables = {
        "headline": headline(page, columns_of(found)),
        "eva": headline(page, eva_columns(found)),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = importlib.resources.files("histill.evaluate.report").joinpath("templates", "report.html.j2")
    return environment.from_string(text.read_text("utf-8")).render(
        title=title,
        today=_today(),
        version=__version__,
        encoders=len(found.encoders),
        count=len(found.results),
        **tables,
        plism=plism_parts(page),
        scale=charts.colour_bar(),
        tasks=task_groups(page),
        retention=[retention_table(page, role) for role in page.roles],
        differences=difference_tables(page),
        cost=cost_table(page),
        provenance=provenance_table(found),
        sources=sources(),
        notes=page.notes.texts,
    )


def render_markdown(found: Collection) -> str:
    """Write the headline tables for a model card: measured rows, then published ones, then notes."""
    page = Page(found=found, roles=(), notes=Notes())
    parts = [f"Measured with histill {__version__}, {_today()}; 95 % intervals in brackets.\n"]
    for table in (headline(page, columns_of(found)), headline(page, eva_columns(found))):
        head = ["encoder", "pooling", *(f"{c['name']} {c['score']}{_marks(c['notes'])}" for c in table["columns"])]
        rows = [[row["name"], row["pooling"], *map(_markdown_cell, row["cells"])] for row in table["measured"]]
        rows += [
            [f"{row['name']} (published)", row["pooling"], *map(_markdown_cell, row["cells"])]
            for row in table["published"]
        ]
        lines = [head, ["---", "---", *("---:" for _ in table["columns"])], *rows]
        parts.append("\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines) + "\n")
    origins = [f"- ({source['letter']}) {source['text']}; date: {source['date']}" for source in sources()]
    parts.append("Rows marked as published are by others, as published, see source; they were not measured here.\n")
    parts.append("\n".join(origins) + "\n")
    if page.notes.texts:
        parts.append("\n".join(f"- [{n}] {text}" for n, text in enumerate(page.notes.texts, 1)) + "\n")
    return "\n".join(parts)


def _today() -> str:
    return date.today().strftime("%d %B %Y").lstrip("0")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _marks(numbers: Sequence[int]) -> str:
    return "".join(f" [{number}]" for number in numbers)


def _markdown_cell(cell: dict[str, Any]) -> str:
    interval = f" ({cell['interval']})" if cell["interval"] else ""
    letter = f" ({cell['source']})" if cell["source"] else ""
    return f"{cell['value']}{interval}{letter}{_marks(cell['notes'])}"
