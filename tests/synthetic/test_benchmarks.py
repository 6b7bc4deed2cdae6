"""Folders of drawn tissue in the layouts of the benchmarks: read by the real readers, and worth learning."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from histill import files
from histill.errors import ConfigError, DataError
from histill.evaluate.embedding import ReadTiles
from histill.evaluate.encoders import slide_embedder
from histill.evaluate.eva.layouts import read_bach, read_mhist, read_pcam
from histill.evaluate.eva.layouts_segmentation import read_consep
from histill.evaluate.eva.layouts_slides import read_camelyon16
from histill.evaluate.hest.layout import find_tasks, read_counts, read_patches, read_task
from histill.evaluate.pathorob.index import robustness_index
from histill.evaluate.pathorob.layout import find_datasets, find_images, read_metadata
from histill.evaluate.plism.layout import check_places, find_tiles, read_tile_places, tile_reader
from histill.slides.open import open_slide
from histill.slides.scale import resolve_scale
from histill.synthetic.benchmarks import BENCHMARKS, write_benchmarks
from histill.synthetic.benchmarks.hest import GENES, PROGRAMMES
from histill.tiles.images import read_table

TILES = 16


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "drawn"
    write_benchmarks(folder, seed=3, tiles=TILES)
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _pattern(tiles_NHW3: np.ndarray) -> np.ndarray:
    """Energy in bands of size, coarse to fine, whatever the colour and the contrast: what kind of tissue, roughly."""
    grey = tiles_NHW3.astype(np.float64).mean(-1)
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    spectrum = np.abs(np.fft.rfft2(grey))
    bands = ((1, 3), (3, 6), (6, 10), (10, 16), (16, 24), (24, 40))
    return np.log(np.stack([spectrum[:, a:b, a:b].mean((1, 2)) for a, b in bands], axis=1))


# ------------------------------------------------------------------ the folder


def test_the_roots_name_every_benchmark_and_nothing_else_is_there(drawn: Path) -> None:
    roots = files.read_json(drawn / "roots.json")
    assert set(roots) == {"plism", "hest", "eva", "pathorob", "tiles", "paired"}
    assert {f"eva/{task}" for task in roots["eva"] if task not in ("quick", "runs")} < set(BENCHMARKS)
    for path in (*(roots[name] for name in ("plism", "hest", "tiles", "paired")), roots["pathorob"]["root"]):
        assert (drawn / path).exists()
    assert {path.name for path in drawn.iterdir()} == {"plism", "hest", "eva", "pathorob", "tables", "roots.json"}


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path, drawn: Path) -> None:
    names = ("plism", "hest", "eva/pcam", "eva/consep", "eva/cam16")
    write_benchmarks(tmp_path / "again", seed=3, tiles=TILES, names=names, workers=2)
    again, first = _hashes(tmp_path / "again"), _hashes(drawn)
    again.pop("roots.json")
    assert len(again) > 20
    assert again == {path: first[path] for path in again}


def test_another_seed_gives_other_tissue(tmp_path: Path, drawn: Path) -> None:
    write_benchmarks(tmp_path / "other", seed=4, tiles=TILES, names=("eva/pcam",))
    first, other = _hashes(drawn), _hashes(tmp_path / "other")
    assert all(other[path] != first[path] for path in other if path.endswith("_x.h5"))


@pytest.mark.parametrize(
    ("told", "kind"),
    [({"names": ("plsm",)}, ConfigError), ({"names": ()}, ConfigError), ({"tiles": 8}, ConfigError)],
)
def test_wrong_arguments_are_refused_and_leave_nothing(tmp_path: Path, told: dict[str, Any], kind: type) -> None:
    with pytest.raises(kind):
        write_benchmarks(tmp_path / "new", **told)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty"):
        write_benchmarks(tmp_path)


# ------------------------------------------------------------------ PLISM


def test_plism_shows_the_same_fields_under_every_look(drawn: Path) -> None:
    found = find_tiles(drawn / "plism")
    assert len(found) == 6
    assert {slide.staining for slide in found} == {"HR", "MY"}
    places_N3 = check_places({slide.name: read_tile_places(path) for slide, path in found.items()})
    tiles = [tile_reader(path, places_N3)(0, TILES) for path in found.values()]
    assert tiles[0].shape == (TILES, 224, 224, 3)
    shape = (TILES, 28, 8, 28, 8)
    first, *others = ([np.ravel(tile) for tile in slide.mean(-1).reshape(shape).mean((2, 4))] for slide in tiles)
    for other in others:  # the nearest in structure is the same field; colours differ
        likeness = np.corrcoef(first, other)[:TILES, TILES:]
        assert (likeness.argmax(axis=1) == np.arange(TILES)).all()
    colours = [slide.mean((0, 1, 2)) for slide in tiles]
    assert min(np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]) > 2


# ------------------------------------------------------------------ HEST


def test_counts_follow_the_nuclei_that_are_seen(drawn: Path) -> None:
    present, _ = find_tasks(drawn / "hest")
    task = read_task(drawn / "hest" / present[0])
    assert (len(task.genes), len(task.folds)) == (50, 4)
    assert [len(fold.test) for fold in task.folds] == [1, 1, 1, 1]
    for fold in task.folds:
        (sample,) = fold.test
        patches = read_patches(sample.patches)
        counts_NG = read_counts(sample.expression, patches.barcodes, task.genes)
        assert patches.read(0, TILES).shape == (TILES, 224, 224, 3)
        assert (counts_NG == np.floor(counts_NG)).all()
        assert (counts_NG.std(axis=0) > 0).all(), "no gene is constant"
        kinds = np.arange(TILES) % 4  # gland, tumour, stroma, lymphoid
        means = {name: counts_NG[:, [gene.startswith(name) for gene in task.genes]].mean(axis=1) for name in PROGRAMMES}
        assert means["LYMPHOID"][kinds == 3].mean() > 3 * means["LYMPHOID"][kinds == 0].mean()
        assert means["TUMOUR"][kinds == 1].mean() > 5 * means["TUMOUR"][kinds != 1].mean()
        assert means["EPITHELIAL"][kinds == 0].mean() > 5 * means["EPITHELIAL"][kinds == 3].mean()


def test_the_expression_file_is_an_anndata_file(drawn: Path) -> None:
    anndata = pytest.importorskip("anndata", reason="anndata is not among the dependencies; it is the reference here")
    path = next((drawn / "hest" / "IDC" / "adata").glob("*.h5ad"))
    read = anndata.read_h5ad(path)
    assert read.shape == (TILES, 60)
    barcodes = list(read.obs_names)
    np.testing.assert_array_equal(read[:, list(GENES)].X.toarray(), read_counts(path, barcodes, GENES))
    with h5py.File(path.parents[1] / "patches" / f"{path.stem}.h5", "r") as file:
        patches = [name.decode() for name in file["barcode"][:, 0]]
    assert sorted(patches) == sorted(barcodes)
    assert patches != barcodes


# ------------------------------------------------------------------ EVA


def _nearest_mean(read: ReadTiles, split_N: np.ndarray, label_N: np.ndarray, scored: str) -> float:
    """Accuracy of the nearest class mean on standardised patterns: no encoder at all."""
    features = _pattern(read(0, len(split_N)))
    train, test = split_N == "train", split_N == scored
    features = (features - features[train].mean(0)) / features[train].std(0)
    means = np.stack([features[train & (label_N == k)].mean(0) for k in np.unique(label_N)])
    nearest = ((features[test][:, None] - means) ** 2).sum(-1).argmin(1)
    return float((nearest == label_N[test]).mean())


def test_the_classes_of_patches_can_be_seen(drawn: Path) -> None:
    mhist = read_mhist(drawn / "eva" / "mhist", 224)
    pcam = read_pcam(drawn / "eva" / "pcam", 96)
    bach = read_bach(drawn / "eva" / "bach", 224)
    assert [int((mhist.split_N == split).sum()) for split in ("train", "val")] == [16, 8]
    assert [int((pcam.split_N == split).sum()) for split in ("train", "val", "test")] == [16, 8, 8]
    assert [int((bach.split_N == split).sum()) for split in ("train", "val")] == [16, 8]
    found = []
    for data, scored, chance in ((mhist, "val", 0.5), (pcam, "test", 0.5), (bach, "val", 0.25)):
        assert set(data.label_N[data.split_N == scored]) == set(range(len(data.classes)))
        found.append(_nearest_mean(data.read, data.split_N, data.label_N, scored) - chance)
    assert np.mean(found) > 0.2


def test_the_masks_lie_on_the_nuclei(drawn: Path) -> None:
    data = read_consep(drawn / "eva" / "consep", 224)
    assert set(np.unique(data.masks_NHW)) == {0, 1, 2, 3, 4} - {1}  # no cell is of the type "other"
    assert len(data) == 4 * (2 + 1)
    red = data.images_NHW3[..., 0].astype(float)  # haematoxylin takes red away, eosin hardly
    for tile, mask in zip(red, data.masks_NHW, strict=True):
        if 0.02 < (mask > 0).mean() < 0.98:
            assert tile[mask > 0].mean() < tile[mask == 0].mean() - 15


class _Seen:
    """An embedder of mean colours, which remembers what it was given."""

    name, key, pooling, dim = "colours", "0", "cls", 3

    def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        return tiles_NHW3.mean((1, 2)).astype(np.float32)

    def patch_tokens(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        raise AssertionError


def test_the_slides_are_real_slides_with_their_scale(drawn: Path) -> None:
    data = read_camelyon16(drawn / "eva" / "cam16")
    assert [int((data.split_N == split).sum()) for split in ("train", "val", "test")] == [8, 4, 6]
    for split in ("train", "val", "test"):
        assert set(data.label_N[data.split_N == split]) == {0, 1}
    slide = open_slide(data.paths[0])
    try:
        assert resolve_scale(slide.scale_facts, trust_tiff=True, where=data.paths[0]).mpp == pytest.approx(0.25)
    finally:
        slide.close()
    bag = slide_embedder(_Seen())(data.paths[0], mpp=0.25, tile_px=224, max_tiles=1000)
    assert 4 <= len(bag) <= 16
    assert bag.std(axis=0).max() > 1


# ------------------------------------------------------------------ PathoROB


def test_a_colour_encoder_sees_the_centre_and_a_brightness_pattern_the_tissue(drawn: Path) -> None:
    (dataset,), _ = find_datasets(drawn / "pathorob")
    table = read_metadata(drawn / "pathorob", dataset.index_metadata)
    assert table is not None
    assert set(table.columns["subset"]) == {"ID", "OOD"}
    images = find_images(drawn / "pathorob", dataset, table.tiles)
    tiles_NHW3 = images.read(0, len(images.tiles))
    row_of = {tile: row for row, tile in enumerate(images.tiles)}
    tiles_NHW3 = tiles_NHW3[[row_of[tile] for tile in table.tiles]]
    colour = tiles_NHW3.mean((1, 2))
    colour -= colour.mean(0)
    pattern = _pattern(tiles_NHW3)
    pattern = (pattern - pattern.mean(0)) / pattern.std(0)
    by_colour = robustness_index(colour, table.columns, dataset.k)
    by_pattern = robustness_index(pattern, table.columns, dataset.k)
    assert by_colour < 0.3
    assert by_pattern > by_colour + 0.2


# ------------------------------------------------------------------ tables


def test_the_tables_are_read_as_ones_own(drawn: Path) -> None:
    roots = files.read_json(drawn / "roots.json")
    for name, columns, rows in (
        ("tiles", ["path", "label", "slide", "split"], 2 * 24),
        ("paired", ["path", "slide", "scanner", "x", "y"], 4 * TILES),
    ):
        table = drawn / roots[name]
        found = read_table(table, columns)
        assert len(found) == rows
        assert all((table.parent / row["path"]).is_file() for row in found)
