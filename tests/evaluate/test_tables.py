from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from histill.errors import DataError
from histill.evaluate import retrieval
from histill.evaluate.checks import load_check
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.probes import cluster_bootstrap, knn_probe, linear_probe
from histill.evaluate.results import Result, read_result
from histill.evaluate.retrieval import COSINE_RESOLUTION
from histill.evaluate.tables import few_shot, run_paired, run_tiles

PX = 24


@dataclass
class GridEmbedder:
    """Mean colours of a 4 x 4 grid."""

    name: str = "grid"
    key: str = "g0"
    pooling: str = "cls"
    dim: int = 48
    calls: list[int] = field(default_factory=list)

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        self.calls.append(len(tiles))
        assert tiles.dtype == np.uint8
        n, side = len(tiles), tiles.shape[1] // 4
        return tiles.reshape(n, 4, side, 4, side, 3).mean(axis=(2, 4)).reshape(n, -1).astype(np.float32) / 255

    def patch_tokens(self, tiles: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def of_tensor(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.embed(images.permute(0, 2, 3, 1).contiguous().numpy()))


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def labelled(folder: Path, *, slides: int = 8, per_slide: int = 12, seed: int = 0, patients: bool = False) -> Path:
    """Red and blue tiles, not all of them clear, of two sizes; the last quarter of the slides is for tests."""
    rng = np.random.default_rng(seed)
    (folder / "t").mkdir(parents=True)
    rows = []
    for slide in range(slides):
        for tile in range(per_slide):
            label = ("red", "blue")[tile % 2]
            colour = np.array([120.0, 100.0, 120.0]) + np.array([18.0, 0.0, -18.0]) * (1 if label == "red" else -1)
            side = (PX, 2 * PX)[tile % 3 == 0]
            pixels = colour + rng.normal(0, 25, 3) + rng.normal(0, 10, (side, side, 3))
            path = f"t/{slide}-{tile}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / path)
            split = "test" if slide >= slides - slides // 4 else ("val" if slide == 0 else "train")
            row = {"path": path, "label": label, "slide": f"s{slide}", "split": split}
            rows.append(row | ({"patient": f"p{slide // 2}"} if patients else {}))
    write_table(folder / "table.csv", rows)
    return folder / "table.csv"


def options(out: Path, embedder: Any = None) -> dict[str, Any]:
    return {
        "embedder": embedder or GridEmbedder(),
        "input_px": PX,
        "cache": FeatureCache(None),
        "out": out,
        "console": Console(file=StringIO()),
    }


def scores(result: Result) -> dict[str, Any]:
    return {score.name: score for score in result.scores}


# ------------------------------------------------------------------ labelled


def test_the_probes_are_those_of_the_checks(tmp_path: Path) -> None:
    table = labelled(tmp_path / "data")
    result = run_tiles(csv_path=table, **options(tmp_path / "out"))
    check = load_check(table, PX)
    features = check.features(GridEmbedder().of_tensor)
    label, slide, split = (check.columns[name] for name in ("label", "slide", "split"))
    train, test = split == "train", split == "test"
    data = (features[train], label[train], features[test], label[test])
    linear, knn = linear_probe(*data, train_groups_N=slide[train]), knn_probe(*data)
    found = scores(result)
    assert found["linear_balanced_accuracy"].value == pytest.approx(linear.balanced_accuracy)
    assert found["linear_auc"].value == pytest.approx(linear.auc)
    assert found["knn_balanced_accuracy"].value == pytest.approx(knn.balanced_accuracy)
    assert found["knn_auc"].value == pytest.approx(knn.auc)
    ends = cluster_bootstrap(label[test], linear.scores_MC, linear.classes, slide[test], resamples=2000)
    assert (found["linear_auc"].low, found["linear_auc"].high) == (ends.low, ends.high)
    for score in found.values():
        assert 0.5 < score.value <= 1, score
    assert result.headline == "linear_balanced_accuracy"
    assert result.data["clusters"] == "slide"
    assert read_result(tmp_path / "out") == result


def test_more_shots_are_better_and_the_draws_are_told(tmp_path: Path) -> None:
    result = run_tiles(csv_path=labelled(tmp_path / "data"), shots=(1, 30), seeds=10, **options(tmp_path / "out"))
    found = scores(result)
    one, thirty = (found[f"few_shot_balanced_accuracy/{n}"] for n in (1, 30))
    assert one.value < thirty.value
    assert one.note.startswith("mean of 10 draws, std 0.")
    assert thirty.low <= thirty.value <= thirty.high
    assert np.mean(result.details["parts"]["few_shot/1"]["balanced_accuracy"]) == pytest.approx(one.value)
    assert result.data["seeds"] == list(range(10))


def test_few_shot_is_the_nearest_class_mean() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(["a", "b", "c"], 5)
    train, test = rng.normal(size=(15, 6)) + 3 * np.eye(6)[np.repeat([0, 1, 2], 5)], rng.normal(size=(9, 6))
    found, classes = few_shot(train, y, test, shots=5, seed=3)  # all of them: no draw
    centre = train.mean(axis=0)

    def unit(x: np.ndarray) -> np.ndarray:
        return (x - centre) / np.linalg.norm(x - centre, axis=1, keepdims=True)

    means = np.stack([unit(train)[y == name].mean(axis=0) for name in classes])
    distance = ((unit(test)[:, None] - means) ** 2).sum(axis=2)
    np.testing.assert_allclose(found, 1 - distance, atol=1e-12)
    assert classes.tolist() == ["a", "b", "c"]
    again = [few_shot(train, y, test, shots=2, seed=seed)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.allclose(again[0], again[2])


def test_intervals_go_by_patient_where_the_table_knows_them(tmp_path: Path) -> None:
    table = labelled(tmp_path / "data", slides=16, patients=True)
    result = run_tiles(csv_path=table, **options(tmp_path / "out"))
    assert result.data["clusters"] == "patient"
    assert result.details["clusters"]["linear_balanced_accuracy"]["names"] == ["p6", "p7"]
    assert scores(result)["knn_balanced_accuracy"].low is not None


def test_one_test_slide_has_no_interval_and_shared_slides_are_told(tmp_path: Path) -> None:
    table = labelled(tmp_path / "data", slides=5)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    found = scores(run_tiles(csv_path=table, **options(tmp_path / "out")))
    assert found["linear_auc"].low is None
    assert "no interval" in found["linear_balanced_accuracy"].note
    for row in rows[-2:]:
        row["split"] = "train"
    write_table(table, rows)
    found = scores(run_tiles(csv_path=table, **options(tmp_path / "out")))
    assert "1 slides are in train and test, first s4" in found["knn_auc"].note


def test_unreadable_tiles_are_counted_named_and_replaced_by_nothing(tmp_path: Path) -> None:
    table = labelled(tmp_path / "data")
    whole = run_tiles(csv_path=table, **options(tmp_path / "whole"))
    (tmp_path / "data" / "t" / "2-3.png").write_bytes(b"no picture")
    (tmp_path / "data" / "t" / "3-4.png").unlink()
    result = run_tiles(csv_path=table, **options(tmp_path / "out"))
    assert set(result.data["unreadable"]) == {"t/2-3.png", "t/3-4.png"}
    assert result.data["tiles"] == whole.data["tiles"] - 2
    assert "2 tiles unreadable and left out, first t/2-3.png" in scores(result)["linear_auc"].note
    embedder = GridEmbedder()
    again = run_tiles(csv_path=table, **options(tmp_path / "out", embedder))
    assert embedder.calls == []
    assert (again.scores, again.data) == (result.scores, result.data)


def test_finished_parts_stay_and_other_tiles_are_other_parts(tmp_path: Path) -> None:
    table, embedder = labelled(tmp_path / "data"), GridEmbedder()
    first = run_tiles(csv_path=table, **options(tmp_path / "out", embedder))
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    assert len(parts) == 1 + 2 + 3
    gone = next(path for path in parts if path.name.startswith("knn"))
    gone.unlink()
    again = run_tiles(csv_path=table, **options(tmp_path / "out", embedder))
    assert [path for path, stamp in parts.items() if path.stat().st_mtime_ns != stamp] == [gone]
    assert (again.scores, again.details) == (first.scores, first.details)
    assert sum(embedder.calls) == 96
    Image.new("RGB", (PX, PX), "white").save(tmp_path / "data" / "t" / "7-0.png")
    changed = run_tiles(csv_path=table, **options(tmp_path / "out", embedder))
    assert sum(embedder.calls) == 2 * 96, "the tiles are not the same"
    assert changed.scores != first.scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [row | {"split": "holdout"} for row in rows], r"unknown split(.|\n)*holdout"),
        (
            lambda rows: [row | {"label": "red" if row["split"] == "test" else row["label"]} for row in rows],
            "two classes",
        ),
        (lambda rows: [r for r in rows if r["split"] != "train"] + rows[12:20], "at least 20 training tiles"),
        (lambda rows: [row | {"label": ""} for row in rows], "empty fields"),
        (lambda rows: [row | {"path": "nowhere.png"} for row in rows], "none of the 96 tiles can be read"),
    ],
)
def test_a_table_that_cannot_be_scored_is_refused_before_anything_is_embedded(
    tmp_path: Path, change: Any, message: str
) -> None:
    table, embedder = labelled(tmp_path / "data"), GridEmbedder()
    with table.open() as file:
        write_table(table, change(list(csv.DictReader(file))))
    with pytest.raises(DataError, match=message):
        run_tiles(csv_path=table, **options(tmp_path / "out", embedder))
    assert embedder.calls == []


# ------------------------------------------------------------------ paired


def fields(seed: int, scanners: str = "abc") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of fields under scanners of which not all have seen everything."""
    rng = np.random.default_rng(seed)
    rows = [(s, f) for s, last in zip(scanners, (40, 35, 20), strict=True) for f in range(last)]
    scanner, number = (np.array(column) for column in zip(*rows, strict=True))
    place = rng.normal(size=(40, 8))[number] + 0.6 * rng.normal(size=(3, 8))[[scanners.index(s) for s in scanner]]
    return (place + 0.7 * rng.normal(size=place.shape)).astype(np.float32), scanner, number


def by_definition(x: np.ndarray, scanner: np.ndarray, number: np.ndarray, k: int) -> float:
    """Mean over pairs, directions and twins of the chance to find the twin, ties drawn at random: all by sorting."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-300)  # a row of zeros has a cosine of 0
    pairs = []
    for a, b in combinations(sorted(set(scanner)), 2):
        directions = []
        for one, other in ((a, b), (b, a)):
            chances = []
            for query in np.flatnonzero((scanner == one) & np.isin(number, number[scanner == other])):
                (twin,) = np.flatnonzero((scanner == other) & (number == number[query]))
                pool = [j for j in np.flatnonzero(np.isin(scanner, (a, b))) if j != query]
                lead = np.array([unit[query] @ unit[j] - unit[query] @ unit[twin] for j in pool])
                nearer, equal = (lead > COSINE_RESOLUTION).sum(), (abs(lead) <= COSINE_RESOLUTION).sum()
                chances.append(min(max((k - nearer) / equal, 0), 1))
            directions.append(np.mean(chances))
        pairs.append(np.mean(directions))
    return float(np.mean(pairs))


@pytest.mark.parametrize("chunk", [2**24, 100])
def test_the_numbers_are_the_definition_s_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    x, scanner, number = fields(0)
    x[5] = x[6] = x[45]  # ties
    x[7] = 0.0
    found = retrieval.paired_retrieval(x, scanner, number.astype(str), (1, 3, 5, 10))
    for k, share in found.top.items():
        assert share == pytest.approx(by_definition(x.astype(np.float64), scanner, number, k), abs=1e-12)


def test_the_terms_are_those_of_each_twin() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6))
    tiles = [retrieval.ScannerTiles.of(features) for features in (x, 1000 * x)]
    hits = retrieval.pair_hits(*tiles, np.arange(50), np.arange(50), (1, 10))
    np.testing.assert_allclose(hits.cosine_P, 1)
    assert hits.top[1].shape == (50,)
    assert hits.top[1].min() == 1.0


def test_real_scanners_get_the_numbers_of_the_checks(shared_data: Path, tmp_path: Path) -> None:
    table = tmp_path / "multiscanner.csv"
    with (shared_data / "tiles" / "multiscanner.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["slide"] in _two_slides(shared_data)]
    write_table(table, rows)
    (tmp_path / "multiscanner").symlink_to(shared_data / "tiles" / "multiscanner")
    result = run_paired(csv_path=table, **options(tmp_path / "out"))
    check = load_check(table, PX)
    expected = check.score(check.features(GridEmbedder().of_tensor))
    found = scores(result)
    for name in ("top_1", "top_10", "cosine"):
        assert found[name].value == pytest.approx(expected[name], abs=1e-9)
        assert found[name].low <= found[name].value <= found[name].high
    names = ("top_1", "top_3", "top_5", "top_10")
    assert sorted(found[name].value for name in names) == [found[name].value for name in names]
    pairs = result.details["pairs"]
    scanners = result.data["scanners"]
    assert len(pairs) == len(scanners) * (len(scanners) - 1) // 2
    assert np.mean([pair["top_10_accuracy"] for pair in pairs]) == pytest.approx(found["top_10"].value)
    assert read_result(tmp_path / "out") == result


def _two_slides(shared_data: Path) -> list[str]:
    with (shared_data / "tiles" / "multiscanner.csv").open() as file:
        return sorted({row["slide"] for row in csv.DictReader(file)})[:2]


def paired_table(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    (folder / "t").mkdir(parents=True)
    rows = []
    for slide in ("p", "q"):
        for x in range(6):
            scene = rng.uniform(60, 200, (4, 4, 3)).repeat(PX // 4, 0).repeat(PX // 4, 1)
            for number, scanner in enumerate(("A/1", "B", "C")):
                path = f"t/{slide}-{x}-{number}.png"
                noisy = scene + 20 * number + rng.normal(0, 20, scene.shape)
                Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / path)
                rows.append({"path": path, "slide": slide, "scanner": scanner, "x": x, "y": 0})
    write_table(folder / "paired.csv", rows)
    return folder / "paired.csv"


def test_finished_pairs_stay(tmp_path: Path) -> None:
    table, embedder = paired_table(tmp_path / "data"), GridEmbedder()
    first = run_paired(csv_path=table, **options(tmp_path / "out", embedder))
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    assert len(parts) == 1 + 3
    gone = next(path for path in parts if path.name.startswith("A_1-C"))
    gone.unlink()
    again = run_paired(csv_path=table, **options(tmp_path / "out", embedder))
    assert [path for path, stamp in parts.items() if path.stat().st_mtime_ns != stamp] == [gone]
    assert (again.scores, again.details) == (first.scores, first.details)
    assert sum(embedder.calls) == 36


def test_tables_without_twins_or_with_a_field_twice_are_refused(tmp_path: Path) -> None:
    table = paired_table(tmp_path / "data")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    write_table(table, [row | {"x": str(number)} for number, row in enumerate(rows)])
    with pytest.raises(DataError, match="no field"):
        run_paired(csv_path=table, **options(tmp_path / "out"))
    write_table(table, [row | {"x": "1"} for row in rows])
    with pytest.raises(DataError, match="holds one field twice"):
        run_paired(csv_path=table, **options(tmp_path / "out"))
