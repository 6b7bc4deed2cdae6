"""The files of a slide: HDF5 as TRIDENT's and CLAM's readers expect it, a tensor as CLAM's, and Zarr.

Shapes: K tiles with a feature, D features, H and W rows and columns of patch tokens, M failed tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from histill import files
from histill.errors import MissingExtraError

__all__ = ["SlideFeatures", "require_zarr", "write_h5", "write_pt", "write_zarr"]

_CHUNK_ROWS = 1024
_CHUNK_BYTES = 2**20
_COPY_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideFeatures:
    """All that is known of a slide."""

    features_KD: NDArray[np.float32]
    """In the order of ``order_K``'s values; may lie on the disk."""
    tokens_KHWD: NDArray[np.float16] | None
    order_K: NDArray[np.int64]
    """Row of ``features_KD`` of each row that is written."""
    coords_K2: NDArray[np.int64]
    """x and y of each row that is written, in level-0 pixels."""
    failed_M2: NDArray[np.int64]
    """x and y of the tiles whose pixels cannot be read."""
    coords_attributes: dict[str, Any]
    """As TRIDENT writes them."""
    features_attributes: dict[str, Any]
    """As TRIDENT writes them."""
    provenance: dict[str, Any]
    """Of the whole file."""

    def arrays(self) -> dict[str, tuple[NDArray[Any], tuple[int, ...], dict[str, Any]]]:
        """What is written row by row: name -> array in its own order, shape of a chunk, attributes."""
        width = self.features_KD.shape[1]
        found: dict[str, tuple[NDArray[Any], tuple[int, ...], dict[str, Any]]] = {
            "features": (self.features_KD, (_CHUNK_ROWS, width), self.features_attributes)
        }
        if self.tokens_KHWD is not None:
            shape = self.tokens_KHWD.shape[1:]
            rows = max(1, _CHUNK_BYTES // (2 * int(np.prod(shape))))
            found["tokens"] = (self.tokens_KHWD, (rows, *shape), self.features_attributes)
        return found


def write_h5(path: Path, slide: SlideFeatures) -> None:
    """Write ``features`` and ``coords`` (and ``tokens``) atomically; the same content gives the same bytes."""
    count = len(slide.order_K)
    with files.atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        for name, (values, chunk, attributes) in slide.arrays().items():
            shape = (count, *values.shape[1:])
            chunks = (min(chunk[0], max(count, 1)), *chunk[1:])
            target = file.create_dataset(name, shape, values.dtype, chunks=chunks, maxshape=(None, *shape[1:]))
            for start in range(0, count, _COPY_ROWS):
                target[start : start + _COPY_ROWS] = values[slide.order_K[start : start + _COPY_ROWS]]
            target.attrs.update(attributes)
        target = file.create_dataset("coords", data=slide.coords_K2, chunks=(max(count, 1), 2), maxshape=(None, 2))
        target.attrs.update(slide.coords_attributes)
        file.create_dataset("failed_tiles", data=slide.failed_M2)
        file.attrs.update(slide.provenance | {"failed_tiles": len(slide.failed_M2)})


def write_pt(path: Path, slide: SlideFeatures) -> None:
    """Write the features alone as a tensor (K, D) in float32, as CLAM's datasets load them."""
    import torch

    with files.atomic_path(path) as temporary:
        torch.save(torch.from_numpy(slide.features_KD[slide.order_K]), temporary)


def require_zarr() -> Any:
    """The module zarr, or an error that says what to install."""
    try:
        import zarr
    except ImportError:
        remedy = "pip install 'histill[zarr]'"
        raise MissingExtraError("zarr is not installed", where="--format zarr", remedy=remedy) from None
    return zarr


def write_zarr(path: Path, slide: SlideFeatures) -> None:
    """Write the same as a Zarr group, for lazy reading; failed_tiles is an attribute there."""
    zarr, count = require_zarr(), len(slide.order_K)
    with files.atomic_folder(path) as temporary:
        group = zarr.open_group(str(temporary), mode="w")
        for name, (values, chunk, attributes) in slide.arrays().items():
            shape = (count, *values.shape[1:])
            target = group.create_array(name, shape=shape, dtype=values.dtype, chunks=chunk)
            for start in range(0, count, chunk[0]):
                target[start : start + chunk[0]] = values[slide.order_K[start : start + chunk[0]]]
            target.attrs.update(attributes)
        coords = group.create_array("coords", shape=slide.coords_K2.shape, dtype=np.int64, chunks=(_CHUNK_ROWS, 2))
        coords[:] = slide.coords_K2
        coords.attrs.update(slide.coords_attributes)
        group.attrs.update(slide.provenance | {"failed_tiles": slide.failed_M2.tolist()})
