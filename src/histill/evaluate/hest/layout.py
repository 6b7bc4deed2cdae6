"""The HEST benchmark's folders as they are distributed: patches, expression, genes and splits.

::

    <root>/<TASK>/var_50genes.json             {"genes": [...]}
    <root>/<TASK>/splits/train_<i>.csv         sample_id,patches_path,expr_path; test_<i>.csv beside it
    <root>/<TASK>/patches/<sample>.h5          img uint8 (N, 224, 224, 3), barcode (N, 1), coords (N, 2)
    <root>/<TASK>/adata/<sample>.h5ad          X counts, dense or sparse; obs (spots) and var (genes) by name

Spots match by barcode and genes by name; the order of either file means nothing.

Shapes: N spots, G genes, S spots and V genes of an expression file, B spots of a block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histill import files
from histill.errors import ConfigError, DataError, nearest
from histill.evaluate.features import Array
from histill.evaluate.parts import digest
from histill.tiles.images import read_table

__all__ = ["TASKS", "Fold", "Patches", "Sample", "Task", "find_tasks", "read_counts", "read_patches", "read_task"]

TASKS = ("IDC", "PRAD", "PAAD", "SKCM", "COAD", "READ", "CCRCC", "LUNG", "LYMPH_IDC")
"""The tasks of the benchmark's average, in the order of its tables."""

_COLUMNS = ("sample_id", "patches_path", "expr_path")
_DENSE_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One tissue section: its patches and its expression."""

    name: str
    patches: Path
    expression: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Sections to fit on and sections to score."""

    number: int
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One organ or disease of the benchmark."""

    name: str
    genes: tuple[str, ...]
    """What is predicted, in the order of ``var_50genes.json``."""
    folds: tuple[Fold, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """A file of patches; pixels stay on the disk."""

    path: Path
    barcodes: tuple[str, ...]
    """The spot of each patch."""
    key: str
    """Hex digest of the file's name and size, its barcodes, and its first and last patch."""

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Patches ``first`` to ``last`` (excluded): uint8 (B, 224, 224, 3), RGB."""
        with _opened(self.path) as file:
            tiles_BHW3: NDArray[np.uint8] = file["img"][first:last]
        return tiles_BHW3


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise DataError(
            "a file of the HEST benchmark is missing", where=path, remedy="download the task again"
        ) from None
    except (OSError, KeyError) as error:
        raise DataError(
            "a file of the HEST benchmark cannot be read", where=path, got=error, remedy="download it again"
        ) from None


def find_tasks(root: Path, names: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Tell which tasks are on the disk.

    Parameters
    ----------
    root
        The folder that holds one folder per task.
    names
        The tasks that are wanted; all nine if None.

    Returns
    -------
    tuple
        (present, missing), both in the order of :data:`TASKS`.

    Raises
    ------
    ConfigError
        A name is no task of the benchmark.
    DataError
        None of them is there.
    """
    wanted = TASKS if names is None else tuple(names)
    for name in wanted:
        if name not in TASKS:
            raise ConfigError("HEST has no such task", got=name, allowed=", ".join(TASKS), remedy=nearest(name, TASKS))
    present = [name for name in TASKS if name in wanted and (root / name).is_dir()]
    if not present:
        raise DataError(
            "no task of the HEST benchmark is here",
            where=root,
            allowed=f"one or more of the folders {', '.join(wanted)}",
            remedy="give the folder that holds them",
        )
    return present, [name for name in TASKS if name in wanted and name not in present]


def _samples(folder: Path, table: Path) -> tuple[Sample, ...]:
    return tuple(
        Sample(name=row["sample_id"], patches=folder / row["patches_path"], expression=folder / row["expr_path"])
        for row in read_table(table, _COLUMNS)
    )


def read_task(folder: Path) -> Task:
    """Read a task's genes and splits.

    Raises
    ------
    DataError
        Genes or splits are missing or damaged, a test split has no training split, a section is on both sides, or a
        file that a split names is not there.
    """
    genes_path = folder / "var_50genes.json"
    try:
        genes = tuple(str(gene) for gene in files.read_json(genes_path)["genes"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError("the genes of a task cannot be read", where=genes_path, got=repr(error)) from None
    if not genes or len(set(genes)) < len(genes):
        raise DataError("a task needs genes, each of them once", where=genes_path, got=f"{len(genes)} genes")
    splits = folder / "splits"
    numbers = sorted(int(m[1]) for path in splits.glob("test_*.csv") if (m := re.fullmatch(r"test_(\d+)", path.stem)))
    if not numbers:
        raise DataError("a task has no splits", where=splits, allowed="train_0.csv, test_0.csv, ...")
    folds = []
    for number in numbers:
        train, test = (_samples(folder, splits / f"{side}_{number}.csv") for side in ("train", "test"))
        both = {s.name for s in train} & {s.name for s in test}
        if both:
            raise DataError("a section is in training and test", where=f"{splits}, fold {number}", got=sorted(both))
        folds.append(Fold(number=number, train=train, test=test))
    for path in (path for fold in folds for s in (*fold.train, *fold.test) for path in (s.patches, s.expression)):
        if not path.is_file():
            raise DataError(
                "a file of the HEST benchmark is missing", where=path, remedy=f"download the task {folder.name} again"
            )
    return Task(name=folder.name, genes=genes, folds=tuple(folds))


def _strings(values: Array) -> tuple[str, ...]:
    return tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values.reshape(-1).tolist())


def read_patches(path: Path) -> Patches:
    """Read the barcodes of a file of patches.

    Raises
    ------
    DataError
        The file is missing or damaged, patches are not RGB in uint8, or barcodes are not one per patch, each once.
    """
    with _opened(path) as file:
        img, barcodes = file["img"], _strings(file["barcode"][()])
        if img.dtype != np.uint8 or img.ndim != 4 or img.shape[-1] != 3 or not len(img):
            raise DataError(
                "these are no patches",
                where=path,
                got=f"{img.dtype} {img.shape}",
                allowed="uint8 (N, height, width, 3)",
            )
        if len(barcodes) != len(img) or len(set(barcodes)) < len(barcodes):
            raise DataError(
                "each patch needs a barcode of its own",
                where=path,
                got=f"{len(img)} patches, {len(barcodes)} barcodes, {len(set(barcodes))} different ones",
            )
        ends = [img[0].tobytes().hex(), img[len(img) - 1].tobytes().hex()]
        shape = [int(n) for n in img.shape]
    key = digest(["hest patches", path.name, path.stat().st_size, shape, list(barcodes), ends])
    return Patches(path=path, barcodes=barcodes, key=key)


def _names(file: Any, axis: str, path: Path) -> tuple[str, ...]:
    """Read the index of ``obs`` or ``var``."""
    group = file[axis]
    if not isinstance(group, h5py.Group):
        raise DataError(
            "this expression file is of an old kind",
            where=f"{path}, {axis}",
            remedy="read it with anndata and write it again",
        )
    index = group[group.attrs.get("_index", "_index")]
    if isinstance(index, h5py.Group):  # nullable strings: values and a mask
        index = index["values"]
    return _strings(index[()])


def _places(names: tuple[str, ...], wanted: Sequence[str], what: str, path: Path) -> NDArray[np.intp]:
    """Find each wanted name; a missing one, or one that is there twice, is an error."""
    place = {name: number for number, name in enumerate(names)}
    missing = [name for name in wanted if name not in place]
    if missing:
        raise DataError(
            f"an expression file lacks {len(missing)} of {len(wanted)} {what}",
            where=path,
            got=", ".join(missing[:3]) + (" ..." if len(missing) > 3 else ""),
            remedy="patches, expression and genes must be of one download",
        )
    if len(place) < len(names):
        twice = sorted(set(wanted) & {name for name, times in Counter(names).items() if times > 1})
        if twice:
            raise DataError(f"an expression file names some {what} twice", where=path, got=", ".join(twice[:3]))
    return np.array([place[name] for name in wanted], dtype=np.intp)


def _columns(x: Any, columns_G: NDArray[np.intp], spots: int, genes: int, path: Path) -> NDArray[np.float64]:
    """Take some columns of ``X``, whatever its encoding: (S, G)."""
    if isinstance(x, h5py.Dataset):
        if x.shape != (spots, genes):
            raise DataError("counts, spots and genes do not match", where=path, got=f"{x.shape}, {spots}, {genes}")
        blocks = [x[start : start + _DENSE_ROWS][:, columns_G] for start in range(0, spots, _DENSE_ROWS)]
        return np.concatenate(blocks).astype(np.float64)
    kind = x.attrs.get("encoding-type", x.attrs.get("h5sparse_format", ""))
    form = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}.get(str(kind)[:3])
    shape = tuple(int(n) for n in x.attrs.get("shape", x.attrs.get("h5sparse_shape", ())))
    if form is None or shape != (spots, genes):
        raise DataError(
            "these counts cannot be read",
            where=f"{path}, X",
            got=f"{kind or 'no encoding'}, shape {shape}, {spots} spots, {genes} genes",
            allowed="a dense array, csr_matrix or csc_matrix",
        )
    counts = form((x["data"][()], x["indices"][()], x["indptr"][()]), shape=shape)
    return np.asarray(counts[:, columns_G].toarray(), np.float64)


def read_counts(path: Path, barcodes: Sequence[str], genes: Sequence[str]) -> NDArray[np.float64]:
    """Read the counts of some genes in some spots, in their order: float64 (N, G).

    Parameters
    ----------
    path
        An AnnData file (``.h5ad``).
    barcodes, genes
        Names of the spots and genes that are wanted.

    Raises
    ------
    DataError
        The file is missing or damaged, lacks a barcode or a gene, has one twice, or is of an old or unknown kind.
    """
    with _opened(path) as file:
        spots, names = _names(file, "obs", path), _names(file, "var", path)
        rows_N = _places(spots, barcodes, "barcodes", path)
        columns_G = _places(names, genes, "genes", path)
        return _columns(file["X"], columns_G, len(spots), len(names), path)[rows_N]
