"""The data set's two layouts, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from histill.errors import ConfigError, DataError
from histill.evaluate.plism import layout
from histill.evaluate.plism.layout import SlideName

NAME = "GIVH_GT450_to_GMH_S60.tif"


def grid(count: int) -> np.ndarray:
    return np.array([[16, x, y] for x in range(7, 12) for y in range(95, 120)][:count])


def write_features(path: Path, places_N3: np.ndarray, features_ND: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.hstack([places_N3, features_ND]).astype(np.float32))
    return path


def write_tiles(path: Path, places_N3: np.ndarray, tiles: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for (level, x, y), tile in zip(places_N3, tiles, strict=True):
            file[f"tile_{level}_{x}_{y}"] = tile
    return path


class TestNames:
    def test_all_91(self) -> None:
        names = [f"{staining}_{scanner}_to_GMH_S60.tif" for staining in layout.STAININGS for scanner in layout.SCANNERS]
        assert len(names) == 91
        for name in names:
            slide = SlideName.of(name, Path(name))
            assert f"{slide.staining}_{slide.scanner}_to_GMH_S60.tif" == slide.name

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("slide1", "no slide of PLISM"),
            ("XX_AT2_to_GMH_S60.tif", "unknown staining"),
            ("GM_XX_to_GMH_S60.tif", "unknown scanner"),
        ],
    )
    def test_others_are_refused(self, name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            SlideName.of(name, Path(name))


class TestFeatureFiles:
    def test_rows_come_in_order_of_place(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        places_N3, features_ND = grid(60), rng.normal(size=(60, 4)).astype(np.float32)
        mixed = rng.permutation(60)
        path = write_features(tmp_path / "features.npy", places_N3[mixed], features_ND[mixed])
        np.testing.assert_array_equal(layout.read_feature_places(path), places_N3)
        rows = np.array([0, 5, 59])
        np.testing.assert_array_equal(layout.read_features(path, rows), features_ND[rows])

    def test_found_by_slide(self, tmp_path: Path) -> None:
        for name in (NAME, "GM_P_to_GMH_S60.tif"):
            write_features(tmp_path / "uni" / name / "features.npy", grid(4), np.ones((4, 2)))
        found = layout.find_features(tmp_path / "uni")
        assert [slide.name for slide in found] == [NAME, "GM_P_to_GMH_S60.tif"]
        with pytest.raises(DataError, match=r"several encoders, name one: uni"):
            layout.find_features(tmp_path)
        with pytest.raises(DataError, match="no such feature folder"):
            layout.find_features(tmp_path / "nothing")

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (np.ones((4, 3), np.float32), "another layout"),
            (np.ones((4, 9)), "another layout"),
            (np.ones(9, np.float32), "another layout"),
            (np.ones((4, 9), np.float32), "one place twice"),
            (np.arange(36, dtype=np.float32).reshape(4, 9) / 2, "whole numbers"),
        ],
    )
    def test_other_tables_are_refused(self, tmp_path: Path, table: np.ndarray, message: str) -> None:
        np.save(tmp_path / "features.npy", table)
        with pytest.raises(DataError, match=message):
            layout.read_feature_places(tmp_path / "features.npy")

    def test_cut_off_file(self, tmp_path: Path) -> None:
        path = write_features(tmp_path / "features.npy", grid(60), np.ones((60, 4)))
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(DataError, match=r"(?s)cannot be read.*features.npy"):
            layout.read_feature_places(path)


class TestTileFiles:
    def test_tiles_come_in_order_of_place(self, tmp_path: Path) -> None:
        places_N3 = grid(60)  # y passes from 99 to 100: the order of names is another
        tiles = np.random.default_rng(0).integers(0, 256, size=(60, 8, 8, 3), dtype=np.uint8)
        path = write_tiles(tmp_path / f"{NAME}.h5", places_N3, tiles)
        np.testing.assert_array_equal(layout.read_tile_places(path), places_N3)
        np.testing.assert_array_equal(layout.tile_reader(path, places_N3)(3, 40), tiles[3:40])

    def test_key_follows_places_and_pixels(self, tmp_path: Path) -> None:
        tiles = np.zeros((9, 8, 8, 3), np.uint8)
        path = write_tiles(tmp_path / f"{NAME}.h5", grid(9), tiles)
        key = layout.tiles_key(path, grid(9))
        assert key == layout.tiles_key(path, grid(9))
        assert key != layout.tiles_key(path, grid(8))
        tiles[0, 0, 0, 0] = 1
        assert key != layout.tiles_key(write_tiles(path, grid(9), tiles), grid(9))

    def test_damaged(self, tmp_path: Path) -> None:
        path = tmp_path / f"{NAME}.h5"
        path.write_bytes(b"no tiles")
        with pytest.raises(DataError, match="cannot be opened"):
            layout.read_tile_places(path)
        write_tiles(path, grid(3), np.zeros((3, 8, 8, 3), np.uint8))
        with h5py.File(path, "a") as file:
            file["other"] = 1
        with pytest.raises(DataError, match=r"(?s)tile_<level>_<x>_<y>.*other"):
            layout.read_tile_places(path)

    def test_strange_tiles_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / f"{NAME}.h5"
        tiles = [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((9, 8, 3), np.uint8)]
        with h5py.File(path, "w") as file:
            for y, tile in enumerate(tiles):
                file[f"tile_16_0_{y}"] = tile
        read = layout.tile_reader(path, np.array([[16, 0, y] for y in range(4)]))
        assert read(0, 1).shape == (1, 8, 8, 3)
        for first, last, named in ((1, 2, "tile_16_0_1"), (2, 3, None), (3, 4, "tile_16_0_3")):
            if named is None:  # alone it is as good as any
                assert read(first, last).shape == (1, 9, 8, 3)
                continue
            with pytest.raises(DataError, match=named):
                read(first, last)


class TestPlaces:
    def test_the_odd_ones_are_named(self) -> None:
        places = {"a": grid(9), "b": grid(8), "c": grid(9), "d": grid(9) + 1}
        with pytest.raises(DataError, match=r"(?s)2 of 4 slides.*where: +b, d"):
            layout.check_places(places)
        np.testing.assert_array_equal(layout.check_places({"a": grid(9), "c": grid(9)}), grid(9))


class TestSubset:
    @pytest.mark.parametrize(("total", "count"), [(16_278, 8139), (16_278, 2713), (100, 99), (100, 2), (7, 3)])
    def test_evenly_spread_and_fixed(self, total: int, count: int) -> None:
        rows = layout.choose_tiles(total, count)
        assert len(rows) == count
        assert (np.diff(rows) > 0).all()
        assert 0 <= rows[0] <= rows[-1] < total
        assert np.abs(rows - np.arange(count) * total / count).max() <= total / count
        np.testing.assert_array_equal(rows, layout.choose_tiles(total, count))

    @pytest.mark.parametrize("asked", ["all", 50, 51])
    def test_all(self, asked: int | str) -> None:
        np.testing.assert_array_equal(layout.choose_tiles(50, asked), np.arange(50))  # type: ignore[arg-type]

    def test_too_few(self) -> None:
        with pytest.raises(ConfigError, match="n_tiles"):
            layout.choose_tiles(50, 1)
