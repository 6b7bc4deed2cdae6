"""`histill evaluate` as a user calls it: a real encoder, small sets in the benchmarks' own layouts."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from histill import files
from histill.cli import main
from histill.errors import ConfigError
from histill.evaluate.command import _joined
from histill.evaluate.config import AllConfig, HestConfig
from histill.evaluate.encoders import check_names, safe_name, slide_embedder
from histill.evaluate.results import read_result, write_result
from histill.models import STUDENTS, build_student, load_encoder, write_bundle
from histill.models.machine import pick_device
from histill.synthetic.slides import write_slide

PX = 56
FAST = ("--input-px", "28", "--precision", "fp32", "--device", "cpu")
SLIDES = [f"{staining}_{scanner}_to_GMH_S60.tif" for staining in ("GM", "HR") for scanner in ("P", "SQ")]


# ------------------------------------------------------------------ an encoder and data


def write_encoder(folder: Path, seed: int) -> Path:
    model = build_student("vit-nano", seed=seed)
    with torch.no_grad():
        for block in model.blocks:  # random layers that do something
            block.ls1.gamma.fill_(1.0)
            block.ls2.gamma.fill_(1.0)
    style = {"mean": (0.7, 0.58, 0.7), "std": (0.21, 0.23, 0.18)}
    write_bundle(folder, model, STUDENTS["vit-nano"], **style, input_px=PX, provenance={})
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoders") / "teacher", 7))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoders") / "student", 8))


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(rng: np.random.Generator, colour: Sequence[float], side: int = 28) -> np.ndarray:
    return np.clip(np.array(colour) + rng.normal(0, 20, (side, side, 3)), 0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_labelled(folder: Path) -> Path:
    rng, rows = np.random.default_rng(0), []
    for slide in range(6):
        for tile in range(6):
            label = ("red", "blue")[tile % 2]
            path = f"tiles/{slide}-{tile}.png"
            save(folder / path, picture(rng, (190, 90, 110) if label == "red" else (110, 90, 190)))
            row = {"path": path, "label": label, "slide": f"s{slide}", "split": "test" if slide > 3 else "train"}
            rows.append(row)
    return write_table(folder / "labels.csv", rows)


def write_paired(folder: Path) -> Path:
    rng, rows = np.random.default_rng(1), []
    for slide in ("p", "q"):
        for x in range(5):
            scene = rng.uniform(60, 200, (4, 4, 3)).repeat(7, 0).repeat(7, 1)
            for scanner in ("A", "B"):
                path = f"tiles/{slide}-{x}-{scanner}.png"
                save(folder / path, np.clip(scene + rng.normal(0, 10, scene.shape), 0, 255).astype(np.uint8))
                rows.append({"path": path, "slide": slide, "scanner": scanner, "x": x, "y": 0})
    return write_table(folder / "fields.csv", rows)


def write_plism(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    scenes = rng.integers(0, 200, size=(12, 28, 28, 3))
    for name in SLIDES:
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for place, scene in enumerate(scenes + rng.integers(0, 50, size=scenes.shape)):
                file[f"tile_16_{place // 4}_{place % 4}"] = scene.astype(np.uint8)
    return folder


def write_hest(folder: Path, task: str = "IDC") -> Path:
    """Dense counts that follow the colour of the patches; two samples, each the test of one fold."""
    rng, root = np.random.default_rng(3), folder / task
    genes = [f"G{i}" for i in range(4)]
    (root / "splits").mkdir(parents=True)
    (root / "var_50genes.json").write_text(json.dumps({"genes": genes}))
    text = h5py.string_dtype()
    for sample in ("a", "b"):
        tiles = rng.integers(0, 256, (20, 1, 1, 3)).astype(np.uint8) * np.ones((1, 28, 28, 1), np.uint8)
        codes = [f"{sample}{i}" for i in range(20)]
        (root / "patches").mkdir(exist_ok=True)
        with h5py.File(root / "patches" / f"{sample}.h5", "w") as file:
            file["img"], file["coords"] = tiles, np.zeros((20, 2), int)
            file["barcode"] = np.array([[code.encode()] for code in codes], dtype=object).astype(text)
        (root / "adata").mkdir(exist_ok=True)
        with h5py.File(root / "adata" / f"{sample}.h5ad", "w") as file:
            file["X"] = rng.poisson(1 + tiles[:, 0, 0] @ np.full((3, 4), 0.02)).astype(np.float32)
            file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for axis, names in (("obs", codes), ("var", genes)):
                group = file.create_group(axis)
                group.attrs.update({"encoding-type": "dataframe", "_index": "_index", "column-order": []})
                group["_index"] = np.array(names, dtype=object).astype(text)
    for number, sample in enumerate(("a", "b")):
        for side, member in (("test", sample), ("train", "ba"[number])):
            lines = ["sample_id,patches_path,expr_path", f"{member},patches/{member}.h5,adata/{member}.h5ad"]
            (root / "splits" / f"{side}_{number}.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_mhist(folder: Path) -> Path:
    rng, rows = np.random.default_rng(4), []
    for number in range(28):
        label = ("HP", "SSA")[number % 2]
        name = f"MHIST_{number:03d}.png"
        save(folder / "images" / name, picture(rng, (190, 90, 110) if label == "HP" else (110, 90, 190)))
        row = {"Image Name": name, "Majority Vote Label": label, "Number of Annotators who Selected SSA (Out of 7)": 3}
        rows.append(row | {"Partition": "train" if number < 18 else "test"})
    write_table(folder / "annotations.csv", rows)
    return folder


def write_pathorob(folder: Path) -> Path:
    """Camelyon alone: two classes, two centres, and a picture that shows both."""
    rng, columns, images = np.random.default_rng(5), [], []
    for centre in ("RUMC", "UMCU"):
        for label in ("normal", "tumor"):
            for slide in range(3):
                for tile in range(12):
                    colour = (150 + 40 * (label == "tumor"), 100, 120 + 30 * (centre == "UMCU"))
                    buffer = io.BytesIO()
                    Image.fromarray(picture(rng, colour)).save(buffer, "PNG")
                    images.append({"bytes": buffer.getvalue(), "path": None})
                    slide_id = f"{centre}-{label}-{slide}"
                    columns.append(
                        {
                            "patch_id": f"{slide_id}-{tile}",
                            "slide_id": slide_id,
                            "biological_class": label,
                            "medical_center": centre,
                            "subset": "ID",
                        }
                    )
    write_table(folder / "metadata" / "camelyon.csv", columns)
    data = folder / "PathoROB-camelyon" / "data"
    data.mkdir(parents=True)
    table = pa.table({"image": images} | {name: [row[name] for row in columns] for name in columns[0]})
    parquet.write_table(table, data / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_labelled(folder / "labelled")
    write_paired(folder / "paired")
    write_plism(folder / "plism")
    write_hest(folder / "hest")
    write_mhist(folder / "mhist")
    write_pathorob(folder / "pathorob")
    return folder


def options_of(benchmark: str, data: Path) -> list[str]:
    return {
        "plism": ["--root", str(data / "plism"), "--n-tiles", "all"],
        "hest": ["--root", str(data / "hest"), "--tasks", "IDC"],
        "eva": ["--root", str(data / "mhist"), "--task", "mhist", "--quick", "--runs", "2"],
        "pathorob": ["--root", str(data / "pathorob"), "--datasets", "camelyon", "--repeats", "0"],
        "tiles": ["--table", str(data / "labelled" / "labels.csv")],
        "paired": ["--table", str(data / "paired" / "fields.csv")],
    }[benchmark]


def run(benchmark: str, *options: str) -> int:
    return main(["evaluate", benchmark, *options, *FAST])


def stamps(folder: Path) -> dict[str, int]:
    """When each computed file (embeddings, parts) was written."""
    kept = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".npy", ".json", ".jsonl")]
    final = ("results.json", "summary.json")
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in kept if p.name not in final}


# ------------------------------------------------------------------ one benchmark


@pytest.mark.parametrize("benchmark_name", ["plism", "hest", "eva", "pathorob", "tiles", "paired"])
def test_each_benchmark_runs_and_runs_again_without_work(
    benchmark_name: str, encoder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--encoder", encoder, "--out", str(tmp_path), *options_of(benchmark_name, data)]
    assert run(benchmark_name, *command) == 0
    folder = tmp_path / benchmark_name / f"{safe_name(encoder)}__cls"
    result = read_result(folder / "mhist" if benchmark_name == "eva" else folder)
    assert (result.benchmark, result.encoder, result.pooling) == (benchmark_name, encoder, "cls")
    score = next(each for each in result.scores if each.name == result.headline)
    assert score.value is not None
    assert np.isfinite(score.value)
    told = capsys.readouterr().out
    assert encoder in told
    assert f"{score.value:.4f}" in told
    assert list((tmp_path / "features").glob("*.npy"))

    before = stamps(tmp_path)
    assert before
    assert run(benchmark_name, *command) == 0
    assert stamps(tmp_path) == before
    again = read_result(folder / "mhist" if benchmark_name == "eva" else folder)
    assert (again.scores, again.details) == (result.scores, result.details)


def test_only_what_is_missing_is_computed(encoder: str, data: Path, tmp_path: Path) -> None:
    command = ["--encoder", encoder, "--out", str(tmp_path), *options_of("hest", data)]
    assert run("hest", *command) == 0
    folder = tmp_path / "hest" / f"{safe_name(encoder)}__cls"
    first = read_result(folder)
    lost = sorted((folder / "folds").iterdir())[0]
    lost.unlink()
    before = stamps(tmp_path)
    assert run("hest", *command) == 0
    after = stamps(tmp_path)
    assert set(after) - set(before) == {lost.relative_to(tmp_path).as_posix()}
    assert {name: after[name] for name in before} == before
    assert read_result(folder).scores == first.scores


def test_poolings_and_encoders_are_axes(encoder: str, other: str, data: Path, tmp_path: Path) -> None:
    command = ["--encoders", encoder, other, "--poolings", "auto", "cls", "cls+mean", "--out", str(tmp_path)]
    assert run("paired", *command, *options_of("paired", data)) == 0
    found = {folder.name: read_result(folder) for folder in (tmp_path / "paired").iterdir()}
    wanted = {f"{safe_name(name)}__{pooling}" for name in (encoder, other) for pooling in ("cls", "cls+mean")}
    assert set(found) == wanted  # auto and cls are one
    assert len({result.encoder_key for result in found.values()}) == 4
    assert len({result.scores for result in found.values()}) == 4


def test_features_need_no_encoder(data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scene = rng.normal(size=(12, 8))
    for name in SLIDES:
        places = [[16, place // 4, place % 4] for place in range(12)]
        (tmp_path / "mine" / name).mkdir(parents=True)
        rows = np.hstack([places, scene + 0.01 * rng.normal(size=scene.shape)]).astype(np.float32)
        np.save(tmp_path / "mine" / name / "features.npy", rows)
    features = ["--features", str(tmp_path / "mine"), "--n-tiles", "all", "--out", str(tmp_path / "out")]
    assert main(["evaluate", "plism", *features, "--device", "cpu"]) == 0
    folder = tmp_path / "out" / "plism" / "mine__as-extracted"
    result = read_result(folder)
    assert result.encoder == "mine"
    assert len(result.details["pairs"]) == 6
    assert {"metrics.csv", "results.csv", "results.json"} <= {path.name for path in folder.iterdir()}
    assert next(each.value for each in result.scores if each.name == result.headline) > 0.99


def test_eva_with_several_tasks_takes_a_folder_per_task(
    encoder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--encoder", encoder, "--out", str(tmp_path), "--root", str(data), "--quick", "--runs", "1"]
    assert run("eva", *command, "--task", "mhist", "bach") == 1
    assert "eva/bach are not there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run("eva", *command, "--task", "mhist", "crc2") == 1
    assert "did you mean crc?" in capsys.readouterr().err


# ------------------------------------------------------------------ slides


def test_tiles_of_a_slide_are_drawn_at_the_scale_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    write_slide(path, width_px=1200, height_px=1000, mpp=0.5, seed=0)

    class Seen:
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012

        def embed(self, tiles: np.ndarray) -> np.ndarray:
            self.shapes.append(tiles.shape)
            return tiles.mean(axis=(1, 2)).astype(np.float32)

    embed = slide_embedder(Seen(), block=4)
    bag = embed(path, mpp=2.0, tile_px=64, max_tiles=6)
    assert bag.shape[1] == 3
    assert 1 <= len(bag) <= 6
    assert {shape[1:] for shape in Seen.shapes} == {(64, 64, 3)}
    np.testing.assert_array_equal(bag, embed(path, mpp=2.0, tile_px=64, max_tiles=6))
    assert bag.mean() < 235  # tissue, not glass


def test_slide_tasks_tile_their_slides(encoder: str, tmp_path: Path) -> None:
    """Camelyon16 in its layout: the slides that PCam validates on are val."""
    root = tmp_path / "cam16"
    drawn = tmp_path / "drawn.svs"
    write_slide(drawn, width_px=1400, height_px=1200, mpp=0.25, seed=1)
    names = [f"training/{label}/{label}_{number:03d}" for label in ("normal", "tumor") for number in (1, 2, 10)]
    for name in [*names, "testing/images/test_001", "testing/images/test_002"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn, root / f"{name}.tif")
    (root / "testing" / "reference.csv").write_text("test_001,Normal,None,None\ntest_002,Tumor,Macro,All\n")
    command = ["--encoder", encoder, "--root", str(root), "--task", "cam16", "--quick", "--runs", "1"]
    assert run("eva", *command, "--out", str(tmp_path / "out")) == 0
    result = read_result(tmp_path / "out" / "eva" / f"{safe_name(encoder)}__cls" / "cam16")
    assert result.headline == "balanced_accuracy/cam16"
    bags = [np.load(path) for path in (tmp_path / "out" / "features").glob("*.npy")]
    assert len(bags) == 8
    assert all(1 <= len(bag) <= 30 for bag in bags)


# ------------------------------------------------------------------ all


def write_roots(path: Path, data: Path) -> Path:
    (data / "empty").mkdir(exist_ok=True)
    table = {
        "tiles": "labelled/labels.csv",  # relative to the file
        "paired": {"table": str(data / "paired" / "fields.csv")},
        "plism": {"root": "empty", "n_tiles": "all"},  # there, but no slides in it
        "hest": {"root": "hest", "tasks": ["IDC"]},
        "eva": {"mhist": "mhist", "pcam": "nowhere", "runs": 2, "quick": True},
    }
    path.write_text(json.dumps(table))
    return path


def test_all_goes_on_after_a_failure_and_says_what_is_missing(
    encoder: str, other: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = write_roots(data / "roots.json", data)
    command = ["--encoder", encoder, "--encoder", other, "--roots", str(roots), "--out", str(tmp_path)]
    assert run("all", *command) == 2
    told = capsys.readouterr()
    found = files.read_json(tmp_path / "results.json")
    done = {(each["benchmark"], each["encoder"]) for each in found["results"]}
    assert done == {(name, who) for name in ("tiles", "paired", "hest", "eva/mhist") for who in (encoder, other)}
    summary = files.read_json(tmp_path / "summary.json")
    assert summary["finished"] is True
    assert [(each["benchmark"], each["encoder"]) for each in summary["failed"]] == [
        ("plism", encoder),
        ("plism", other),
    ]
    assert "PLISM compares at least two slides" in summary["failed"][0]["reason"]
    missing = {each["benchmark"]: each["reason"] for each in summary["missing"]}
    assert missing["pathorob"] == "not in roots.json"
    assert missing["eva/bach"] == "not in roots.json"
    assert "nowhere" in missing["eva/pcam"]
    assert "eva/mhist" not in missing
    markdown = (tmp_path / "results.md").read_text()
    for text in (told.out, markdown):
        assert "pathorob" in text
        assert "eva/pcam" in text
        assert "plism" in text
    for each in found["results"]:
        result = read_result(tmp_path / each["folder"])
        score = next(score for score in result.scores if score.name == result.headline)
        assert (each["score"], each["value"], each["low"]) == (score.name, score.value, score.low)
        assert f"| {score.value:.4f} |" in markdown

    # the hole is mended: the rest stays as it is
    before = stamps(tmp_path)
    table = json.loads(roots.read_text())
    del table["eva"]["pcam"]
    roots.write_text(json.dumps(table | {"plism": {"root": "plism", "n_tiles": "all"}}))
    assert run("all", *command) == 0
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(files.read_json(tmp_path / "results.json")["results"]) == 10

    # the page compares both encoders on every benchmark, and says the student's share of the teacher
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--out", str(page), "--student", other, "--teacher", encoder]) == 0
    text = page.read_text()
    assert len(re.findall(r"[+\d] to [^;<]+; p (?:&lt; )?[01]", text)) == 5
    assert len(re.findall(r"\d+ to \d+ %</span>", text)) >= 5
    assert ">not measured<" not in text  # the cost of both


def test_a_run_of_all_that_was_killed_goes_on(encoder: str, data: Path, tmp_path: Path) -> None:
    roots = tmp_path / "roots.json"
    table = {"tiles": str(data / "labelled" / "labels.csv"), "hest": {"root": str(data / "hest"), "tasks": ["IDC"]}}
    roots.write_text(json.dumps(table))
    out = tmp_path / "out"
    command = ["all", "--encoder", encoder, "--roots", str(roots), "--out", str(out), *FAST]
    with subprocess.Popen(
        [sys.executable, "-m", "histill", "evaluate", *command], stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not list((out / "tiles").rglob("parts/*.json")):
            time.sleep(0.01)
        process.kill()
    before = stamps(out)
    assert before
    assert main(["evaluate", *command]) == 0
    after = stamps(out)
    finished = [name for name in before if not name.endswith((".part.npy", ".done.json")) and "/.tmp-" not in name]
    assert {name: after[name] for name in finished} == {name: before[name] for name in finished}
    whole = ["all", "--encoder", encoder, "--roots", str(roots), "--out", str(tmp_path / "whole"), *FAST]
    assert main(["evaluate", *whole]) == 0
    for folder in ("tiles", "hest"):
        here, there = (
            read_result(place / folder / f"{safe_name(encoder)}__cls") for place in (out, tmp_path / "whole")
        )
        assert (here.scores, here.details) == (there.scores, there.details)


def test_an_encoder_that_cannot_be_loaded_leaves_the_others(
    encoder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_encoder(tmp_path / "broken", 9)
    (broken / "model.safetensors").write_bytes(b"no weights")
    roots = tmp_path / "roots.toml"
    roots.write_text(f'tiles = "{data}/labelled/labels.csv"\n')
    command = ["--encoder", str(broken), "--encoder", encoder, "--roots", str(roots), "--out", str(tmp_path / "out")]
    assert run("all", *command) == 2
    found = files.read_json(tmp_path / "out" / "results.json")
    assert [each["encoder"] for each in found["results"]] == [encoder]
    assert [each["encoder"] for each in found["failed"]] == [str(broken)]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('{"plsm": "x"}', "did you mean plism"),
        ('{"plism": {"root": "x", "n_tile": 5}}', "did you mean n_tiles"),
        ('{"plism": {"n_tiles": 5}}', "is needed"),
        ('{"eva": "x"}', "a group such as"),
        ('{"eva": {"mhits": "x"}}', "did you mean mhist"),
        ('{"eva": {"quick": true}}', "no task of EVA"),
        ('{"hest": {"root": "x", "batch": 3}}', "give it with the command"),
        ('{"tiles": 3}', "a path, or a group"),
        ("{}", "names no benchmark"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_table_of_roots_is_one_clear_error(
    table: str, message: str, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roots = tmp_path / "roots.json"
    roots.write_text(table)
    out = tmp_path / "out"
    assert run("all", "--encoder", encoder, "--roots", str(roots), "--out", str(out)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(roots) in error
    assert not out.exists()


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plisn"], "did you mean plism"),
        (["tiles", "--encoder", "E"], "--out"),
        (["tiles", "--out", "OUT", "--table", "T"], "an encoder is needed"),
        (["tiles", "--encoder", "E", "--out", "OUT"], "--table"),
        (["tiles", "--encoder", "E", "--out", "OUT", "--table", "nothing.csv"], "data of tiles are not there"),
        (["tiles", "--encoder", "no-such-model", "--out", "OUT", "--table", "T"], "no-such-model"),
        (["tiles", "--encoder", "E", "--out", "OUT", "--table", "T", "--input-px", "30"], "multiples of"),
        (["tiles", "--encoder", "E", "--out", "OUT", "--table", "T", "--device", "tpu9"], "no such device"),
        (["plism", "--encoder", "E", "--out", "OUT", "--features", "T"], "and an encoder too"),
        (["plism", "--out", "OUT", "--root", "T"], "or --features"),
        (["hest", "--encoder", "E", "--out", "OUT", "--root", "HEST", "--task", "IDCC"], "did you mean IDC"),
        (["all", "--encoder", "E", "--out", "OUT"], "--roots"),
        (["all", "--encoder", "E", "--out", "OUT", "--roots", "nothing.json"], "cannot be read"),
    ],
)
def test_wrong_input_is_one_clear_error_and_writes_nothing(
    argv: list[str], message: str, encoder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = {"E": encoder, "OUT": str(tmp_path / "out"), "T": str(data / "labelled" / "labels.csv")}
    placed["HEST"] = str(data / "hest")
    assert main(["evaluate", *(placed.get(each, each) for each in argv)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plism", "--n-tiles", "0"], "1 or more"),
        (["plism", "--memory-gb", "0"], "above 0"),
        (["eva", "--runs", "-1"], "0 or more"),
        (["tiles", "--pooling"], "no pooling"),
        (["hest", "--precision", "fp8"], "fp32"),
        (["hest", "--exakt"], "--exact"),
    ],
)
def test_a_wrong_option_is_a_wrong_command_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_another_encoder_s_results_are_not_replaced(
    encoder: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--encoder", encoder, "--out", str(tmp_path), *options_of("paired", data)]
    assert run("paired", *command) == 0
    path = tmp_path / "paired" / f"{safe_name(encoder)}__cls" / "results.json"
    result = read_result(path.parent)
    write_result(replace(result, encoder="another", settings=result.settings | {"encoder": "another"}), path.parent)
    assert run("paired", *command) == 1
    told = capsys.readouterr().err
    assert f"now encoder {encoder}" in told
    assert "as before: encoder another" in told
    path.write_text("{")  # damaged: written anew
    assert run("paired", *command) == 0
    assert read_result(path.parent).encoder == encoder


def test_other_settings_data_or_weights_do_not_replace_results(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = write_encoder(tmp_path / "student", 1)
    command = ["--encoder", str(student), "--out", str(tmp_path / "out")]
    assert run("plism", *command, "--root", str(data / "plism"), "--n-tiles", "8") == 0
    folder = tmp_path / "out" / "plism" / f"{safe_name(str(student))}__cls"
    result = read_result(folder)
    assert result.settings["n_tiles"] == 8
    assert result.date
    assert result.weights == load_encoder(str(student)).content_hash()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(*options: str) -> str:
        capsys.readouterr()
        assert run("plism", *command, *options) == 1
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        return capsys.readouterr().err

    told = refused("--root", str(data / "plism"), "--n-tiles", "9")
    assert "now n_tiles 9" in told
    assert "as before: n_tiles 8" in told
    told = refused("--root", str(data / "plism"), "--n-tiles", "8", "--compat", "fp16")
    assert "compat fp16" in told
    assert "n_tiles" not in told
    shutil.copytree(data / "plism", tmp_path / "plism")
    assert "as before: root" in refused("--root", str(tmp_path / "plism"), "--n-tiles", "8")
    assert run("plism", *command, "--root", str(data / "plism"), "--n-tiles", "8", "--memory-gb", "2") == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_encoder(student, 2)
    assert "weights" in refused("--root", str(data / "plism"), "--n-tiles", "8")


def test_the_cost_stands_with_each_result_and_is_measured_once(encoder: str, data: Path, tmp_path: Path) -> None:
    command = ["--encoder", encoder, "--out", str(tmp_path), "--pooling", "cls", "cls+mean"]
    assert run("paired", *command, *options_of("paired", data)) == 0
    assert run("tiles", *command, *options_of("tiles", data)) == 0
    results = [read_result(path.parent) for path in tmp_path.glob("*/*/results.json")]
    assert len(results) == 4
    cost = results[0].data["cost"]
    assert all(result.data["cost"] == cost for result in results)
    assert (cost["input_px"], cost["precision"], cost["tiles"]) == (28, "fp32", "tiles of a benchmark")
    assert len(list((tmp_path / "features").glob("cost-*.json"))) == 1


def test_names_become_folders() -> None:
    assert safe_name("hf-hub:bioptimus/H0-mini") == "hf-hub_bioptimus_H0-mini"
    assert safe_name("../runs/a/student/") == "runs_a_student"
    long = [safe_name("x/" * 200 + end) for end in "ab"]
    assert [len(name) <= 120 for name in long] == [True, True]
    assert long[0] != long[1]


def test_two_encoders_do_not_share_a_folder(encoder: str, tmp_path: Path) -> None:
    for name in ("a_b", "a b"):
        write_encoder(tmp_path / name, 1)
    with pytest.raises(ConfigError, match="one folder"):
        check_names([str(tmp_path / "a_b"), str(tmp_path / "a b")])
    check_names([encoder, encoder])


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no such device"):
        pick_device("meta")
    with pytest.raises(ConfigError, match="cannot be reached"):
        pick_device("cuda:99")


# ------------------------------------------------------------------ the command line itself


def test_lists_come_in_any_spelling() -> None:
    argv = ["--encoder", "a", "--out", "o", "--encoder=b", "--poolings", "cls", "cls+mean", "--encoders", "c", "d"]
    assert _joined(AllConfig, argv) == [
        *("--out", "o", "--encoder", "a", "b", "c", "d", "--pooling", "cls", "cls+mean"),
    ]
    assert _joined(HestConfig, ["--task", "IDC", "--exact"]) == ["--exact", "--tasks", "IDC"]


@pytest.mark.parametrize("argv", [["--help"], ["nothing"]])
def test_help_and_refusals_import_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; from histill.cli import main; status = main(['evaluate', *sys.argv[1:]]);"
        "assert not {'torch', 'numpy', 'timm', 'tyro'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == (0 if argv == ["--help"] else 1), text
    for name in ("plism", "hest", "eva", "pathorob", "tiles", "paired", "all"):
        assert name in text


def test_every_benchmark_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plism", "hest", "eva", "pathorob", "tiles", "paired", "all"):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", name, "--help"])
        assert stop.value.code == 0
        assert "--encoder" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--pooling", "cls"), ("--input-px", "112"), ("--precision", "fp32")])
def test_an_option_of_the_encoder_is_refused_beside_features(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "plism", "--features", str(tmp_path), "--out", str(tmp_path / "out"), *option]) == 1
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
