"""Sets of labelled patches in the folders that they are distributed in: BACH, CRC, MHIST, PCam, BreakHis, Gleason.

Every reader gives the rows of all splits, in a fixed order, without opening an image. Which row belongs to which
split is the original's rule, see each reader.

Shapes: N images.
"""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from histill.errors import DataError
from histill.evaluate.features import Array

__all__ = [
    "PatchSet",
    "central_box",
    "central_square",
    "data_key",
    "file_digest",
    "read_bach",
    "read_breakhis",
    "read_crc",
    "read_gleason",
    "read_mhist",
    "read_pcam",
    "read_table",
    "required",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PatchSet:
    """Labelled patches of all splits."""

    classes: tuple[str, ...]
    label_N: NDArray[np.int64]
    """Positions in ``classes``."""
    split_N: Array
    """train, val or test."""
    group_N: Array | None
    """Who must not be on two sides of a split; None where the file names do not tell."""
    group: str | None
    """What a group is: patient, core, slide."""
    key: str
    """Hex digest of names, sizes and rows."""
    rows_N: NDArray[np.int64]
    """Rows of the whole set."""
    read_rows: Callable[[Array], NDArray[np.uint8]]
    """Rows of the whole set -> (n, px, px, 3), RGB."""

    def __len__(self) -> int:
        return len(self.label_N)

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Patches ``first`` to ``last``: uint8 (last - first, px, px, 3)."""
        return self.read_rows(self.rows_N[first:last])

    def take(self, rows: Array) -> PatchSet:
        """Some of the rows, in that order."""
        kept = self.rows_N[rows]
        return replace(
            self,
            label_N=self.label_N[rows],
            split_N=self.split_N[rows],
            group_N=None if self.group_N is None else self.group_N[rows],
            rows_N=kept,
            key=hashlib.sha256(self.key.encode() + kept.tobytes()).hexdigest(),
        )


# ------------------------------------------------------------------ parts of all readers


def required(path: Path, name: str, *, folder: bool = True) -> Path:
    """Give ``path`` back when it is there.

    Raises
    ------
    DataError
        It is not; says what stands there instead.
    """
    if path.is_dir() if folder else path.is_file():
        return path
    parent = next(above for above in path.parents if above.is_dir() or above == above.parent)
    beside = sorted(entry.name for entry in parent.iterdir())[:8] if parent.is_dir() else []
    raise DataError(
        f"a {'folder' if folder else 'file'} of {name} is missing",
        where=path,
        got=f"in {parent}: {', '.join(beside) or 'nothing'}",
        remedy=f"give the folder into which {name} was unpacked, in its original layout",
    )


def read_table(path: Path, columns: Sequence[str], name: str) -> list[dict[str, str]]:
    """Rows of a CSV file that must have these columns (and may have others).

    Raises
    ------
    DataError
        The file or a column is missing.
    """
    with required(path, name, folder=False).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        lacking = [column for column in columns if column not in header]
        if lacking:
            raise DataError(
                f"a column of {name} is missing", where=path, got=", ".join(header), allowed=", ".join(columns)
            )
        return list(reader)


def data_key(paths: Sequence[Path], root: Path, *more: object) -> str:
    """Hex digest of names below the root and sizes in bytes."""
    digest = hashlib.sha256(repr(more).encode())
    for path in paths:
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def file_digest(*parts: object) -> str:
    """Hex digest of some printable values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def central_box(width: int, height: int, tile_px: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what "resize the shorter side to ``tile_px``, crop the centre" keeps.

    Both steps round to whole pixels, as torchvision's do.
    """
    found = []
    for length in (width, height):
        resized = int(tile_px * length / min(width, height))
        first = round((resized - tile_px) / 2)
        found.append((first * length / resized, (first + tile_px) * length / resized))
    (left, right), (top, bottom) = found
    return left, top, right, bottom


def central_square(path: Path, tile_px: int) -> NDArray[np.uint8]:
    """Read an image, RGB: its shorter side resized (bilinear, antialiased) to ``tile_px``, then its central square.

    Raises
    ------
    DataError
        The image cannot be read.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # a damaged TIFF warns, then fails
            box = central_box(*image.size, tile_px)
            square = image.convert("RGB").resize((tile_px, tile_px), Image.Resampling.BILINEAR, box=box)
            return np.asarray(square)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError("an image cannot be read", where=path, got=error) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    path: Path
    label: str
    split: str
    group: str = ""


def _of_files(
    rows: Sequence[_Row], root: Path, classes: Sequence[str], tile_px: int, name: str, group: str | None = None
) -> PatchSet:
    if not rows:
        raise DataError(f"there are no images of {name} here", where=root, remedy="check that the archive is unpacked")
    place = {label: number for number, label in enumerate(classes)}
    paths = [row.path for row in rows]

    def read_rows(wanted: Array) -> NDArray[np.uint8]:
        return np.stack([central_square(paths[row], tile_px) for row in wanted])

    return PatchSet(
        classes=tuple(classes),
        label_N=np.array([place[row.label] for row in rows], np.int64),
        split_N=np.array([row.split for row in rows]),
        group_N=np.array([row.group for row in rows]) if group else None,
        group=group,
        key=data_key(paths, root, tile_px),
        rows_N=np.arange(len(rows)),
        read_rows=read_rows,
    )


# ------------------------------------------------------------------ the sets

_BACH_NAMES = {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}
_BACH_VAL = {
    "Benign": [*range(42, 60), *range(61, 91)],
    "InSitu": [*range(40, 70)],
    "Invasive": [*range(41, 59), *range(61, 74)],
    "Normal": [*range(46, 69)],
}
"""Numbers of the images that eva validates on (chosen there so that no patient is on both sides)."""


def read_bach(root: Path, tile_px: int) -> PatchSet:
    """BACH: ``ICIAR2018_BACH_Challenge/Photos/<class>/{b,is,iv,n}<number>.tif``, 268 train and 132 val.

    The split is eva's, by the number in the file name; patients are not part of the distribution.

    Raises
    ------
    DataError
        A folder, table or file is missing, there are no images, or one is not named, labelled or shaped as published.
    """
    photos = required(root / "ICIAR2018_BACH_Challenge" / "Photos", "BACH")
    rows = []
    for name, letters in _BACH_NAMES.items():
        for path in sorted(required(photos / name, "BACH").glob("*.tif")):
            match = re.fullmatch(letters + r"(\d{3})\.tif", path.name)
            if match is None:
                raise DataError("this is no image of BACH", where=path, allowed=f"{letters}001.tif to {letters}100.tif")
            split = "val" if int(match[1]) in _BACH_VAL[name] else "train"
            rows.append(_Row(path=path, label=name, split=split))
    return _of_files(rows, root, tuple(_BACH_NAMES), tile_px, "BACH")


_CRC_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def read_crc(root: Path, tile_px: int) -> PatchSet:
    """CRC: ``NCT-CRC-HE-100K/<class>/*.tif`` train, ``CRC-VAL-HE-7K/<class>/*.tif`` val; patients are not given."""
    rows = [
        _Row(path=path, label=name, split=split)
        for folder, split in (("NCT-CRC-HE-100K", "train"), ("CRC-VAL-HE-7K", "val"))
        for name in _CRC_CLASSES
        for path in sorted(required(root / folder / name, "CRC").glob("*.tif"))
    ]
    return _of_files(rows, root, _CRC_CLASSES, tile_px, "CRC")


_MHIST_COLUMNS = (
    "Image Name",
    "Majority Vote Label",
    "Number of Annotators who Selected SSA (Out of 7)",
    "Partition",
)


def read_mhist(root: Path, tile_px: int) -> PatchSet:
    """MHIST: ``images/*.png`` and ``annotations.csv``; its train partition train, its test partition val.

    The original stops on the test partition and scores it too; patients are unknown. Errors as of :func:`read_bach`.
    """
    table, classes, rows = root / "annotations.csv", ("HP", "SSA"), []
    for line, entry in enumerate(read_table(table, _MHIST_COLUMNS, "MHIST"), start=2):
        label, partition = entry["Majority Vote Label"], entry["Partition"]
        if label not in classes or partition not in ("train", "test"):
            raise DataError(
                "a row of MHIST's table is not understood",
                where=f"{table}, line {line}",
                got=f"{label}, {partition}",
                allowed="HP or SSA, train or test",
            )
        path = required(root / "images" / entry["Image Name"], "MHIST", folder=False)
        rows.append(_Row(path=path, label=label, split="train" if partition == "train" else "val"))
    return _of_files(rows, root, classes, tile_px, "MHIST")


_BREAKHIS_TYPES = {
    "TA": ("benign", "tubular_adenoma"),
    "MC": ("malignant", "mucinous_carcinoma"),
    "F": ("benign", "fibroadenoma"),
    "DC": ("malignant", "ductal_carcinoma"),
}
_BREAKHIS_VAL = (
    *("18842D", "19979", "15275", "15792", "16875", "3909", "5287", "16716", "2773", "5695"),
    *("16184CD", "23060CD", "21998CD", "21998EF"),
)
"""Patients that eva validates on."""


def read_breakhis(root: Path, tile_px: int) -> PatchSet:
    """BreakHis at 40X: ``BreaKHis_v1/histology_slides/breast/<kind>/SOB/<type>/<patient>/40X/*.png``.

    The four types with at least seven patients (tubular adenoma, mucinous carcinoma, fibroadenoma, ductal carcinoma),
    as the original; type and patient stand in the file name (``SOB_B_TA-14-4659-40-001.png``). 1,132 train, 339 val.
    Errors as of :func:`read_bach`.
    """
    breast = required(root / "BreaKHis_v1" / "histology_slides" / "breast", "BreakHis")
    rows = []
    for name, (kind, folder) in _BREAKHIS_TYPES.items():
        for path in sorted(required(breast / kind / "SOB" / folder, "BreakHis").glob("*/40X/*.png")):
            match = re.fullmatch(rf"SOB_[BM]_{name}-\d+-(\w+)-40-\d+\.png", path.name)
            if match is None:
                raise DataError(
                    "this is no image of BreakHis", where=path, allowed=f"SOB_B_{name}-14-4659-40-001.png, for example"
                )
            split = "val" if match[1] in _BREAKHIS_VAL else "train"
            rows.append(_Row(path=path, label=name, split=split, group=match[1]))
    return _of_files(rows, root, tuple(_BREAKHIS_TYPES), tile_px, "BreakHis", "patient")


_GLEASON_CLASSES = ("benign", "gleason_3", "gleason_4", "gleason_5")
_GLEASON_SPLITS = {"ZT76": "val", "ZT111": "train", "ZT199": "train", "ZT204": "train", "ZT80": "test"}


def read_gleason(root: Path, tile_px: int) -> PatchSet:
    """Gleason (Arvaniti): ``train_validation_patches_750/<core>/*.jpg``, ``test_patches_750/patho_1/<core>/*.jpg``.

    The class stands at the end of the file name (``..._class_2.jpg``), the microarray at its start: ZT76 val, ZT111,
    ZT199 and ZT204 train, ZT80 test. A group is a tissue core, of which there is one per patient.
    Errors as of :func:`read_bach`.
    """
    rows = []
    for folder in ("train_validation_patches_750", "test_patches_750/patho_1"):
        for path in sorted(required(root / folder, "Gleason (Arvaniti)").glob("*/*.jpg")):
            match = re.fullmatch(r"(ZT\d+)_.*_class_([0-3])\.jpg", path.name)
            if match is None or match[1] not in _GLEASON_SPLITS:
                raise DataError(
                    "this is no patch of Gleason (Arvaniti)", where=path, allowed="ZT76_39_A_1_1_patch_12_class_0.jpg"
                )
            label = _GLEASON_CLASSES[int(match[2])]
            rows.append(_Row(path=path, label=label, split=_GLEASON_SPLITS[match[1]], group=path.parent.name))
    return _of_files(rows, root, _GLEASON_CLASSES, tile_px, "Gleason (Arvaniti)", "core")


def read_pcam(root: Path, tile_px: int) -> PatchSet:
    """PCam: ``camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``, ``x`` (N, 96, 96, 3), ``y`` (N, 1, 1, 1).

    The slide of each patch is read from ``..._meta.csv`` (column ``wsi``) where all three tables lie beside them.
    Errors as of :func:`read_bach`.
    """
    stems = {split: f"camelyonpatch_level_2_split_{file}" for split, file in _PCAM_FILES.items()}
    labels, splits, groups, files = [], [], [], []
    with_slides = all((root / f"{stem}_meta.csv").is_file() for stem in stems.values())
    for split, stem in stems.items():
        images, table = (required(root / f"{stem}_{part}.h5", "PCam", folder=False) for part in "xy")
        label_N = _dataset(table, "y").reshape(-1).astype(np.int64)
        shape = _dataset(images, "x", np.shape)
        if shape != (len(label_N), 96, 96, 3) or not np.isin(label_N, (0, 1)).all():
            raise DataError(
                "a file of PCam is not as published",
                where=images,
                got=f"x {shape}, {len(label_N)} labels",
                allowed="x (N, 96, 96, 3), and N labels 0 or 1",
            )
        if with_slides:
            slides = [entry["wsi"] for entry in read_table(root / f"{stem}_meta.csv", ("wsi",), "PCam")]
            if len(slides) != len(label_N):
                raise DataError(
                    "a table of PCam does not fit", where=root / f"{stem}_meta.csv", got=f"{len(slides)} rows"
                )
            groups += slides
        labels.append(label_N)
        splits += [split] * len(label_N)
        files += [images, table]
    starts = np.cumsum([0, *map(len, labels)])

    def read_rows(wanted: Array) -> NDArray[np.uint8]:
        found = np.empty((len(wanted), tile_px, tile_px, 3), np.uint8)
        for number, (first, last) in enumerate(pairwise(starts.tolist())):
            here = np.flatnonzero((wanted >= first) & (wanted < last))
            with h5py.File(files[2 * number], "r") as file:
                for place in here:
                    tile = Image.fromarray(file["x"][int(wanted[place] - first)])
                    found[place] = np.asarray(tile.resize((tile_px, tile_px), Image.Resampling.BILINEAR))
        return found

    return PatchSet(
        classes=("no_tumor", "tumor"),
        label_N=np.concatenate(labels),
        split_N=np.array(splits),
        group_N=np.array(groups) if with_slides else None,
        group="slide" if with_slides else None,
        key=data_key(files, root, tile_px),
        rows_N=np.arange(starts[-1]),
        read_rows=read_rows,
    )


_PCAM_FILES = {"train": "train", "val": "valid", "test": "test"}


def _dataset(path: Path, name: str, read: Callable[[Any], Any] = np.asarray) -> Any:
    try:
        with h5py.File(path, "r") as file:
            return read(file[name])
    except (OSError, KeyError) as error:
        raise DataError("an HDF5 file cannot be read", where=path, got=error, allowed=f"a data set {name}") from None
