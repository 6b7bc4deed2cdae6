"""The whole benchmark on small slides: parity, extraction, resume after kill -9, refusals."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from rich.console import Console

from histill import files
from histill.errors import ConfigError, DataError, RunError
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.plism.journal import Journal
from histill.evaluate.plism.run import run_plism
from histill.evaluate.results import Result, read_result

SLIDES = [f"{staining}_{scanner}_to_GMH_S60.tif" for staining in ("GM", "GV", "HR") for scanner in ("P", "SQ", "S60")]


def run(features: Path | None, out: Path, **options: Any) -> Result:
    options = {"root": None, "embedder": None, "cache": FeatureCache(None)} | options
    return run_plism(features=features, out=out, console=Console(quiet=True), **options)


def write_features(folder: Path, tiles: int = 60, dim: int = 8) -> Path:
    rng = np.random.default_rng(0)
    places_N3 = np.array([[16, place // 10, place % 10] for place in range(tiles)])
    field_ND = rng.normal(size=(tiles, dim))
    for name in SLIDES:
        features_ND = field_ND + rng.normal(size=(tiles, dim))
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "features.npy", np.hstack([places_N3, features_ND]).astype(np.float32))
    return folder


def without_time(folder: Path) -> dict[str, Any]:
    plain: dict[str, Any] = files.read_json(folder / "results.json")
    plain.pop("seconds")
    return plain


class TestParity:
    @pytest.mark.parametrize(
        ("compat", "column", "cosine", "top"), [("none", "exact", 1e-5, 1e-6), ("fp16", "reference_fp16", 5e-4, 0.004)]
    )
    def test_reference(
        self, shared_parity: Path, tmp_path: Path, compat: str, column: str, cosine: float, top: float
    ) -> None:
        run(shared_parity / "plism" / "features", tmp_path, compat=compat)
        expected = json.loads((shared_parity / "plism" / "expected.json").read_text())
        found = files.read_json(tmp_path / "results.json")["pairs"]
        assert len(found) == 15
        for pair, want in zip(found, expected["pairs"], strict=True):
            assert (pair["slide_a"], pair["slide_b"]) == (want["slide_a"], want["slide_b"])
            for name, value, tolerance in zip(expected["columns"], want[column], [cosine, *[top] * 4], strict=True):
                assert pair[name] == pytest.approx(value, abs=tolerance)


class TestFiles:
    def test_tables_and_result(self, tmp_path: Path) -> None:
        result = run(write_features(tmp_path / "uni"), tmp_path / "out")
        assert (result.encoder, result.headline, result.pooling) == ("uni", "score", "as stored")
        assert read_result(tmp_path / "out") == result
        assert result.data["tiles"] == 60
        with (tmp_path / "out" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 36
        assert float(rows[7]["top_3_accuracy"]) == result.details["pairs"][7]["top_3_accuracy"]
        with (tmp_path / "out" / "results.csv").open() as file:
            table = {row["group"]: row for row in csv.DictReader(file)}
        scores = {score.name: score.value for score in result.scores}
        assert float(table["both"]["top_10_accuracy_median"]) == scores["top_10_accuracy/both"]
        assert not (tmp_path / "out" / ".lock").exists()

    def test_memory_limit_changes_no_number(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni", tiles=600, dim=128)
        wide = run(folder, tmp_path / "wide")
        with pytest.raises(ConfigError, match="at least") as refusal:
            run(folder, tmp_path / "none", memory_gb=0.001)
        least = float(str(refusal.value).split("at least ")[1].split()[0])
        narrow = run(folder, tmp_path / "narrow", memory_gb=least)
        assert narrow.details == wide.details

    def test_fewer_tiles_are_the_same_in_all_slides(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        result = run(folder, tmp_path / "out", n_tiles=20)
        assert (result.data["tiles"], result.data["tiles_in_slide"]) == (20, 60)
        for name in SLIDES[::2]:  # the file's order is free
            path = folder / name / "features.npy"
            np.save(path, np.random.default_rng(1).permutation(np.load(path)))
        assert run(folder, tmp_path / "again", n_tiles=20).details == result.details


class TestRefused:
    def test_not_finite(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        path = folder / SLIDES[4] / "features.npy"
        table = np.load(path)
        table[5, 7] = np.nan
        np.save(path, table)
        with pytest.raises(DataError, match=SLIDES[4]):
            run(folder, tmp_path / "out")

    def test_other_places(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        path = folder / SLIDES[4] / "features.npy"
        np.save(path, np.load(path)[:-1])
        with pytest.raises(DataError, match=SLIDES[4]):
            run(folder, tmp_path / "out")

    def test_other_widths(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        path = folder / SLIDES[4] / "features.npy"
        np.save(path, np.load(path)[:, :-1])
        with pytest.raises(DataError, match=SLIDES[4]):
            run(folder, tmp_path / "out")

    def test_two_or_no_sources(self, tmp_path: Path) -> None:
        for options in ({}, {"root": tmp_path}):
            with pytest.raises(ConfigError, match="either"):
                run(None, tmp_path / "out", **options)
        with pytest.raises(ConfigError, match="either"):
            run(tmp_path, tmp_path / "out", root=tmp_path)

    def test_two_processes(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        with files.lock(tmp_path / "out" / ".lock", wait=False), pytest.raises(RunError, match="another process"):
            run(folder, tmp_path / "out")


class TestResume:
    PROGRAM = """
import sys
from pathlib import Path
import torch
from rich.console import Console
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.plism.run import run_plism
torch.set_num_threads(1)
run_plism(features=Path(sys.argv[1]), root=None, embedder=None, cache=FeatureCache(None), out=Path(sys.argv[2]),
          console=Console(quiet=True))
"""

    def test_killed_and_again(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni", tiles=1500, dim=256)
        out, journal = tmp_path / "out", tmp_path / "out" / "pairs.jsonl"
        process = subprocess.Popen([sys.executable, "-c", self.PROGRAM, str(folder), str(out)])
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        before = journal.read_bytes()
        done = before[: before.rfind(b"\n") + 1]
        assert 3 <= done.count(b"\n") < 36
        assert not (out / "results.json").exists()
        journal.write_bytes(done + b'{"key": "torn')  # as a kill within a write leaves it
        run(folder, out)
        after = journal.read_bytes()
        assert after.startswith(done)  # nothing finished was computed again
        assert after.count(b"\n") == 36
        run(folder, tmp_path / "unbroken")
        assert without_time(out) == without_time(tmp_path / "unbroken")
        run(folder, out)
        assert journal.read_bytes() == after

    def test_other_features_are_other_pairs(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        first = run(folder, tmp_path / "out")
        path = folder / SLIDES[0] / "features.npy"
        table = np.load(path)
        table[:, 3:] = table[::-1, 3:]
        np.save(path, table)
        second = run(folder, tmp_path / "out")
        changed = [SLIDES[0] in (p["slide_a"], p["slide_b"]) for p in first.details["pairs"]]
        differs = [x != y for x, y in zip(first.details["pairs"], second.details["pairs"], strict=True)]
        assert differs == changed
        assert (tmp_path / "out" / "pairs.jsonl").read_bytes().count(b"\n") == 36 + 8
        assert second.encoder_key != first.encoder_key

    def test_modes_do_not_mix(self, tmp_path: Path) -> None:
        folder = write_features(tmp_path / "uni")
        exact = run(folder, tmp_path / "out")
        assert run(folder, tmp_path / "out", compat="fp16").details != exact.details
        assert run(folder, tmp_path / "out").details == exact.details

    def test_damaged_journal(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.jsonl"
        path.write_text("{}\n")
        with pytest.raises(DataError, match="line 1"):
            Journal(path)


@dataclass
class Colours:
    """An embedder: a tile's mean colour and coarse pixels."""

    name: str = "colours"
    key: str = "0" * 64
    pooling: str = "cls"
    dim: int = 15
    seen: list[int] = field(default_factory=list)

    def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        self.seen.append(len(tiles_NHW3))
        mean_N3 = tiles_NHW3.mean(axis=(1, 2))
        coarse = tiles_NHW3[:, ::4, ::4].reshape(len(tiles_NHW3), -1)
        return np.concatenate([mean_N3, coarse], axis=1).astype(np.float32)

    def patch_tokens(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class TestExtraction:
    def write(self, root: Path) -> Path:
        root.mkdir()
        rng = np.random.default_rng(0)
        tiles = rng.integers(0, 200, size=(30, 8, 8, 3))
        for name in SLIDES:
            with h5py.File(root / f"{name}.h5", "w") as file:
                for place, tile in enumerate(tiles + rng.integers(0, 50, size=tiles.shape)):
                    file[f"tile_16_{9 + place // 10}_{place % 10}"] = tile.astype(np.uint8)
        return root

    def test_as_from_a_feature_folder(self, tmp_path: Path) -> None:
        root, encoder = self.write(tmp_path / "plism"), Colours()
        options = {"root": root, "embedder": encoder, "n_tiles": 20}
        result = run(None, tmp_path / "out", cache=FeatureCache(tmp_path / "cache"), **options)
        assert sum(encoder.seen) == 20 * 9
        assert (result.encoder, result.encoder_key, result.pooling) == ("colours", "0" * 64, "cls")
        for name in SLIDES:
            with h5py.File(root / f"{name}.h5") as file:
                places = [[int(part) for part in tile.split("_")[1:]] for tile in file]
                features_ND = Colours().embed(np.stack([file[tile][()] for tile in file]))
            (tmp_path / "colours" / name).mkdir(parents=True)
            np.save(tmp_path / "colours" / name / "features.npy", np.hstack([places, features_ND]).astype(np.float32))
        assert run(tmp_path / "colours", tmp_path / "other", n_tiles=20).details == result.details

    def test_tiles_are_embedded_once(self, tmp_path: Path) -> None:
        root, encoder = self.write(tmp_path / "plism"), Colours()
        run(None, tmp_path / "out", root=root, embedder=encoder)
        assert sum(encoder.seen) == 30 * 9
        run(None, tmp_path / "out", root=root, embedder=encoder, compat="fp16")
        assert sum(encoder.seen) == 30 * 9
