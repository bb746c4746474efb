"""SVG charts: well-formed, and every number at its place."""

import xml.etree.ElementTree as ElementTree

import pytest

from engine.charts import curves, heat_map, histogram, spread, ticks


def parse(svg: str) -> ElementTree.Element:
    """The picture; nothing may be drawn outside it."""
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    for box in root.iter("rect"):
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter("text")]


def hints(root: ElementTree.Element) -> list[str]:
    return [title.text for title in root.iter("title")]


def test_heat_map_has_each_cell_s_share_of_its_row():
    root = parse(heat_map([[90, 10, 0], [1, 999, 0], [0, 0, 0]], ["road", "car", "<none>"]))
    found = hints(root)
    assert found[0] == "road called road: 90 pixels, 90.00 %"
    assert found[1] == "road called car: 10 pixels, 10.00 %"
    assert found[3] == "car called road: 1 pixels, 0.10 %"
    assert found[8] == "<none> called <none>: 0 pixels, 0.00 %"
    shown = texts(root)
    assert {"90", "10", "100", "·", "truth ↓", "prediction →"} <= set(shown)
    assert shown.count("<none>") == 2
    fills = [box.get("fill") for box in root.iter("rect")]
    assert fills[2] == "#ffffff", "nothing of the row is here"
    assert fills[6:] == ["#eeeeee"] * 3, "the class has no pixel"
    brightness = [int(fill[1:3], 16) for fill in fills[:5]]
    assert brightness[4] < brightness[0] < brightness[1] < brightness[2]


def test_heat_map_rows_are_the_truth():
    root = parse(heat_map([[0, 5], [0, 0]], ["a", "b"]))
    box = next(box for box in root.iter("rect") if box.get("fill") == "#08306b")
    others = [float(b.get("x")) for b in root.iter("rect")]
    rows = [float(b.get("y")) for b in root.iter("rect")]
    assert float(box.get("x")) == max(others)
    assert float(box.get("y")) == min(rows)


def test_histogram_counts_every_defined_value():
    root = parse(histogram("EN", [0.0, 0.02, 0.5, 1.0, None], (0, 1)))
    assert hints(root) == ["0 to 0.05: 2", "0.5 to 0.55: 1", "0.95 to 1: 1"]
    heights = [float(box.get("height")) for box in root.iter("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert "EN (1 undefined)" in texts(root)
    assert "mean 0.38" in texts(root)


@pytest.mark.parametrize("values", [[3.0], [3.0, 3.0], [0.0, 0.0]])
def test_histogram_of_one_value(values):
    assert sum(int(hint.split(": ")[1]) for hint in hints(parse(histogram("x", values)))) == len(
        values
    )


@pytest.mark.parametrize("values", [[], [None]])
def test_nothing_to_draw_is_said(values):
    assert "no values" in texts(parse(histogram("x", values)))
    assert "no values" in texts(parse(curves("x", range(len(values)), {"a": values})))


def test_curves_break_where_a_value_is_undefined():
    root = parse(
        curves("IoU", [5, 10, 20, 30], {"car": [0.1, 0.4, None, 0.2], "bus": [1, 1, 1, 1]})
    )
    lines = [line.get("points").split() for line in root.iter("polyline")]
    assert [len(line) for line in lines] == [2, 1, 4]
    (x0, y0), (x1, y1) = ([float(v) for v in point.split(",")] for point in lines[0])
    (x2, _) = (float(v) for v in lines[2][2].split(","))
    assert y1 < y0, "more is higher"
    assert x2 - x1 == pytest.approx(2 * (x1 - x0), abs=0.2), "epochs are to scale"
    assert {"IoU", "car", "bus", "5", "30"} <= set(texts(root))
    assert "car, 10: 0.4" in hints(root)


def test_one_epoch_is_a_point():
    root = parse(curves("IoU", [7], {"car": [0.5]}))
    assert len(list(root.iter("circle"))) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 3], (1, 3)),
        ([2], (1, 3)),
        ([0], (-0.5, 0.5)),
        ([2, 2 + 1e-12], (1, 3)),
        ([-2], (-3, -1)),
    ],
    ids=str,
)
def test_spread_is_never_empty(values, expected):
    assert spread(values) == pytest.approx(expected)
    first, *_, last = ticks(*spread(values))
    assert first <= min(values) <= max(values) <= last
    assert first < last
