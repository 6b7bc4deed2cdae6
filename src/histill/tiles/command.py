"""``histill tile``."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from histill import config as configs
from histill.errors import ConfigError
from histill.tiles.config import TileConfig

__all__ = ["run"]

_DESCRIPTION = """Cut slides into a tile set that training streams from: shards of JPEG tiles at an exact scale and one
index. The same command again does only what is missing. Exit status: 0 all slides done, 2 some slides failed
(slides.csv says why), 1 the run could not be carried out.

histill tile SLIDES... --out SET: make or complete a set

histill tile SLIDES... --dry-run: tiles, size and time to expect

histill tile --inspect SET: what a set holds

histill tile --merge SET SET --out SET: put parts of a job array together"""

_SOME_FAILED = 2


def run(argv: list[str]) -> int:
    """Run the command; the exit status tells whether slides failed."""
    config = configs.parse(TileConfig, argv, prog="histill tile", description=_DESCRIPTION, flags=True)
    if config.inspect is not None:
        if config.slides or config.out is not None or config.merge:
            raise ConfigError("--inspect stands alone", where="histill tile --inspect", allowed="--picture beside it")
        from histill.tiles.inspect import inspect_set

        inspect_set(config.inspect, config.picture)
        return 0
    if config.merge:
        return _merge(config)
    if not config.slides:
        raise ConfigError("no slides are given", remedy="histill tile SLIDES... --out SET; see histill tile --help")
    if config.dry_run:
        return _dry_run(config)
    if config.out is None:
        raise ConfigError("no folder is given for the tile set", where="--out", remedy="add --out SET, or --dry-run")
    return _write(config)


def _write(config: TileConfig) -> int:
    from histill.tiles.write import write_tiles

    outcome = write_tiles(config, Console(stderr=True))
    tiles = sum(record.tiles for record in outcome.done)
    unreadable = sum(record.unreadable for record in outcome.done)
    there = f"; {outcome.there} there already" if outcome.there else ""
    print(f"{len(outcome.done)} slides done, {tiles} tiles{there}")
    if unreadable:
        print(f"{unreadable} tiles could not be read and are in no shard: {config.out}/unreadable.csv")
    if outcome.elsewhere:
        print(f"{len(outcome.elsewhere)} slides were taken by another process")
    if outcome.failed:
        print(f"{len(outcome.failed)} slides failed; why is in {config.out}/slides.csv:")
        for record in outcome.failed:
            print(f"{record.slide}: {record.error}", file=sys.stderr)
    print(f"tile set: {config.out}")
    return _SOME_FAILED if outcome.failed else 0


def _merge(config: TileConfig) -> int:
    from histill.tiles.merge import merge_sets

    if config.out is None or config.slides:
        raise ConfigError("--merge takes sets, and --out a folder for the whole", allowed="--merge SET SET --out SET")
    records = merge_sets(config.merge, config.out)
    failed = [record for record in records if record.status == "failed"]
    print(f"{len(records) - len(failed)} slides, {sum(record.tiles for record in records)} tiles in {config.out}")
    if failed:
        print(f"{len(failed)} slides failed: {', '.join(record.slide for record in failed)}", file=sys.stderr)
    return _SOME_FAILED if failed else 0


def _dry_run(config: TileConfig) -> int:
    from histill.tiles.dry_run import dry_run

    estimates, workers = dry_run(config, Console(stderr=True))
    table = Table(title="a dry run: nothing was written")
    for name in ("slide", "mpp", "from", "level", "grid", "tissue", "tiles (est.)", "MB (est.)"):
        table.add_column(name, justify="left" if name in ("slide", "from") else "right")
    for row in estimates:
        if row.error is not None:
            table.add_row(row.slide, "[red]failed[/]")
            continue
        table.add_row(
            row.slide,
            f"{row.mpp:.4g}",
            row.mpp_source,
            str(row.level),
            str(row.grid_tiles),
            str(row.tissue_tiles),
            str(row.kept_tiles),
            f"{row.set_bytes / 1e6:.1f}",
        )
    Console().print(table)
    tiles, seconds = sum(row.kept_tiles for row in estimates), sum(row.seconds for row in estimates) / workers
    size = sum(row.set_bytes for row in estimates)
    print(f"{tiles} tiles, {_size(size)} on disk, about {_duration(seconds)} with {workers} worker processes")
    failed = [row for row in estimates if row.error is not None]
    for row in failed:
        print(f"{row.slide}: {row.error}", file=sys.stderr)
    return _SOME_FAILED if failed else 0


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
