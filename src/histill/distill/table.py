"""The summary of a run as a table for people."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

__all__ = ["print_summary"]


def print_summary(summary: dict[str, Any], file: TextIO, *, title: str | None = None) -> None:
    """Print teacher, student, untrained student and retention for every metric of every table."""
    console = Console(file=file)
    table = Table("table", "metric", "teacher", "student", "its start", "untrained", "retention", title=title)
    for name, metrics in summary["student"].items():
        for metric, value in metrics.items():
            share = summary["retention"].get(name, {}).get(metric)
            table.add_row(
                name,
                metric,
                f"{summary['teacher'][name][metric]:.3f}",
                f"{value:.3f}",
                f"{summary['start'][name][metric]:.3f}",
                f"{summary['untrained'][name][metric]:.3f}",
                "-" if share is None else f"{share:.0%}",
            )
    if table.row_count:
        console.print(table)
    for name, agreement in summary["agreements"].items():
        console.print(
            f"agreement with {name}: linear CKA {agreement['cka']:.3f}, neighbour overlap "
            f"{agreement['knn_overlap']:.3f}, effective rank {agreement['student_rank']:.1f} "
            f"(teacher {agreement['teacher_rank']:.1f})",
            highlight=False,
        )
    if summary["warning"]:
        console.print(f"[bold red]COLLAPSE: {summary['warning']}[/]")
