"""`histill tile` on real slides: what is in a set, what is refused, and that nothing is lost or mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from histill.cli import main
from histill.tiles.open import open_set

SMALL = "CMU-1-Small-Region"
TCGA = "TCGA-CR-7395-01A-01-TS1"


# ------------------------------------------------------------------ what is in a set


def test_the_set_of_a_real_slide(slide_rows: Any, small_set: Path) -> None:
    row = slide_rows(small_set)[SMALL]
    assert (row["status"], row["mpp"], row["mpp_source"], row["vendor"]) == ("done", "0.499", "vendor", "aperio")
    # 2220 x 2967 px at 0.499 are 1107.8 x 1480.5 um: 9 x 13 tiles of 112 um
    assert int(row["grid_tiles"]) == 9 * 13
    fates = ("tiles", "white", "black", "blur", "pen", "unreadable")
    assert sum(int(row[fate]) for fate in fates) == int(row["tissue_tiles"]) <= int(row["grid_tiles"])
    table = pq.read_table(small_set / "index.parquet").to_pylist()
    assert len(table) == int(row["tiles"]) > 40
    assert {(entry["mpp"], entry["level"], entry["slide"]) for entry in table} == {(0.5, 0, SMALL)}
    step = 224 * 0.5 / 0.499
    assert {entry["x"] for entry in table} <= {round(i * step) for i in range(9)}
    assert len({(entry["x"], entry["y"]) for entry in table}) == len(table)
    settings = json.loads((small_set / "tileset.json").read_text())
    assert settings["codec"] == "jpeg"
    assert settings["jpeg_quality"] == 90
    assert not list(small_set.glob(".*"))


@pytest.fixture(scope="module")
def lossless_set(tile: Any, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lossless") / "set"
    assert tile(slides / f"{SMALL}.svs", "--out", out, "--lossless") == 0
    return out


def _regions(slide: Path, folder: Path) -> list[np.ndarray]:
    """What OpenSlide and Pillow give at the places of a set's tiles, shrunk by 1.002."""
    import openslide
    from PIL import Image

    extent, found = 224 * 0.5 / 0.499, []
    with openslide.OpenSlide(slide) as whole:
        for row in pq.read_table(folder / "index.parquet").to_pylist():
            region = whole.read_region((row["x"], row["y"]), 0, (225, 225)).convert("RGB")
            shrunk = region.resize((224, 224), Image.Resampling.BILINEAR, box=(0, 0, extent, extent))
            found.append(np.asarray(shrunk).astype(float))
    return found


def test_a_tile_is_the_slide_at_that_place(lossless_set: Path, slides: Path) -> None:
    source = open_set(lossless_set)
    for index, wanted in enumerate(_regions(slides / f"{SMALL}.svs", lossless_set)):
        assert np.abs(source.read(index) - wanted).mean() < 1


def test_the_dicom_twin_gives_the_same_tiles(tile: Any, lossless_set: Path, slides: Path, tmp_path: Path) -> None:
    """The twin was compressed again, with half the colours across: that much the two files differ by themselves."""
    dicom = slides / f"{SMALL}_dicom"
    assert tile(dicom, "--out", tmp_path / "set", "--lossless") == 0
    here, there = open_set(lossless_set), open_set(tmp_path / "set")
    places = [
        [(row["x"], row["y"]) for row in pq.read_table(folder / "index.parquet").to_pylist()]
        for folder in (lossless_set, tmp_path / "set")
    ]
    assert places[0] == places[1]
    ours = [(here.read(i).astype(float), there.read(i).astype(float)) for i in range(len(here))]
    dicom_file = sorted(dicom.glob("*.dcm"))[0]
    theirs = list(zip(_regions(slides / f"{SMALL}.svs", lossless_set), _regions(dicom_file, lossless_set), strict=True))

    def apart(pairs: list[tuple[np.ndarray, np.ndarray]], weights: list[float]) -> float:
        return float(np.mean([np.abs((one - other) @ weights).mean() for one, other in pairs]))

    green = [0.0, 1.0, 0.0]
    luma = [0.299, 0.587, 0.114]
    assert apart(ours, luma) < 1
    assert apart(ours, green) == pytest.approx(apart(theirs, green), abs=0.1)


def test_at_a_coarser_scale_the_dicom_twin_agrees_in_colour_too(tile: Any, slides: Path, tmp_path: Path) -> None:
    for name, slide in (("svs", f"{SMALL}.svs"), ("dicom", f"{SMALL}_dicom")):
        assert tile(slides / slide, "--out", tmp_path / name, "--mpp", 2, "--tile-px", 56, "--lossless") == 0
    here, there = open_set(tmp_path / "svs"), open_set(tmp_path / "dicom")
    assert len(here) == len(there) > 40
    differences = [np.abs(here.read(i).astype(int) - there.read(i).astype(int)).mean() for i in range(len(here))]
    assert max(differences) < 2


def test_the_thumbnail_shows_the_kept_grid(small_set: Path) -> None:
    from PIL import Image

    thumbnail = np.asarray(Image.open(small_set / "thumbnails" / f"{SMALL}.jpg")).astype(int)
    assert max(thumbnail.shape) == 1024
    green = (thumbnail[..., 1] > thumbnail[..., 0] + 30) & (thumbnail[..., 1] > thumbnail[..., 2] + 10)
    assert 0.01 < green.mean() < 0.2


def test_lossless_and_index_only_hold_the_same_pixels(tile: Any, slides: Path, tmp_path: Path) -> None:
    slide = slides / f"{SMALL}.svs"
    assert tile(slide, "--out", tmp_path / "png", "--lossless", "--mpp", 1) == 0
    assert tile(slide, "--out", tmp_path / "index", "--index-only", "--mpp", 1) == 0
    assert not (tmp_path / "index" / "shards").exists() or not list((tmp_path / "index" / "shards").iterdir())
    stored, online = open_set(tmp_path / "png"), open_set(tmp_path / "index")
    assert len(stored) == len(online) > 9
    for index in range(len(stored)):
        np.testing.assert_array_equal(stored.read(index), online.read(index))


def test_a_drawn_mask_replaces_otsu(slide_rows: Any, tile: Any, slides: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    square = [[[600, 600], [1500, 600], [1500, 1500], [600, 1500], [600, 600]]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": square}, "properties": {}}
    (masks / f"{SMALL}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    assert tile(slides / f"{SMALL}.svs", "--out", tmp_path / "set", "--masks", masks, "--tissue-min", 1) == 0
    extent = 224 * 0.5 / 0.499
    table = pq.read_table(tmp_path / "set" / "index.parquet").to_pylist()
    # wholly inside 600..1500: columns 3, 4, 5 (673.4 to 1346.7), and 9 tiles in all
    assert {(round(row["x"] / extent), round(row["y"] / extent)) for row in table} <= {
        (x, y) for x in (3, 4, 5) for y in (3, 4, 5)
    }
    assert len(table) >= 7  # a filter may take some
    assert slide_rows(tmp_path / "set")[SMALL]["mask"].startswith(f"{SMALL}.geojson ")


# ------------------------------------------------------------------ parts of a whole


@pytest.fixture(scope="module")
def three(damaged_copy: Any, slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three slides that differ."""
    folder = tmp_path_factory.mktemp("three")
    (folder / "deep").mkdir()
    shutil.copyfile(slides / f"{SMALL}.svs", folder / "a.svs")
    shutil.copyfile(slides / f"{TCGA}.svs", folder / "b.svs")
    damaged_copy(slides / f"{SMALL}.svs", folder / "deep" / "c.svs", "zero")
    return folder


OPTIONS = ("--mpp", 1, "--mpp-override", 0.5)


@pytest.fixture(scope="module")
def whole(slide_rows: Any, three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    assert main(["tile", str(three), "--out", str(out), *map(str, OPTIONS), "--workers", "2"]) == 0
    assert list(slide_rows(out)) == ["a", "b", "deep__c"]
    return out


def test_one_worker_or_two_is_the_same_set(content: Any, tile: Any, three: Path, whole: Path, tmp_path: Path) -> None:
    assert tile(three, "--out", tmp_path / "set", *OPTIONS) == 0
    assert content(tmp_path / "set") == content(whole)


def test_the_same_command_again_changes_nothing(
    content: Any, tile: Any, three: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(whole)
    assert tile(three, "--out", whole, *OPTIONS) == 0
    assert "3 there already" in capsys.readouterr().out
    assert content(whole) == before


def _in_one_folder(tile: Any, three: Path, tmp_path: Path) -> Path:
    for part in ("0/2", "1/2"):
        assert tile(three, "--out", tmp_path / "set", *OPTIONS, "--shard", part) == 0
    return tmp_path / "set"


def _in_two_folders(tile: Any, three: Path, tmp_path: Path) -> Path:
    for number in (0, 1):
        assert tile(three, "--out", tmp_path / f"{number}", *OPTIONS, "--shard", f"{number}/2") == 0
    assert main(["tile", "--merge", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "set")]) == 0
    return tmp_path / "set"


@pytest.mark.parametrize("how", [_in_one_folder, _in_two_folders])
def test_two_shards_are_the_whole(
    content: Any, tile: Any, how: Callable[..., Path], three: Path, whole: Path, tmp_path: Path
) -> None:
    assert content(how(tile, three, tmp_path)) == content(whole)


def test_sets_that_do_not_belong_together_are_not_merged(
    small_set: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tile", "--merge", str(small_set), str(whole), "--out", str(tmp_path / "set")]) == 1
    assert "other settings" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_comes_near(
    tile: Any, three: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tile(three, "--out", tmp_path / "set", *OPTIONS, "--dry-run") == 0
    assert not (tmp_path / "set").exists()
    told = capsys.readouterr().out.splitlines()[-1]
    tiles, rest = told.split(" tiles, ")
    size, unit = rest.split(" on disk")[0].split()
    real = sum(path.stat().st_size for path in (whole / "shards").iterdir())
    assert int(tiles) == pytest.approx(len(open_set(whole)), rel=0.1)
    assert float(size) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(real, rel=0.25)


def test_inspect_shows_the_set(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert main(["tile", "--inspect", str(whole), "--picture", str(tmp_path / "p.png")]) == 0
    told = capsys.readouterr().out
    assert f"{len(open_set(whole))} tiles of 224 px at 1.0 um/px" in told
    assert "deep__c" in told
    assert "override (3)" in told
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert picture.std() > 20


# ------------------------------------------------------------------ the scale


@pytest.mark.parametrize("mpp", [0.25, 0.265])
def test_a_printed_ruler_has_the_right_length(tile: Any, mpp: float, tmp_path: Path) -> None:
    """Lines every 50 um, cut at 0.5 um/px: 100 px apart within a tile, and where they should be in every tile."""
    from histill.synthetic.slides import write_ruler_slide

    slide = tmp_path / "ruler.svs"
    write_ruler_slide(slide, mpp=mpp, width_px=4000, height_px=3000, period_um=50)
    off = ("--quality.white-max", 1, "--quality.blur-min", 0)
    assert tile(slide, "--out", tmp_path / "set", "--lossless", "--tissue-min", 0.9, *off) == 0
    source, table = open_set(tmp_path / "set"), pq.read_table(tmp_path / "set" / "index.parquet").to_pylist()
    assert len(table) > 20
    for index, row in enumerate(table):
        tile_HWC = source.read(index).astype(float)
        for axis, start in ((0, row["x"]), (1, row["y"])):
            lines = _dark_lines(255 - tile_HWC.mean(axis=(axis, 2)))
            wanted = np.arange(np.ceil(start * mpp / 50), 20 * 4000 * mpp) * 50  # um from the slide's edge
            wanted = (wanted - start * mpp) / 0.5
            wanted = wanted[(wanted > 3) & (wanted < 221)]
            assert len(lines) == len(wanted)
            assert np.abs(lines - wanted).max() < 0.25  # pixels
            if len(lines) > 1:
                assert np.diff(lines) == pytest.approx(100, rel=0.01)


def _dark_lines(profile: np.ndarray) -> np.ndarray:
    """Centres of gravity of the peaks, 3 px or more from the ends; the middle of pixel i lies at i + 0.5."""
    above = np.clip(profile - (np.median(profile) + 20), 0, None)
    edges = np.flatnonzero(np.diff((above > 0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    centres = [
        float((above[first:last] * (np.arange(first, last) + 0.5)).sum() / above[first:last].sum())
        for first, last in edges
    ]
    return np.array([centre for centre in centres if 3 < centre < len(profile) - 3])
