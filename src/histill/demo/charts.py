"""Line charts as SVG text, drawn by hand: text stays text, colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Level", "Line", "chart", "smooth", "ticks"]

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 40
_LABEL_ROOM = 78  # right of the plot, when lines are named there
_LABEL_STEP = 15  # least distance of two names


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve."""

    x: Sequence[float]
    y: Sequence[float]
    style: str
    """CSS class: student, teacher, untrained, or one of them with ``faint``."""
    name: str = ""
    """Written at its end; nothing if empty."""
    dots: bool = False
    """Mark each point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A horizontal reference line, named at its right end."""

    y: float
    style: str
    name: str


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside of a range, at steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average, shorter at the ends."""
    half = window // 2
    means = []
    for index in range(len(values)):
        part = values[max(0, index - half) : index + half + 1]
        means.append(sum(part) / len(part))
    return means


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    y_range: tuple[float, float] | None = None,
    y_format: Callable[[float], str] = "{:g}".format,
) -> str:
    """Draw a chart.

    Parameters
    ----------
    lines
        At least one, none empty; x is 0 or more, and the axis begins at 0.
    title
        For people who cannot see it.
    x_label, y_label
        With units.
    levels
        Reference lines.
    y_range
        Of the axis; fitted to lines and levels if None.
    y_format
        Text of a tick.
    """
    named = [(line.y[-1], line.style, line.name) for line in lines if line.name]
    named += [(level.y, level.style, level.name) for level in levels]
    right = _WIDTH - (_RIGHT if not named else _LABEL_ROOM)
    x_high = max(1.0, max(max(line.x) for line in lines))
    y_low, y_high = y_range or _fitted([*(value for line in lines for value in line.y), *(level.y for level in levels)])

    def at_x(value: float) -> float:
        return _LEFT + value / x_high * (right - _LEFT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_low) / (y_high - y_low) * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_axes(ticks(0, x_high), ticks(y_low, y_high), at_x, at_y, right, y_format),
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(12 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for level in levels:
        y = at_y(level.y)
        parts.append(f'<line class="level {level.style}" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for line in lines:
        points = [(at_x(x), at_y(y)) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if line.dots:
            parts += [f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in points]
    for y, style, name in _apart([(at_y(value), style, name) for value, style, name in named]):
        parts.append(f'<text class="name {style}" x="{right + 6}" y="{y + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _fitted(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    at_x: Callable[[float], float],
    at_y: Callable[[float], float],
    right: float,
    y_format: Callable[[float], str],
) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = [f'<line class="base" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for tick in y_ticks:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_format(tick)}</text>')
    for tick in x_ticks:
        x = at_x(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    return parts


def _apart(names: Sequence[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Push names that would overlap apart, from top to bottom, and back up when the last leaves the plot."""
    placed: list[tuple[float, str, str]] = []
    for y, style, name in sorted(names):
        least = placed[-1][0] + _LABEL_STEP if placed else _TOP
        placed.append((max(y, least), style, name))
    limit = float(_HEIGHT - _BOTTOM)
    for index in range(len(placed) - 1, -1, -1):
        y, style, name = placed[index]
        placed[index] = (min(y, limit), style, name)
        limit = placed[index][0] - _LABEL_STEP
    return placed
