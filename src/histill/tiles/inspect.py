"""Show what a tile set holds: a table, and a picture with charts and a contact sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from histill import files
from histill.errors import DataError
from histill.tiles.folder import SetFolder, SlideRecord
from histill.tiles.images import UnreadableTileError
from histill.tiles.open import open_set
from histill.tiles.tile_set import TileSource

__all__ = ["inspect_set"]

_SHEET_COLUMNS, _SHEET_ROWS, _SHEET_TILE_PX = 10, 5, 112
_LISTED, _NAME_WIDTH = 25, 20
_FATES = ("tiles", "white", "black", "blur", "pen", "unreadable")
_COLOURS = ("#2a7f62", "#d9d9d9", "#333333", "#9ecae1", "#7b3294", "#c0392b")
_SEED = 0x5EE


def inspect_set(root: Path, picture: Path | None) -> None:
    """Print what a set holds, and draw it.

    Parameters
    ----------
    root
        The tile set.
    picture
        A PNG file; ``<set>-inspect.png`` beside the set if None.

    Raises
    ------
    DataError, RunError
        The folder is not a tile set, or holds no slide yet.
    """
    folder = SetFolder(root)
    settings, records = folder.settings(), folder.records()
    if not records:
        raise DataError("this tile set holds no slide yet", where=root, remedy="run histill tile again")
    _print(settings, records)
    if not any(record.tiles for record in records):
        print("no tiles, and so no picture")
        return
    target = picture or root.resolve().with_name(f"{root.resolve().name}-inspect.png")
    _draw(root, settings, records, target)
    print(f"picture: {target}")


def _print(settings: dict[str, Any], records: Sequence[SlideRecord]) -> None:
    done = [record for record in records if record.status == "done"]
    count, size = sum(record.tiles for record in done), sum(record.set_bytes for record in done)
    codec = {"jpeg": f"JPEG quality {settings['jpeg_quality']} {settings['jpeg_chroma']}", "png": "PNG, lossless"}
    held = codec.get(settings["codec"], "no pixels: read from the slides")
    step = f"step {settings['stride_px']} px"
    print(f"{count} tiles of {settings['tile_px']} px at {settings['mpp']} um/px, {step}; {held}")
    print(
        f"{len(done)} slides, {len(records) - len(done)} failed; {size / 1e6:.1f} MB"
        + (f", {size / count / 1000:.1f} kB a tile" if count and size else "")
    )
    sources = Counter(record.mpp_source for record in done)
    print("scale from: " + ", ".join(f"{source} ({number})" for source, number in sorted(sources.items(), key=str)))
    fates = {fate: sum(getattr(record, fate) for record in done) for fate in _FATES[1:]}
    print("left out: " + ", ".join(f"{number} {fate}" for fate, number in fates.items()))
    table = Table(box=None, padding=(0, 1))
    for name in ("slide", "um/px", "from", "grid", "tissue", "tiles", "filtered", "damaged"):
        justify: Literal["left", "right"] = "left" if name in ("slide", "from") else "right"
        table.add_column(name, justify=justify, no_wrap=True, max_width=_NAME_WIDTH if name == "slide" else None)
    for record in records[:_LISTED]:
        if record.status == "failed":
            table.add_row(record.slide, "", "[red]failed[/]")
        else:
            filtered = record.white + record.black + record.blur + record.pen
            numbers = (record.grid_tiles, record.tissue_tiles, record.tiles, filtered, record.unreadable)
            table.add_row(record.slide, f"{record.mpp:.4g}", record.mpp_source, *map(str, numbers))
    Console().print(table)
    if len(records) > _LISTED:
        print(f"and {len(records) - _LISTED} more: slides.csv")


def _draw(root: Path, settings: dict[str, Any], records: Sequence[SlideRecord], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [record for record in records if record.status == "done"]
    figure = plt.figure(figsize=(12, 10.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 2.1])
    fates, sizes, scales, sheet = (
        figure.add_subplot(grid[0, 0]),
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[0, 2]),
        figure.add_subplot(grid[1, :]),
    )
    _draw_fates(fates, done)
    source = open_set(root)
    lengths = source.selection.index.lengths
    if len(lengths):
        sizes.hist(lengths / 1000, bins=40, color=_COLOURS[0])
        sizes.set(title="size of a tile", xlabel="kB", ylabel="tiles")
    else:
        sizes.set_axis_off()
    known = [record.mpp for record in done if record.mpp]
    ends = min([*known, settings["mpp"]]), max([*known, settings["mpp"]])
    scales.hist(known, bins=30, range=(0.9 * ends[0], 1.1 * ends[1]), color="#4a6fa5")
    scales.axvline(settings["mpp"], color=_COLOURS[-1])
    scales.set(title=f"scale of the slides (red: the tiles, {settings['mpp']})", xlabel="um/px", ylabel="slides")
    chosen = np.random.default_rng(_SEED).choice(len(source), min(len(source), _SHEET_COLUMNS * _SHEET_ROWS), False)
    sheet.imshow(_contact_sheet(source, np.sort(chosen)))
    sheet.set_axis_off()
    sheet.set_title(f"{len(chosen)} of {len(source)} tiles, drawn at random, in the order of the slides")
    figure.suptitle(root.resolve().name)
    try:
        with files.atomic_path(target) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    except OSError as error:
        raise DataError("the picture cannot be written", where=target, got=error.strerror or error) from None
    finally:
        plt.close(figure)


def _draw_fates(axes: Any, done: Sequence[SlideRecord]) -> None:
    """What became of the tiles with tissue, slide by slide, sorted by their number."""
    done = sorted(done, key=lambda record: -record.tissue_tiles)
    bottom = np.zeros(len(done))
    for fate, colour in zip(_FATES, _COLOURS, strict=True):
        counts = np.array([getattr(record, fate) for record in done], dtype=float)
        if counts.any():
            axes.bar(np.arange(len(done)), counts, bottom=bottom, color=colour, width=0.9, label=fate)
        bottom += counts
    axes.set(title="tiles with tissue", xlabel="slide", ylabel="tiles")
    axes.legend(fontsize="small")
    if len(done) <= 6:
        names = [record.slide if len(record.slide) <= 14 else record.slide[:13] + "…" for record in done]
        axes.set_xticks(range(len(done)), names, rotation=20, ha="right")
        axes.set_xlabel("")


def _contact_sheet(source: TileSource, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    from PIL import Image

    side, gap = _SHEET_TILE_PX, 4
    rows = -(-len(indices) // _SHEET_COLUMNS)
    sheet = np.full((rows * (side + gap), _SHEET_COLUMNS * (side + gap), 3), 255, dtype=np.uint8)
    for number, index in enumerate(indices.tolist()):
        try:
            tile = Image.fromarray(source.read(index)).resize((side, side), Image.Resampling.BOX)
        except UnreadableTileError:
            continue  # stays blank; a set with damaged shards says so when it is trained on
        y, x = (value * (side + gap) for value in divmod(number, _SHEET_COLUMNS))
        sheet[y : y + side, x : x + side] = np.asarray(tile)
    return sheet
