"""Training from a tile set, from a set without pixels, and from slides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from histill.cli import main
from histill.synthetic.slides import write_slide

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def drawn_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for number in range(3):
        write_slide(folder / f"s{number}.svs", width_px=640, height_px=560, mpp=0.5, seed=number)
    return folder


@pytest.fixture(scope="module")
def sets(drawn_slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiles stored and rendered."""
    folder = tmp_path_factory.mktemp("sets")
    options = ["--tile-px", "64", "--workers", "1", "--quality.blur-min", "0"]
    assert main(["tile", str(drawn_slides), "--out", str(folder / "png"), "--lossless", *options]) == 0
    assert main(["tile", str(drawn_slides), "--out", str(folder / "index"), "--index-only", *options]) == 0
    return {"png": folder / "png", "index": folder / "index"}


def distill(teacher: Path, tiles: Path, out: Path, *more: str) -> int:
    return main(
        [
            *("distill", "tokens", "--teacher", f"local-dir:{teacher}", "--student", "vit-nano"),
            *("--tiles", str(tiles), "--out", str(out), "--steps", "3", "--batch-tiles", "8", "--precision", "fp32"),
            *("--views.global-px", "56", "--checks.agreement-tiles", "32", "--device", "cpu", *more),
        ]
    )


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_stored_and_rendered_tiles_teach_the_same(
    sets: dict[str, Path], small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(small_teacher, sets["png"], tmp_path / "png") == 0
    capsys.readouterr()
    assert distill(small_teacher, sets["index"], tmp_path / "index") == 0
    assert "rendered from the slides" in capsys.readouterr().err.replace("\n", " ")
    assert losses(tmp_path / "png") == losses(tmp_path / "index")
    assert len(losses(tmp_path / "png")) == 3


def test_slides_can_be_trained_on_as_they_are(drawn_slides: Path, small_teacher: Path, tmp_path: Path) -> None:
    assert distill(small_teacher, drawn_slides, tmp_path / "run") == 0
    index = tmp_path / "run" / "slides-index"
    settings = json.loads((index / "tileset.json").read_text())
    assert (settings["codec"], settings["tile_px"], settings["mpp"]) == ("none", 224, 0.5)
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["tiles"] > 0


def test_slides_can_be_held_out(sets: dict[str, Path], small_teacher: Path, tmp_path: Path) -> None:
    assert distill(small_teacher, sets["png"], tmp_path / "run", "--hold-out-slides", "s1") == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    records = {path.stem: json.loads(path.read_text()) for path in (sets["png"] / "parts").glob("*.json")}
    assert plan["tiles_held_out"] == records["s1"]["tiles"] > 0
    assert plan["tiles"] == records["s0"]["tiles"] + records["s2"]["tiles"]


def test_slides_equally_often(sets: dict[str, Path], small_teacher: Path, tmp_path: Path) -> None:
    assert distill(small_teacher, sets["png"], tmp_path / "balanced", "--sampling", "slide-balanced") == 0
    assert distill(small_teacher, sets["png"], tmp_path / "uniform") == 0
    assert losses(tmp_path / "balanced") != losses(tmp_path / "uniform")


def test_a_damaged_shard_is_named(
    sets: dict[str, Path], small_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = tmp_path / "set"
    shutil.copytree(sets["png"], tiles)
    shard = tiles / "shards" / "s1-00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert distill(small_teacher, tiles, tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["unreadable"]
    assert all(name.startswith("slide s1, x ") for name in summary["unreadable"])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--hold-out-slides", "s7"], "slide to hold out"),
        (["--table", "x.csv"], "folder of images"),
    ],
)
def test_wrong_options_for_a_tile_set(
    more: list[str],
    told: str,
    sets: dict[str, Path],
    small_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert distill(small_teacher, sets["png"], tmp_path / "run", *more) == 1
    assert told in capsys.readouterr().err
