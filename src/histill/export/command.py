"""``histill export``."""

from __future__ import annotations

import sys
from typing import Any

from histill import config as configs
from histill.export.config import ExportConfig

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run the command."""
    config = configs.parse(
        ExportConfig,
        argv,
        prog="histill export",
        description="Turn a bundle into a model for onnxruntime or OpenVINO, or into a folder for the hub. Each export "
        "for an engine is compared with the bundle on real tiles, and kept only if it agrees.",
        flags=True,
    )
    config.require_complete()
    from rich.console import Console

    console = Console(stderr=True)
    if config.to == "hub":
        from histill.export.hub import export_to_hub

        print(export_to_hub(config, console))
        return 0
    from histill.export.run import export

    _print(export(config, console), str(config.out))
    return 0


def _print(record: dict[str, Any], out: str) -> None:
    """Show what was verified."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("engine", "tokens", "largest difference", "mean cosine", "min cosine", "centred cosine"):
        table.add_column(name, no_wrap=name == "engine")
    found = record["verification"]["engines"]
    for engine, each in found.items():
        for name in ("cls", "patches"):
            row = each[name]
            cosines = (f"{row[key]:.5f}" for key in ("mean_cosine", "min_cosine", "centred_cosine"))
            table.add_row(engine, name, f"{row['max_difference']:.2g}", *cosines)
    console = Console(file=sys.stdout)
    console.print(table)
    for engine, each in found.items():
        for metric, row in each.get("scores", {}).items():
            kept = "no retention" if row["retention"] is None else f"retention {row['retention']:.3f}"
            console.print(f"{engine} {metric}: bundle {row['bundle']:.4f}, export {row['export']:.4f}, {kept}")
    if record["licence_notice"]:
        print(record["licence_notice"], file=sys.stderr)
    print(f"export: {out}")
