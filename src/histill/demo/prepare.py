"""What the demo learns from and is checked on: drawn slides, the tile set cut from them, and two tables of its tiles.

The tile set has no labels. Since the program knows what it drew where, the tiles of a clear kind of tissue are labelled
here, and the tiles at one place of a section are paired between its appearances. Checks read tables of image files, so
the very JPEG files of the set are written beside their table, in the folder ``checks``.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from histill.demo.config import SLIDE_PX, TILE_PX, DemoConfig
from histill.errors import DataError, RunError
from histill.files import atomic_folder
from histill.synthetic import KINDS, LABELS_CSV, MPP, PAIRED_CSV
from histill.synthetic.layout import SlideTruth
from histill.synthetic.slides import SLIDE_LABELS_CSV, slide_set_truths, write_slide_set
from histill.tiles.config import TileConfig
from histill.tiles.folder import SetFolder
from histill.tiles.images import read_table
from histill.tiles.index import Index, TileRow
from histill.tiles.pool import cores
from histill.tiles.shards import OpenShards
from histill.tiles.write import write_tiles

__all__ = ["cut_tiles", "data_facts", "draw_slides", "held_out_slides", "label_tiles", "pair_tiles"]

_LABEL_COLUMNS = ("path", "label", "slide", "scanner", "split")
_PAIR_COLUMNS = ("path", "slide", "scanner", "x", "y")
_FEWEST_OF_A_KIND = 5  # labelled tiles, in train and in test
_MOST_WORKERS = 8  # more processes take longer to start than they save

Row = dict[str, Any]
"""One row of a table, by column."""


def draw_slides(config: DemoConfig, console: Console) -> None:
    """Draw the slides, with a bar; a set that is there is whole."""
    folder = config.out / "slides"
    if folder.exists():
        console.print("the slides are there already")
        return
    bar = Progress(
        TextColumn("slides"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("slides", total=None)
        write_slide_set(
            folder,
            **_drawn(config),
            workers=_workers(),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"{config.slides} slides, and {config.sections} more under every stain and scanner, in {folder}",
        highlight=False,
    )


def _drawn(config: DemoConfig) -> dict[str, Any]:
    """What decides the slides."""
    side = {"width_px": SLIDE_PX, "height_px": SLIDE_PX}
    return {"slides": config.slides, "paired": config.sections, "seed": config.seed} | side


def _workers() -> int:
    return min(_MOST_WORKERS, cores())


def cut_tiles(config: DemoConfig, console: Console) -> None:
    """Cut the slides into the tile set, then write the tables for the checks; what is there stays.

    Raises
    ------
    RunError
        A slide cannot be read.
    DataError
        Too few tiles show a kind of tissue.
    """
    tiles, checks = config.out / "tiles", config.out / "checks"
    if checks.exists():  # it is written last
        console.print("the tiles are there already")
        return
    told = TileConfig(slides=(config.out / "slides",), out=tiles, mpp=MPP, tile_px=TILE_PX, workers=_workers())
    outcome = write_tiles(told, console)
    if outcome.failed:
        first = outcome.failed[0]
        raise RunError("a drawn slide cannot be cut into tiles", where=first.path, got=first.error)
    _write_checks(checks, tiles, config)
    facts = data_facts(config.out)
    filtered = sum(facts["filtered"].values())
    console.print(
        f"{facts['tiles']} tiles kept of {facts['grid_tiles']} in {tiles}: {facts['without_tissue']} have too little "
        f"tissue, {filtered} are left out by filters\n{facts['labelled_tiles']} tiles of a clear kind and "
        f"{facts['paired_fields']} paired fields in {checks}",
        highlight=False,
    )


def held_out_slides(slides: Path) -> tuple[str, ...]:
    """Ids of the slides that are for the checks alone: the test slides and the paired ones."""
    return tuple(row["slide"] for row in _slide_rows(slides) if row["split"] != "train")


def _slide_rows(slides: Path) -> list[dict[str, str]]:
    return read_table(slides / SLIDE_LABELS_CSV, ["slide", "stain", "scanner", "split"])


# ------------------------------------------------------------------ the tables


def label_tiles(
    tiles: Sequence[TileRow], slides: Mapping[str, Mapping[str, str]], truths: Mapping[str, SlideTruth]
) -> list[tuple[TileRow, Row]]:
    """Label the tiles of which one kind of tissue covers nearly all, on slides of their own.

    Parameters
    ----------
    tiles
        Rows of the index.
    slides
        Slide id -> its row in the slides' table.
    truths
        Slide id -> what lies where.

    Returns
    -------
    list
        Tile, and its row for ``labels.csv``.
    """
    labelled = []
    for tile in tiles:
        slide = slides[tile.slide]
        kind = truths[tile.slide].kind_of(tile.x, tile.y, TILE_PX) if slide["split"] != "paired" else None
        if kind is not None:
            path = f"tiles/{kind}/{tile.slide}_x{tile.x}_y{tile.y}.jpg"
            row = {"path": path, "label": kind, "slide": tile.slide, "scanner": _look(slide), "split": slide["split"]}
            labelled.append((tile, row))
    return labelled


def pair_tiles(tiles: Sequence[TileRow], slides: Mapping[str, Mapping[str, str]]) -> list[tuple[TileRow, Row]]:
    """Pair the tiles of sections that were drawn under every appearance, where all of them were kept.

    Arguments and result as in :func:`label_tiles`; the rows are for ``paired.csv``, its ``slide`` is the section.
    """
    looks = {_look(slide) for slide in slides.values() if slide["split"] == "paired"}
    fields: dict[tuple[str, int, int], dict[str, TileRow]] = {}
    for tile in tiles:
        if slides[tile.slide]["split"] == "paired":
            section = tile.slide.partition("_")[0]
            fields.setdefault((section, tile.y, tile.x), {})[_look(slides[tile.slide])] = tile
    paired = []
    for (section, y, x), found in sorted(fields.items()):
        if set(found) == looks:
            for look, tile in sorted(found.items()):
                path = f"paired/{look}/{section}_x{x}_y{y}.jpg"
                paired.append((tile, {"path": path, "slide": section, "scanner": look, "x": x, "y": y}))
    return paired


def _look(slide: Mapping[str, str]) -> str:
    return f"{slide['stain']}-{slide['scanner']}"


def _write_checks(folder: Path, tile_set: Path, config: DemoConfig) -> None:
    index = Index.open(tile_set / "index.parquet")
    tiles = [TileRow(**row) for row in index.rows(np.arange(len(index))).to_pylist()]
    slides = {row["slide"]: row for row in _slide_rows(config.out / "slides")}
    labelled = label_tiles(tiles, slides, slide_set_truths(**_drawn(config)))
    _require_every_kind([row for _, row in labelled])
    paired = pair_tiles(tiles, slides)
    shards = OpenShards(tile_set / "shards")
    with atomic_folder(folder) as temporary:
        for name, columns, chosen in ((LABELS_CSV, _LABEL_COLUMNS, labelled), (PAIRED_CSV, _PAIR_COLUMNS, paired)):
            with (temporary / name).open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(row for _, row in chosen)
            for tile, row in chosen:
                target = temporary / row["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(_encoded(tile, shards))


def _encoded(tile: TileRow, shards: OpenShards) -> bytes:
    assert tile.shard is not None  # as in every set that has pixels
    assert tile.offset is not None
    assert tile.length is not None
    return shards.read(tile.shard, tile.offset, tile.length)


def _require_every_kind(rows: Sequence[Row]) -> None:
    counts = Counter((row["label"], row["split"]) for row in rows)
    found = {(kind, split): counts[kind, split] for kind in KINDS for split in ("train", "test")}
    if min(found.values()) < _FEWEST_OF_A_KIND:
        raise DataError(
            "too few tiles show a kind of tissue clearly, so that the student could not be checked",
            got=", ".join(f"{number} of {kind} in {split}" for (kind, split), number in found.items()),
            allowed=f"{_FEWEST_OF_A_KIND} or more of each in both",
            remedy="give a new --out and more --slides, or another --seed",
        )


# ------------------------------------------------------------------ counts


def data_facts(demo: Path) -> dict[str, Any]:
    """Count slides, tiles and what became of them, from the files in a demo's folder; JSON-ready."""
    tile_set = SetFolder(demo / "tiles")
    settings, records = tile_set.settings(), tile_set.records()
    slides = _slide_rows(demo / "slides")
    labels = read_table(demo / "checks" / LABELS_CSV, ["label", "split"])
    pairs = read_table(demo / "checks" / PAIRED_CSV, ["slide", "x", "y"])
    grid, tissue = (sum(getattr(record, name) for record in records) for name in ("grid_tiles", "tissue_tiles"))
    by_split = {split: Counter(row["label"] for row in labels if row["split"] == split) for split in ("train", "test")}
    return {
        "kinds": list(KINDS),
        "slides": sum(row["split"] != "paired" for row in slides),
        "test_slides": sum(row["split"] == "test" for row in slides),
        "paired_slides": sum(row["split"] == "paired" for row in slides),
        "paired_sections": len({row["slide"] for row in pairs}),
        "slide_px": SLIDE_PX,
        "mpp": settings["mpp"],
        "tile_px": settings["tile_px"],
        "tissue_min": settings["tissue_min"],
        "grid_tiles": grid,
        "without_tissue": grid - tissue,
        "filtered": {
            name: sum(getattr(record, name) for record in records) for name in ("white", "black", "blur", "pen")
        },
        "unreadable": sum(record.unreadable for record in records),
        "tiles": sum(record.tiles for record in records),
        "labelled_tiles": len(labels),
        "labels": {split: dict(sorted(counts.items())) for split, counts in by_split.items()},
        "paired_fields": len({(row["slide"], row["x"], row["y"]) for row in pairs}),
    }
