"""Small sets of the EVA protocol in their own folders: MHIST, BACH, PCam, CoNSeP and Camelyon16.

The names of the classes are the sets' own, the tissue is ours: every class is one kind of drawn tissue, or one type of
drawn nucleus, that can be seen. No set says anything about the diagnosis that its class is named after.

::

    <folder>/mhist/annotations.csv, images/*.png
    <folder>/bach/ICIAR2018_BACH_Challenge/Photos/<class>/{b,is,iv,n}<number>.tif
    <folder>/pcam/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5
    <folder>/consep/{Train,Test}/Images/*.png, Labels/*.mat
    <folder>/cam16/training/{normal,tumor}/*.tif, testing/images/*.tif, testing/reference.csv
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import savemat

from histill.synthetic.benchmarks.camelyon import write_camelyon16
from histill.synthetic.benchmarks.fields import TILE_PX, Look, Map, Plan, draw, save_image, seed_of, write_datasets
from histill.synthetic.cells import CELLS, MITOSES
from histill.synthetic.tissue import KINDS

__all__ = ["EVA_TASKS", "write_bach", "write_consep", "write_mhist", "write_pcam"]

_LOOKS: tuple[Look, ...] = (("harris", "aurora"), ("mayer", "cinder"))
_PER_SLIDE = 8  # fields that come from one slide; slides are never on two sides of a split

# ------------------------------------------------------------------ patches


def _plans(kinds: list[str], tile_px: int, seed: int, *stream: int) -> list[Plan]:
    """Plan a field of each kind; consecutive ones share a slide, and slides take turns in their look."""
    return [
        Plan(
            kind=kind,
            tile_px=tile_px,
            seed=seed_of(seed, *stream, 1, number),
            slide_seed=seed_of(seed, *stream, 2, number // _PER_SLIDE),
            looks=(_LOOKS[number // _PER_SLIDE % len(_LOOKS)],),
        )
        for number, kind in enumerate(kinds)
    ]


_MHIST_KINDS = {"HP": "gland", "SSA": "tumour"}
_MHIST_COLUMNS = ("Image Name", "Majority Vote Label", "Number of Annotators who Selected SSA (Out of 7)", "Partition")


def write_mhist(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write ``tiles`` images to train on and half as many to test on; glands are HP, tumour is SSA."""
    rows: list[tuple[str, str, int, str]] = []
    for part, (partition, count) in enumerate((("train", tiles), ("test", tiles // 2))):
        labels = [tuple(_MHIST_KINDS)[number % 2] for number in range(count)]
        plans = _plans([_MHIST_KINDS[label] for label in labels], TILE_PX, seed, 10, part)
        for label, field in zip(labels, map_over(draw, plans), strict=True):
            name = f"MHIST_{len(rows):04d}.png"
            save_image(folder / "images" / name, field.images[0])
            rows.append((name, label, 7 if label == "SSA" else 0, partition))
    with (folder / "annotations.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_MHIST_COLUMNS)
        writer.writerows(rows)


_BACH = {  # class -> letters, kind of tissue, first number to train on, first number that eva validates on
    "Benign": ("b", "stroma", 1, 61),
    "InSitu": ("is", "lymphoid", 1, 40),
    "Invasive": ("iv", "tumour", 1, 41),
    "Normal": ("n", "gland", 1, 46),
}
_BACH_MOST = 13  # numbers in a row that eva validates on, in the class that has the fewest
_BACH_HEIGHT_PX = 168  # 4:3, as in the original


def write_bach(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write a quarter of ``tiles`` images of each class to train on, and half as many (13 at most) to validate on."""
    for part, (train, val) in enumerate(((True, False), (False, True))):
        count = max(1, tiles // 4) if train else min(_BACH_MOST, max(1, tiles // 8))
        names = [(name, number) for number in range(count) for name in _BACH]
        plans = _plans([_BACH[name][1] for name, _ in names], TILE_PX, seed, 11, part)
        for (name, number), field in zip(names, map_over(draw, plans), strict=True):
            letters, _, first_train, first_val = _BACH[name]
            file = f"{letters}{number + (first_val if val else first_train):03d}.tif"
            path = folder / "ICIAR2018_BACH_Challenge" / "Photos" / name / file
            save_image(path, field.images[0][:_BACH_HEIGHT_PX])


_PCAM_PX = 96


def write_pcam(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write ``tiles`` patches to train on and half as many each for validation and test, half of them tumour."""
    splits = (("train", tiles), ("valid", tiles // 2), ("test", tiles // 2))
    for part, (split, count) in enumerate(splits):
        label_N = np.arange(count, dtype=np.uint8) % 2
        plans = _plans([("lymphoid", "tumour")[label] for label in label_N], _PCAM_PX, seed, 12, part)
        images = np.stack([field.images[0] for field in map_over(draw, plans)])
        write_datasets(folder / f"camelyonpatch_level_2_split_{split}_x.h5", x=images)
        write_datasets(folder / f"camelyonpatch_level_2_split_{split}_y.h5", y=label_N.reshape(-1, 1, 1, 1))


# ------------------------------------------------------------------ segmentation

_CONSEP_TYPE = {  # cell -> the seven types of the original
    "epithelial": 3,
    "tumour": 4,
    **dict.fromkeys(MITOSES, 4),
    "lymphocyte": 2,
    "histiocyte": 2,
    "fibroblast": 5,
    "endothelial": 7,
}
_CONSEP_VALUES = np.array([0, *(_CONSEP_TYPE[name] for name in CELLS)], dtype=np.float64)
_CONSEP_PX = 500  # of 1,000 in the original: four tiles of 250 pixels
_MAT_HEADER = b"MATLAB 5.0 MAT-file, histill".ljust(116)  # SciPy writes the time into it


def write_consep(folder: Path, *, tiles: int, seed: int, map_over: Map) -> None:
    """Write an eighth of ``tiles`` images to train on, and half as many to test on, with the type of each nucleus."""
    for part, (split, count) in enumerate((("Train", max(2, tiles // 8)), ("Test", max(1, tiles // 16)))):
        kinds = [KINDS[(number + part) % len(KINDS)] for number in range(count)]
        plans = _plans(kinds, _CONSEP_PX, seed, 13, part)
        for number, field in enumerate(map_over(draw, plans), start=1):
            name = f"{split.lower()}_{number}"
            save_image(folder / split / "Images" / f"{name}.png", field.images[0])
            buffer = io.BytesIO()
            savemat(buffer, {"type_map": _CONSEP_VALUES[field.nuclei_HW]}, do_compression=True)
            labels = folder / split / "Labels" / f"{name}.mat"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_bytes(_MAT_HEADER + buffer.getvalue()[len(_MAT_HEADER) :])


# ------------------------------------------------------------------ all

EVA_TASKS: dict[str, Callable[..., None]] = {
    "mhist": write_mhist,
    "bach": write_bach,
    "pcam": write_pcam,
    "consep": write_consep,
    "cam16": write_camelyon16,
}
"""Task -> its writer, which takes (folder, tiles, seed, map_over)."""
