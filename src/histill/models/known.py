"""What is known of a model beside its weights: the scale and the colours that its tiles must have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from histill.errors import ModelError
from histill.models.card import teachers_of
from histill.models.engines.folder import is_export, read_export
from histill.models.sources import record_of, resolve
from histill.models.teachers import TEACHERS

__all__ = ["Known", "check_colours", "known_of", "short_name"]

_SAME_COLOUR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the table of teachers, a bundle's provenance or an export says of a model; None where they say nothing."""

    mpp: tuple[float, ...] | None = None
    """Microns per pixel of the tiles that it was made for."""
    mean: tuple[float, ...] | None = None
    """Of the RGB channels, images in 0..1."""
    std: tuple[float, ...] | None = None


def known_of(model: str) -> Known:
    """Look a model up: its row of the table, its ``histill.json`` and there the rows of its teachers, or its export.

    Teachers of several scales leave their student several; colours are normalised as for the first one.

    Raises
    ------
    ModelError
        There is no such model, or what it says of itself is damaged.
    """
    if is_export(model):
        exported = read_export(Path(model).expanduser())
        return Known(mpp=exported.mpp, mean=exported.mean, std=exported.std)
    source = resolve(model)
    record = record_of(source)
    names = [str(teacher.get("name")) for teacher in teachers_of(record)]
    specs = [source.spec] if source.spec else [TEACHERS[name] for name in names if name in TEACHERS]
    spec = specs[0] if specs else None
    scales = {each for found in specs for each in _as_tuple(found.mpp)}
    mpp = _as_tuple(record.get("mpp")) or tuple(sorted(scales))
    return Known(
        mpp=mpp or None,
        mean=tuple(record["mean"]) if "mean" in record else spec.mean if spec else None,
        std=tuple(record["std"]) if "std" in record else spec.std if spec else None,
    )


def _as_tuple(mpp: float | Sequence[float] | None) -> tuple[float, ...]:
    return tuple(map(float, mpp)) if isinstance(mpp, Sequence) else () if mpp is None else (float(mpp),)


def short_name(name: str) -> str:
    """Call a model the same however its path is written: the last part of a folder's path, other names as they are."""
    prefix, _, target = name.partition(":")
    return name if prefix in ("timm", "hf-hub") else Path(target or prefix).expanduser().name or name


def check_colours(where: object, mean: Sequence[float], std: Sequence[float], known: Known) -> None:
    """Refuse a model that would normalise its images otherwise than it was made with.

    Raises
    ------
    ModelError
        Mean or std differ by more than 1e-4 from what is known.
    """
    for name, has, needs in (("mean", mean, known.mean), ("std", std, known.std)):
        if needs is not None and not np.allclose(has, needs, rtol=0, atol=_SAME_COLOUR):
            raise ModelError(
                "this model's normalisation is not the one that it was made with",
                where=where,
                got=f"{name} {', '.join(f'{value:g}' for value in has)}",
                allowed=f"{name} {', '.join(f'{value:g}' for value in needs)}",
                remedy="correct config.json in its folder, or make the bundle anew",
            )
