"""Tasks of the EVA protocol from the command line, killed while they embed and killed between their runs.

As tests/evaluate/test_resume.py; the schedules and the tiles of a segmentation are made smaller.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from histill.cli import main
from histill.evaluate import embedding, encoders
from histill.evaluate.eva import protocols, tasks
from histill.evaluate.results import read_result
from histill.synthetic.slides import write_slide

BLOCK, STEPS, PX = 8, 3, 32
SMALL = f"""
from dataclasses import replace
from types import MappingProxyType
from histill.evaluate import embedding
from histill.evaluate.eva import protocols, tasks
embedding.BLOCK_TILES = {BLOCK}
protocols._QUICK_STEPS.update(dict.fromkeys(protocols._QUICK_STEPS, {STEPS}))
tasks.TASKS = MappingProxyType(tasks.TASKS | {{"consep": replace(tasks.TASKS["consep"], tile_px={PX})}})
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process."""
    monkeypatch.setattr(embedding, "BLOCK_TILES", BLOCK)
    for kind in protocols._QUICK_STEPS:
        monkeypatch.setitem(protocols._QUICK_STEPS, kind, STEPS)
    consep = replace(tasks.TASKS["consep"], tile_px=PX)
    monkeypatch.setattr(tasks, "TASKS", MappingProxyType(tasks.TASKS | {"consep": consep}))


def write_camelyon16(root: Path) -> None:
    """Eight slides with the names of the original's splits."""
    drawn = root.with_suffix(".svs")
    write_slide(drawn, width_px=1400, height_px=1200, mpp=0.25, seed=1)
    names = [f"training/{label}/{label}_{number:03d}" for label in ("normal", "tumor") for number in (1, 2, 10)]
    for name in [*names, "testing/images/test_001", "testing/images/test_002"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn, root / f"{name}.tif")
    (root / "testing" / "reference.csv").write_text("test_001,Normal,None,None\ntest_002,Tumor,Macro,All\n")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Where a task is killed, and what is then left of it."""

    write: Callable[[Any, Path], object]
    embedding: tuple[str, int]
    """The process dies when it is about to put the n-th file of this name in its place."""
    counted: Callable[[Any], Any]
    """Notes what is embedded."""
    embedded: Callable[[Any], int]
    """From these notes."""
    left: int
    run: tuple[str, int]
    train: str
    """Trains the runs of ``seeds`` (a decoder: of ``seed``)."""
    seeds_left: list[int]
    """In the order of the calls."""


def blocks(calls: Any) -> Any:
    return calls(embedding, "_checked")


def tiles(noted: Any) -> int:
    return sum(arguments[3] - arguments[2] for arguments, _ in noted)


CASES = {
    # 30 images, 8 at a time; both protocols have three runs each
    "mhist": Case(
        write=lambda sets, root: sets.write_mhist(root, train=20, test=10),
        embedding=(r"\.done\.json$", 3),
        counted=blocks,
        embedded=tiles,
        left=30 - 2 * 8,
        run=(r"runs/mhist-clean-", 2),
        train="train_probes",
        seeds_left=[1, 2],
    ),
    # eight slides, each a file; the original's stopping split is not the scored one, so that it has one protocol
    "cam16": Case(
        write=lambda _, root: write_camelyon16(root),
        embedding=(r"features/[0-9a-f]+\.npy$", 4),
        counted=lambda calls: calls(encoders, "open_slide"),
        embedded=len,
        left=8 - 3,
        run=(r"runs/cam16-original-", 2),
        train="train_mil",
        seeds_left=[1, 2],
    ),
    # 5 images of 4 tiles
    "consep": Case(
        write=lambda sets, root: sets.write_consep(root),
        embedding=(r"\.done\.json$", 2),
        counted=blocks,
        embedded=tiles,
        left=20 - 8,
        run=(r"runs/consep-original-", 2),
        train="train_decoder",
        seeds_left=[1, 2, 0, 1, 2],
    ),
}


@pytest.mark.parametrize("task", CASES)
def test_killed_and_run_again(task: str, bundle: str, killed: Any, calls: Any, sets: Any, tmp_path: Path) -> None:
    case, root = CASES[task], tmp_path / "data"
    case.write(sets, root)
    fixed = ["--encoder", bundle, "--precision", "fp32", "--device", "cpu", "--root", str(root), "--task", task]
    command = ["evaluate", "eva", *fixed, "--quick", "--runs", "3"]

    def measured(out: Path, *more: str) -> Any:
        assert main([*command, "--out", str(out), *more]) == 0
        (folder,) = (out / "eva").iterdir()
        result = read_result(folder / task)
        return result.scores, result.details

    whole = measured(tmp_path / "whole")

    out = tmp_path / "embedding"
    killed([*command, "--out", str(out)], *case.embedding, SMALL)
    assert not list(out.rglob("runs/*.json"))
    noted = case.counted(calls)
    assert measured(out) == whole
    assert case.embedded(noted) == case.left

    out, cache = tmp_path / "runs", ["--cache", str(tmp_path / "whole" / "features")]
    killed([*command, "--out", str(out), *cache], *case.run, SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("runs/*.json")}
    assert before
    trained = calls(protocols, case.train)
    noted.clear()
    assert measured(out, *cache) == whole
    assert case.embedded(noted) == 0, "features are there"
    seeds = [seed for _, options in trained for seed in options.get("seeds", [options.get("seed")])]
    assert seeds == case.seeds_left
    assert {path: path.stat().st_mtime_ns for path in before} == before
