"""``histill bench``."""

from __future__ import annotations

import json
import sys

from histill import config as configs
from histill.export.config import BenchConfig

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Run the command."""
    config = configs.parse(
        BenchConfig,
        argv,
        prog="histill bench",
        description="Speed, latency, memory, multiplications and parameters of models and engines, measured in turns "
        "in one run.",
        flags=True,
    )
    from rich.console import Console
    from rich.table import Table

    from histill.export.bench import bench

    found = bench(config, Console(stderr=True))
    if config.json:
        print(json.dumps(found, indent=2))
        return 0
    wide = None if sys.stdout.isatty() else 120
    table = Table("model", "engine", title=f"batch {found['batch']}, {found['threads']} threads, {found['processor']}")
    for name in ("tiles/s", "ratio", "p50 ms", "p95 ms", "MB", "M params", "GMAC"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        memory = "?" if row["memory_mb"] is None else f"{row['memory_mb']:.0f}"
        numbers = [f"{row[key]:.4g}" for key in ("tiles_per_second", "ratio", "latency_p50_ms", "latency_p95_ms")]
        sizes = [f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}"]
        table.add_row(row["model"], row["engine"], *numbers, memory, *sizes)
    Console(width=wide).print(table)
    return 0
