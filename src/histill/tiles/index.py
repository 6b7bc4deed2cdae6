"""The index of a tile set: one Parquet row a tile, which says where its bytes are and where in which slide it lies.

Rows are sorted by slide; those of a slide are in the order in which they were cut, cell by cell of the grid. What
finding a tile's bytes needs is held in memory (8 bytes a tile); the other columns are read when they are asked for.
Shapes: N tiles, S slides, R runs of tiles in one shard, B rows asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from histill.errors import DataError
from histill.files import atomic_path

__all__ = ["ROW_GROUP_ROWS", "SCHEMA", "Index", "TileRow", "merge_indexes", "parts_digest", "to_table", "write_index"]

_TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("shard", _TEXT),  # null, as offset and length, in a set without pixels of its own
        pa.field("offset", pa.int64()),
        pa.field("length", pa.int32()),
        pa.field("slide", _TEXT, nullable=False),
        pa.field("patient", _TEXT),
        pa.field("x", pa.int32(), nullable=False),
        pa.field("y", pa.int32(), nullable=False),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("mpp", pa.float32(), nullable=False),
        pa.field("tissue", pa.float32(), nullable=False),
    ]
)
"""Columns of an index; each is explained in :class:`TileRow`."""
ROW_GROUP_ROWS = 131_072
"""Rows that are written and read together."""

_SETTINGS, _PARTS = b"histill", b"histill-parts"
# Differences and LZ4 are read about as fast as plain numbers and take a third of the room: the resident columns of 43
# million rows take half a second of decoding.
_FORMAT: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": ["shard", "slide", "patient", "level", "mpp"],
    "column_encoding": {
        "offset": "DELTA_BINARY_PACKED",
        "length": "DELTA_BINARY_PACKED",
        "x": "DELTA_BINARY_PACKED",
        "y": "DELTA_BINARY_PACKED",
        "tissue": "BYTE_STREAM_SPLIT",
    },
    "write_statistics": False,
}
_AGAIN = "run `histill tile` again with the same settings: finished slides stay, and the index is made from them"


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRow:
    """One tile's row."""

    shard: str | None
    """File name below ``shards/``; None in a set without pixels of its own."""
    offset: int | None
    """Where the encoded tile begins in the shard, in bytes, a multiple of 512."""
    length: int | None
    """Bytes of the encoded tile."""
    slide: str
    """Slide id."""
    patient: str | None
    x: int
    """Left edge, in level-0 pixels."""
    y: int
    """Top edge, in level-0 pixels."""
    level: int
    """Level of the slide that was read."""
    mpp: float
    """Microns per pixel of the tile."""
    tissue: float
    """Share of tissue, 0 to 1."""


def to_table(rows: Iterable[TileRow]) -> pa.Table:
    """Make a table of :data:`SCHEMA` from rows."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def write_index(path: Path, table: pa.Table, settings: Mapping[str, Any]) -> None:
    """Write an index, or the part of one slide, atomically.

    Parameters
    ----------
    path
        The Parquet file.
    table
        Rows with the columns of :data:`SCHEMA`, in any order; texts may be plain or dictionaries.
    settings
        What the set was made with, kept as JSON in the file's metadata.
    """
    schema = SCHEMA.with_metadata({_SETTINGS: _json(settings)})
    with atomic_path(path) as temporary:
        pq.write_table(table.select(SCHEMA.names).cast(schema), temporary, row_group_size=ROW_GROUP_ROWS, **_FORMAT)


def merge_indexes(parts: Sequence[Path], out: Path, settings: Mapping[str, Any]) -> None:
    """Write the parts of many slides as one index, sorted by slide, atomically and in little memory.

    Parameters
    ----------
    parts
        Files of :func:`write_index`, each named after the one slide that it holds, in any order; some may be empty.
    out
        The index.
    settings
        What the set was made with.

    Raises
    ------
    DataError
        When a part is damaged, was made with other settings, or a slide comes twice.
    """
    ordered = sorted(parts, key=lambda part: part.stem)
    schema = SCHEMA.with_metadata({_SETTINGS: _json(settings), _PARTS: parts_digest(ordered)})
    with atomic_path(out) as temporary, pq.ParquetWriter(temporary, schema, **_FORMAT) as writer:
        for tables in _in_row_groups(_tables_of_parts(ordered, settings)):
            # Of all their slides a row group names its own alone: a dictionary of all slides in each would be large.
            table = pa.concat_tables(tables).unify_dictionaries().combine_chunks().cast(schema)
            writer.write_table(table, row_group_size=len(table))


def _tables_of_parts(ordered: Iterable[Path], settings: Mapping[str, Any]) -> Iterator[pa.Table]:
    last_slide = ""
    for part in ordered:
        with _named_damage(part), pq.ParquetFile(part) as file:
            if (file.schema_arrow.metadata or {}).get(_SETTINGS) != _json(settings):
                raise DataError("a part of the index was made with other settings", where=part, remedy=_AGAIN)
            before = last_slide
            for group in range(file.num_row_groups):
                table = file.read_row_group(group).select(SCHEMA.names).replace_schema_metadata(None)
                for slide in _runs(table.column("slide"))[1]:
                    if slide <= before or slide < last_slide:
                        raise DataError("a slide comes twice, or out of turn", where=part, got=slide, remedy=_AGAIN)
                    last_slide = slide
                yield table


def _in_row_groups(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Gather tables until they fill a row group."""
    gathered: list[pa.Table] = []
    rows = 0
    for table in tables:
        gathered.append(table)
        rows += len(table)
        if rows >= ROW_GROUP_ROWS:
            yield gathered
            gathered, rows = [], 0
    if rows:
        yield gathered


def parts_digest(parts: Iterable[Path]) -> bytes:
    """Hash the names of parts: an index keeps it, so that an index that is older than the parts beside it is noticed.

    Names are enough, since the part of one slide under the same settings always holds the same rows.
    """
    names = "\n".join(sorted(part.stem for part in parts))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest().encode()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Index:
    """An open index. Arrays that tell where tiles are stay in memory, 8 bytes a tile; nothing else does."""

    path: Path
    """The Parquet file."""
    settings: Mapping[str, Any]
    """What the set was made with."""
    parts: str | None
    """:func:`parts_digest` of the parts that it was merged from."""
    slides: tuple[str, ...]
    """Slide ids, in the order of rows."""
    slide_first: NDArray[np.int64]
    """(S + 1,): first row of each slide, and the number of rows."""
    shards: tuple[str, ...]
    """File name of each run of tiles in one shard; empty in a set without pixels."""
    shard_first: NDArray[np.int64]
    """(R + 1,): first row of each run, and the number of rows."""
    blocks: NDArray[np.uint32]
    """(N,): where a tile's bytes begin in its shard, in blocks of 512 bytes; empty in a set without pixels."""
    lengths: NDArray[np.uint32]
    """(N,): how many bytes they are."""
    metadata: pq.FileMetaData
    """The file's footer."""

    @classmethod
    def open(cls, path: Path) -> Index:
        """Read an index: 43 million rows in about a second.

        Raises
        ------
        DataError
            When there is none, it is damaged or not an index, or the tiles of a slide are not neighbours.
        """
        if not path.is_file():
            raise DataError("a tile set has no index", where=path, remedy=_AGAIN)
        with _named_damage(path), pq.ParquetFile(path, pre_buffer=False) as file:
            about = file.schema_arrow.metadata or {}
            missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
            if missing or _SETTINGS not in about:
                lacking = f"the column {missing[0]}" if missing else "the settings"
                raise DataError(f"this is not the index of a tile set: it lacks {lacking}", where=path, remedy=_AGAIN)
            slides, shards, blocks, lengths = _read_resident(file, path)
            return cls(
                path=path,
                settings=json.loads(about[_SETTINGS]),
                parts=about[_PARTS].decode() if _PARTS in about else None,
                slides=tuple(slides.names),
                slide_first=slides.edges(len_=file.metadata.num_rows),
                shards=tuple(shards.names),
                shard_first=shards.edges(len_=file.metadata.num_rows),
                blocks=blocks,
                lengths=lengths,
                metadata=file.metadata,
            )

    def __len__(self) -> int:
        return int(self.metadata.num_rows)

    def slide_of(self, rows_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place in ``slides`` of each row's slide, shape (B,)."""
        return np.searchsorted(self.slide_first, rows_B, side="right") - 1

    def column(self, name: str) -> NDArray[Any]:
        """Read a whole column of numbers (``x``, ``y``, ``level``, ``mpp``, ``tissue``), shape (N,)."""
        field = SCHEMA.field(name)
        whole = np.empty(len(self), dtype=field.type.to_pandas_dtype())
        first = 0
        with _named_damage(self.path), pq.ParquetFile(self.path, metadata=self.metadata) as file:
            for group in range(file.num_row_groups):
                values = file.read_row_group(group, columns=[name]).column(0).to_numpy()
                whole[first : first + len(values)] = values
                first += len(values)
        return whole

    def rows(self, rows_B: NDArray[np.int64], columns: Sequence[str] | None = None) -> pa.Table:
        """Read rows, in the order asked for; each row group that holds one is read once.

        Parameters
        ----------
        rows_B
            Row numbers, int64 (B,).
        columns
            Names; all when None.

        Raises
        ------
        IndexError
            There is no such row.
        """
        rows_B = np.asarray(rows_B, dtype=np.int64)
        if len(rows_B) and (rows_B.min() < 0 or rows_B.max() >= len(self)):
            raise IndexError(f"rows are 0 to {len(self) - 1}")
        groups = range(self.metadata.num_row_groups)
        first_G = np.cumsum([0, *(self.metadata.row_group(group).num_rows for group in groups)])
        order = np.argsort(rows_B, kind="stable")
        group_B = np.searchsorted(first_G, rows_B[order], side="right") - 1
        names = list(SCHEMA.names if columns is None else columns)
        found = []
        with _named_damage(self.path), pq.ParquetFile(self.path, metadata=self.metadata) as file:
            for group in np.unique(group_B):
                table = file.read_row_group(int(group), columns=names).select(names)
                # Texts as plain strings: a dictionary for each row group would be carried along.
                table = table.take(rows_B[order][group_B == group] - first_G[group])
                found.append(table.cast(_plain(table.schema)))
        if not found:
            return _plain(pa.schema([SCHEMA.field(name) for name in names])).empty_table()
        return pa.concat_tables(found).take(np.argsort(order, kind="stable"))

    def row(self, row: int) -> TileRow:
        """Read one row: for messages and pictures, since it costs as much as a whole row group."""
        return TileRow(**self.rows(np.array([row])).to_pylist()[0])


def _plain(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(pa.string()) if field.type == _TEXT else field for field in schema])


class _Runs:
    """Runs of equal texts in a column that comes in pieces."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.first: list[NDArray[np.int64]] = []

    def add(self, column: pa.ChunkedArray, first_row: int) -> None:
        starts, names = _runs(column)
        joined = int(bool(names and self.names and names[0] == self.names[-1]))
        self.names += names[joined:]
        self.first.append(starts[joined:] + first_row)

    def edges(self, *, len_: int) -> NDArray[np.int64]:
        return np.concatenate([*self.first, np.array([len_])])


def _runs(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """Where each run of equal texts begins in a dictionary column, and its text."""
    column = column.combine_chunks()
    codes = column.indices.to_numpy()
    starts = np.flatnonzero(codes[1:] != codes[:-1]) + 1
    starts = np.concatenate([np.zeros(min(1, len(codes)), dtype=np.int64), starts])
    return starts, column.dictionary.take(pa.array(codes[starts])).to_pylist()


def _read_resident(file: pq.ParquetFile, path: Path) -> tuple[_Runs, _Runs, NDArray[np.uint32], NDArray[np.uint32]]:
    """Read what stays in memory, row group by row group into arrays that are made once."""
    slides, shards = _Runs(), _Runs()
    rows, first, without = file.metadata.num_rows, 0, 0
    blocks, lengths = np.empty(rows, dtype=np.uint32), np.empty(rows, dtype=np.uint32)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["slide", "shard", "offset", "length"])
        slides.add(table.column("slide"), first)
        last = first + len(table)
        nulls = max(table.column(name).null_count for name in ("shard", "offset", "length"))
        if nulls == 0:
            shards.add(table.column("shard"), first)
            np.right_shift(table.column("offset").to_numpy(), 9, out=blocks[first:last], casting="unsafe")
            lengths[first:last] = table.column("length").to_numpy()
        without += nulls
        first = last
    if len(set(slides.names)) != len(slides.names):
        raise DataError("the tiles of a slide are not neighbours in the index", where=path, remedy=_AGAIN)
    if without not in (0, rows):
        raise DataError(
            "some tiles of the index are in no shard", where=path, got=f"{without} of {rows}", remedy=_AGAIN
        )
    if rows and without:
        shards, blocks, lengths = _Runs(), blocks[:0], lengths[:0]
    return slides, shards, blocks, lengths


def _json(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


@contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Turn what Arrow says of a damaged or missing file into an error that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError("an index cannot be read", where=path, got=error, remedy=_AGAIN) from error
