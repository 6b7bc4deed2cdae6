"""`histill evaluate all` and `histill report` for real: the demo's teacher and an untrained one, on drawn folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from histill import files
from histill.cli import main
from histill.demo.run import TEACHER
from histill.models import build_student, write_bundle
from histill.models.students import STUDENTS
from histill.synthetic.benchmarks import BENCHMARKS, write_benchmarks

NAMES = tuple(name for name in BENCHMARKS if name != "eva/consep")  # its decoder trains for minutes
TILES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "drawn"
    write_benchmarks(folder, seed=1, tiles=TILES, names=NAMES)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "untrained"
    mean = std = (0.5, 0.5, 0.5)
    model = build_student("vit-nano", seed=0)
    write_bundle(folder, model, STUDENTS["vit-nano"], mean=mean, std=std, input_px=112, provenance={})
    return folder


def _command(untrained: Path, roots: Path, out: Path) -> list[str]:
    encoders = ["--encoder", f"local-dir:{TEACHER}", "--encoder", f"local-dir:{untrained}"]
    return ["evaluate", "all", *encoders, "--roots", str(roots), "--out", str(out)]


@pytest.fixture(scope="module")
def out(data: Path, untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    assert main(_command(untrained, data / "roots.json", folder)) == 0
    return folder


@pytest.fixture(scope="module")
def values(out: Path, untrained: Path) -> dict[str, tuple[float, float]]:
    """Benchmark -> headline of the teacher and of the untrained network."""
    found = {
        (row["benchmark"], row["encoder"]): row["value"] for row in files.read_json(out / "results.json")["results"]
    }
    names = (f"local-dir:{TEACHER}", f"local-dir:{untrained}")
    return {benchmark: (found[benchmark, names[0]], found[benchmark, names[1]]) for benchmark, _ in found}


def test_every_benchmark_gives_a_result(out: Path, values: dict[str, tuple[float, float]]) -> None:
    results: dict[str, Any] = files.read_json(out / "results.json")
    assert results["failed"] == []
    assert set(values) == set(NAMES)
    assert len(results["results"]) == 2 * len(NAMES)
    for pair in values.values():
        assert all(-1 <= value <= 1 for value in pair)
    assert {row["benchmark"] for row in results["missing"]} >= {"eva/consep", "eva/panda"}


@pytest.mark.parametrize("benchmark", ["plism", "hest", "eva/pcam", "pathorob", "tiles", "paired"])
def test_the_teacher_beats_an_untrained_network(values: dict[str, tuple[float, float]], benchmark: str) -> None:
    teacher, untrained = values[benchmark]
    assert teacher > untrained + 0.05


def test_a_second_call_computes_nothing_again(out: Path, data: Path, untrained: Path) -> None:
    kept = [path for path in out.rglob("*") if path.suffix in (".npy", ".npz", ".jsonl") or path.parent.name == "runs"]
    kept = [path for path in kept if path.is_file()]
    assert len(kept) > 20
    before = {path: path.stat().st_mtime_ns for path in kept}
    results = files.read_json(out / "results.json")["results"]
    assert main(_command(untrained, data / "roots.json", out)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    again = files.read_json(out / "results.json")["results"]
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in results]


def test_the_report_makes_its_page(out: Path, untrained: Path, tmp_path: Path) -> None:
    roles = ["--student", f"local-dir:{untrained}", "--teacher", f"local-dir:{TEACHER}"]
    assert main(["report", str(out), *roles, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 5_000_000
    for name in ("PLISM", "HEST", "PathoROB", "mhist"):
        assert name.lower() in page.lower()
    assert "http://" not in page
    assert (tmp_path / "page.md").is_file()


def test_identical_renderings_are_perfectly_robust(data: Path, tmp_path: Path) -> None:
    """One slide under four names: the same features, so that the score is 1 whatever the encoder."""
    (tmp_path / "plism").mkdir()
    source = data / "plism" / "HR_AT2_to_GMH_S60.tif.h5"
    for name in ("HR_AT2", "HR_S60", "MY_AT2", "MY_S60"):
        shutil.copy(source, tmp_path / "plism" / f"{name}_to_GMH_S60.tif.h5")
    command = ["evaluate", "plism", "--encoder", f"local-dir:{TEACHER}", "--root", str(tmp_path / "plism")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").rglob("results.json")
    found = files.read_json(path)
    assert {score["name"]: score["value"] for score in found["scores"]}["score"] == pytest.approx(1.0, abs=1e-5)
    assert all(pair["top_1_accuracy"] == 1.0 for pair in found["pairs"])
