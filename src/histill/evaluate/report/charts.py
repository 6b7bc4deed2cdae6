"""Bars and heat maps as SVG text, drawn by hand: text stays text, colours come from the page's style sheet.

Shapes: N slides, H and W pixels.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["NAMED_SLIDES", "Bar", "bars", "colour_bar", "heat_map", "order_slides"]

NAMED_SLIDES = 20
"""With more slides, the map names stainings instead of each slide."""

_WIDTH = 400
_ROW = 40  # height of a bar with its name above it
_PLOT = 318  # right end of the bars: the value stands beside them
_VALUED_SLIDES = 9  # up to so many, the value stands in each cell
# viridis at quarters (Smith and van der Walt): rises evenly in lightness, also in grey print
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)
_LIGHT = 0.5  # from here on, text on the colour is dark


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One encoder in one task."""

    name: str
    style: str
    """CSS class of its colour: c0 to c7."""
    value: float | None
    """None: grey, with ``text``."""
    low: float | None = None
    high: float | None = None
    text: str = ""
    """At the end of the bar; why there is none."""


def bars(rows: Sequence[Bar], *, title: str, span: tuple[float, float]) -> str:
    """Draw one task: a bar and its interval per encoder.

    Parameters
    ----------
    rows
        At least one.
    title
        For people who cannot see it.
    span
        Of the axis, low to high, with 0 inside: equal for tasks that are to be compared.
    """
    low, high = span

    def at(value: float) -> float:
        return min(max((value - low) / (high - low), 0.0), 1.0) * _PLOT

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_ROW * len(rows)}" role="img" aria-label="{escape(title)}">']
    for number, row in enumerate(rows):
        top = number * _ROW
        parts.append(f'<text class="who" x="0" y="{top + 14}">{escape(row.name)}</text>')
        if row.value is None:
            parts.append(f'<rect class="absent" x="0" y="{top + 20}" width="{_PLOT}" height="12" rx="2"/>')
            parts.append(f'<text x="8" y="{top + 30.5}" class="why">{escape(row.text or "not run")}</text>')
            continue
        left, right = sorted((at(0.0), at(row.value)))
        middle = top + 26
        parts.append(f'<rect class="track" x="0" y="{top + 20}" width="{_PLOT}" height="12" rx="2"/>')
        parts.append(
            f'<rect class="bar {row.style}" x="{left:.1f}" y="{top + 20}" width="{right - left:.1f}" height="12"/>'
        )
        if row.low is not None and row.high is not None:
            first, last = at(row.low), at(row.high)
            parts.append(
                f'<path class="span" d="M{first:.1f} {middle}H{last:.1f}'
                f'M{first:.1f} {middle - 5}v10M{last:.1f} {middle - 5}v10"/>'
            )
        parts.append(f'<text class="number" x="{_WIDTH}" y="{top + 31}" text-anchor="end">{escape(row.text)}</text>')
    return "\n".join([*parts, "</svg>"])


def _colours(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(..., 4): red, green, blue and opacity of values from 0 to 1; NaN is clear."""
    place = np.clip(np.nan_to_num(values), 0.0, 1.0) * (len(_COLOURS) - 1)
    channels = [np.interp(place, range(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    return np.stack([*channels, np.where(np.isnan(values), 0.0, 255.0)], axis=-1).round().astype(np.uint8)


def _png(pixels_HW4: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels_HW4).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def colour_bar() -> str:
    """PNG data URI of the colours from 0 (left) to 1 (right)."""
    return _png(_colours(np.linspace(0.0, 1.0, 128)[None]))


def order_slides(names: Sequence[str]) -> list[int]:
    """Places of slides ``<STAINING>_<SCANNER>_to_...``, ordered by staining, then scanner."""
    return sorted(range(len(names)), key=lambda place: names[place].split("_")[:2])


def heat_map(names: Sequence[str], above_NN: NDArray[np.float64], below_NN: NDArray[np.float64], *, title: str) -> str:
    """Draw two symmetric matrices of values from 0 to 1 in one square; NaN is shown grey.

    Parameters
    ----------
    names
        Slides, ``<STAINING>_<SCANNER>_to_...``, ordered by staining (N).
    above_NN, below_NN
        Shown above and below the diagonal, which itself stays grey.
    title
        For people who cannot see it.
    """
    count, short = len(names), [" ".join(name.split("_")[:2]) for name in names]
    shown_NN = np.where(np.tri(count, k=-1, dtype=bool), below_NN, above_NN)
    np.fill_diagonal(shown_NN, np.nan)
    each = count <= NAMED_SLIDES
    left = 64 if each else 42  # room for names, on the left and, turned, below
    side = _WIDTH - left
    cell = side / count
    labels = [(place + 0.5, text) for place, text in enumerate(short)] if each else _blocks(names)
    parts = [
        f'<svg class="chart map" viewBox="0 0 {_WIDTH} {side + left}" role="img" aria-label="{escape(title)}">',
        f'<rect class="absent" x="{left}" y="0" width="{side}" height="{side}"/>',
        f'<image x="{left}" y="0" width="{side}" height="{side}" preserveAspectRatio="none" '
        f'href="{_png(_colours(shown_NN))}"/>',
    ]
    if not each:
        parts += _rules(names, left, side, cell)
    if count <= _VALUED_SLIDES:
        parts += _values(shown_NN, left, cell)
    for place, text in labels:
        at = place * cell
        parts.append(f'<text x="{left - 5}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        parts.append(
            f'<text transform="translate({left + at + 4:.1f} {side + 6}) rotate(-90)" '
            f'text-anchor="end">{escape(text)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def _values(shown_NN: NDArray[np.float64], left: float, cell: float) -> list[str]:
    return [
        f'<text class="{"dark" if value > _LIGHT else "light"}" x="{left + (column + 0.5) * cell:.1f}" '
        f'y="{(row + 0.5) * cell + 4:.1f}" text-anchor="middle">{value:.2f}</text>'
        for (row, column), value in np.ndenumerate(shown_NN)
        if np.isfinite(value)
    ]


def _blocks(names: Sequence[str]) -> list[tuple[float, str]]:
    """Middle and staining of each run of slides with the same staining."""
    found, begin = [], 0
    for staining, members in itertools.groupby(name.split("_")[0] for name in names):
        size = len(list(members))
        found.append((begin + size / 2, staining))
        begin += size
    return found


def _rules(names: Sequence[str], left: float, side: float, cell: float) -> list[str]:
    """Thin lines between stainings."""
    stainings = [name.split("_")[0] for name in names]
    edges = [place for place in range(1, len(names)) if stainings[place] != stainings[place - 1]]
    path = "".join(f"M{left + e * cell:.1f} 0v{side}M{left} {e * cell:.1f}h{side}" for e in edges)
    return [f'<path class="rule" d="{path}"/>'] if edges else []
