"""Every benchmark, killed while it embeds and killed between its parts: only what is missing runs, results are equal.

``histill evaluate`` runs in a process of its own that gets a real SIGKILL (fixture ``killed``), then again here, where
calls are counted; a third run that nothing disturbs gives the expected numbers.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from histill.cli import main
from histill.evaluate import embedding, labelled, paired, tables
from histill.evaluate.hest import run as hest_run
from histill.evaluate.pathorob import run as pathorob_run
from histill.evaluate.results import read_result

BLOCK = 16
SMALL_BLOCKS = f"from histill.evaluate import embedding; embedding.BLOCK_TILES = {BLOCK}"
PX = 28


# ------------------------------------------------------------------ small sets


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def noisy(rng: np.random.Generator, colour: Sequence[float]) -> np.ndarray:
    return np.clip(np.array(colour) + rng.normal(0, 20, (PX, PX, 3)), 0, 255).astype(np.uint8)


def write_tiles(folder: Path) -> list[str]:
    """48 labelled tiles of six slides."""
    rng, rows = np.random.default_rng(0), []
    (folder / "t").mkdir(parents=True)
    for number in range(48):
        label = number % 2
        Image.fromarray(noisy(rng, (190 - 40 * label, 90, 130))).save(folder / f"t/{number}.png")
        split = "train" if number < 32 else "test"
        rows.append({"path": f"t/{number}.png", "label": "ab"[label], "slide": f"s{number // 8}", "split": split})
    table(folder / "tiles.csv", rows)
    return ["--table", str(folder / "tiles.csv")]


def write_paired(folder: Path) -> list[str]:
    """12 fields under four scanners."""
    rng, rows = np.random.default_rng(1), []
    (folder / "t").mkdir(parents=True)
    for x in range(12):
        scene = rng.uniform(60, 200, (4, 4, 3)).repeat(7, 0).repeat(7, 1)
        for scanner in "ABCD":
            Image.fromarray(np.clip(scene + rng.normal(0, 20, scene.shape), 0, 255).astype(np.uint8)).save(
                folder / f"t/{x}{scanner}.png"
            )
            rows.append({"path": f"t/{x}{scanner}.png", "slide": f"s{x // 4}", "scanner": scanner, "x": x, "y": 0})
    table(folder / "paired.csv", rows)
    return ["--table", str(folder / "paired.csv")]


def write_pathorob(folder: Path) -> list[str]:
    """Camelyon: two classes from two centres, three slides of each, 12 tiles of a slide."""
    rng, rows, images = np.random.default_rng(2), [], []
    for place in range(144):
        centre, label, slide = ("RUMC", "UMCU")[place // 72], ("normal", "tumor")[place // 36 % 2], place // 12 % 3
        buffer = io.BytesIO()
        Image.fromarray(noisy(rng, (150 + 40 * (label == "tumor"), 100, 120 + 30 * (centre == "UMCU")))).save(
            buffer, "PNG"
        )
        images.append({"bytes": buffer.getvalue(), "path": None})
        name = f"{centre}-{label}-{slide}"
        row = {"patch_id": f"{name}-{place}", "slide_id": name, "biological_class": label}
        rows.append(row | {"medical_center": centre, "subset": "ID"})
    table(folder / "metadata" / "camelyon.csv", rows)
    (folder / "PathoROB-camelyon" / "data").mkdir(parents=True)
    columns = {"image": images} | {name: [row[name] for row in rows] for name in rows[0]}
    parquet.write_table(pa.table(columns), folder / "PathoROB-camelyon" / "data" / "train-00000-of-00001.parquet")
    return ["--root", str(folder), "--datasets", "camelyon", "--repeats", "4"]


def write_plism(folder: Path) -> list[str]:
    """Four slides of 24 tiles."""
    rng = np.random.default_rng(3)
    scenes = rng.integers(0, 200, size=(24, PX, PX, 3))
    folder.mkdir()
    for name in (f"{staining}_{scanner}_to_GMH_S60.tif" for staining in ("GM", "HR") for scanner in ("P", "SQ")):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for place, scene in enumerate(scenes + rng.integers(0, 50, size=scenes.shape)):
                file[f"tile_16_{place // 4}_{place % 4}"] = scene.astype(np.uint8)
    return ["--root", str(folder), "--n-tiles", "all"]


def write_hest(folder: Path) -> list[str]:
    """Three sections of 20 spots, each the test of one fold."""
    rng, root, text = np.random.default_rng(4), folder / "IDC", h5py.string_dtype()
    genes, samples = [f"G{i}" for i in range(4)], "abc"
    for name in ("splits", "patches", "adata"):
        (root / name).mkdir(parents=True)
    (root / "var_50genes.json").write_text(json.dumps({"genes": genes}))
    for number, sample in enumerate(samples):
        tiles = rng.integers(0, 256, (20, 1, 1, 3)).astype(np.uint8) * np.ones((1, PX, PX, 1), np.uint8)
        codes = np.array([f"{sample}{i}" for i in range(20)], dtype=object)
        with h5py.File(root / "patches" / f"{sample}.h5", "w") as file:
            file["img"], file["coords"] = tiles, np.zeros((20, 2), int)
            file["barcode"] = codes[:, None].astype(text)
        with h5py.File(root / "adata" / f"{sample}.h5ad", "w") as file:
            file["X"] = rng.poisson(1 + tiles[:, 0, 0] @ np.full((3, 4), 0.02)).astype(np.float32)
            file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            for axis, names in (("obs", codes), ("var", np.array(genes, dtype=object))):
                group = file.create_group(axis)
                group.attrs.update({"encoding-type": "dataframe", "_index": "_index", "column-order": []})
                group["_index"] = names.astype(text)
        for side, members in (("test", sample), ("train", samples.replace(sample, ""))):
            lines = [f"{member},patches/{member}.h5,adata/{member}.h5ad" for member in members]
            text_lines = "\n".join(["sample_id,patches_path,expr_path", *lines])
            (root / "splits" / f"{side}_{number}.csv").write_text(f"{text_lines}\n")
    return ["--root", str(folder), "--tasks", "IDC"]


# ------------------------------------------------------------------ the cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """Where a benchmark is killed, and what is then left of it."""

    write: Callable[[Path], list[str]]
    """Write the set; gives the options of the command."""
    embedding: tuple[str, int]
    """The process dies when it is about to put the n-th file of this name in its place."""
    tiles_left: int
    part: tuple[str, int] = ("", 0)
    left: tuple[tuple[Any, str, int], ...] = ()
    """Function, and how often it is called by the second run when the first was killed at ``part``."""


CASES = {
    # 48 tiles in blocks of 16: the second block was embedded, but not yet noted as done
    "tiles": Case(
        write=write_tiles,
        embedding=(r"\.done\.json$", 2),
        tiles_left=32,
        part=(r"parts/knn-", 1),
        left=((labelled, "linear_probe", 0), (labelled, "knn_probe", 1), (tables, "few_shot", 60)),
    ),
    "paired": Case(
        write=write_paired,
        embedding=(r"\.done\.json$", 2),
        tiles_left=32,
        part=(r"parts/[A-D]-[A-D]-", 3),
        left=((paired, "pair_hits", 4),),
    ),
    "pathorob": Case(
        write=write_pathorob,
        embedding=(r"\.done\.json$", 4),
        tiles_left=144 - 3 * 16,
        part=(r"parts/camelyon-drop-", 2),
        left=((pathorob_run, "typed_neighbours", 0), (pathorob_run, "confounded_probes", 3)),
    ),
    # the second section was embedded as a whole, and only its name was not yet changed
    "hest": Case(
        write=write_hest,
        embedding=(r"features/[0-9a-f]+\.npy$", 2),
        tiles_left=20,
        part=(r"folds/IDC-", 2),
        left=((hest_run, "ridge_pearson", 2),),
    ),
    # pairs: see plism/test_run.py, they are added to a journal
    "plism": Case(write=write_plism, embedding=(r"\.done\.json$", 4), tiles_left=8 + 2 * 24),
}


@pytest.mark.parametrize("benchmark_name", CASES)
def test_killed_and_run_again(
    benchmark_name: str, bundle: str, killed: Any, calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[benchmark_name]
    monkeypatch.setattr(embedding, "BLOCK_TILES", BLOCK)
    fixed = ["--encoder", bundle, "--precision", "fp32", "--device", "cpu", *case.write(tmp_path / "data")]
    command = ["evaluate", benchmark_name, *fixed]

    def measured(out: Path, *more: str) -> Any:
        assert main([*command, "--out", str(out), *more]) == 0
        (folder,) = (out / benchmark_name).iterdir()
        result = read_result(folder)
        return result.scores, result.details

    whole = measured(tmp_path / "whole")

    out = tmp_path / "embedding"
    killed([*command, "--out", str(out)], *case.embedding, SMALL_BLOCKS)
    assert not list((out / benchmark_name).rglob("results.json"))
    read = calls(embedding, "_checked")  # (embedder, read, first, last, progress) of each block
    assert measured(out) == whole
    assert sum(arguments[3] - arguments[2] for arguments, _ in read) == case.tiles_left

    if case.left:
        out, cache = tmp_path / "parts", ["--cache", str(tmp_path / "whole" / "features")]
        killed([*command, "--out", str(out), *cache], *case.part, SMALL_BLOCKS)
        assert not list((out / benchmark_name).rglob("results.json"))
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
        noted = [(calls(owner, name), count) for owner, name, count in case.left]
        read.clear()
        assert measured(out, *cache) == whole
        assert not read, "features are there"
        assert [len(found) for found, _ in noted] == [count for _, count in noted]
        assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_benchmark_embeds_and_computes_nothing(bundle: str, calls: Any, tmp_path: Path) -> None:
    options = ["--encoder", bundle, "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "out")]
    command = ["evaluate", "paired", *options, *write_paired(tmp_path / "data")]
    assert main(command) == 0
    noted = [calls(paired, "pair_hits"), calls(embedding, "_checked")]
    assert main(command) == 0
    assert noted == [[], []]
