"""What reads the files: code written to the conventions of CLAM, TRIDENT, QuPath and Zarr."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from histill.cli import main
from histill.slides.masks import read_mask
from histill.slides.open import open_slide


@pytest.fixture(scope="module", params=["pt", "zarr"])
def out(request: pytest.FixtureRequest, model: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "zarr":
        pytest.importorskip("zarr")
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--format", request.param, "--workers", "1", "--engine", "torch-fp32", "--stride-px", "42"]
    assert main(["extract", str(drawn), "--model", str(model), "--out", str(folder), *options]) == 0
    return folder


def test_clam_reads_a_bag(out: Path) -> None:
    """CLAM: a dataset of bags loads pt_files/<slide>.pt, or features and coords from an HDF5 of the same name."""
    with h5py.File(out / "features" / "a.h5", "r") as file:
        features, coords = torch.from_numpy(file["features"][:]), file["coords"][:]
    assert features.dtype == torch.float32
    assert features.shape == (len(coords), 128)
    assert coords.dtype.kind == "i"
    assert coords.shape[1] == 2
    if (out / "pt_files").exists():
        bag = torch.load(out / "pt_files" / "a.pt", weights_only=True)
        torch.testing.assert_close(bag, features, rtol=0, atol=0)
    else:
        assert (out / "zarr").exists()


def test_trident_reads_attributes(out: Path, drawn: Path) -> None:
    """TRIDENT: a slide encoder takes features, coords and attributes of coords, patch_size_level0 above all."""
    with h5py.File(out / "features" / "b.h5", "r") as file:
        told, of_features = dict(file["coords"].attrs), dict(file["features"].attrs)
    assert told["patch_size"] == 56
    assert int(told["patch_size_level0"]) == 56
    assert (int(told["level0_magnification"]), int(told["target_magnification"])) == (20, 20)
    assert told["overlap"] == 14
    assert told["name"] == of_features["name"] == "b"
    assert told["savetodir"] == of_features["savetodir"] == str(out / "features")
    assert (told["level0_width"], told["level0_height"]) == (700, 600)
    assert "nano" in of_features["encoder"]


def test_zarr_holds_the_same(out: Path) -> None:
    zarr = pytest.importorskip("zarr")
    if not (out / "zarr").exists():
        pytest.skip("of the other format")
    group = zarr.open_group(str(out / "zarr" / "a.zarr"), mode="r")
    with h5py.File(out / "features" / "a.h5", "r") as file:
        np.testing.assert_array_equal(group["features"][:], file["features"][:])
        np.testing.assert_array_equal(group["coords"][:], file["coords"][:])
        assert group.attrs["model_hash"] == file.attrs["model_hash"]
        assert group["coords"].attrs["patch_size_level0"] == file["coords"].attrs["patch_size_level0"]


def test_the_outline_is_an_annotation_around_the_tiles(out: Path, drawn: Path) -> None:
    told = json.loads((out / "tissue" / "a.geojson").read_text())
    assert told["type"] == "FeatureCollection"
    assert {feature["properties"]["objectType"] for feature in told["features"]} == {"annotation"}
    slide = open_slide(drawn / "a.svs")
    full = slide.levels[0]
    slide.close()
    mask = read_mask(out / "tissue" / "a.geojson", full.width, full.height, full.width, full.height)
    with h5py.File(out / "features" / "a.h5", "r") as file:
        coords = file["coords"][:]
    shares = [mask[y : y + 56, x : x + 56].mean() for x, y in coords.tolist()]
    assert min(shares) > 0.38  # 40 % on the mask's own pixels
    assert 0.05 < mask.mean() < 0.95


def test_the_table_has_a_row_a_slide(out: Path) -> None:
    with (out / "slides.csv").open(newline="") as file:
        rows = {row["slide"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a", "b"}
    for name, row in rows.items():
        with h5py.File(out / "features" / f"{name}.h5", "r") as file:
            assert int(row["tiles"]) == len(file["features"])
        left_out = sum(int(row[fate]) for fate in ("white", "black", "blur", "pen", "unreadable"))
        assert int(row["tiles"]) + left_out == int(row["tissue_tiles"])
