from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from histill.demo.charts import Level, Line, chart, smooth, ticks


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.03, 0.97, [0.2, 0.4, 0.6, 0.8]),
        (-1.2, 1.2, [-1, -0.5, 0, 0.5, 1]),
        (0, 37, [0, 10, 20, 30]),
        (0.76, 1.0, [0.8, 0.85, 0.9, 0.95, 1.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_smoothing_is_a_centred_mean_that_shortens_at_the_ends() -> None:
    assert smooth([0, 3, 6, 0, 9], 3) == [1.5, 3, 3, 5, 4.5]
    assert smooth([1.0, 2.0], 1) == [1.0, 2.0]


def test_a_line_runs_between_the_corners_of_the_plot() -> None:
    svg = drawn(
        chart(
            [Line(x=[0, 50, 100], y=[0, 0.25, 1], style="student")],
            title="t",
            x_label="steps",
            y_label="share",
            y_range=(0, 1),
        )
    )
    points = [tuple(map(float, point.split(","))) for point in svg.find("polyline").get("points").split()]  # type: ignore[union-attr]
    (x0, y0), (x1, y1), (x2, y2) = points
    base = svg.find("line[@class='base']")
    assert base is not None
    assert (x0, y0) == (float(base.get("x1", 0)), float(base.get("y1", 0)))
    assert x2 == float(base.get("x2", 0))
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert (y0 - y1) == pytest.approx((y0 - y2) / 4, abs=0.1), "up is more"


def test_text_stays_text_and_is_escaped() -> None:
    svg = drawn(
        chart([Line(x=[0, 1], y=[1, 2], style="student")], title="a < b", x_label="steps & more", y_label="loss (nats)")
    )
    texts = [element.text for element in svg.iter("text")]
    assert "steps & more" in texts
    assert "loss (nats)" in texts
    assert svg.get("aria-label") == "a < b"


def test_names_at_the_right_do_not_overlap_and_stay_in_the_plot() -> None:
    levels = [Level(y=0.5, style="teacher", name="teacher"), Level(y=0.5001, style="untrained", name="untrained")]
    line = Line(x=[0, 1], y=[0.2, 0.4999], style="student", name="student")
    svg = drawn(chart([line], levels=levels, title="t", x_label="x", y_label="y"))
    names = {e.text: float(e.get("y", 0)) for e in svg.iter("text") if (e.get("class") or "").startswith("name")}
    assert set(names) == {"teacher", "untrained", "student"}
    heights = sorted(names.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 14
    assert heights[0] > 0
    assert heights[-1] < float((svg.get("viewBox") or "").split()[3])


def test_constant_values_and_a_single_point_can_be_drawn() -> None:
    text = chart([Line(x=[3], y=[0.0], style="student", dots=True)], title="t", x_label="x", y_label="y")
    assert not re.search(r"nan|inf", text)
    assert drawn(text).find("circle") is not None
