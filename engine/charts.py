"""Charts as SVG text for a page of HTML: heat map, histogram, curves; no script, no file."""

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22",
)  # fmt: skip
_BINS = 20
_CELL = 40  # pixels
_LETTER = 6.6  # pixels, of the font's 12
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 32  # margins of a chart with axes


def heat_map(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: rows are the truth, columns the prediction, each row 100 %.

    Args:
        counts: (classes, classes), pixels of class `row` that were called `column`.
    """
    margin = max(96, 24 + _LETTER * max(map(len, names)))
    parts = []
    for row, line in enumerate(counts):
        total, y = sum(line), margin + row * _CELL
        parts.append(_text(margin - 6, y + _CELL / 2 + 4, names[row], anchor="end"))
        for column, count in enumerate(line):
            share, x = count / total if total else 0.0, margin + column * _CELL
            shown = f"{100 * share:.0f}" if share >= 0.005 else ("·" if count else "")
            hint = f"{names[row]} called {names[column]}: {count} pixels, {100 * share:.2f} %"
            fill = _blend(share) if total else "#eeeeee"
            parts.append(_box(x, y, _CELL - 1, _CELL - 1, fill, hint))
            color = "#ffffff" if share > 0.5 else "#222222"
            parts.append(
                _text(x + _CELL / 2, y + _CELL / 2 + 4, shown, anchor="middle", fill=color)
            )
    for column, name in enumerate(names):
        x, y = margin + column * _CELL + _CELL / 2 + 4, margin - 6
        parts.append(_text(x, y, name, more=f'transform="rotate(-90 {x:g} {y:g})"'))
    parts.append(_text(margin - 6, 14, "prediction →", anchor="end"))
    parts.append(_text(margin - 6, margin - 6, "truth ↓", anchor="end"))
    size = margin + len(names) * _CELL + 4
    return _svg("confusion", size, size, parts)


def histogram(
    title: str, values: Sequence[float | None], limits: tuple[float, float] | None = None
) -> str:
    """How many images have which value, and a line at the mean.

    Args:
        values: one an image; None where undefined, which is counted in the title.
        limits: least and largest value of the axis; None takes them from the values.
    """
    width, height = 300, 180
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        title = f"{title} ({len(values) - len(defined)} undefined)"
    parts = [_text(_LEFT, 16, title, more='class="title"')]
    if not defined:
        return _svg("histogram", width, height, [*parts, _text(_LEFT, 90, "no values")])
    low, high = limits or spread(defined)
    counts = [0] * _BINS
    for value in defined:
        counts[min(_BINS - 1, max(0, int((value - low) / (high - low) * _BINS)))] += 1
    x_of = _scale(low, high, _LEFT, width - _RIGHT)
    y_of = _scale(0, max(counts), height - _BOTTOM, _TOP)
    for index, count in enumerate(counts):
        begin, end = (low + (high - low) * i / _BINS for i in (index, index + 1))
        hint = f"{begin:.4g} to {end:.4g}: {count}"
        if count:
            bar = y_of(0) - y_of(count)
            parts.append(_box(x_of(begin), y_of(count), x_of(end) - x_of(begin) - 1, bar,
                              COLORS[0], hint))  # fmt: skip
    mean = math.fsum(defined) / len(defined)
    parts.append(_line(x_of(mean), _TOP, x_of(mean), height - _BOTTOM, COLORS[1], 1.5))
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(_text(middle, height - 14, f"mean {mean:.4g}", anchor="middle", fill=COLORS[1]))
    parts.append(_line(_LEFT, y_of(0), width - _RIGHT, y_of(0), "#888888"))
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(_text(x_of(value), height - 14, f"{value:.4g}", anchor=anchor))
    parts.append(_text(_LEFT - 6, y_of(max(counts)) + 10, str(max(counts)), anchor="end"))
    return _svg("histogram", width, height, parts)


def curves(title: str, x: Sequence[float], series: Mapping[str, Sequence[float | None]]) -> str:
    """Lines over one axis with their names beside them; a line is broken where a value is None.

    Args:
        x: rising, such as epochs.
        series: name to values, as many as x.
    """
    plot, height = 560, 300
    width = plot + 40 + _LETTER * max(map(len, series), default=0)
    parts = [_text(_LEFT, 16, title, more='class="title"')]
    defined = [value for values in series.values() for value in values if value is not None]
    if not defined:
        return _svg("curves", width, height, [*parts, _text(_LEFT, 90, "no values")])
    y_ticks = ticks(*spread(defined))
    x_of = _scale(*spread(x), _LEFT, plot - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], height - _BOTTOM, _TOP)
    for tick in y_ticks:
        parts.append(_line(_LEFT, y_of(tick), plot - _RIGHT, y_of(tick), "#dddddd"))
        parts.append(_text(_LEFT - 6, y_of(tick) + 4, f"{tick:g}", anchor="end"))
    step = math.ceil(len(x) / 10)
    for place in x[::step]:
        parts.append(_text(x_of(place), height - 14, f"{place:g}", anchor="middle"))
    for index, (name, values) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        points = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        for piece in _pieces(x, values):
            path = " ".join(f"{x_of(a):.1f},{y_of(b):.1f}" for a, b in piece)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
            )
        for a, b in points:
            hint = html.escape(f"{name}, {a:g}: {b:.4g}")
            parts.append(
                f'<circle cx="{x_of(a):.1f}" cy="{y_of(b):.1f}" r="3" fill="{color}">'
                f"<title>{hint}</title></circle>"
            )
        parts.append(_box(plot + 8, _TOP + 20 * index, 12, 12, color, name))
        parts.append(_text(plot + 26, _TOP + 20 * index + 10, name))
    return _svg("curves", width, max(height, _TOP + 20 * len(series) + 8), parts)


def ticks(low: float, high: float, *, most: int = 8) -> list[float]:
    """Round numbers, evenly spaced, at most `most`, that enclose low < high."""
    for power in itertools.count(math.floor(math.log10((high - low) / most))):
        for factor in (1, 2, 5):
            spacing = factor * 10.0**power
            first, last = math.floor(low / spacing + 1e-9), math.ceil(high / spacing - 1e-9)
            if last - first < most:
                return [round(i * spacing, 12) for i in range(first, last + 1)]
    raise AssertionError("unreachable")


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Least and largest value, apart from each other: values that only noise divides are one."""
    low, high = float(min(values)), float(max(values))
    if high - low > 1e-6 * max(abs(low), abs(high)):
        return low, high
    return low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)


def _pieces(x: Sequence[float], values: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """Runs of neighbouring points without a gap."""
    runs = itertools.groupby(zip(x, values, strict=True), key=lambda point: point[1] is not None)
    return [list(run) for is_defined, run in runs if is_defined]


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """A function from low..high to first..last."""
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _blend(share: float) -> str:
    """White at 0, dark blue at 1."""
    dark = (8, 48, 107)
    return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in dark)


def _svg(kind: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg class="{kind}" width="{width:.0f}" height="{height:.0f}" role="img"'
    return f'{head} viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#222222", more: str = ""
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" {more}'
    return f"<text {place.rstrip()}>{html.escape(text)}</text>"


def _box(x: float, y: float, width: float, height: float, fill: str, hint: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"'
    return f"<rect {place}><title>{html.escape(hint)}</title></rect>"


def _line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{color}" stroke-width="{width:g}"/>'
