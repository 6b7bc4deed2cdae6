"""Whole tasks on small sets in the original layouts: scores, notes, resuming."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from histill.errors import ConfigError, DataError, RunError
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.eva import protocols
from histill.evaluate.eva import run as run_module
from histill.evaluate.eva.run import run_eva
from histill.evaluate.eva.tasks import TASKS, find_task
from histill.evaluate.results import Result, read_result, write_result

QUIET = Console(file=io.StringIO())


@pytest.fixture
def run(sets: Any) -> Any:
    """Run a task quickly with the encoder of colours."""

    def quickly(task: str, root: Path, out: Path, embedder: Any = None, **options: Any) -> Result:
        settings = {"runs": 2, "quick": True, "console": QUIET, "cache": FeatureCache(None)} | options
        return run_eva(task=task, root=root, embedder=embedder or sets.ColourEmbedder(), out=out, **settings)

    return quickly


def comparable(result):
    return result.scores, result.details, {k: v for k, v in result.data.items() if k != "root"}


@pytest.mark.parametrize("task", ["bach", "breakhis", "crc", "gleason", "mhist", "pcam"])
def test_patch_tasks_beat_chance_and_are_scored_in_two_ways(task: str, tmp_path: Path, sets: Any, run: Any) -> None:
    result = run(task, getattr(sets, f"write_{task}")(tmp_path / "data"), tmp_path / "out")
    original, clean = result.scores
    assert (original.name, clean.name) == (f"balanced_accuracy/{task}", f"balanced_accuracy_clean/{task}")
    assert result.headline == original.name
    assert original.value > 1.5 / TASKS[task].classes
    assert clean.low <= clean.high
    assert "interval over 2 runs" in original.note
    if task == "pcam":
        assert "own stopping split" in original.note
        assert original.value == clean.value
        assert list(result.details["runs"]) == ["original"]
    else:
        assert "also stops on" in original.note
        assert list(result.details["runs"]) == ["original", "clean"]
    assert {"breakhis": "patients", "gleason": "cores"}.get(task, "images") in clean.note
    if task != "bach":
        assert "published" in original.note, "a subset is said to be one"
    write_result(result, tmp_path / "out")
    assert comparable(read_result(tmp_path / "out"))[0] == result.scores


def test_the_original_score_is_the_best_check_of_the_scored_split(tmp_path: Path, sets: Any, run: Any) -> None:
    result = run("mhist", sets.write_mhist(tmp_path / "data"), tmp_path / "out")
    for one in result.details["runs"]["original"]:
        assert one["score"] == pytest.approx(one["stop_score"], abs=1e-12)
    assert result.scores[0].value == pytest.approx(
        np.mean([one["score"] for one in result.details["runs"]["original"]])
    )


@pytest.mark.parametrize(("task", "write"), [("cam16", "write_camelyon16"), ("panda", "write_panda")])
def test_slide_tasks(task: str, write: str, tmp_path: Path, sets: Any, run: Any) -> None:
    root = getattr(sets, write)(tmp_path / "data")
    cache = FeatureCache(tmp_path / "cache")
    result = run(task, root, tmp_path / "out", embed_slide=sets.embed_slide, cache=cache)
    assert result.scores[0].value > 1.3 / TASKS[task].classes
    assert "interval over slides" in result.scores[1].note
    if task == "panda":
        assert "noisy labels" in result.scores[0].note

    def forbidden(path: Path, **options: object) -> np.ndarray:
        raise AssertionError("a cached slide is not embedded again")

    again = run(task, root, tmp_path / "other", embed_slide=forbidden, cache=cache)
    assert again.scores == result.scores


@pytest.mark.parametrize(("task", "write"), [("consep", "write_consep"), ("monusac", "write_monusac")])
def test_segmentation_tasks(
    task: str, write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: Any, run: Any
) -> None:
    monkeypatch.setitem(protocols._QUICK_STEPS, "segmentation", 3)
    monkeypatch.setattr(run_module, "find_task", lambda name: replace(TASKS[name], tile_px=64))
    cache, embedder = FeatureCache(tmp_path / "cache"), sets.ColourEmbedder()
    result = run(task, getattr(sets, write)(tmp_path / "data"), tmp_path / "out", embedder, cache=cache)
    original, clean = result.scores
    assert (original.name, clean.name) == (f"dice/{task}", f"dice_clean/{task}")
    assert 0 <= original.value <= 1
    assert ("interval over images" if task == "consep" else "interval over patients") in clean.note
    calls = len(embedder.tiles)
    run(task, tmp_path / "data", tmp_path / "other", embedder, cache=cache)
    assert embedder.tiles[calls:] == [1], "tokens come from the cache; one tile tells their shape"


def test_runs_that_are_there_are_not_trained_again(tmp_path: Path, sets: Any, run: Any) -> None:
    root, out = sets.write_mhist(tmp_path / "data"), tmp_path / "out"
    whole = run("mhist", root, out, runs=3)
    files = sorted(out.glob("mhist-*.json"))
    assert len(files) == 6
    gone, kept = files[1], {path: path.stat().st_mtime_ns for path in files if path != files[1]}
    content = gone.read_text()
    gone.unlink()
    again = run("mhist", root, out, runs=3)
    assert comparable(again) == comparable(whole)
    assert gone.read_text() == content
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    fewer = run("mhist", root, out, runs=2)
    assert fewer.details["runs"]["clean"] == whole.details["runs"]["clean"][:2]


def test_other_features_or_data_are_other_runs(tmp_path: Path, sets: Any, run: Any) -> None:
    root, out = sets.write_mhist(tmp_path / "data"), tmp_path / "out"
    run("mhist", root, out)
    run("mhist", root, out, sets.ColourEmbedder(key="another"))
    run("mhist", root, out, sets.ColourEmbedder(pooling="cls+mean"))
    (root / "annotations.csv").write_text((root / "annotations.csv").read_text().rsplit("\n", 2)[0] + "\n")
    run("mhist", root, out)
    assert len(list(out.glob("mhist-original-0-*.json"))) == 4


KILLED = """
import os, sys
from pathlib import Path
from rich.console import Console
sys.path.insert(0, {folder!r})
import small_sets
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.eva.run import run_eva
run_eva(task="cam16", root=Path({root!r}), embedder=small_sets.ColourEmbedder(), out=Path({out!r}), runs=12, quick=True,
        console=Console(file=open(os.devnull, "w")), cache=FeatureCache(Path({cache!r})),
        embed_slide=small_sets.embed_slide)
"""


def test_killed_and_run_again(tmp_path: Path, sets: Any, run: Any) -> None:
    root, out, cache = sets.write_camelyon16(tmp_path / "data"), tmp_path / "out", tmp_path / "cache"
    code = KILLED.format(folder=str(Path(__file__).parent), root=str(root), out=str(out), cache=str(cache))
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        until = time.monotonic() + 240
        while len(list(out.glob("cam16-*.json"))) < 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in out.glob("cam16-*.json")}
    assert 2 <= len(done) < 12, "the test needs a run that is killed in the middle"
    resumed = run("cam16", root, out, runs=12, embed_slide=sets.embed_slide, cache=FeatureCache(cache))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    whole = run("cam16", root, tmp_path / "whole", runs=12, embed_slide=sets.embed_slide)
    assert comparable(resumed) == comparable(whole)


def test_a_damaged_run_is_named(tmp_path: Path, sets: Any, run: Any) -> None:
    root, out = sets.write_mhist(tmp_path / "data"), tmp_path / "out"
    run("mhist", root, out)
    path = next(out.glob("mhist-clean-1-*.json"))
    path.write_text(path.read_text()[:20])
    with pytest.raises(RunError, match=rf"{path.name}[\s\S]*delete this file"):
        run("mhist", root, out)
    path.write_text(json.dumps({"seed": 1}))
    with pytest.raises(RunError, match="cannot be read"):
        run("mhist", root, out)


def test_what_cannot_run_is_refused_before_work(tmp_path: Path, sets: Any, run: Any) -> None:
    embedder = sets.ColourEmbedder()
    with pytest.raises(ConfigError, match=r"unknown task[\s\S]*did you mean mhist"):
        run("mist", tmp_path, tmp_path / "out", embedder)
    with pytest.raises(ConfigError, match="at least one run"):
        run("mhist", tmp_path, tmp_path / "out", embedder, runs=0)
    with pytest.raises(ConfigError, match="slides to be embedded"):
        run("cam16", tmp_path, tmp_path / "out", embedder)
    root = sets.write_mhist(tmp_path / "data")
    table = root / "annotations.csv"
    table.write_text(table.read_text().replace(",test", ",train"))
    with pytest.raises(DataError, match=r"a split of mhist is empty[\s\S]*no val rows"):
        run("mhist", root, tmp_path / "out", embedder)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path, sets: Any, run: Any) -> None:
    class Broken(sets.ColourEmbedder):
        def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
            return sets.ColourEmbedder.embed(self, tiles_NHW3) * np.inf

    with pytest.raises(DataError, match="not finite"):
        run("mhist", sets.write_mhist(tmp_path / "data"), tmp_path / "out", Broken())

    def broken_slide(path: Path, **options: object) -> np.ndarray:
        return np.full((3, 4), np.nan, np.float32)

    with pytest.raises(DataError, match=r"not finite[\s\S]*|normal_001"):
        run("cam16", sets.write_camelyon16(tmp_path / "slides"), tmp_path / "out", embed_slide=broken_slide)


def test_a_terminal_sees_progress(tmp_path: Path, sets: Any, run: Any) -> None:
    console = Console(force_terminal=True, record=True, file=io.StringIO(), width=120)
    run("mhist", sets.write_mhist(tmp_path / "data"), tmp_path / "out", console=console)
    assert "mhist-clean, step" in console.export_text()


def test_the_table_of_tasks_is_sound() -> None:
    assert {task.name for task in TASKS.values() if task.stops_on_scored} == {
        "bach", "breakhis", "crc", "gleason", "mhist", "consep", "monusac"}  # fmt: skip
    for name, task in TASKS.items():
        assert find_task(name) is task
        assert {"train", "val", task.scored} <= set(task.published)
        assert (task.mpp is None) == (task.kind != "slide")
