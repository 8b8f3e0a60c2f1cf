"""Charts as inline SVG: text stays text, colours are classes of the page's style sheet, so that dark mode reaches them.

Every function returns Markup; whatever is printed in it is escaped. Sizes are in SVG units, scaled by the page.

Not drawn by matplotlib, which draws the pictures of runs and cards (`utils.plots`): a report is one HTML file with many
charts in it, and of matplotlib's SVG every element carries its own colour and font, which a style sheet cannot change
(dark mode, print); its ids, of which a chart refers to a dozen, are the same in every chart of a page; a name that is
cut has no title that shows it whole; and a chart takes five times the bytes (18 kB for curves that take 3.5 here).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from manticore_hf.modeling.settings_manticore import printable

_WIDTH = 640
NARROW = 340
"""Width of a chart for a phone, whose letters are then as large as the page's."""


def for_any_page(draw: Callable[..., Markup], *args: Any, width: float = _WIDTH, **settings: Any) -> Markup:
    """A chart twice, for pages and for phones, of which the page's style sheet shows one.

    One that only shrinks has letters of half their size on a phone, and one that keeps its size is cut at the right.

    Args:
        draw: A chart's function.
        args, settings: What it takes.
        width: Of the chart on a page.
    """
    broad, narrow = (draw(*args, width=one, **settings) for one in (width, NARROW))
    return Markup('<div class="broad">{}</div><div class="narrow">{}</div>').format(broad, narrow)


def _svg(width, height, parts, label):
    body = Markup("").join(parts)
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart" style="max-width:{}px">{}</svg>'
    ).format(_short(width), _short(height), printable(label), _short(width), body)


def _text(x, y, text, anchor="start", classes="", title=None):
    text, title = printable(text), None if title is None else printable(title)
    inner = escape(text) if title is None else Markup("<title>{}</title>{}").format(title, text)
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(
        _short(x), _short(y), anchor, classes, inner
    )


def _line(x1, y1, x2, y2, classes):
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(*map(_short, (x1, y1, x2, y2)), classes)


def _rect(x, y, width, height, classes, style=""):
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}" style="{}"/>').format(
        *map(_short, (x, y, max(width, 0), max(height, 0))), classes, style
    )


def _short(number):
    return f"{number:.1f}".removesuffix(".0")


def _clip(text, length):
    return text if len(text) <= length else text[: length - 1] + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(value, all_ticks):
    gaps = [b - a for a, b in zip(all_ticks, all_ticks[1:])]
    digits = max(0, -math.floor(math.log10(min(gaps)) + 1e-9)) if gaps else 2
    return f"{value or 0.0:,.{digits}f}"  # -0.0, too


def forest(
    rows: Sequence[tuple[str, float, Sequence[float] | None]],
    needed: float | None = None,
    label: str = "Differences with confidence intervals",
    unit: str = "nats per token",
    width: float = _WIDTH,
) -> Markup:
    """Differences with their intervals around a line at 0.

    Args:
        rows: [(name, difference, [low, high] or None)]: positive is to the right.
        needed: Where to draw the line of what is worth having, or None.
        label: For screen readers.
        unit: Of the differences.
        width: Of the chart; on a phone, and where it is too narrow for the names, each is above its bar.
    """
    above = width <= NARROW or width < _WIDTH and max(len(name) for name, *_ in rows) > 30
    most = 44 if above else 38
    names = [_clip(name, most) for name, *_ in rows]
    left, right, top, step = 24 + 6.7 * max(map(len, names)), 20, 8, 24
    if above:
        left, right, step = 10, 10, 40
    numbers = [0.0, needed or 0.0] + [x for _, difference, pair in rows for x in (difference, *(pair or ()))]
    low, high = min(numbers), max(numbers)
    pad = 0.06 * (high - low or 1.0)
    low, high = low - pad, high + pad
    height = top + step * len(rows) + 40

    def at(value):
        return left + (value - low) / (high - low) * (width - left - right)

    marks, bottom = ticks(low, high, 4 if above else 5), top + step * len(rows)
    parts = [_line(at(v), top, at(v), bottom, "grid") for v in marks]
    parts += [_text(at(v), bottom + 14, _tick_text(v, marks), "middle", "tick") for v in marks]
    parts.append(_line(at(0), top, at(0), bottom, "zero"))
    if needed:
        parts.append(_line(at(needed), top, at(needed), bottom, "needed"))
    for i, (name, difference, pair) in enumerate(rows):
        y = top + step * i + (30 if above else step / 2)
        sure = "good" if pair and pair[0] > 0 else "bad" if pair and pair[1] < 0 else "open"
        parts.append(
            _text(0, y - 13, names[i], "start", "name", name)
            if above
            else _text(left - 10, y + 4, names[i], "end", "", name)
        )
        if pair:
            parts.append(_line(at(pair[0]), y, at(pair[1]), y, f"bar {sure}"))
            parts += [_line(at(end), y - 6, at(end), y + 6, f"bar {sure}") for end in pair]
        parts.append(
            Markup('<circle cx="{}" cy="{}" r="3" class="dot {}"/>').format(_short(at(difference)), _short(y), sure)
        )
    # At the ends, not around 0: a hybrid that loses everywhere has that at the edge.
    parts.append(_text(left, bottom + 32, "← baseline better", "start", "tick"))
    parts.append(_text(width - right, bottom + 32, f"hybrid better, {unit} →", "end", "tick"))
    return _svg(width, height, parts, label)


def heat(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    form: str = "{:.2f}",
    largest: float = 1.0,
    label: str = "Heat map",
    width: float = _WIDTH,
) -> Markup:
    """A heat map: the darker, the larger; negative values in the other colour.

    Args:
        values: [rows][columns] numbers, None where there is none.
        rows, columns: Names.
        form: How a value is printed.
        largest: The value of full colour.
        label: For screen readers.
        width: At most, of the chart.
    """
    left = 110 if width >= _WIDTH else 70
    top, wide, high = 30, min(150, (width - left - 10) / max(1, len(columns))), 28
    parts = [
        _text(left + wide * (i + 0.5), 20, _clip(name, max(6, int(wide / 7))), "middle", "", name)
        for i, name in enumerate(columns)
    ]
    for i, (name, row) in enumerate(zip(rows, values)):
        y = top + i * high
        parts.append(_text(left - 10, y + high / 2 + 4, name, "end"))
        for j, value in enumerate(row):
            x, strength = left + j * wide, min(1.0, abs(value or 0.0) / (largest or 1.0))
            if value is None:
                parts += [
                    _rect(x, y, wide - 2, high - 2, "cell empty"),
                    _text(x + wide / 2, y + high / 2 + 4, "–", "middle", "tick"),
                ]
                continue
            kind = "cell less" if value < 0 else "cell more"
            parts.append(_rect(x, y, wide - 2, high - 2, kind, f"fill-opacity:{strength:.3f}"))
            strong = "on-dark" if strength > 0.55 else ""
            parts.append(_text(x + wide / 2 - 1, y + high / 2 + 4, form.format(value), "middle", strong))
    return _svg(left + wide * len(columns) + 10, top + high * len(rows) + 4, parts, label)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    low: float | None = None,
    high: float | None = None,
    label: str = "Curves",
    width: float = _WIDTH,
) -> Markup:
    """Curves with a legend, by colour and dash pattern: of two that are equal, one shows through the other's gaps.

    Args:
        series: {name: (x values, y values)}.
        x_label, y_label: What the axes show, as parts of a sentence.
        low, high: Bounds of y; default: those of the values.
        label: For screen readers.
        width: Of the chart.
    """
    left, right, top, plot = 58 if width >= _WIDTH else 40, 12, 12, 190
    legend, x, row = [], left, 0
    for i, name in enumerate(series):
        entry = 36 + 7.2 * len(_clip(name, 40))
        if x + entry > width - right and x > left:
            x, row = left, row + 1
        legend.append((i, name, x, row))
        x += entry
    top += 18 * (row + 1)
    xs = [v for one, _ in series.values() for v in one]
    ys = [v for _, one in series.values() for v in one if math.isfinite(v)] or [0.0]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(ys) if low is None else low), (max(ys) if high is None else high)
    pad = 0.05 * (y_high - y_low or 1.0)
    y_low, y_high = (y_low - pad if low is None else y_low), (y_high + pad if high is None else y_high)

    def at(a, b):
        return (
            left + (a - x_low) / ((x_high - x_low) or 1) * (width - left - right),
            top + (1 - (b - y_low) / (y_high - y_low)) * plot,
        )

    parts = []
    y_marks, x_marks = ticks(y_low, y_high), ticks(x_low, x_high, 6 if width >= _WIDTH else 4)
    for value in y_marks:
        y = at(x_low, value)[1]
        parts += [
            _line(left, y, width - right, y, "grid"),
            _text(left - 7, y + 4, _tick_text(value, y_marks), "end", "tick"),
        ]
    parts += [_text(at(v, y_low)[0], top + plot + 16, _tick_text(v, x_marks), "middle", "tick") for v in x_marks]
    for i, name, lx, lrow in legend:
        y = 14 + 18 * lrow
        parts += [
            _line(lx, y - 4, lx + 20, y - 4, f"curve c{i % 6} d{i % 4}"),
            _text(lx + 25, y, _clip(name, 40), title=name),
        ]
    for i, (one, other) in enumerate(series.values()):
        points = [at(a, b) for a, b in zip(one, other) if math.isfinite(b)]
        path = " ".join(f"{_short(px)},{_short(py)}" for px, py in points)
        parts.append(Markup('<polyline points="{}" class="curve c{} d{}"/>').format(path, i % 6, i % 4))
        if len(points) < 16:
            parts += [
                Markup('<circle cx="{}" cy="{}" r="3" class="point c{}"/>').format(_short(px), _short(py), i % 6)
                for px, py in points
            ]
    from_zero = "" if y_low <= 0 else " (does not start at 0)"
    parts.append(_text(left, top + plot + 34, f"{y_label}, by {x_label}{from_zero}", "start", "tick"))
    return _svg(width, top + plot + 40, parts, label)
