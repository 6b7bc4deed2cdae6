from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histill.errors import DataError
from histill.tiles import index as index_module
from histill.tiles.index import SCHEMA, Index, TileRow, merge_indexes, parts_digest, to_table, write_index

SETTINGS = {"tile_px": 224, "mpp": 0.5, "codec": "jpeg", "tissue": {"min": 0.4}}


def rows_of(slide: str, tiles: int, *, per_shard: int = 4, patient: str | None = "p") -> list[TileRow]:
    """Rows with numbers that tell them apart."""
    return [
        TileRow(
            shard=f"{slide}-{place // per_shard:05d}.tar",
            offset=512 + place % per_shard * 1024,
            length=1000 + place,
            slide=slide,
            patient=patient,
            x=place % 3 * 448,
            y=place // 3 * 448,
            level=place % 2,
            mpp=0.5,
            tissue=place / 64,
        )
        for place in range(tiles)
    ]


def without_pixels(rows: Iterable[TileRow]) -> list[TileRow]:
    return [dataclasses.replace(row, shard=None, offset=None, length=None) for row in rows]


def write_part(folder: Path, slide: str, rows: list[TileRow], made_with: dict[str, Any] = SETTINGS) -> Path:
    path = folder / f"{slide}.parquet"
    write_index(path, to_table(rows), made_with)
    return path


def all_rows(index: Index) -> list[TileRow]:
    return [TileRow(**row) for row in index.rows(np.arange(len(index))).to_pylist()]


def assert_finds_its_tiles(index: Index, rows: list[TileRow]) -> None:
    assert len(index) == len(rows)
    assert index.blocks.dtype == index.lengths.dtype == np.uint32
    for number, row in enumerate(rows):
        run = int(np.searchsorted(index.shard_first, number, side="right")) - 1
        found = index.shards[run], int(index.blocks[number]) * 512, int(index.lengths[number])
        assert found == (row.shard, row.offset, row.length)
        assert index.slides[index.slide_of(np.array([number]))[0]] == row.slide


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(1, 40))
def test_merged_parts_are_the_rows_of_all_slides_in_order(
    tmp_path_factory: pytest.TempPathFactory, tiles: list[int], group_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    slides = [f"s{number:02d}" for number in range(len(tiles))]
    rows = {slide: rows_of(slide, count) for slide, count in zip(slides, tiles, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "ROW_GROUP_ROWS", group_rows)
        parts = [write_part(folder, slide, rows[slide]) for slide in slides]
        merge_indexes(parts[::-1], folder / "index.parquet", SETTINGS)
    index = Index.open(folder / "index.parquet")
    expected = [row for slide in slides for row in rows[slide]]
    assert all_rows(index) == expected
    assert_finds_its_tiles(index, expected)
    assert index.slides == tuple(slide for slide in slides if rows[slide])
    assert np.diff(index.slide_first).tolist() == [count for count in tiles if count]
    assert index.settings == SETTINGS
    assert index.parts == parts_digest(parts).decode()
    for name in ("x", "y", "level", "mpp", "tissue"):
        column = index.column(name)
        assert column.dtype == SCHEMA.field(name).type.to_pandas_dtype()
        np.testing.assert_array_equal(column, np.array([getattr(row, name) for row in expected], dtype=column.dtype))


def test_rows_come_in_the_order_asked_for_and_each_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "ROW_GROUP_ROWS", 7)
    rows = rows_of("a", 40)
    index = Index.open(write_part(tmp_path, "a", rows))
    assert index.metadata.num_row_groups == 6
    wanted = np.array([39, 0, 7, 6, 0, 20, 39])
    read: list[int] = []
    plain = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, *args: Any, **kwargs: Any) -> Any:
        read.append(group)
        return plain(self, group, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    found = index.rows(wanted)
    assert [TileRow(**row) for row in found.to_pylist()] == [rows[number] for number in wanted]
    assert sorted(read) == [0, 1, 2, 5]
    assert index.rows(wanted, ["y", "slide"]).to_pylist() == [{"y": rows[i].y, "slide": "a"} for i in wanted]
    assert index.rows(np.array([], dtype=np.int64)).num_rows == 0
    assert index.row(20) == rows[20]
    for outside in (-1, 40):
        with pytest.raises(IndexError, match="0 to 39"):
            index.row(outside)


def test_a_set_without_pixels_has_rows_and_no_shards(tmp_path: Path) -> None:
    rows = without_pixels(rows_of("a", 5, patient=None) + rows_of("b", 3))
    write_index(tmp_path / "i.parquet", to_table(rows), SETTINGS)
    index = Index.open(tmp_path / "i.parquet")
    assert all_rows(index) == rows
    assert index.shards == ()
    assert len(index.blocks) == len(index.lengths) == 0
    assert index.slide_first.tolist() == [0, 5, 8]


def test_an_index_of_nothing_opens(tmp_path: Path) -> None:
    merge_indexes([], tmp_path / "index.parquet", SETTINGS)
    index = Index.open(tmp_path / "index.parquet")
    assert len(index) == 0
    assert index.slides == index.shards == ()
    assert index.slide_first.tolist() == [0]


def test_offsets_beyond_two_gigabytes_are_kept(tmp_path: Path) -> None:
    rows = [dataclasses.replace(rows_of("a", 1)[0], offset=512 * (2**32 - 1), length=2**31 - 1)]
    index = Index.open(write_part(tmp_path, "a", rows))
    assert int(index.blocks[0]) * 512 == rows[0].offset
    assert int(index.lengths[0]) == rows[0].length


def test_plain_texts_and_another_order_of_columns_are_taken(tmp_path: Path) -> None:
    rows = rows_of("ä/b", 6)
    table = to_table(rows)
    plain = pa.table({name: table.column(name).cast(pa.string()) for name in ("patient", "slide", "shard")})
    others = table.drop_columns(["patient", "slide", "shard"])
    for name in others.column_names:
        plain = plain.append_column(name, others.column(name))
    write_index(tmp_path / "i.parquet", plain, SETTINGS)
    assert all_rows(Index.open(tmp_path / "i.parquet")) == rows


def test_other_tools_read_the_columns_and_the_settings(tmp_path: Path) -> None:
    path = write_part(tmp_path, "a", rows_of("a", 3))
    table = pq.read_table(path)
    assert table.schema.names == SCHEMA.names
    assert table.schema.field("slide").type == pa.dictionary(pa.int32(), pa.string())
    assert pa.types.is_int64(table.schema.field("offset").type)
    assert b'"tile_px": 224' in table.schema.metadata[b"histill"]
    without_arrow = pq.ParquetFile(path).schema.column(3)
    assert (without_arrow.name, str(without_arrow.logical_type)) == ("slide", "String")


def test_a_row_group_names_its_own_slides_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "ROW_GROUP_ROWS", 20)
    parts = [write_part(tmp_path, f"s{number:03d}", rows_of(f"s{number:03d}", 8)) for number in range(60)]
    merge_indexes(parts, tmp_path / "index.parquet", SETTINGS)
    with pq.ParquetFile(tmp_path / "index.parquet") as file:
        assert file.num_row_groups == 20
        for group in range(20):
            assert len(file.read_row_group(group).column("slide").combine_chunks().dictionary) == 3


def test_merging_holds_one_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "ROW_GROUP_ROWS", 50)
    parts = [write_part(tmp_path, f"s{number:03d}", rows_of(f"s{number:03d}", 33)) for number in range(40)]
    written: list[int] = []
    plain = pq.ParquetWriter.write_table

    def counted(self: Any, table: pa.Table, *args: Any, **kwargs: Any) -> None:
        written.append(len(table))
        plain(self, table, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", counted)
    merge_indexes(parts, tmp_path / "index.parquet", SETTINGS)
    assert sum(written) == 33 * 40
    assert max(written) < 50 + 33


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        parts = [write_part(tmp_path / folder, slide, rows_of(slide, 9)) for slide in ("s", "t")]
        made_with = dict(SETTINGS if folder == "a" else reversed(SETTINGS.items()))
        merge_indexes(parts, tmp_path / folder / "index.parquet", made_with)
    assert (tmp_path / "a" / "index.parquet").read_bytes() == (tmp_path / "b" / "index.parquet").read_bytes()


# ------------------------------------------------------------------ refusals


def test_parts_of_other_settings_are_refused_and_the_old_index_stays(tmp_path: Path) -> None:
    parts = [write_part(tmp_path, "a", rows_of("a", 3)), write_part(tmp_path, "b", rows_of("b", 3))]
    merge_indexes(parts, tmp_path / "index.parquet", SETTINGS)
    before = (tmp_path / "index.parquet").read_bytes()
    write_part(tmp_path, "b", rows_of("b", 3), SETTINGS | {"mpp": 1.0})
    with pytest.raises(DataError, match=r"other settings[^$]*b\.parquet"):
        merge_indexes(parts, tmp_path / "index.parquet", SETTINGS)
    assert (tmp_path / "index.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "index.parquet"]


def test_a_slide_that_comes_twice_is_refused(tmp_path: Path) -> None:
    parts = [write_part(tmp_path, "a", rows_of("a", 3)), write_part(tmp_path, "b", rows_of("a", 3))]
    with pytest.raises(DataError, match="twice"):
        merge_indexes(parts, tmp_path / "index.parquet", SETTINGS)
    parts = [write_part(tmp_path, "a", rows_of("b", 3)), write_part(tmp_path, "b", rows_of("a", 3))]
    with pytest.raises(DataError, match="out of turn"):
        merge_indexes(parts, tmp_path / "index.parquet", SETTINGS)
    torn = rows_of("a", 3) + rows_of("b", 2) + rows_of("a", 3)
    with pytest.raises(DataError, match="not neighbours"):
        Index.open(write_part(tmp_path, "c", torn))


@pytest.mark.parametrize("keep", [0, 3, 200, -4])
def test_a_damaged_index_or_part_is_named(tmp_path: Path, keep: int) -> None:
    path = write_part(tmp_path, "a", rows_of("a", 50))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot be read[^$]*a\.parquet[^$]*histill tile"):
        Index.open(path)
    with pytest.raises(DataError, match=r"cannot be read[^$]*a\.parquet"):
        merge_indexes([path], tmp_path / "index.parquet", SETTINGS)


def test_damage_inside_a_row_group_is_named(tmp_path: Path) -> None:
    path = write_part(tmp_path, "a", rows_of("a", 500))
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read[^$]*a\.parquet"):
        Index.open(path)


def test_a_missing_index_and_a_table_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index[^$]*histill tile"):
        Index.open(tmp_path / "index.parquet")
    pq.write_table(pa.table({"slide": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="lacks the column shard"):
        Index.open(tmp_path / "t.parquet")
    pq.write_table(to_table(rows_of("a", 2)), tmp_path / "u.parquet")
    with pytest.raises(DataError, match="lacks the settings"):
        Index.open(tmp_path / "u.parquet")


def test_an_index_that_has_pixels_for_some_tiles_only_is_refused(tmp_path: Path) -> None:
    rows = rows_of("a", 3) + without_pixels(rows_of("b", 2))
    with pytest.raises(DataError, match=r"in no shard[^$]*2 of 5"):
        Index.open(write_part(tmp_path, "a", rows))
    rows = rows_of("a", 3)
    rows[1] = dataclasses.replace(rows[1], length=None)
    with pytest.raises(DataError, match="in no shard"):
        Index.open(write_part(tmp_path, "a", rows))
