"""What every measure expects of a feature array: finite, two-dimensional, one row per image.

Shapes: N images, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from histill.errors import DataError

__all__ = ["Array", "as_features", "unit_rows"]

Array = npt.NDArray[Any]


def as_features(x_ND: Array, name: str) -> Array:
    """Return ``x_ND`` as float64.

    Raises
    ------
    DataError
        When it is not two-dimensional, is empty, or holds a value that is not finite (with the first such row).
    """
    if x_ND.ndim != 2 or 0 in x_ND.shape:
        raise DataError("features are a table of one row per image", where=name, got=f"shape {x_ND.shape}")
    x_ND = x_ND.astype(np.float64)
    finite_N = np.isfinite(x_ND).all(axis=1)
    if not finite_N.all():
        raise DataError(
            f"{(~finite_N).sum()} of {len(x_ND)} feature rows are not finite",
            where=f"{name}, first in row {int(np.argmin(finite_N))}",
            remedy="look at the encoder: its weights or its input are not finite, or its precision overflows",
        )
    return x_ND


def unit_rows(x_ND: Array) -> Array:
    """Scale every row to length 1; a row of zeros stays zeros (its cosine with everything is 0)."""
    norm_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    unit_ND: Array = np.divide(x_ND, norm_N1, out=np.zeros_like(x_ND), where=norm_N1 > 0)
    return unit_ND
