"""Which of a slide's claims about its own scale is believed, and what is refused."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from histill.errors import DataError, nearest
from histill.slides.slide import ScaleFacts, SlideError

__all__ = ["MPP_MAX", "MPP_MIN", "Scale", "ScaleError", "ScaleSource", "read_overrides", "resolve_scale"]

ScaleSource = Literal["override", "vendor", "objective", "tiff"]

MPP_MIN = 0.05
"""Finest scale that is believed, microns per pixel (no light microscope scans finer)."""
MPP_MAX = 5.0
"""Coarsest scale that is believed, microns per level-0 pixel."""
_SQUARE = 0.01  # x and y may differ by this share; beyond it one number cannot describe both
_MICRONS_AT_1X = 10.0  # 40x is 0.25 um/px and 20x is 0.5: the convention of scanners, good to about 10 %
_ALLOWED = f"{MPP_MIN} to {MPP_MAX} um/px"
_OVERRIDE = "state it: --mpp-override with a number, or with a CSV that has the columns slide,mpp"


class ScaleError(SlideError):
    """A slide does not say how large its pixels are, or says something that cannot be true."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of a slide's level 0."""

    mpp: float
    """Microns per level-0 pixel."""
    source: ScaleSource
    """Who says so."""


def _believable(mpp: float) -> bool:
    return math.isfinite(mpp) and MPP_MIN <= mpp <= MPP_MAX


def _square(mpp_xy: tuple[float, float]) -> bool:
    x, y = mpp_xy
    return abs(x - y) <= _SQUARE * min(x, y)


def _checked(mpp: float, source: ScaleSource, what: str, where: object) -> Scale:
    if not _believable(mpp):
        raise ScaleError(what, where=where, got=f"{mpp:.6g} um/px", allowed=_ALLOWED, remedy=_OVERRIDE)
    return Scale(mpp, source)


def _from_pair(mpp_xy: tuple[float, float], source: ScaleSource, who: str, where: object) -> Scale:
    """Check a scale that is stated once per axis."""
    for mpp in mpp_xy:
        _checked(mpp, source, f"the scale that {who} cannot be true", where)
    if not _square(mpp_xy):
        raise ScaleError(
            f"the scale that {who} differs between x and y: the pixels are not square",
            where=where,
            got=f"{mpp_xy[0]:.6g} across, {mpp_xy[1]:.6g} down, um/px",
            allowed=f"a difference of up to {_SQUARE:.0%}",
            remedy=f"if these numbers are wrong, {_OVERRIDE}",
        )
    return Scale(sum(mpp_xy) / 2, source)


def resolve_scale(
    facts: ScaleFacts, *, override: float | None = None, trust_tiff: bool = False, where: object
) -> Scale:
    """Choose a slide's scale: override, else vendor, else objective power, else (only when trusted) the TIFF tags.

    A source that is present but cannot be true is an error; the next one is not tried in its place.

    Parameters
    ----------
    facts
        What the file says.
    override
        Microns per level-0 pixel as the user states them; wins over everything.
    trust_tiff
        Whether bare TIFF resolution tags may be believed when there is nothing better.
    where
        The slide, for the error.

    Raises
    ------
    ScaleError
        When no source states a scale, or the one that does is outside 0.05 to 5 um/px, or x and y differ by more
        than 1 %.
    """
    if override is not None:
        return _checked(override, "override", "the scale given with --mpp-override cannot be true", where)
    if facts.vendor_mpp_xy is not None:
        return _from_pair(facts.vendor_mpp_xy, "vendor", "the scanner wrote", where)
    if facts.objective_power is not None:
        power = facts.objective_power
        what = f"the objective power that the file states ({power:g}x) cannot be true"
        return _checked(_MICRONS_AT_1X / power if power > 0 else math.nan, "objective", what, where)
    if trust_tiff and facts.tiff_mpp_xy is not None:
        return _from_pair(facts.tiff_mpp_xy, "tiff", "the TIFF resolution tags state", where)
    raise _unknown(facts, where)


def _unknown(facts: ScaleFacts, where: object) -> ScaleError:
    tags, got, remedy = facts.tiff_mpp_xy, "no vendor scale and no objective power", _OVERRIDE
    if tags is not None:
        got += f"; TIFF resolution tags of {tags[0]:.6g} x {tags[1]:.6g} um/px"
        if all(map(_believable, tags)) and _square(tags):
            remedy += "; or, if the TIFF resolution tags are right, --trust-tiff-resolution"
    return ScaleError(
        "this slide does not say how large its pixels are", where=where, got=got, allowed=_ALLOWED, remedy=remedy
    )


def _override_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, slide and mpp of each row, as text."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            if missing := [name for name in ("slide", "mpp") if name not in columns]:
                raise DataError(
                    f"a table of scales lacks the column {missing[0]}",
                    where=path,
                    got=", ".join(columns) or "an empty file",
                    allowed="the columns slide,mpp",
                    remedy=nearest(missing[0], columns),
                )
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        "a row has another number of fields than the header", where=f"{path}, line {reader.line_num}"
                    )
                yield reader.line_num, row["slide"].strip(), row["mpp"].strip()
    except OSError as error:
        raise DataError("a table of scales cannot be read", where=path, got=error, remedy="check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError("a table of scales is not a CSV in UTF-8", where=path, got=error) from None


def read_overrides(path: Path) -> dict[str, float]:
    """Read a CSV with the columns ``slide,mpp``: slide id -> microns per level-0 pixel.

    Raises
    ------
    DataError
        When the file is missing, not a CSV in UTF-8, or has no rows; when a row lacks a slide, names one a second
        time, or holds no number from 0.05 to 5.
    """
    overrides: dict[str, float] = {}
    for line, slide, text in _override_rows(path):
        where = f"{path}, line {line}"
        if not slide:
            raise DataError("a row of a table of scales names no slide", where=where)
        if slide in overrides:
            raise DataError("a table of scales names a slide twice", where=where, got=slide, remedy="keep one row")
        try:
            mpp = float(text)
        except ValueError:
            mpp = math.nan
        if not _believable(mpp):
            raise DataError("a table of scales holds no scale", where=where, got=repr(text), allowed=_ALLOWED)
        overrides[slide] = mpp
    if not overrides:
        raise DataError("a table of scales has no rows", where=path, allowed="the columns slide,mpp and a row a slide")
    return overrides
