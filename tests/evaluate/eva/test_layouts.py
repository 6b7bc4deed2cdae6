"""The original layouts are read as they are: files, labels, splits, groups, pixels."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from histill.errors import DataError
from histill.evaluate.eva import layouts
from histill.evaluate.eva.layouts_segmentation import read_consep, read_monusac
from histill.evaluate.eva.layouts_slides import read_camelyon16, read_panda, read_panda_small
from histill.evaluate.eva.segmentation import IGNORE


def counts(data) -> dict[str, int]:
    return dict(Counter(data.split_N.tolist()))


# ------------------------------------------------------------------ patches


def test_bach_has_the_published_split(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_bach(sets.write_bach(tmp_path), 16)
    assert counts(data) == {"train": 268, "val": 132}
    assert Counter(data.label_N.tolist()) == {0: 100, 1: 100, 2: 100, 3: 100}
    # eva gives the split as ranges of the files sorted by class and name
    ranges = [(41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368)]
    assert np.flatnonzero(data.split_N == "val").tolist() == [n for low, high in ranges for n in range(low, high)]
    assert data.group_N is None


def test_a_subset_of_bach_keeps_its_splits(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_bach(sets.write_bach(tmp_path, [1, 41, 42, 60]), 16)
    rows = ["train train val train", "train val val val", "train val val train", "train train train val"]
    assert data.split_N.tolist() == " ".join(rows).split()


def test_an_image_is_its_central_square(tmp_path: Path, sets: Any) -> None:
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, :10], pixels[:, 10:40], pixels[:, 40:] = 255, (10, 20, 30), 255
    path = sets.save(tmp_path / "a.tif", Image.fromarray(pixels))
    assert (layouts.central_square(path, 15)[:, 1:-1] == (10, 20, 30)).all()
    # the same as torchvision's resize of the shorter side, then a crop: the original's transform
    import torch
    from torchvision.transforms.v2.functional import center_crop, resize

    for size, side in (((60, 90), 30), ((153, 204), 22), ((91, 70), 35), ((50, 50), 96)):
        noisy = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        path = sets.save(tmp_path / "b.png", Image.fromarray(noisy))
        image = torch.from_numpy(noisy).permute(2, 0, 1)
        original = center_crop(resize(image, [side], antialias=True), [side, side]).permute(1, 2, 0).numpy()
        assert np.abs(layouts.central_square(path, side).astype(int) - original).max() <= 2


def test_crc(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_crc(sets.write_crc(tmp_path, 3, 2), 8)
    assert counts(data) == {"train": 27, "val": 18}
    assert data.classes[data.label_N[0]] == "ADI"
    assert data.classes[data.label_N[-1]] == "TUM"
    assert data.read(3, 5).shape == (2, 8, 8, 3)
    shutil.rmtree(tmp_path / "CRC-VAL-HE-7K" / "MUS")
    with pytest.raises(DataError, match=r"a folder of CRC is missing[\s\S]*MUS"):
        layouts.read_crc(tmp_path, 8)


def test_mhist_scores_its_test_partition(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_mhist(sets.write_mhist(tmp_path), 16)
    assert counts(data) == {"train": 40, "val": 16}
    assert data.classes == ("HP", "SSA")
    assert data.label_N[:4].tolist() == [0, 1, 0, 1]


def test_mhist_says_what_is_wrong(tmp_path: Path, sets: Any) -> None:
    root = sets.write_mhist(tmp_path, 4, 2)
    table = root / "annotations.csv"
    good = table.read_text()
    table.write_text(good.replace("Partition", "Split"))
    with pytest.raises(DataError, match=r"a column of MHIST is missing[\s\S]*Partition"):
        layouts.read_mhist(root, 16)
    table.write_text(good.replace("SSA,7,train", "SSL,7,train", 1))
    with pytest.raises(DataError, match=r"annotations\.csv, line 3"):
        layouts.read_mhist(root, 16)
    table.write_text(good)
    (root / "images" / "MHIST_002.png").unlink()
    with pytest.raises(DataError, match=r"MHIST_002\.png"):
        layouts.read_mhist(root, 16)


def test_pcam(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_pcam(sets.write_pcam(tmp_path, (6, 4, 5)), 96)
    assert counts(data) == {"train": 6, "val": 4, "test": 5}
    assert data.group_N is None
    with h5py.File(tmp_path / "camelyonpatch_level_2_split_valid_x.h5") as file:
        valid = file["x"][:]
    assert (data.read(5, 8)[1:] == valid[:2]).all(), "a block across two files"
    assert (data.take(np.array([7, 6])).read(0, 2) == valid[[1, 0]]).all()
    assert data.label_N[6:10].tolist() == [0, 1, 0, 1]


def test_pcam_knows_slides_from_its_tables(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_pcam(sets.write_pcam(tmp_path, (12, 6, 6), slides=True), 32)
    assert (data.group, len(np.unique(data.group_N))) == ("slide", 4)
    assert data.read(0, 1).shape == (1, 32, 32, 3)


def test_a_damaged_pcam_is_refused(tmp_path: Path, sets: Any) -> None:
    root = sets.write_pcam(tmp_path, (6, 4, 5))
    for part in "xy":
        (root / f"camelyonpatch_level_2_split_test_{part}.h5").write_bytes(b"not HDF5")
        with pytest.raises(DataError, match="HDF5 file cannot be read"):
            layouts.read_pcam(root, 96)
        sets.write_pcam(root, (6, 4, 5))
    with h5py.File(root / "camelyonpatch_level_2_split_train_x.h5", "w") as file:
        file["x"] = np.zeros((5, 96, 96, 3), np.uint8)
    with pytest.raises(DataError, match="not as published"):
        layouts.read_pcam(root, 96)


def test_breakhis_takes_four_types_at_40x_by_patient(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_breakhis(sets.write_breakhis(tmp_path), 16)
    assert len(data) == 4 * 5 * 4
    val = {"15275", "16875", "19979", "21998CD", "2773"}
    assert set(data.group_N[data.split_N == "val"]) == val
    assert not set(data.group_N[data.split_N == "train"]) & val
    assert data.classes == ("TA", "MC", "F", "DC")


def test_gleason_splits_by_microarray(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_gleason(sets.write_gleason(tmp_path), 16)
    assert counts(data) == {"train": 48, "val": 16, "test": 16}
    assert {core.partition("_")[0] for core in data.group_N[data.split_N == "test"]} == {"ZT80"}
    stray = tmp_path / "train_validation_patches_750" / "ZT76_39_A_0_1" / "ZT9_1_patch_0_class_1.jpg"
    sets.save(stray, sets.picture(0, 0))
    with pytest.raises(DataError, match="ZT9_1"):
        layouts.read_gleason(tmp_path, 16)


@pytest.mark.parametrize(
    "read", [layouts.read_bach, layouts.read_crc, layouts.read_mhist, layouts.read_pcam, layouts.read_breakhis]
)
def test_another_folder_is_no_data_set(read, tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError, match=r"is missing[\s\S]*holiday"):
        read(tmp_path, 16)


def test_a_broken_image_is_named(tmp_path: Path, sets: Any) -> None:
    root = sets.write_crc(tmp_path, 2, 1)
    path = root / "NCT-CRC-HE-100K" / "ADI" / "ADI-N00001.tif"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"ADI-N00001\.tif"):
        layouts.read_crc(root, 8).read(0, 2)


def test_the_key_knows_files_size_and_rows(tmp_path: Path, sets: Any) -> None:
    data = layouts.read_crc(sets.write_crc(tmp_path, 2, 1), 8)
    assert data.key == layouts.read_crc(tmp_path, 8).key
    keys = {data.key, layouts.read_crc(tmp_path, 9).key, data.take(np.arange(5)).key, data.take(np.arange(6)).key}
    sets.save(tmp_path / "CRC-VAL-HE-7K" / "ADI" / "ADI-X.tif", sets.picture(0, 0))
    keys.add(layouts.read_crc(tmp_path, 8).key)
    assert len(keys) == 5


# ------------------------------------------------------------------ segmentation


def test_consep_is_cut_into_tiles_with_merged_types(tmp_path: Path, sets: Any) -> None:
    sets.write_consep(tmp_path, 1, 1)
    types = np.zeros((500, 500))
    types[:250, :250], types[:250, 250:], types[250:, :250], types[250:, 250:] = 1, 4, 7, 2
    types[0, 0] = 0
    savemat(tmp_path / "Train" / "Labels" / "train_1.mat", {"type_map": types})
    data = read_consep(tmp_path, 250)
    assert counts(data) == {"train": 4, "val": 4}
    assert data.sources == {"train": 1, "val": 1}
    assert [np.unique(mask).tolist() for mask in data.masks_NHW[:4]] == [[0, 1], [3], [4], [2]]
    assert data.masks_NHW[0, 0, 0] == 0
    image = np.asarray(Image.open(tmp_path / "Train" / "Images" / "train_1.png"))
    assert (data.images_NHW3[1] == image[:250, 250:]).all()
    assert set(data.group_N) == {"train_1", "test_1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"inst_map": np.zeros((500, 500))}, r"no type_map[\s\S]*inst_map"),
        ({"type_map": np.full((500, 500), 8)}, "0 to 7"),
        ({"type_map": np.zeros((400, 500))}, r"\(500, 500\)"),
    ],
)
def test_a_damaged_consep_is_refused(content, message: str, tmp_path: Path, sets: Any) -> None:
    sets.write_consep(tmp_path, 1, 1)
    savemat(tmp_path / "Test" / "Labels" / "test_1.mat", content)
    with pytest.raises(DataError, match=message):
        read_consep(tmp_path, 64)
    (tmp_path / "Test" / "Labels" / "test_1.mat").unlink()
    with pytest.raises(DataError, match=r"test_1\.mat"):
        read_consep(tmp_path, 64)


def test_monusac_fills_nuclei_and_ignores_ambiguous_ones(tmp_path: Path, sets: Any) -> None:
    root = sets.write_monusac(tmp_path, 1, 1)
    path = next((root / "MoNuSAC Testing Data and Annotations").glob("*/*.xml"))
    square = [(20, 10), (30, 10), (30, 16), (20, 16)]
    hole = [(50, 20), (60, 20), (60, 30), (50, 30)]
    path.write_text(sets.monusac_xml({"Macrophage": [square], "Ambiguous": [hole], "Neutrophil": []}))
    data = read_monusac(root, 64)  # the images are 96 x 64: the central square is columns 16 to 80
    assert counts(data) == {"train": 1, "val": 1}
    expected = np.zeros((64, 64), np.uint8)
    expected[10:16, 4:14], expected[20:30, 34:44] = 4, IGNORE
    assert (data.masks_NHW[1] == expected).all()
    assert data.group == "patient"
    assert set(np.unique(data.masks_NHW[0])) <= {0, 1, 2, 3}


def test_a_damaged_monusac_is_refused(tmp_path: Path, sets: Any) -> None:
    root = sets.write_monusac(tmp_path, 1, 1)
    path = next((root / "MoNuSAC_images_and_annotations").glob("*/*.xml"))
    path.write_text("<Annotations>")
    with pytest.raises(DataError, match="cannot be read"):
        read_monusac(root, 64)
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        read_monusac(root, 64)


# ------------------------------------------------------------------ slides


def test_camelyon16(tmp_path: Path, sets: Any) -> None:
    data = read_camelyon16(sets.write_camelyon16(tmp_path, range(1, 33), 6))
    split = {path.stem: name for path, name in zip(data.paths, data.split_N.tolist(), strict=True)}
    assert [
        name for name in ("normal_009", "normal_010", "tumor_001", "tumor_002", "test_001") if split[name] == "val"
    ] == [
        "normal_010",
        "tumor_001",
    ]
    assert counts(data)["test"] == 6
    assert data.label_N[data.split_N == "test"].tolist() == [1, 0, 1, 0, 1, 0]


def test_camelyon16_whole_has_the_published_split(tmp_path: Path, sets: Any) -> None:
    sets.write_camelyon16(tmp_path, range(1, 2), 2)
    for name, numbers in (("normal", range(1, 161)), ("tumor", range(1, 112))):
        for number in numbers:
            if (name, number) != ("normal", 86):  # it is not in the distribution
                (tmp_path / "training" / name / f"{name}_{number:03d}.tif").touch()
    found = counts(read_camelyon16(tmp_path))
    assert (found["train"], found["val"]) == (216, 54)


def test_a_test_slide_without_a_label_is_refused(tmp_path: Path, sets: Any) -> None:
    root = sets.write_camelyon16(tmp_path, range(1, 3), 3)
    table = root / "testing" / "reference.csv"
    table.write_text(table.read_text().replace("test_002,Normal", "test_002,?"))
    with pytest.raises(DataError, match="test_002"):
        read_camelyon16(root)


def test_panda_splits_are_stratified_and_fixed(tmp_path: Path, sets: Any) -> None:
    data = read_panda(sets.write_panda(tmp_path, 240))
    assert counts(data) == {"train": 168, "val": 36, "test": 36}
    assert all(Counter(data.label_N[data.split_N == name].tolist()) == dict.fromkeys(range(6), n) for name, n in (
        ("train", 28), ("val", 6), ("test", 6)))  # fmt: skip
    small = read_panda_small(tmp_path)
    assert counts(small) == {"train": 24, "val": 12, "test": 12}
    assert len(set(small.paths)) == len(small)
    assert "not left out" in small.notes[0]


def test_panda_leaves_noisy_labels_out(tmp_path: Path, sets: Any) -> None:
    data = read_panda(sets.write_panda(tmp_path, 120, noisy=True))
    assert len(data) == 108
    assert data.notes == ("12 slides with noisy labels are left out",)


def test_panda_refuses_other_grades(tmp_path: Path, sets: Any) -> None:
    root = sets.write_panda(tmp_path, 12)
    rows = [line.split(",") for line in (root / "train.csv").read_text().splitlines()]
    rows[3][2] = "6"
    sets.write_table(root / "train.csv", None, rows)
    with pytest.raises(DataError, match="grade of PANDA is unknown"):
        read_panda(root)
