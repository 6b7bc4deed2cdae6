"""`histill tile` on real slides: what is refused, what is counted, and what is never mixed."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from histill.cli import main
from histill.tiles.open import open_set

SMALL = "CMU-1-Small-Region"
TCGA = "TCGA-CR-7395-01A-01-TS1"


# ------------------------------------------------------------------ what is refused


def test_a_slide_without_a_scale_is_refused_with_the_remedy(
    slide_rows: Any, tile: Any, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tile(slides / f"{TCGA}.svs", "--out", tmp_path / "set") == 2
    row = slide_rows(tmp_path / "set")[TCGA]
    assert row["status"] == "failed"
    assert "--mpp-override" in row["error"]
    assert "--mpp-override" in capsys.readouterr().err
    overrides = tmp_path / "mpp.csv"
    overrides.write_text(f"slide,mpp\nanother,0.25\n{TCGA}.svs,0.5\n")
    assert tile(slides / f"{TCGA}.svs", "--out", tmp_path / "set", "--mpp-override", overrides) == 0
    row = slide_rows(tmp_path / "set")[TCGA]
    assert (row["status"], row["mpp"], row["mpp_source"]) == ("done", "0.5", "override")
    assert int(row["tiles"]) > 50


def test_a_broken_slide_does_not_stop_the_others(slide_rows: Any, tile: Any, slides: Path, tmp_path: Path) -> None:
    given = [slides / f"{SMALL}.svs", slides / "broken.svs", slides / "unreadable.svs", slides / "kidney-48-5.tif"]
    assert tile(*given, "--out", tmp_path / "set") == 2
    rows = slide_rows(tmp_path / "set")
    assert rows[SMALL]["status"] == "done"
    for name in ("broken", "unreadable", "kidney-48-5"):
        assert rows[name]["status"] == "failed", name
        assert len(rows[name]["error"]) > 30
    assert len(open_set(tmp_path / "set")) == int(rows[SMALL]["tiles"])


@pytest.mark.parametrize("how", ["zero", "truncate"])
@pytest.mark.parametrize("name", [SMALL, TCGA])
def test_a_damaged_block_is_counted_and_named(
    slide_rows: Any, damaged_copy: Any, tile: Any, how: str, name: str, slides: Path, tmp_path: Path
) -> None:
    x, y = damaged_copy(slides / f"{name}.svs", tmp_path / f"{name}.svs", how)
    options = ("--mpp-override", 0.5, "--tissue-min", 0, "--quality.white-max", 1, "--quality.blur-min", 0)
    assert tile(slides / f"{name}.svs", "--out", tmp_path / "good", *options) == 0
    assert tile(tmp_path / f"{name}.svs", "--out", tmp_path / "set", *options) == 0
    good, bad = (pq.read_table(tmp_path / folder / "index.parquet").to_pylist() for folder in ("good", "set"))
    lost = {(row["x"], row["y"]) for row in good} - {(row["x"], row["y"]) for row in bad}
    with (tmp_path / "set" / "unreadable.csv").open(newline="") as file:
        named = {(int(row["x"]), int(row["y"])) for row in csv.DictReader(file)}
    assert named == lost
    assert 1 <= len(named) <= 9
    assert any(left <= x < left + 224 and top <= y < top + 224 for left, top in named)
    assert int(slide_rows(tmp_path / "set")[name]["unreadable"]) == len(named)
    here, there = open_set(tmp_path / "good"), open_set(tmp_path / "set")
    kept = {(row["x"], row["y"]): index for index, row in enumerate(good)}
    for index, row in enumerate(bad):
        np.testing.assert_array_equal(there.read(index), here.read(kept[row["x"], row["y"]]))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--out", "SET"], "no slides are given"),
        (["SLIDE"], "--out"),
        (["SLIDE", "--out", "SET", "--mpp-override", "missing.csv"], "missing.csv"),
        (["SLIDE", "--out", "SET", "--mpp-override", "OTHERS"], "no slide of this table"),
        (["nowhere.svs", "--out", "SET"], "nowhere.svs"),
        (["--inspect", "nowhere"], "not a tile set"),
    ],
)
def test_a_wrong_command_line(
    argv: list[str], told: str, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"SLIDE": str(slides / f"{SMALL}.svs"), "SET": str(tmp_path / "set"), "OTHERS": str(tmp_path / "o.csv")}
    (tmp_path / "o.csv").write_text("slide,mpp\nCMU-2,0.5\n")
    assert main(["tile", *(names.get(word, word) for word in argv)]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("option", "value"), [("--shard", "2/2"), ("--mpp", "0"), ("--tissue-min", "2")])
def test_a_value_out_of_range(
    tile: Any, option: str, value: str, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tile(slides / f"{SMALL}.svs", "--out", tmp_path / "set", option, value)
    told = capsys.readouterr().err
    assert option in told
    assert "allowed" in told


def test_other_settings_and_other_folders_are_refused(
    content: Any, tile: Any, small_set: Path, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(small_set)
    assert tile(slides / f"{SMALL}.svs", "--out", small_set, "--mpp", 1) == 1
    assert "mpp: 0.5 there, 1.0 now" in capsys.readouterr().err
    assert tile(slides / f"{SMALL}.svs", "--out", small_set, "--mpp-override", 0.25) == 1
    assert "another mpp" in capsys.readouterr().err
    assert content(small_set) == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert tile(slides / f"{SMALL}.svs", "--out", tmp_path) == 1
    assert "thesis.txt" in capsys.readouterr().err


# ------------------------------------------------------------------ cut again, named twice, oddly named


OPTIONS = ("--mpp", 1, "--quality.blur-min", 0)


def _shards_on_disk(folder: Path) -> set[str]:
    return {path.name for path in (folder / "shards").iterdir()}


def test_a_slide_that_is_cut_again_leaves_nothing_of_the_first_time(
    content: Any, tile: Any, slides: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "set", tmp_path / "again"
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.pad(np.full((80, 60), 255, np.uint8), ((0, 0), (0, 60)))).resize((222, 297)).save(
        tmp_path / "masks" / f"{SMALL}.png"
    )
    slide, masked = slides / f"{SMALL}.svs", ("--masks", tmp_path / "masks", "--tissue-min", 0.4)
    small_shards = ("--shard-mb", 1)
    assert tile(slide, "--out", out, "--tissue-min", 0.4, "--lossless", *small_shards) == 0
    assert len(_shards_on_disk(out)) > 2
    (out / "parts" / f"{SMALL}.json").unlink()  # as the error message says
    assert tile(slide, "--out", out, "--lossless", *masked, *small_shards) == 0
    assert tile(slide, "--out", again, "--lossless", *masked, *small_shards) == 0
    assert content(out) == content(again)


def test_an_index_of_the_first_time_is_gone_while_a_slide_is_cut_again(tile: Any, slides: Path, tmp_path: Path) -> None:
    from histill.errors import DataError
    from histill.tiles.folder import SetFolder

    out = tmp_path / "set"
    assert tile(slides / f"{SMALL}.svs", "--out", out, *OPTIONS) == 0
    SetFolder(out).forget(SMALL)  # where a killed process stops
    with pytest.raises(DataError, match="no index"):
        open_set(out)


def test_a_folder_that_is_not_ours_keeps_its_files(tile: Any, slides: Path, tmp_path: Path) -> None:
    (tmp_path / ".tmp-notes").write_text("mine")
    (tmp_path / ".tmp-folder").mkdir()
    assert tile(slides / f"{SMALL}.svs", "--out", tmp_path) == 1
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-notes", ".tmp-folder"}


def test_a_slide_with_two_values_in_a_table_is_refused(
    tile: Any, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mpp.csv").write_text(f"slide,mpp\n{SMALL},0.25\n{SMALL}.svs,0.5\n")
    assert tile(slides / f"{SMALL}.svs", "--out", tmp_path / "set", "--mpp-override", tmp_path / "mpp.csv") == 1
    assert "named twice" in capsys.readouterr().err


def test_odd_names_do_not_stop_the_others(slide_rows: Any, tile: Any, slides: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    long_name = "n" * 240
    for name in ("good", long_name, "set", "good.lock", "[bold]"):
        shutil.copyfile(slides / f"{SMALL}.svs", folder / f"{name}.svs")
    shutil.copyfile(slides / f"{SMALL}.svs", os.fsencode(folder) + b"/odd\xff.svs")
    (folder / "gone.dcm").symlink_to(tmp_path / "nowhere")
    assert tile(folder, "--out", tmp_path / "set", *OPTIONS) == 2
    rows = slide_rows(tmp_path / "set")
    done = {slide for slide, row in rows.items() if row["status"] == "done"}
    assert {"good", "set", "good.lock", "[bold]", "odd\\xff"} < done
    assert len(done) == 6
    assert len(rows) == 7
    assert len(open_set(tmp_path / "set")) == 6 * int(rows["good"]["tiles"])


def test_a_dicom_series_of_links(slide_rows: Any, tile: Any, slides: Path, tmp_path: Path) -> None:
    for path in (slides / f"{SMALL}_dicom").iterdir():
        (tmp_path / "series").mkdir(exist_ok=True)
        (tmp_path / "series" / path.name).symlink_to(path.resolve())
    assert tile(tmp_path / "series", "--out", tmp_path / "set", *OPTIONS) == 0
    assert int(slide_rows(tmp_path / "set")["series"]["tiles"]) > 5


def test_a_damaged_record_is_named(tile: Any, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tile(slides / f"{SMALL}.svs", "--out", tmp_path / "set", *OPTIONS) == 0
    record = tmp_path / "set" / "parts" / f"{SMALL}.json"
    record.write_text('{"slide": ')
    assert main(["tile", "--inspect", str(tmp_path / "set")]) == 1
    told = capsys.readouterr().err
    assert record.name in told
    assert "delete this file" in told
