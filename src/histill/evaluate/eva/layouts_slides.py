"""Sets of labelled whole slides, as distributed: Camelyon16 and PANDA.

Shapes: N slides.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histill.errors import DataError
from histill.evaluate.eva.layouts import file_digest, read_table, required
from histill.evaluate.features import Array

__all__ = ["SlideSet", "read_camelyon16", "read_panda", "read_panda_small"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideSet:
    """Labelled slides of all splits."""

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    label_N: NDArray[np.int64]
    split_N: Array
    """train, val or test."""
    notes: tuple[str, ...] = ()
    """What a reader of the scores must know."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def key(self) -> str:
        """Hex digest of names, sizes, labels and splits."""
        sizes = [(path.name, path.stat().st_size) for path in self.paths]
        return file_digest(sizes, self.label_N.tolist(), self.split_N.tolist())

    def take(self, rows: Array) -> SlideSet:
        """Some of the slides, in that order."""
        return SlideSet(
            classes=self.classes,
            paths=tuple(self.paths[row] for row in rows),
            label_N=self.label_N[rows],
            split_N=self.split_N[rows],
            notes=self.notes,
        )


_CAMELYON_VAL = {
    "normal": "10 13 16 17 19 20 25 30 31 32 52 56 57 67 76 79 85 95 98 99 "
    "101 102 105 106 109 129 132 137 142 143 148 152",
    "tumor": "1 5 11 12 13 19 31 37 43 46 57 65 69 71 73 79 80 81 82 85 97 109",
}
"""Numbers of the slides that PCam, and eva with it, validates on."""


def read_camelyon16(root: Path) -> SlideSet:
    """Camelyon16: ``training/{normal,tumor}/*.tif``, ``testing/images/*.tif``, ``testing/reference.csv``.

    The table has no header; its first two columns are the name of a test slide and Normal or Tumor. 54 training
    slides, those that PCam validates on, are val (216 train, 129 test).

    Raises
    ------
    DataError
        A folder or the table is missing, there are no slides, or a test slide has no label.
    """
    paths, labels, splits = [], [], []
    for label, name in enumerate(("normal", "tumor")):
        val = {f"{name}_{int(number):03d}" for number in _CAMELYON_VAL[name].split()}
        for path in sorted(required(root / "training" / name, "Camelyon16").glob("*.tif")):
            paths.append(path)
            labels.append(label)
            splits.append("val" if path.stem in val else "train")
    table = required(root / "testing" / "reference.csv", "Camelyon16", folder=False)
    with table.open(newline="", encoding="utf-8-sig") as file:
        kinds = {row[0].strip(): row[1].strip().lower() for row in csv.reader(file) if len(row) > 1}
    for path in sorted(required(root / "testing" / "images", "Camelyon16").glob("*.tif")):
        if kinds.get(path.stem) not in ("normal", "tumor"):
            raise DataError(
                "a test slide of Camelyon16 has no label",
                where=f"{table}, {path.stem}",
                got=kinds.get(path.stem),
                allowed="Normal or Tumor in the second column",
            )
        paths.append(path)
        labels.append(int(kinds[path.stem] == "tumor"))
        splits.append("test")
    return _slides(("normal", "tumor"), paths, labels, splits, (), root, "Camelyon16")


def read_panda_small(root: Path) -> SlideSet:
    """Read a tenth of PANDA to train on and a twentieth each to stop on and to score: what eva's leaderboard shows.

    Raises
    ------
    DataError
        The folder, the table or a column is missing, there are no slides, or a grade is not 0 to 5.
    """
    return _panda(root, (0.1, 0.05, 0.05))


def read_panda(root: Path) -> SlideSet:
    """All of PANDA: 70 % train, 15 % val, 15 % test.

    Raises
    ------
    DataError
        The folder, the table or a column is missing, there are no slides, or a grade is not 0 to 5.
    """
    return _panda(root, (0.7, 0.15, 0.15))


def _panda(root: Path, shares: tuple[float, float, float]) -> SlideSet:
    """PANDA: ``train_images/<image_id>.tiff`` and ``train.csv`` (``image_id``, ``isup_grade``).

    The split is eva's: slides by name, and in each class shuffled with NumPy's generator of seed 42. eva leaves the
    slides with noisy labels out, by the column ``noise_ratio_10`` of ``train_with_noisy_labels.csv`` (public, not
    Kaggle's); without that file they stay in, with a note.
    """
    noisy = root / "train_with_noisy_labels.csv"
    columns = ("image_id", "isup_grade")
    if noisy.is_file():
        rows = read_table(noisy, (*columns, "noise_ratio_10"), "PANDA")
        try:
            kept = [row for row in rows if float(row["noise_ratio_10"]) == 0]
        except ValueError as error:
            raise DataError("noise_ratio_10 of a slide is no number", where=noisy, got=error) from None
        notes = (f"{len(rows) - len(kept)} slides with noisy labels are left out",)
    else:
        kept = read_table(root / "train.csv", columns, "PANDA")
        notes = ("slides with noisy labels are not left out: there is no train_with_noisy_labels.csv",)
    grade = {row["image_id"]: row["isup_grade"] for row in kept}
    found = sorted(path for path in required(root / "train_images", "PANDA").glob("*.tiff") if path.stem in grade)
    wrong = sorted({grade[path.stem] for path in found} - set("012345"))
    if wrong:
        raise DataError("a grade of PANDA is unknown", where=root, got=", ".join(wrong), allowed="0 to 5")
    label_N = np.array([int(grade[path.stem]) for path in found], np.int64)
    generator = np.random.default_rng(42)
    paths, labels, splits = [], [], []
    for label in range(6):
        rows_of_class = np.flatnonzero(label_N == label)
        generator.shuffle(rows_of_class)
        first = 0
        for split, share in zip(("train", "val", "test"), shares, strict=True):
            last = first + max(1, int(np.floor(share * len(rows_of_class))))
            if split == "test" and sum(shares) == 1:
                last = len(rows_of_class)
            for row in rows_of_class[first:last]:
                paths.append(found[row])
                labels.append(label)
                splits.append(split)
            first = last
    return _slides(tuple("012345"), paths, labels, splits, notes, root, "PANDA")


def _slides(
    classes: tuple[str, ...],
    paths: list[Path],
    labels: list[int],
    splits: list[str],
    notes: tuple[str, ...],
    root: Path,
    name: str,
) -> SlideSet:
    if not paths:
        raise DataError(f"there are no slides of {name} here", where=root, remedy="check the folder")
    return SlideSet(
        classes=classes,
        paths=tuple(paths),
        label_N=np.array(labels, np.int64),
        split_N=np.array(splits),
        notes=notes,
    )
