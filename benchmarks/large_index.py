"""Seconds and peak memory of opening, and of seeking in, the index of a set as large as the largest public one.

    python benchmarks/large_index.py [--rows 43000000] [--seeks 1000] [--keep FOLDER]

The index is generated (sizes of tiles, places and tissue shares are drawn) as parts of about a million rows, which are
merged as `histill tile` merges the parts of slides. Merging and opening run in processes of their own, whose peak
resident memory is printed, imports included. A seek finds shard, offset and length of a random tile, and its slide; a
row is all that the index says of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from histill.tiles.index import SCHEMA, Index, merge_indexes, write_index

PART_ROWS, SLIDE_ROWS, SHARD_BYTES = 2**20, 3500, 10**9
SETTINGS = {"tile_px": 224, "mpp": 0.5, "codec": "jpeg"}


def part(first: int, rows: int) -> pa.Table:
    """Rows ``first`` to ``first + rows`` of the set."""
    random = np.random.default_rng(first)
    slide, place = np.divmod(np.arange(first, first + rows), SLIDE_ROWS)
    length = random.normal(24_600, 6_000, rows).clip(3_000, 60_000).astype(np.int32)
    taken = 512 + -(-length.astype(np.int64) // 512) * 512
    before = np.cumsum(taken) - taken
    starts = np.flatnonzero(np.diff(slide, prepend=-1))
    offset = before - np.repeat(before[starts], np.diff([*starts, rows])) + 512
    texts = {
        "shard": [f"slide-{number:06d}-00000.tar" for number in slide[starts]],
        "slide": [f"slide-{number:06d}" for number in slide[starts]],
        "patient": [f"patient-{number // 2:05d}" for number in slide[starts]],
    }
    codes = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff([*starts, rows]))
    columns = {name: pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(text)) for name, text in texts.items()}
    columns |= {
        "offset": offset,
        "length": length,
        "x": (place % 60 * 447).astype(np.int32),
        "y": (place // 60 * 447).astype(np.int32),
        "level": np.zeros(rows, dtype=np.int8),
        "mpp": np.full(rows, 0.5, dtype=np.float32),
        "tissue": random.uniform(0.4, 1, rows).astype(np.float32),
    }
    return pa.table({name: columns[name] for name in SCHEMA.names})


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def merge(folder: Path) -> dict[str, object]:
    parts = sorted((folder / "parts").glob("*.parquet"))
    return {"merging": timed(lambda: merge_indexes(parts, folder / "index.parquet", SETTINGS))}


def open_and_seek(folder: Path, seeks: int) -> dict[str, object]:
    path = folder / "index.parquet"
    imported_gb = peak_gb()
    opening = timed(lambda: Index.open(path))
    index = Index.open(path)
    rows = np.random.default_rng(0).integers(0, len(index), seeks)

    def seek() -> None:
        for row in rows:
            run = int(np.searchsorted(index.shard_first, row, side="right")) - 1
            _ = index.shards[run], int(index.blocks[row]) * 512, int(index.lengths[row])
            _ = index.slides[int(np.searchsorted(index.slide_first, row, side="right")) - 1]

    times = {"opening": opening, f"{seeks} seeks": timed(seek)}
    peak_gb_open = peak_gb()
    times[f"{seeks} rows, in one call"] = timed(lambda: index.rows(rows))
    times["one row"] = timed(lambda: index.row(int(rows[0])))
    return times | {
        "imported GB": imported_gb,
        "peak GB, opening and seeking": peak_gb_open,
        "peak GB, in all": peak_gb(),
    }


def peak_gb() -> float:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def run_alone(role: str, folder: Path, seeks: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--role", role, "--keep", str(folder), "--seeks", str(seeks)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def compare(folder: Path, rows: int, seeks: int) -> None:
    for first in range(0, rows, PART_ROWS // SLIDE_ROWS * SLIDE_ROWS):
        last = min(rows, first + PART_ROWS // SLIDE_ROWS * SLIDE_ROWS)
        write_index(folder / "parts" / f"{first:010d}.parquet", part(first, last - first), SETTINGS)
    for role in ("merge", "open"):
        print(f"\n{'merging' if role == 'merge' else 'opening'}, in a process of its own")
        for name, value in run_alone(role, folder, seeks).items():
            shown = f"{value:8.2f}" if isinstance(value, float) else "{:8.3f} s ({:.3f} s CPU)".format(*value)  # type: ignore[misc]
            print(f"  {name:30}{shown}")
    print(f"\n{rows:,} rows, {(folder / 'index.parquet').stat().st_size / 1e6:.0f} MB on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=43_000_000)
    parser.add_argument("--seeks", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="where the index is made; a temporary folder when left out")
    parser.add_argument("--role", choices=("merge", "open"), help="do this one here and print JSON")
    options = parser.parse_args()
    if options.role == "merge":
        print(json.dumps(merge(options.keep) | {"peak GB": peak_gb()}))
    elif options.role == "open":
        print(json.dumps(open_and_seek(options.keep, options.seeks)))
    elif options.keep:
        compare(options.keep, options.rows, options.seeks)
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), options.rows, options.seeks)


if __name__ == "__main__":
    main()
