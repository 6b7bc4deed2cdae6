"""Features against a plain loop of openslide and timm, written without histill."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
import timm
import torch

import histill
from histill.cli import main

SMALL = "CMU-1-Small-Region"
SIDE = 112


def plain_loop(slide: Path, coords: np.ndarray, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and patch tokens of tiles at level 0, as anybody would write it."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = []
    with openslide.OpenSlide(slide) as opened, torch.inference_mode():
        for x, y in coords.tolist():
            tile = np.asarray(opened.read_region((x, y), 0, (SIDE, SIDE)).convert("RGB"))
            image = torch.from_numpy(tile.copy()).permute(2, 0, 1).float() / 255
            found.append(model.forward_features(((image - mean) / std)[None])[0].numpy())
    tokens = np.stack(found)
    return tokens[:, 0], tokens[:, model.num_prefix_tokens :]


@pytest.fixture(scope="module")
def teacher(shared_data: Path) -> Path:
    return shared_data / "teacher-vits14"


@pytest.fixture(scope="module")
def extracted(shared_data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("values") / "out"
    slides = [str(shared_data / "slides" / f"{name}.svs") for name in (SMALL,)]
    options = ["--mpp", "0.499", "--tile-px", str(SIDE), "--engine", "torch-fp32", "--batch", "7", "--workers", "1"]
    assert main(["extract", *slides, "--model", str(teacher), "--out", str(out), "--tokens", *options]) == 0
    return out


def test_features_and_tokens_equal_a_plain_loop(extracted: Path, shared_data: Path, teacher: Path) -> None:
    with h5py.File(extracted / "features" / f"{SMALL}.h5") as file:
        features, coords, tokens = file["features"][:], file["coords"][:], file["tokens"][:]
    assert len(coords) > 100
    picked = np.linspace(0, len(coords) - 1, 12).astype(int)
    cls, patches = plain_loop(shared_data / "slides" / f"{SMALL}.svs", coords[picked], teacher)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features[picked], cls, atol=1e-3, rtol=0)
    assert np.abs(cls).max() > 1
    assert tokens.dtype == np.float16
    assert tokens.shape == (len(coords), 8, 8, 384)
    np.testing.assert_allclose(tokens[picked].reshape(12, 64, 384), patches, atol=0.02, rtol=2e-3)


def test_tiles_stand_row_by_row_on_the_grid_and_have_tissue(extracted: Path, shared_data: Path) -> None:
    with h5py.File(extracted / "features" / f"{SMALL}.h5") as file:
        coords = file["coords"][:]
    assert (coords % SIDE == 0).all()
    assert coords.tolist() == sorted(coords.tolist(), key=lambda xy: (xy[1], xy[0]))
    assert len(np.unique(coords, axis=0)) == len(coords)
    with openslide.OpenSlide(shared_data / "slides" / f"{SMALL}.svs") as slide:
        width, height = slide.dimensions
    assert len(coords) < (width // SIDE) * (height // SIDE)


def test_provenance_is_in_the_file(extracted: Path, teacher: Path) -> None:
    with h5py.File(extracted / "features" / f"{SMALL}.h5") as file:
        told = dict(file.attrs)
        assert file["features"].chunks[0] <= 1024
    assert told["mpp"] == 0.499
    assert told["slide_mpp"] == 0.499
    assert told["mpp_source"] == "vendor"
    assert told["model_hash"] == histill.load_encoder(str(teacher)).content_hash()
    assert told["histill_version"] == histill.__version__
    assert told["failed_tiles"] == 0


def test_the_python_function_gives_the_same(extracted: Path, model: Path, drawn: Path, tmp_path: Path) -> None:
    import histill.extract  # the package, which is the function too

    outcome = histill.extract(drawn, model=model, out=tmp_path / "a", workers=1, engine="torch-fp32")
    assert [record.slide for record in outcome.done] == ["a", "b"]
    command = ["extract", str(drawn), "--model", str(model), "--out", str(tmp_path / "b"), "--engine", "torch-fp32"]
    assert main([*command, "--workers", "2"]) == 0
    for name in "ab":
        one, other = ((tmp_path / out / "features" / f"{name}.h5").read_bytes() for out in "ab")
        assert len(one) == len(other)
        with h5py.File(tmp_path / "a" / "features" / f"{name}.h5") as file:
            assert file["features"].shape == (outcome.done["ab".index(name)].tiles, 128)
            assert file.attrs["mpp"] == 0.5  # of the student's teacher
    with pytest.raises(histill.errors.ConfigError, match="unknown key 'workerz'"):
        histill.extract(drawn, model=model, out=tmp_path / "c", workerz=1)


def test_cls_and_mean(model: Path, drawn: Path, tmp_path: Path) -> None:
    options = ["--model", str(model), "--out", str(tmp_path), "--embedding", "cls+mean", "--tokens", "--workers", "1"]
    assert main(["extract", str(drawn / "a.svs"), *options, "--engine", "torch-fp32"]) == 0
    with h5py.File(tmp_path / "features" / "a.h5") as file:
        features, tokens = file["features"][:], file["tokens"][:].astype(np.float32)
    width = tokens.shape[-1]
    assert features.shape[1] == 2 * width
    np.testing.assert_allclose(features[:, width:], tokens.mean(axis=(1, 2)), atol=2e-3)
    assert not np.allclose(features[:, :width], features[:, width:], atol=0.1)
