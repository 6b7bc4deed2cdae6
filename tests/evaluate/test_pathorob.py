from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from histill.errors import ConfigError, DataError
from histill.evaluate import pathorob
from histill.evaluate.embedding import FeatureCache
from histill.evaluate.pathorob import index as index_module
from histill.evaluate.pathorob.drop import average_performance_drop, cell_shares, confounded_probes
from histill.evaluate.pathorob.index import COLUMNS, typed_neighbours
from histill.evaluate.pathorob.layout import DATASETS, find_datasets, find_images, read_features, read_metadata
from histill.evaluate.pathorob.run import run_pathorob
from histill.evaluate.results import Result, read_result

# ------------------------------------------------------------------ robustness index


@pytest.fixture(scope="module")
def reference(shared_parity: Path) -> tuple[np.ndarray, Path, float]:
    folder = shared_parity / "pathorob"
    expected = json.loads((folder / "expected.json").read_text())
    assert expected["k"] == 11
    return np.load(folder / "features.npy"), folder / "metadata.csv", expected["reference"]["robustness_index"]


def test_it_gives_the_original_s_number(reference) -> None:
    features, metadata, expected = reference
    assert pathorob.robustness_index(features, metadata, 11) == pytest.approx(expected, abs=1e-9)


def test_metadata_come_in_any_form(reference) -> None:
    features, path, expected = reference
    with path.open() as file:
        rows = list(csv.DictReader(file))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for metadata in (rows, columns, pa.table(columns), {name: np.array(c) for name, c in columns.items()}):
        assert pathorob.robustness_index(features, metadata, 11) == pytest.approx(expected, abs=1e-9)


def cohort(seed: int, tiles: int = 240, centre_signal: float = 1.0, biology_signal: float = 1.0) -> tuple[Any, Any]:
    """Two classes from two centres, six slides of each; features follow both."""
    rng = np.random.default_rng(seed)
    biology, centre = rng.integers(0, 2, tiles), rng.integers(0, 2, tiles)
    slide = np.array([f"{b}{c}-{s}" for b, c, s in zip(biology, centre, rng.integers(0, 6, tiles), strict=True)])
    axes = np.linalg.qr(rng.normal(size=(10, 10)))[0]
    features = rng.normal(size=(tiles, 10)) + 3 * biology_signal * np.outer(biology * 2 - 1, axes[0])
    features += 3 * centre_signal * np.outer(centre * 2 - 1, axes[1])
    metadata = {
        "subset": np.full(tiles, "ID"),
        "slide_id": slide,
        "patch_id": np.arange(tiles).astype(str),
        "biological_class": np.array(["normal", "tumor"])[biology],
        "medical_center": np.array(["RUMC", "UMCU"])[centre],
    }
    return features, metadata


def by_loop(features: np.ndarray, metadata: dict[str, np.ndarray], k: int) -> float:
    """The definition, tile by tile and subset by subset; needs features without ties."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    so = os = 0
    for subset in set(metadata["subset"]) - {"OOD"}:
        rows = np.flatnonzero(metadata["subset"] == subset)
        for q in rows:
            others = [j for j in rows if metadata["slide_id"][j] != metadata["slide_id"][q]]
            for j in sorted(others, key=lambda j: float(np.square(unit[q] - unit[j]).sum()))[:k]:
                biology = metadata["biological_class"][j] == metadata["biological_class"][q]
                centre = metadata["medical_center"][j] == metadata["medical_center"][q]
                so += biology and not centre
                os += centre and not biology
    return so / (so + os)


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("chunk", [2**23, 700])
def test_it_is_the_definition_in_any_chunks(k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, metadata = cohort(0)
    monkeypatch.setattr(index_module, "_CHUNK", chunk)
    assert pathorob.robustness_index(features, metadata, k) == pytest.approx(by_loop(features, metadata, k), abs=1e-12)


def test_neighbours_are_sought_within_a_subset_and_ood_is_left_out() -> None:
    features, metadata = cohort(1)
    metadata["subset"] = np.array(["pair_0", "pair_1", "OOD"])[np.arange(240) % 3]
    assert pathorob.robustness_index(features, metadata, 5) == pytest.approx(by_loop(features, metadata, 5), abs=1e-12)
    so, os = typed_neighbours(features, metadata, 5)
    assert np.isnan(so[2::3]).all()
    assert np.isfinite(so[0::3]).all()
    left = np.flatnonzero(np.arange(240) % 3 != 2)
    without = {name: column[left] for name, column in metadata.items()}
    np.testing.assert_array_equal(typed_neighbours(features[left], without, 5), (so[left], os[left]))


def test_the_ends_of_the_scale() -> None:
    features, metadata = cohort(2, centre_signal=0.0, biology_signal=9.0)
    assert pathorob.robustness_index(features, metadata, 11) > 0.99
    features, metadata = cohort(2, centre_signal=9.0, biology_signal=0.0)
    assert pathorob.robustness_index(features, metadata, 11) < 0.01
    features, metadata = cohort(2, centre_signal=0.0, biology_signal=0.0)
    assert pathorob.robustness_index(features, metadata, 11) == pytest.approx(0.5, abs=0.05)


def test_length_says_nothing_and_neither_does_the_order_of_rows() -> None:
    features, metadata = cohort(3)
    expected = pathorob.robustness_index(features, metadata, 9)
    rng = np.random.default_rng(0)
    order = rng.permutation(240)
    scaled = features * rng.uniform(0.1, 1000, (240, 1))
    moved = {name: column[order] for name, column in metadata.items()}
    assert pathorob.robustness_index(scaled[order], moved, 9) == pytest.approx(expected, abs=1e-9)


def test_ties_share_the_places_that_are_left() -> None:
    # the query's nearest are three equal tiles: one SO, one OS, one SS; with k = 2 each has 2/3 of a place
    features = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    metadata = {
        "subset": ["ID"] * 4,
        "slide_id": ["q", "a", "b", "c"],
        "biological_class": ["x", "x", "y", "x"],
        "medical_center": ["1", "2", "1", "1"],
    }
    so, os = typed_neighbours(features, metadata, 2)
    assert (so[0], os[0]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    collapsed = np.ones((240, 3))
    assert pathorob.robustness_index(collapsed, cohort(4)[1], 5) == pytest.approx(0.5, abs=0.05)


def by_counting(features: np.ndarray, metadata: dict[str, Any], k: int) -> float:
    """The definition with ties: distances rounded to 1e-9, tiles as near as the k-th share what is left of k."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-300)
    so = os = 0.0
    for q, (subset, slide, biology, centre) in enumerate(zip(*(metadata[name] for name in COLUMNS), strict=True)):
        if subset == "OOD":
            continue
        pool = [j for j in range(len(unit)) if metadata["subset"][j] == subset and metadata["slide_id"][j] != slide]
        distance = {j: round(float(np.linalg.norm(unit[q] - unit[j])), 9) for j in pool}
        kth = sorted(distance.values())[k - 1]
        nearer, equal = [j for j in pool if distance[j] < kth], [j for j in pool if distance[j] == kth]
        for some, share in ((nearer, 1.0), (equal, (k - len(nearer)) / len(equal))):
            for j in some:
                same_biology = metadata["biological_class"][j] == biology
                same_centre = metadata["medical_center"][j] == centre
                so += share * (same_biology and not same_centre)
                os += share * (same_centre and not same_biology)
    return so / (so + os)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_cohort_has_the_index_of_the_definition(data: st.DataObject) -> None:
    """Several classes, centres and subsets, slides of any size, copies of tiles, labels as numbers or as text."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    tiles = data.draw(st.integers(12, 40))
    metadata = {
        "subset": rng.choice(
            ["ID", "pair_1", "OOD"], tiles, p=data.draw(st.sampled_from([(1, 0, 0), (0.5, 0.4, 0.1)]))
        ),
        "slide_id": rng.integers(0, data.draw(st.integers(3, 12)), tiles),
        "biological_class": rng.integers(0, data.draw(st.integers(2, 4)), tiles),
        "medical_center": rng.integers(0, data.draw(st.integers(2, 4)), tiles),
    }
    if data.draw(st.booleans()):
        metadata = {name: column.astype(str) for name, column in metadata.items()}
    features = rng.normal(size=(tiles, 3)) * data.draw(st.sampled_from([1.0, 1000.0]))
    place = st.integers(0, tiles - 1)
    for copy, original in data.draw(st.lists(st.tuples(place, place), max_size=12)):
        features[copy] = features[original]
    subsets = [np.flatnonzero(metadata["subset"] == name) for name in set(metadata["subset"].tolist()) - {"OOD"}]
    slides = [metadata["slide_id"][rows] for rows in subsets]
    left = min(len(slide) - max(np.unique(slide, return_counts=True)[1]) for slide in slides)
    assume(left >= 1)
    k = data.draw(st.integers(1, int(left)))
    try:
        want = by_counting(features, metadata, k)
    except ZeroDivisionError:
        with pytest.raises(DataError, match="no neighbour tells"):
            pathorob.robustness_index(features, metadata, k)
        return
    assert pathorob.robustness_index(features, metadata, k) == pytest.approx(want, abs=1e-9)
    with pytest.raises(DataError, match="fewer neighbours on other slides"):
        pathorob.robustness_index(features, metadata, int(left) + 1)


def test_rows_without_a_value_are_refused() -> None:
    features, metadata = cohort(6)
    for lost in (None, float("nan"), ""):
        column = metadata["medical_center"].astype(object)
        column[33] = lost
        with pytest.raises(DataError, match=r"without a value(.|\n)*medical_center, row 33"):
            pathorob.robustness_index(features, metadata | {"medical_center": column}, 5)
    named = metadata | {"medical_center": np.where(metadata["medical_center"] == "UMCU", "None", "nan")}
    assert pathorob.robustness_index(features, named, 5) == pathorob.robustness_index(features, metadata, 5)


def test_what_cannot_be_measured_is_refused() -> None:
    features, metadata = cohort(5)
    with pytest.raises(DataError, match="one row of metadata per feature row"):
        pathorob.robustness_index(features[:-1], metadata, 5)
    with pytest.raises(ConfigError, match="1 or more"):
        pathorob.robustness_index(features, metadata, 0)
    with pytest.raises(ConfigError, match="whole number"):
        pathorob.robustness_index(features, metadata, 5.0)
    with pytest.raises(DataError, match=r"0 tiles on other slides, k = 5"):
        pathorob.robustness_index(features, metadata | {"slide_id": ["one"] * 240}, 5)
    with pytest.raises(DataError, match=r"fewer neighbours on other slides(.|\n)*k = 230"):
        pathorob.robustness_index(features, metadata, 230)
    with pytest.raises(DataError, match="medical_center"):
        pathorob.robustness_index(features, {k: v for k, v in metadata.items() if k != "medical_center"}, 5)
    with pytest.raises(DataError, match="no neighbour tells biology from centre"):
        pathorob.robustness_index(
            features, metadata | {"medical_center": ["A"] * 240, "biological_class": ["x"] * 240}, 5
        )
    features[17, 3] = np.nan
    with pytest.raises(DataError, match="row 17"):
        pathorob.robustness_index(features, metadata, 5)


# ------------------------------------------------------------------ average performance drop

# Published with PathoROB: UNI2-h on Camelyon, right answers of 2,400 per level (rows) and repeat, and what it reports.
PUBLISHED = """
2324 2260 2371 2328 2347 2398 2358 2389 2382 2341 2380 2398 2374 2374 2357 2384 2381 2374 2383 2380
2379 2342 2372 2328 2364 2398 2367 2390 2384 2345 2390 2398 2298 2340 2299 2364 2383 2376 2168 2384
2363 2307 2371 2347 2328 2396 2366 2389 2374 2347 2388 2398 2386 2312 2360 2350 2374 2375 2367 2338
2388 2324 2373 2368 2328 2384 2354 2389 2318 2348 2382 2373 2383 2361 2329 2281 2381 2376 2316 2324
2387 2049 2355 2326 2355 2397 2356 2385 2373 2348 2359 2357 2332 2348 2346 2315 2332 2377 2278 2367
2380 2256 2369 2293 2327 2356 2331 2094 2283 2275 2378 2358 2186 2323 2271 2155 2362 2378 2155 2044
2255 2198 2346 2230 2199 2148 2103 2209 2241 2273 2305 2330 2128 2124 2061 2089 2170 2371 1961 1725
2103 1703 2082 1313 2002 2096 1902 1882 2017 2188 1740 2176 1970 2153 1798 1978 1996 2203 1622 1542
"""
PUBLISHED_DROP = -0.0462926520863586


def test_the_published_drop_comes_out_of_the_published_accuracies() -> None:
    accuracy = np.array([line.split() for line in PUBLISHED.split("\n") if line], float) / 2400
    assert accuracy.shape == (8, 20)
    assert average_performance_drop(accuracy) == pytest.approx(PUBLISHED_DROP, abs=1e-9)


def test_a_drop_by_hand() -> None:
    assert average_performance_drop([[0.8, 0.5], [0.4, 0.5], [0.8, 0.25]]) == pytest.approx((-0.5 + 0 + 0 - 0.5) / 4)
    for bad in ([[0.8, 0.5]], [[0.0], [0.5]], [0.5, 0.4]):
        with pytest.raises(DataError, match="level 0"):
            average_performance_drop(bad)


@pytest.mark.parametrize(("classes", "centres"), [(2, 2), (4, 4), (6, 2), (3, 2)])
def test_shares_go_from_balanced_to_confounded(classes: int, centres: int) -> None:
    for level in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(cell_shares(classes, centres, level).sum(axis=1), 1)
    np.testing.assert_allclose(cell_shares(classes, centres, 0.0), 1 / centres)
    confounded = cell_shares(classes, centres, 1.0)
    assert set(np.unique(confounded)) == {0.0, 1.0}
    assert np.ptp(confounded.sum(axis=0)) <= 1, "centres have as many classes as can be"


def test_a_probe_that_can_use_the_centre_drops_and_another_does_not() -> None:
    drops = {}
    for name, centre, biology in (("centre", 2.0, 0.3), ("biology", 0.0, 0.6)):
        features, metadata = cohort(6, tiles=800, centre_signal=centre, biology_signal=biology)
        runs = [confounded_probes(features, metadata, levels=5, seed=seed).in_domain for seed in range(4)]
        drops[name] = average_performance_drop(np.array(runs).T)
    assert drops["centre"] < -0.15
    assert drops["biology"] == pytest.approx(0.0, abs=0.05)


def test_levels_have_the_same_size_and_the_same_seed_the_same_numbers() -> None:
    features, metadata = cohort(7)
    first, again, other = (confounded_probes(features, metadata, levels=3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.out_of_domain is None
    metadata["subset"] = np.where(np.arange(240) < 200, "ID", "OOD")
    with_ood = confounded_probes(features, metadata, levels=3, seed=1)
    assert len(with_ood.out_of_domain) == len(with_ood.in_domain) == 3


def test_no_slide_is_on_both_sides_even_when_it_shows_several_classes() -> None:
    """Features that name the tile, labels at random: only a test tile that was trained on could be told."""
    rng = np.random.default_rng(8)
    slide = np.repeat(np.arange(16), 30)
    metadata = {
        "subset": ["ID"] * 480,
        "slide_id": slide.astype(str),
        "biological_class": rng.integers(0, 2, 480).astype(str),
        "medical_center": (slide % 2).astype(str),
    }
    for seed in range(3):  # a tile that the probe has not seen is all zeros to it: chance, exactly
        assert confounded_probes(np.eye(480), metadata, levels=2, seed=seed).in_domain == (0.5, 0.5)


def test_a_cell_with_one_slide_cannot_be_held_out() -> None:
    features, metadata = cohort(9)
    metadata["slide_id"] = np.where(np.char.startswith(metadata["slide_id"], "00"), "lone", metadata["slide_id"])
    with pytest.raises(DataError, match=r"too few slides(.|\n)*normal from RUMC"):
        confounded_probes(features, metadata, levels=2, seed=0)


# ------------------------------------------------------------------ files


def write_metadata(root: Path, name: str, metadata: dict[str, np.ndarray]) -> None:
    path = root / "metadata" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(metadata)
        writer.writerows(zip(*metadata.values(), strict=True))


def png(tile: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "PNG")
    return buffer.getvalue()


def tile_of(features: np.ndarray) -> np.ndarray:
    """Hide ten features in the columns of a small picture."""
    grey = np.clip(128 + 10 * features, 0, 255).astype(np.uint8)
    return np.repeat(np.repeat(grey[None, :, None], 8, axis=0), 3, axis=2)


def write_images(root: Path, dataset: str, metadata: dict[str, np.ndarray], tiles: Sequence[np.ndarray]) -> None:
    """Two Parquet files of several row groups, as published."""
    folder = root / f"PathoROB-{dataset}" / "data"
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(tiles))
    for number, rows in enumerate(np.array_split(order, 2)):
        columns = {name: column[rows].tolist() for name, column in metadata.items()}
        images = [{"bytes": png(tiles[row]), "path": None} for row in rows]
        table = pa.table({"image": images, **columns})
        parquet.write_table(table, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=50)


@dataclass
class PictureEmbedder:
    """Reads the features back."""

    name: str = "picture"
    key: str = "p0"
    pooling: str = "cls"
    dim: int = 10
    calls: list[int] = field(default_factory=list)

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        self.calls.append(len(tiles))
        return (tiles[:, 0, :, 0].astype(np.float32) - 128) / 10

    def patch_tokens(self, tiles: np.ndarray) -> np.ndarray:
        raise NotImplementedError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Camelyon with rows of another centre, and TCGA with paired subsets that share tiles."""
    folder = tmp_path_factory.mktemp("pathorob")
    features, metadata = cohort(10)
    metadata["subset"] = np.where(np.arange(240) < 200, "ID", "OOD")
    write_metadata(folder, "camelyon", metadata)
    write_images(folder, "camelyon", metadata, [tile_of(x) for x in features])
    features, metadata = cohort(11, tiles=400)
    rows = np.concatenate([np.arange(0, 300), np.arange(100, 400)])
    paired = {name: column[rows] for name, column in metadata.items()}
    paired["subset"] = np.repeat(["pair_0", "pair_1"], 300)
    write_metadata(folder, "tcga_2x2", paired)
    write_metadata(folder, "tcga_4x4", metadata)
    write_images(folder, "tcga", metadata, [tile_of(x) for x in features])
    return folder


def run(root: Path, out: Path, embedder: Any = None, **options: Any) -> Result:
    embedder = PictureEmbedder() if embedder is None and "features" not in options else embedder
    arguments = {"repeats": 2, "cache": FeatureCache(None), "console": Console(file=StringIO())} | options
    return run_pathorob(root=root, out=out, embedder=embedder, **arguments)


def scores(result: Result) -> dict[str, float | None]:
    return {score.name: score.value for score in result.scores}


def test_images_are_those_of_their_names_in_any_blocks(tmp_path: Path) -> None:
    features, metadata = cohort(13)
    tiles = [tile_of(x) for x in features]
    write_images(tmp_path, "camelyon", metadata, tiles)
    names = [f"{s}-{p}" for s, p in zip(metadata["slide_id"], metadata["patch_id"], strict=True)]
    wanted = names[20:200]
    images = find_images(tmp_path, DATASETS[0], [*wanted, *wanted[:9]])
    assert sorted(images.tiles) == sorted(wanted)
    read = np.concatenate([images.read(first, min(first + 37, 180)) for first in range(0, 180, 37)])
    for name, tile in zip(images.tiles, read, strict=True):
        np.testing.assert_array_equal(tile, tiles[names.index(name)])


def test_the_numbers_are_those_of_the_tiles(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path)
    found = scores(result)
    expected = []
    for dataset in (DATASETS[0], DATASETS[2]):
        table = read_metadata(root, dataset.index_metadata)
        images = find_images(root, dataset, table.tiles)
        row = {tile: i for i, tile in enumerate(images.tiles)}
        features = PictureEmbedder().embed(images.read(0, len(images.tiles)))[[row[tile] for tile in table.tiles]]
        expected.append(pathorob.robustness_index(features, table.columns, dataset.k))
        assert found[f"robustness_index/{dataset.name}"] == pytest.approx(expected[-1], abs=1e-12)
    assert found["robustness_index"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert found["robustness_index/tolkach_esca"] is None
    mean = result.scores[0]
    assert mean.low < mean.value < mean.high
    assert mean.note == "mean over camelyon, tcga; without tolkach_esca"
    assert {"apd_id/camelyon", "apd_ood/camelyon", "apd_id/tcga"} <= set(found)
    assert "apd_ood/tcga" not in found, "it has no other centre here"
    assert set(result.details["datasets"]["tcga"]["subsets"]) == {"pair_0", "pair_1"}
    assert read_result(tmp_path) == result


def test_each_tile_is_embedded_once_and_finished_parts_stay(root: Path, tmp_path: Path) -> None:
    embedder = PictureEmbedder()
    first = run(root, tmp_path, embedder)
    assert sum(embedder.calls) == 240 + 400
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(parts) == 2 * (1 + 2)
    gone = next(path for path in parts if path.name.startswith("tcga-drop-1"))
    gone.unlink()
    again = run(root, tmp_path, embedder)
    assert sum(embedder.calls) == 640
    assert [path for path, stamp in parts.items() if path.stat().st_mtime_ns != stamp] == [gone]
    assert (again.scores, again.details) == (first.scores, first.details)


def test_a_run_that_is_cut_short_goes_on(root: Path, tmp_path: Path) -> None:
    class Cut(PictureEmbedder):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            if self.calls:
                raise KeyboardInterrupt
            return super().embed(tiles)

    whole = run(root, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", Cut())
    assert len(list((tmp_path / "cut" / "parts").iterdir())) == 3
    embedder = PictureEmbedder()
    result = run(root, tmp_path / "cut", embedder)
    assert embedder.calls == [400]
    assert (result.scores, result.details) == (whole.scores, whole.details)


def test_features_of_the_original_s_extraction_give_the_same(root: Path, tmp_path: Path) -> None:
    from_images = run(root, tmp_path / "a", datasets=["camelyon"])
    table = read_metadata(root, "camelyon")
    images = find_images(root, DATASETS[0], table.tiles)
    features = dict(zip(images.tiles, PictureEmbedder().embed(images.read(0, 240)), strict=True))
    folder = tmp_path / "features" / "picture_cls" / "camelyon"
    folder.mkdir(parents=True)
    for centre in ("RUMC", "UMCU"):
        members = [t for t, c in zip(table.tiles, table.columns["medical_center"], strict=True) if c == centre]
        np.savez(folder / f"{centre}.npz", **{tile: features[tile] for tile in members})
    result = run(root, tmp_path / "b", datasets=["camelyon"], features=folder.parent)
    assert scores(result) == scores(from_images)
    assert (result.encoder, result.pooling) == ("picture_cls", "as extracted")
    with pytest.raises(ConfigError, match="either an encoder or a folder"):
        run(root, tmp_path / "c", PictureEmbedder(), features=folder.parent)
    (folder / "UMCU.npz").unlink()
    with pytest.raises(DataError, match=r"centre are missing(.|\n)*UMCU"):
        read_features(folder, table.tiles, table.columns["medical_center"].tolist())
    np.savez(folder / "UMCU.npz", other=np.ones(10))
    with pytest.raises(DataError, match=r"cannot be read(.|\n)*UMCU"):
        read_features(folder, table.tiles, table.columns["medical_center"].tolist())


def test_what_is_missing_is_said(root: Path, tmp_path: Path) -> None:
    present, missing = find_datasets(root)
    assert [dataset.name for dataset in present] == ["camelyon", "tcga"]
    assert missing == {"tolkach_esca": "no metadata/tolkach_esca_reduced.csv"}
    with pytest.raises(ConfigError, match=r"no such data set(.|\n)*camelyon"):
        find_datasets(root, ["cameleon"])
    with pytest.raises(DataError, match=r"no data set of PathoROB(.|\n)*tolkach_esca: no metadata"):
        find_datasets(root, ["tolkach_esca"])
    with pytest.raises(DataError, match=r"1 of 1 tiles(.|\n)*no-such-tile"):
        find_images(root, DATASETS[0], ["no-such-tile"])
    metadata = cohort(12)[1]
    write_metadata(tmp_path, "camelyon", {name: np.repeat(column, 2) for name, column in metadata.items()})
    with pytest.raises(DataError, match="twice in one subset"):
        read_metadata(tmp_path, "camelyon")
    folder = tmp_path / "PathoROB-camelyon" / "data"
    folder.mkdir(parents=True)
    (folder / "train-0.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="images cannot be read"):
        find_images(tmp_path, DATASETS[0], ["a-b"])
    parquet.write_table(pa.table({"slide_id": ["a"], "patch_id": ["b"]}), folder / "train-0.parquet")
    with pytest.raises(DataError, match="no column image"):
        find_images(tmp_path, DATASETS[0], ["a-b"])
