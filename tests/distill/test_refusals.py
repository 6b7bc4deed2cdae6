"""Folders, files and settings that a run cannot use: one clear error, nothing lost, nothing silently left out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from histill.cli import main
from histill.distill.config import DistillConfig
from histill.distill.record import read_rows
from histill.errors import ConfigError
from histill.models import STUDENTS, build_student, read_bundle, write_bundle
from histill.models.machine import pick_device

SMALL = [
    "--student=vit-nano",
    "--batch-tiles=8",
    "--objective.head-hidden=32",
    "--objective.head-bottleneck=16",
    "--checks.agreement-tiles=32",
]


def command(teacher: Path, tiles: Path, out: Path, *more: str) -> list[str]:
    given = ["--teacher", f"local-dir:{teacher}", "--tiles", str(tiles), "--out", str(out)]
    return ["distill", "cpu", *given, *SMALL, *more]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(arguments) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in text
    for word in words:
        assert word in text, text


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Twelve tiles without a table."""
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_an_out_that_is_a_file(
    out: str, small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    fails(command(small_teacher, few, tmp_path / out, "--steps", "1"), capsys, "cannot be written", "--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_something_else_is_not_a_finished_run(
    small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("{}")
    fails(command(small_teacher, few, tmp_path / "out", "--steps", "1"), capsys, "something else", "summary.json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "summary.json"]


@pytest.mark.parametrize("start", ["auto", "random"])
def test_not_one_readable_tile(
    start: str, small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in few.iterdir():
        cut(path)
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "1", "--init", start)
    fails(arguments, capsys, "none of the tiles can be read", ".jpg")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_calibration_without_a_readable_tile(
    small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in few.iterdir():
        cut(path)
    arguments = ["calibrate", "--bundle", str(small_teacher), "--tiles", str(few), "--out", str(tmp_path / "out")]
    fails(arguments, capsys, "none of the tiles can be read")
    assert not (tmp_path / "out").exists()


def test_one_tile_is_too_few(
    small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(few.iterdir())[1:]:
        path.unlink()
    fails(command(small_teacher, few, tmp_path / "out", "--steps", "1"), capsys, "comparing tiles", "2 or more")


@pytest.mark.parametrize("micro", ["2", "3"])
def test_parts_of_a_step_never_have_too_few_tiles(micro: str, small_teacher: Path, few: Path, tmp_path: Path) -> None:
    cut(few / "03.jpg")
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "6", "--scale.micro-tiles", micro)
    assert main([*arguments, "--batch-tiles", "5"]) == 0
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "check" not in row]
    assert len(rows) == 6
    assert all("loss" in row for row in rows)
    assert {row["tiles"] for row in rows} >= {3, 5}


def test_steps_that_are_passed_over_are_said_and_counted(
    small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5, 12):
        cut(few / f"{number:02d}.jpg")
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "12", "--init", "random", "--batch-tiles", "3")
    assert main([*arguments, "--objective.cls-prototypes", "2", "--objective.patch-prototypes", "4"]) == 0
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert 0 < len(rows) < 12
    assert told["steps_passed_over"] == 12 - len(rows)
    assert " ".join(capsys.readouterr().err.split()).count("is passed over") == 12 - len(rows)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 2**64}, "seed"),
        ({"scale": {"micro_tiles": 1}}, "micro-tiles"),
        ({"objective": {"cls_prototypes": 1}}, "cls-prototypes"),
    ],
)
def test_settings_out_of_range(values: dict[str, object], words: str) -> None:
    from histill import config as configs

    with pytest.raises(ConfigError, match=words):
        configs.from_dict(DistillConfig, values)


def test_no_student_and_no_such_device() -> None:
    with pytest.raises(ConfigError, match="the student is missing"):
        DistillConfig(teacher=("x",), tiles=Path("x"), out=Path("x"), steps=1, student=()).require_complete()
    for name in ("meta", "banana"):
        with pytest.raises(ConfigError, match="no such device"):
            pick_device(name)


def test_a_table_beside_the_tiles_that_cannot_be_scored_is_a_note_and_one_asked_for_an_error(
    small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{number:02d}.jpg,a,s{number},train" for number in range(12)]
    (few / "labels.csv").write_text("path,label,slide,split\n" + "\n".join(rows) + "\n")
    (few / "notes.csv").write_text('a,"' + "x" * 200_000)
    assert main(command(small_teacher, few, tmp_path / "out", "--steps", "1")) == 0
    assert "labels.csv is not scored" in " ".join(capsys.readouterr().err.split())
    asked = command(small_teacher, few, tmp_path / "asked", "--steps", "1", "--checks.tables", str(few / "labels.csv"))
    fails(asked, capsys, "labels.csv")


@pytest.mark.parametrize("option", ["--table", "--checks.tables", "--labelled"])
def test_a_folder_is_no_table(
    option: str, small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "1", option, str(tmp_path))
    fails(arguments, capsys, "cannot be read", str(tmp_path.name))


def test_a_bundles_own_normalisation_goes_on(small_teacher: Path, few: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    half = (0.5, 0.5, 0.5)
    write_bundle(
        start, build_student("vit-nano", seed=1), STUDENTS["vit-nano"], mean=half, std=half, input_px=56, provenance={}
    )
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "1", "--init", f"local-dir:{start}")
    assert main(arguments) == 0
    assert read_bundle(tmp_path / "out" / "student").encoder.mean == half


def test_a_moved_run_goes_on_from_its_config_alone(
    small_teacher: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command(small_teacher, few, Path("first"), "--steps", "2")) == 0
    (tmp_path / "first" / "summary.json").unlink()
    (tmp_path / "first").rename(tmp_path / "moved")
    stray = tmp_path / "moved" / "checkpoints" / ".tmp-0123.safetensors"
    stray.write_bytes(b"of a killed process")
    assert main(["distill", str(tmp_path / "moved" / "config.json")]) == 0
    assert "going on from step 2" in capsys.readouterr().err
    assert not stray.exists()
    assert not (tmp_path / "first").exists()


def test_a_signal_while_preparing_ends_it_at_once(small_teacher: Path, small_tiles: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = command(small_teacher, small_tiles, out, "--minutes", "30")
    process = subprocess.Popen(
        [sys.executable, "-m", "histill", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 180
    while not (out / "config.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get going"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "stopped; the same command goes on" in text
    assert not (out / "plan.json").exists()


def labelled(folder: Path, name: str, values: list[str], column: str = "label") -> Path:
    lines = [f"path,{column}", *(f"{number:02d}.jpg,{value}" for number, value in enumerate(values))]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.mark.parametrize("name", ["train.csv", "my.labels.csv"])
def test_a_labelled_table_may_have_any_name(name: str, small_teacher: Path, few: Path, tmp_path: Path) -> None:
    table = labelled(few, name, ["a", "b"] * 6)
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "2", "--labelled", str(table))
    assert main(arguments) == 0
    stem = name.removesuffix(".csv")
    heads = load_file(tmp_path / "out" / "student" / "labelled_heads.safetensors")
    assert set(heads) == {f"{stem}.linear.weight", f"{stem}.linear.bias"}
    assert all(f"labelled_{stem}" in row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "loss" in row)


@pytest.mark.parametrize("missing", ["", "NaN", " "])
def test_a_missing_label_is_no_class(
    missing: str, small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = labelled(few, "some.csv", ["b", "a", missing, *["a", "b"] * 4])
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "1", "--labelled", str(table))
    fails(arguments, capsys, "missing", "line 4")


def test_a_tile_with_two_labels_is_refused(
    small_teacher: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = labelled(few, "some.csv", ["a", "b"])
    table.write_text(table.read_text() + "00.jpg,a \n01.jpg,a\n")
    arguments = command(small_teacher, few, tmp_path / "out", "--steps", "1", "--labelled", str(table))
    fails(arguments, capsys, "two labels", "b and a", "line 5")
