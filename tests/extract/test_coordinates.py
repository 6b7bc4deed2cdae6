"""Coordinates made by TRIDENT and by CLAM, taken in."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from histill.cli import main
from histill.extract.model import check_tile_mpp
from histill.slides.coordinates import read_coordinates
from histill.slides.open import open_slide
from histill.slides.slide import SlideError

GIVEN = [[310, 205], [0, 0], [64, 7], [310, 205], [512, 480], [640, 590]]  # the last reaches beyond 700 x 600
INSIDE = GIVEN[:-1]
TRIDENT = {
    "patch_size": 56,
    "patch_size_level0": 56,
    "level0_magnification": 20,
    "target_magnification": 20,
    "overlap": 0,
    "name": "a",
    "savetodir": "patches",
    "level0_width": 700,
    "level0_height": 600,
}
CLAM = {
    "patch_size": 56,
    "patch_level": 0,
    "downsample": (1.0, 1.0),
    "downsampled_level_dim": (700, 600),
    "level_dim": (700, 600),
    "name": "a",
    "save_path": "patches",
}


def write(path: Path, attributes: dict[str, object], coords: object = GIVEN) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("coords", data=np.array(coords))
        dataset.attrs.update(attributes)
    return path


def extract(slide: Path, model: Path, out: Path, coords: Path, *options: object) -> int:
    command = ["extract", str(slide), "--model", str(model), "--out", str(out), "--coords", str(coords)]
    return main([*command, *map(str, options), "--workers", "1", "--engine", "torch-fp32", "--batch", "2"])


def same(out: Path, other: Path) -> bool:
    with h5py.File(out / "features" / "a.h5") as here, h5py.File(other / "features" / "a.h5") as there:
        return all(np.array_equal(here[name][:], there[name][:]) for name in ("features", "coords"))


def error_of(out: Path, slide: str = "a") -> str:
    with (out / "slides.csv").open(newline="") as file:
        return {row["slide"]: row["error"] for row in csv.DictReader(file)}[slide]


@pytest.fixture(scope="module")
def by_trident(model: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trident")
    write(folder / "patches" / "a_patches.h5", TRIDENT)
    assert extract(drawn / "a.svs", model, folder / "out", folder / "patches") == 0
    return folder / "out"


def test_trident_s_order_is_kept_and_tiles_beyond_the_slide_are_listed(by_trident: Path) -> None:
    with h5py.File(by_trident / "features" / "a.h5") as file:
        assert file["coords"][:].tolist() == INSIDE
        features = file["features"][:]
        assert file["failed_tiles"][:].tolist() == [GIVEN[-1]]
        assert file.attrs["failed_tiles"] == 1
        assert file["coords"].attrs["overlap"] == 0
    np.testing.assert_array_equal(features[0], features[3])
    assert len(np.unique(features, axis=0)) == 4
    with (by_trident / "unreadable.csv").open(newline="") as file:
        assert [(row["x"], row["y"]) for row in csv.DictReader(file)] == [("640", "590")]


def test_clam_s_mean_the_same_tiles(by_trident: Path, model: Path, drawn: Path, tmp_path: Path) -> None:
    assert extract(drawn / "a.svs", model, tmp_path / "out", write(tmp_path / "a.h5", CLAM)) == 0
    with (
        h5py.File(tmp_path / "out" / "features" / "a.h5") as ours,
        h5py.File(by_trident / "features" / "a.h5") as other,
    ):
        np.testing.assert_array_equal(ours["features"][:], other["features"][:])
        np.testing.assert_array_equal(ours["coords"][:], other["coords"][:])


def test_our_own_files_are_coordinates_too(by_trident: Path, model: Path, drawn: Path, tmp_path: Path) -> None:
    assert extract(drawn / "a.svs", model, tmp_path / "out", by_trident / "features") == 0
    with (
        h5py.File(tmp_path / "out" / "features" / "a.h5") as ours,
        h5py.File(by_trident / "features" / "a.h5") as other,
    ):
        np.testing.assert_array_equal(ours["features"][:], other["features"][:])


def test_a_level_and_its_downsample(model: Path, drawn: Path, tmp_path: Path) -> None:
    """56 px of a level that is 4 times smaller are 224 px of level 0: 2 um/px, which this model was not made for."""
    import openslide

    with openslide.OpenSlide(drawn / "a.svs") as slide:
        assert slide.level_downsamples[1] == 4
    given = CLAM | {"patch_level": 1, "downsample": (4.0, 4.0), "level_dim": (175, 150)}
    coords = write(tmp_path / "a.h5", given, [[0, 0], [224, 224]])
    assert extract(drawn / "a.svs", model, tmp_path / "refused", coords) == 2
    told = error_of(tmp_path / "refused")
    assert "2 um/px" in told
    assert "0.5 um/px" in told
    assert extract(drawn / "a.svs", model, tmp_path / "out", coords, "--any-mpp") == 0
    with h5py.File(tmp_path / "out" / "features" / "a.h5") as file:
        assert file["coords"].attrs["patch_size_level0"] == 224
        assert file.attrs["mpp"] == 2


@pytest.mark.parametrize(
    ("attributes", "coords", "told"),
    [
        (TRIDENT | {"level0_width": 701}, GIVEN, "another slide"),
        (CLAM | {"level_dim": (1400, 1200)}, GIVEN, "another slide"),
        (CLAM | {"downsample": (2.0, 2.0)}, GIVEN, "another slide"),
        (CLAM | {"patch_level": 7, "level_dim": (1, 1)}, GIVEN, "level that the slide lacks"),
        ({"patch_size": 56}, GIVEN, "size of their tiles"),
        (TRIDENT, [[0, 0], [900, 0]], "outside the slide"),
        (TRIDENT, [[0.5, 0.5]], "whole pixels"),
        (TRIDENT, [[0, 0, 0]], "whole pixels"),
        ({**TRIDENT, "patch_size_level0": 32}, GIVEN, "another scale"),
    ],
)
def test_coordinates_that_cannot_be_meant(
    attributes: dict[str, object], coords: object, told: str, drawn: Path, tmp_path: Path
) -> None:
    """Of the planning alone, which is what a reader process runs."""
    path, slide = write(tmp_path / "a.h5", attributes, coords), open_slide(drawn / "a.svs")

    def plan() -> None:
        check_tile_mpp(0.5 * read_coordinates(path, slide).extent_px / 56, (0.5,), 56, path)

    with pytest.raises(SlideError, match=told):
        plan()
    slide.close()


def test_a_slide_without_coordinates_fails_alone(model: Path, drawn: Path, tmp_path: Path) -> None:
    write(tmp_path / "patches" / "a_patches.h5", TRIDENT)
    (tmp_path / "patches" / "b.h5").write_bytes(b"no HDF5")
    assert extract(drawn, model, tmp_path / "out", tmp_path / "patches") == 2
    assert error_of(tmp_path / "out", "a") == ""
    assert "b.h5" in error_of(tmp_path / "out", "b")
    (tmp_path / "patches" / "b.h5").unlink()
    assert extract(drawn, model, tmp_path / "out", tmp_path / "patches") == 2  # tried again
    assert "b_patches.h5" in error_of(tmp_path / "out", "b")
    assert not (tmp_path / "out" / "features" / "b.h5").exists()


def test_other_coordinates_in_the_same_folder_are_refused(
    model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.h5", TRIDENT)
    assert extract(drawn / "a.svs", model, tmp_path / "out", path) == 0
    write(path, TRIDENT, [[1, 1]])
    assert extract(drawn / "a.svs", model, tmp_path / "out", path) == 1
    assert "done with another mask" in capsys.readouterr().err


def test_slides_of_one_name_do_not_share_coordinates(model: Path, drawn: Path, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        folder = tmp_path / "slides" / f"s{number}"
        folder.mkdir(parents=True)
        (folder / "x.svs").write_bytes((drawn / f"{name}.svs").read_bytes())
    write(tmp_path / "by-file" / "x_patches.h5", TRIDENT)
    assert extract(tmp_path / "slides", model, tmp_path / "out", tmp_path / "by-file") == 2
    assert "s0__x_patches.h5" in error_of(tmp_path / "out", "s0__x")
    part = ("--shard", "0/2")
    assert extract(tmp_path / "slides", model, tmp_path / "part", tmp_path / "by-file", *part) == 2, "of a part too"
    write(tmp_path / "by-id" / "s0__x_patches.h5", TRIDENT)
    write(tmp_path / "by-id" / "s1__x_patches.h5", TRIDENT, [[0, 0]])
    assert extract(tmp_path / "slides", model, tmp_path / "whole", tmp_path / "by-id") == 0


def test_the_overlap_of_the_file_stays(model: Path, drawn: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.h5", TRIDENT | {"patch_size": 112, "patch_size_level0": 56, "overlap": 28}, INSIDE)
    assert extract(drawn / "a.svs", model, tmp_path / "out", tmp_path / "a.h5") == 0
    with h5py.File(tmp_path / "out" / "features" / "a.h5") as file:
        assert file["coords"].attrs["overlap"] == 14  # a quarter of 56


def test_the_size_in_level_0_pixels_is_enough(model: Path, drawn: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.h5", {"patch_size_level0": 56}, INSIDE)
    assert extract(drawn / "a.svs", model, tmp_path / "out", tmp_path / "a.h5") == 0


def test_an_unknown_scale_must_be_taken_knowingly(
    make_bundle: Callable[..., Path], drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = make_bundle(tmp_path / "model", provenance={})
    write(tmp_path / "a.h5", TRIDENT, INSIDE)
    assert extract(drawn / "a.svs", unknown, tmp_path / "out", tmp_path / "a.h5") == 1
    assert "--any-mpp" in capsys.readouterr().err
    assert extract(drawn / "a.svs", unknown, tmp_path / "out", tmp_path / "a.h5", "--any-mpp") == 0
