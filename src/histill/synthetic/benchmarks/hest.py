"""A small HEST benchmark: counts of genes that depend on the nuclei that were drawn.

::

    <folder>/IDC/var_50genes.json, splits/{train,test}_<i>.csv, patches/<sample>.h5, adata/<sample>.h5ad

Every gene belongs to a programme, and a programme to some cell types; in a spot it has an expected count of its own
activity times the nuclei of these types, a little from all other nuclei, and a background. Counts are Poisson draws,
times a sequencing depth of the section.

Shapes: S spots, V genes of an expression file.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histill.synthetic.benchmarks.fields import TILE_PX, Look, Map, Plan, draw, seed_of, write_datasets
from histill.synthetic.cells import MITOSES
from histill.synthetic.tissue import KINDS

__all__ = ["GENES", "PROGRAMMES", "write_hest"]

PROGRAMMES: dict[str, tuple[str, ...]] = {
    "EPITHELIAL": ("epithelial",),
    "TUMOUR": ("tumour", *MITOSES),
    "LYMPHOID": ("lymphocyte",),
    "STROMAL": ("fibroblast", "endothelial", "histiocyte"),
}
"""Programme -> the cell types that express its genes."""
GENES = tuple(f"{programme}{number:02d}" for number in range(1, 14) for programme in PROGRAMMES)[:50]
"""The genes of the benchmark: 50, named by their programme."""

_TASK = "IDC"
_LOOKS: tuple[Look, ...] = (("harris", "aurora"), ("mayer", "cinder"), ("gill", "boreas"), ("carazzi", "aurora"))
_SILENT = tuple(f"SILENT{number:02d}" for number in range(1, 11))  # of the expression file alone: hardly expressed
_LEAK, _BACKGROUND = 0.02, 0.2
_PER_ROW = 8


def write_hest(folder: Path, *, spots: int, seed: int, map_over: Map) -> None:
    """Write one task, IDC, of four sections of ``spots`` spots; each section is held out once."""
    task = folder / _TASK
    samples = [f"SYN{number + 1}" for number in range(len(_LOOKS))]
    for number, (sample, look) in enumerate(zip(samples, _LOOKS, strict=True)):
        plans = [
            Plan(
                kind=KINDS[spot % len(KINDS)],
                tile_px=TILE_PX,
                seed=seed_of(seed, 3, number, spot),
                slide_seed=seed_of(seed, 4, number),
                looks=(look,),
            )
            for spot in range(spots)
        ]
        fields = list(map_over(draw, plans))
        barcodes = [f"{spot // _PER_ROW:03d}x{spot % _PER_ROW:03d}" for spot in range(spots)]
        write_datasets(
            task / "patches" / f"{sample}.h5",
            img=np.stack([field.images[0] for field in fields]),
            barcode=np.array([[barcode] for barcode in barcodes], dtype=h5py.string_dtype()),
            coords=np.array([[spot % _PER_ROW, spot // _PER_ROW] for spot in range(spots)]) * TILE_PX,
        )
        rng = np.random.default_rng([seed, 5, number])
        counts_SV = _counts([field.cells for field in fields], seed, rng)
        order = rng.permutation(spots)  # as in the original, the two files have orders of their own
        names = [barcodes[spot] for spot in order]
        _write_h5ad(task / "adata" / f"{sample}.h5ad", counts_SV[order], names, [*_SILENT, *GENES])
    (task / "var_50genes.json").write_text(json.dumps({"genes": list(GENES)}) + "\n", encoding="utf-8")
    for fold, held_out in enumerate(samples):
        _write_split(task / "splits" / f"train_{fold}.csv", [sample for sample in samples if sample != held_out])
        _write_split(task / "splits" / f"test_{fold}.csv", [held_out])


def _counts(cells: list[dict[str, int]], seed: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Counts (S, V), columns the silent genes and then :data:`GENES`."""
    activity_V = np.random.default_rng([seed, 6]).lognormal(np.log(0.08), 0.5, len(GENES))  # same in all sections
    depth = rng.lognormal(0.0, 0.15)
    rates_SV = np.full((len(cells), len(_SILENT) + len(GENES)), 0.01)
    for spot, found in enumerate(cells):
        every = sum(found.values())
        for column, gene in enumerate(GENES):
            own = sum(found.get(kind, 0) for kind in PROGRAMMES[gene[:-2]])
            rates_SV[spot, len(_SILENT) + column] = activity_V[column] * (own + _LEAK * every) + _BACKGROUND
    return rng.poisson(depth * rates_SV).astype(np.float32)


def _write_split(path: Path, samples: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("sample_id", "patches_path", "expr_path"))
        writer.writerows((sample, f"patches/{sample}.h5", f"adata/{sample}.h5ad") for sample in samples)


def _write_h5ad(path: Path, counts_SV: NDArray[np.float32], spots: list[str], genes: list[str]) -> None:
    """Write AnnData's file format (0.1.0): counts by rows, and the names of spots and genes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sparse.csr_matrix(counts_SV)
    with h5py.File(path, "w") as file:
        _encode(file, "anndata", "0.1.0")
        x = file.create_group("X")
        _encode(x, "csr_matrix", "0.1.0")
        x.attrs["shape"] = np.array(rows.shape, dtype=np.int64)
        for name in ("data", "indices", "indptr"):
            x.create_dataset(name, data=getattr(rows, name))
        for axis, names in (("obs", spots), ("var", genes)):
            table = file.create_group(axis)
            _encode(table, "dataframe", "0.2.0")
            table.attrs["_index"] = "_index"
            table.attrs["column-order"] = np.array([], dtype=h5py.string_dtype())
            _encode(table.create_dataset("_index", data=names, dtype=h5py.string_dtype()), "string-array", "0.2.0")
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            _encode(file.create_group(name), "dict", "0.1.0")


def _encode(node: h5py.HLObject, kind: str, version: str) -> None:
    node.attrs["encoding-type"], node.attrs["encoding-version"] = kind, version
