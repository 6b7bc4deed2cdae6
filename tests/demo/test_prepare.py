from __future__ import annotations

import csv
import dataclasses
import itertools
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as parquet
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from histill.demo import prepare
from histill.demo.config import SLIDE_PX, DemoConfig
from histill.errors import DataError, RunError
from histill.files import read_json
from histill.synthetic import KINDS, MPP
from histill.synthetic.layout import SlideTruth
from histill.synthetic.slides import slide_set_truths
from histill.tiles.index import TileRow

QUIET = Console(quiet=True)


def _tile(slide: str, x: int, y: int) -> TileRow:
    return TileRow(
        shard=f"{slide}.tar", offset=512, length=9, slide=slide, patient=None, x=x, y=y, level=0, mpp=0.5, tissue=1.0
    )


def _slide(split: str, stain: str = "harris", scanner: str = "aurora") -> dict[str, str]:
    return {"stain": stain, "scanner": scanner, "split": split}


def _halves() -> SlideTruth:
    """Gland on the left, tumour on the right, glass below; 512 pixels wide, cells of 16."""
    grid_HW = np.full((32, 32), -1, dtype=np.int8)
    grid_HW[:16, :16], grid_HW[:16, 16:] = 0, 1
    return SlideTruth(kinds=("gland", "tumour"), grid_HW=grid_HW, cell_px=16.0, width_px=512, height_px=512)


# ------------------------------------------------------------------ by hand


def test_tiles_of_a_clear_kind_are_labelled() -> None:
    slides = {"a": _slide("train"), "b": _slide("test", "mayer", "cinder"), "pair-000_harris-aurora": _slide("paired")}
    tiles = [
        _tile("a", 0, 0),
        _tile("a", 128, 0),
        _tile("a", 192, 0),  # half and half
        _tile("a", 0, 192),  # half of it is glass
        _tile("b", 256, 128),
        _tile("pair-000_harris-aurora", 0, 0),
    ]
    found = prepare.label_tiles(tiles, slides, dict.fromkeys(slides, _halves()))
    assert [tile for tile, _ in found] == [tiles[0], tiles[1], tiles[4]]
    rows = [row for _, row in found]
    assert [row["label"] for row in rows] == ["gland", "gland", "tumour"]
    assert [row["split"] for row in rows] == ["train", "train", "test"]
    assert [row["scanner"] for row in rows] == ["harris-aurora", "harris-aurora", "mayer-cinder"]
    assert [row["slide"] for row in rows] == ["a", "a", "b"]
    assert len({row["path"] for row in rows}) == 3


def test_fields_are_paired_where_every_look_was_kept() -> None:
    looks = [("harris", "aurora"), ("mayer", "cinder")]
    slides = {"slide-000": _slide("train")} | {
        f"{section}_{stain}-{scanner}": _slide("paired", stain, scanner)
        for section in ("pair-000", "pair-001")
        for stain, scanner in looks
    }
    tiles = [
        _tile("pair-000_harris-aurora", 0, 0),
        _tile("pair-000_harris-aurora", 128, 0),
        _tile("pair-000_mayer-cinder", 128, 0),
        _tile("pair-001_mayer-cinder", 0, 0),  # the other look was kept on another section only
        _tile("pair-001_harris-aurora", 128, 128),
        _tile("pair-001_mayer-cinder", 128, 128),
        _tile("slide-000", 0, 0),
    ]
    found = prepare.pair_tiles(tiles, slides)
    assert [tile for tile, _ in found] == [tiles[1], tiles[2], tiles[4], tiles[5]]
    assert [(row["slide"], row["x"], row["y"], row["scanner"]) for _, row in found] == [
        ("pair-000", 128, 0, "harris-aurora"),
        ("pair-000", 128, 0, "mayer-cinder"),
        ("pair-001", 128, 128, "harris-aurora"),
        ("pair-001", 128, 128, "mayer-cinder"),
    ]
    assert len({row["path"] for _, row in found}) == 4


# ------------------------------------------------------------------ on drawn slides


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def config(finished: Path, tmp_path: Path) -> DemoConfig:
    """A demo that was cut short before its tiles: the slides of a finished one."""
    out = tmp_path / "demo"
    shutil.copytree(finished / "slides", out / "slides")
    return DemoConfig(out=out, slides=6)


def _inside(rings: list[list[list[float]]], x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie in a polygon: rays to the right cross its sides an odd number of times."""
    crossed = np.zeros(len(x_N), dtype=bool)
    for ring in rings:
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if y0 != y1:
                crossed ^= ((y_N < y0) != (y_N < y1)) & (x_N < x0 + (x1 - x0) * (y_N - y0) / (y1 - y0))
    return crossed


def test_labels_agree_with_the_outlines_beside_the_slides(finished: Path) -> None:
    fine = np.arange(4.0, 128.0, 8.0)
    right_N, down_N = (axis.ravel() for axis in np.meshgrid(fine, fine))
    regions: dict[str, list[dict[str, Any]]] = {}
    shares = []
    for row in _rows(finished / "checks" / "labels.csv"):
        slide = row["slide"]
        if slide not in regions:
            regions[slide] = read_json(finished / "slides" / f"{slide}.geojson")["features"]
        x, y = (int(part[1:]) for part in Path(row["path"]).stem.split("_")[1:])
        covered = np.zeros(len(right_N), dtype=bool)
        for region in regions[slide]:
            if region["properties"]["classification"]["name"] == row["label"]:
                covered |= _inside(region["geometry"]["coordinates"], x + right_N, y + down_N)
        shares.append(covered.mean())
    assert len(shares) > 100
    assert min(shares) >= 0.9


def test_both_parts_have_every_kind_and_no_slide_is_in_both(finished: Path) -> None:
    rows = _rows(finished / "checks" / "labels.csv")
    for split in ("train", "test"):
        counts = Counter(row["label"] for row in rows if row["split"] == split)
        assert set(counts) == set(KINDS)
        assert min(counts.values()) >= 5
    slides = {split: {row["slide"] for row in rows if row["split"] == split} for split in ("train", "test")}
    assert not slides["train"] & slides["test"]
    drawn = {row["slide"]: row["split"] for row in _rows(finished / "slides" / "labels.csv")}
    assert all(drawn[row["slide"]] == row["split"] for row in rows)


def test_the_files_of_the_tables_are_the_bytes_of_the_set(finished: Path) -> None:
    members: dict[str, bytes] = {}
    for shard in (finished / "tiles" / "shards").glob("*.tar"):
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    listed = 0
    for table in ("labels.csv", "paired.csv"):
        for row in _rows(finished / "checks" / table):
            path = Path(row["path"])
            x, y = (part[1:] for part in path.stem.split("_")[-2:])
            slide = row["slide"] if table == "labels.csv" else f"{row['slide']}_{row['scanner']}"
            assert (finished / "checks" / path).read_bytes() == members[f"{slide}_{x}_{y}.jpg"]
            listed += 1
    assert len(list((finished / "checks").rglob("*.jpg"))) == listed > 300, "nothing else, and no path twice"


def test_paired_tiles_show_the_same_tissue(finished: Path) -> None:
    fields: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    for row in _rows(finished / "checks" / "paired.csv"):
        with Image.open(finished / "checks" / row["path"]) as image:
            grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=float).ravel()
        fields.setdefault((row["x"], row["y"]), {})[row["scanner"]] = grey
    assert {len(found) for found in fields.values()} == {4}
    for look in ("mayer-aurora", "harris-cinder", "mayer-cinder"):
        likeness = np.corrcoef(
            [found["harris-aurora"] for found in fields.values()], [f[look] for f in fields.values()]
        )
        across = likeness[: len(fields), len(fields) :]
        assert (across.argmax(axis=1) == np.arange(len(fields))).mean() > 0.95


def test_the_tile_set_is_at_the_scale_and_size_of_the_demo(finished: Path) -> None:
    settings = read_json(finished / "tiles" / "tileset.json")
    assert (settings["mpp"], settings["tile_px"], settings["stride_px"]) == (MPP, 128, 128) == (0.5, 128, 128)
    index = parquet.read_table(finished / "tiles" / "index.parquet")
    assert set(index["x"].to_pylist()) <= set(range(0, SLIDE_PX, 128))
    assert min(index["tissue"].to_pylist()) >= settings["tissue_min"] == 0.4


def test_a_damaged_slide_ends_the_demo_with_its_name(config: DemoConfig) -> None:
    (config.out / "slides" / "slide-003.svs").write_bytes(b"not a slide")
    with pytest.raises(RunError, match=r"cannot be cut into tiles[\s\S]*slide-003\.svs"):
        prepare.cut_tiles(config, QUIET)
    assert not (config.out / "checks").exists()


def test_a_kind_that_is_missing_in_one_part_is_an_error_before_training(
    finished: Path, config: DemoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "tiles", config.out / "tiles")

    class Outcome:
        failed: ClassVar[list[object]] = []

    def without_tumour_in_test(**told: Any) -> dict[str, SlideTruth]:
        truths = slide_set_truths(**told)
        for name in ("slide-002", "slide-005"):
            truth = truths[name]
            grid_HW = np.where(truth.grid_HW == truth.kinds.index("tumour"), -1, truth.grid_HW).astype(np.int8)
            truths[name] = dataclasses.replace(truth, grid_HW=grid_HW)
        return truths

    monkeypatch.setattr(prepare, "write_tiles", lambda *_: Outcome)
    monkeypatch.setattr(prepare, "slide_set_truths", without_tumour_in_test)
    with pytest.raises(DataError, match=r"0 of tumour in test[\s\S]*--slides"):
        prepare.cut_tiles(config, QUIET)
    assert {path.name for path in config.out.iterdir()} == {"slides", "tiles"}
