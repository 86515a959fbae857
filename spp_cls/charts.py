"""Charts as inline SVG, drawn by a few functions of our own: hundreds of curves in a second, in the page's colours.

A curve or dot carries its name and the number of its run for the page's script; a chart, how its px become values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .render import COLOURS, DASHES

WIDTH, HEIGHT = 460, 250  # of the drawing; wide enough for a curve, narrow enough to be read on a telephone
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 36
MOST = 400  # points of a curve
SHADES = 8  # of a metric, from the best to the worst

Numbers = npt.NDArray[np.float64]


class Buckets(NamedTuple):
    """A curve in few points: of the values that fall into each, place, mean, least and most."""

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def downsample(x: Any, y: Any, most: int = MOST) -> Buckets:
    """`y` (n,) over `x` (n,), ascending, in at most `most` buckets of as many values each.

    What is not finite is left out. No extreme is lost: the least and the most of all are those of some bucket.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return Buckets(x, y, y, y)
    edges = np.linspace(0, len(x), most + 1).astype(np.intp)
    counts, starts = np.diff(edges), edges[:-1]
    means = [np.add.reduceat(values, starts) / counts for values in (x, y)]
    return Buckets(means[0], means[1], np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def smooth(y: Numbers, window: int) -> Numbers:
    """The mean of `window` values round each; fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + (window - window // 2), len(y))
    return np.asarray((total[high] - total[low]) / (high - low), np.float64)


@dataclass(frozen=True)
class Axis:
    """Values → places from 0 to 1: numbers between `low` and `high`, evenly or by their logarithms; or `words`."""

    low: float
    high: float
    log: bool = False
    words: tuple[str, ...] = ()

    def place(self, values: Any) -> Numbers:
        if self.words:
            places = {word: (i + 0.5) / len(self.words) for i, word in enumerate(self.words)}
            return np.array([places.get(str(value), math.nan) for value in values])
        ends = [self.low, self.high, *np.asarray(values, np.float64)]
        scaled = np.log10(ends) if self.log else np.array(ends)
        return np.asarray((scaled[2:] - scaled[0]) / (scaled[1] - scaled[0]), np.float64)

    def ticks(self, number: int = 5) -> list[tuple[float, str]]:
        """(place, label), about `number` of them."""
        if self.words:
            return list(zip(self.place(self.words).tolist(), self.words, strict=True))
        values = _decades(self.low, self.high) if self.log else []
        values = values if len(values) > 1 else _round_numbers(self.low, self.high, number)
        return list(zip(self.place(values).tolist(), map(label, values), strict=True))


def axis_of(values: Sequence[Any], log: bool | None = None, pad: float = 0.04) -> Axis:
    """An axis that shows all `values`: numbers, or words; by logarithms where they span more than a factor of 50."""
    if any(isinstance(value, str) for value in values):
        return Axis(0, 1, words=tuple(dict.fromkeys(map(str, values))))
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    low, high = (float(numbers.min()), float(numbers.max())) if len(numbers) else (0.0, 1.0)
    if log is None:
        log = low > 0 and high / low > 50
    if low == high:
        wider = abs(low) * 0.1 or 1.0
        return Axis(low - wider, high + wider)
    if log:
        return Axis(low / (high / low) ** pad, high * (high / low) ** pad, log=True)
    wider = pad * (high - low)
    return Axis(low - wider if low < 0 or low - wider > 0 else 0.0, high + wider)


def label(value: float) -> str:
    """A number in few letters."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _round_numbers(low: float, high: float, number: int) -> list[float]:
    rough = (high - low) / number
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, (last - first) // 6)
    values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [value for value in values if low <= value <= high]


@dataclass(frozen=True)
class Series:
    """A curve, or dots, in the look `look` (see `look_of`, `shade_of`); `run` is the number of its run."""

    name: str
    x: Any
    y: Any
    look: str = "c0"
    run: int | None = None
    band: Buckets | None = None
    dots: bool = False


def look_of(number: int) -> str:
    """Colour and dash of the curve of that number, told apart up to 24."""
    return f"c{number % len(COLOURS)} d{number // len(COLOURS) % len(DASHES)}"


def shade_of(rank: float) -> str:
    """The look of a metric: `rank` 0 is the best, 1 the worst, nan is none."""
    return "mx" if math.isnan(rank) else f"m{min(SHADES - 1, int(rank * SHADES))}"


def legend(series: Sequence[Series]) -> str:
    """Colours, dashes and names."""
    names = "".join(f'<li class="{each.look}">{escape(each.name)}</li>' for each in series)
    return f'<ul class="legend">{names}</ul>'


def chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, named: bool = True, log: bool | None = None
) -> str:
    """A figure of `series` in one system of axes; nothing where they have no value. `named`: with its legend."""
    series = [each for each in series if len(each.x)]
    if not series:
        return ""
    x_axis = axis_of(_together([each.x for each in series]), log=None if series[0].dots else False, pad=0.03)
    bands = [values for each in series if each.band for values in (each.band.low, each.band.high)]
    y_axis = axis_of(_together([*(each.y for each in series), *bands]), log)
    parts = [_axes(x_axis, y_axis, x_label, y_label)]
    parts += [_band(each.band, each.look, x_axis, y_axis) for each in series if each.band]
    for each in series:
        parts += _marks(each, x_axis, y_axis)
    scale = f' data-box="{LEFT} {WIDTH - RIGHT} {TOP} {HEIGHT - BOTTOM}" data-at="{escape(x_label)}"'
    scale += "" if x_axis.words else f' data-x="{x_axis.low!r} {x_axis.high!r} {int(x_axis.log)}"'
    scale += f' data-y="{y_axis.low!r} {y_axis.high!r} {int(y_axis.log)}"'
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        + (legend(series) if named else "")
        + f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{scale}>{"".join(parts)}'
        + "</svg></figure>"
    )


def _together(parts: Sequence[Any]) -> list[Any]:
    return [value for part in parts for value in (part.tolist() if isinstance(part, np.ndarray) else part)]


def _x(places: Numbers) -> Numbers:
    return LEFT + places * (WIDTH - LEFT - RIGHT)


def _y(places: Numbers) -> Numbers:
    return HEIGHT - BOTTOM - places * (HEIGHT - TOP - BOTTOM)


def _axes(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for place, text in y_axis.ticks():
        y = f"{float(_y(np.array(place))):.1f}"
        parts.append(
            f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/><text x="{LEFT - 5}" y="{y}" class="y">{text}</text>'
        )
    ticks = x_axis.ticks(6)
    every = max(1, math.ceil(len(ticks) * max(len(text) for _, text in ticks) / 62)) if ticks else 1
    for place, text in ticks[::every]:
        x = f"{float(_x(np.array(place))):.1f}"
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 13}" class="x">{escape(text)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 5}" class="x title">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(11 {middle:g}) rotate(-90)" class="x title">{escape(y_label)}</text>')
    parts.append(f'<path class="base" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts)


def _points(x: Any, y: Any) -> list[str]:
    pairs = zip(np.round(x, 1).tolist(), np.round(y, 1).tolist(), strict=True)
    return [f"{a:g} {b:g}" for a, b in pairs if math.isfinite(a) and math.isfinite(b)]


def _marks(series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    points = _points(_x(x_axis.place(series.x)), _y(y_axis.place(series.y)))
    of = f' data-run="{series.run}"' if series.run is not None else ""
    name = f' data-name="{escape(series.name)}"'
    if series.dots or len(points) == 1:  # a line of no length with round ends
        return [f'<path class="dot {series.look}"{name}{of} d="M{point}h0"/>' for point in points]
    return [f'<path class="line {series.look}"{name}{of} d="M{"L".join(points)}h0"/>'] if points else []


def _band(band: Buckets, look: str, x_axis: Axis, y_axis: Axis) -> str:
    x = _x(x_axis.place(band.x))
    there, back = _points(x, _y(y_axis.place(band.high))), _points(x, _y(y_axis.place(band.low)))[::-1]
    return f'<path class="band {look}" d="M{"L".join([*there, *back])}Z"/>'


def parallel(axes: Sequence[tuple[str, Axis]], lines: Sequence[tuple[str, Sequence[Any], str, int]]) -> str:
    """Parallel coordinates: an upright axis for each name, a line for each (name, values, look, run)."""
    gap, height = 120, 260
    left = 20 + 6 * max(len(cut(text, 16)) for _, text in axes[0][1].ticks())
    width = left + gap * (len(axes) - 1) + 70
    columns = [axis.place([values[i] for _, values, _, _ in lines]) for i, (_, axis) in enumerate(axes)]
    parts = []
    for j, (name, _, look, run) in enumerate(lines):
        # Where a run has no value its line makes a gap; a number alone would leave a dot.
        points = [
            f"{left + gap * i} {height - 20 - column[j] * (height - 60):.1f}" if math.isfinite(column[j]) else ""
            for i, column in enumerate(columns)
        ]
        pieces = "".join(f"{'L' if i and points[i - 1] else 'M'}{point}" for i, point in enumerate(points) if point)
        parts.append(f'<path class="line {look}" data-name="{escape(name)}" data-run="{run}" d="{pieces}"/>')
    for i, (name, axis) in enumerate(axes):
        x = left + gap * i
        parts.append(
            f'<path class="base" d="M{x} 40V{height - 20}"/>'
            f'<text x="{x}" y="18" class="x title">{escape(cut(name, 19))}</text>'
        )
        ticks = axis.ticks()
        for place, text in ticks[:: max(1, len(ticks) // 8)]:
            y = height - 20 - place * (height - 60)
            parts.append(f'<text x="{x - 5}" y="{y:.1f}" class="y halo">{escape(cut(text, 16))}</text>')
    return (
        f'<div class="wide"><svg class="parallel" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="parallel coordinates" style="min-width:{min(width, 900)}px;max-width:{1.4 * width:.0f}px">'
        + "".join(parts)
        + "</svg></div>"
    )


def cut(text: str, letters: int) -> str:
    """`text` in at most so many letters."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


def matrix(counts: Any, classes: Sequence[str]) -> str:
    """A confusion matrix (K, K): rows are labels, columns answers, shade the share of the row; cells with counts in a
    small one. What is nought is not drawn."""
    counts, number = np.asarray(counts), len(classes)
    cell = 26 if number <= 20 else 16 if number <= 50 else max(2, 800 // number)
    named = number <= 50
    margin = 12 + 6.3 * max(len(cut(name, 18)) for name in classes) if named else 8
    side = margin + cell * number + 2
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    parts = [
        f'<rect class="frame" x="{margin:.0f}" y="{margin:.0f}" width="{cell * number}" height="{cell * number}"/>'
    ]
    for i, j in zip(*np.nonzero(counts), strict=True):
        x, y = margin + cell * j, margin + cell * i
        parts.append(
            f'<rect class="{"right" if i == j else "wrong"}" x="{x:.0f}" y="{y:.0f}" width="{cell}" height="{cell}" '
            f'fill-opacity="{max(0.08, shares[i, j]):.2f}">'
            f"<title>{escape(classes[i])} → {escape(classes[j])}: {counts[i, j]}</title></rect>"
        )
        if number <= 20:
            at = f'x="{x + cell / 2:.0f}" y="{y + cell / 2:.0f}"'
            kind = "count light" if shares[i, j] > 0.5 else "count"
            parts.append(f'<text class="{kind}" {at}>{label(float(counts[i, j]))}</text>')
    for i, name in enumerate(classes if named else ()):
        middle = margin + cell * (i + 0.5)
        text = escape(cut(name, 18))
        parts.append(f'<text x="{margin - 4:.0f}" y="{middle:.1f}" class="y">{text}</text>')
        parts.append(f'<text transform="translate({middle:.1f} {margin - 4:.0f}) rotate(-90)" class="up">{text}</text>')
    return (
        f'<div class="wide"><svg class="matrix" viewBox="0 0 {side:.0f} {side:.0f}" style="width:{side:.0f}px" '
        f'role="img" aria-label="confusion matrix">{"".join(parts)}</svg></div>'
    )


def css() -> str:
    """What the drawings look like, in the colours that the page of `render` names."""
    colours = "".join(f".c{i}{{--c:var(--{colour[1:]})}}" for i, colour in enumerate(COLOURS))
    best, worst = "var(--0072b2)", "var(--c25100)"
    shades = "".join(
        f".m{i}{{--c:color-mix(in oklab,{best} {100 - 100 * i // (SHADES - 1)}%,{worst})}}" for i in range(SHADES)
    )
    return f"""
{colours}{shades}.mx{{--c:var(--d5d9e0)}}
.d1{{stroke-dasharray:6 3}}.d2{{stroke-dasharray:8 3 2 3}}.d3{{stroke-dasharray:2 3}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:0 1.5rem}}
figure.chart{{margin:1.25rem 0 0;max-width:38rem;min-width:0}}
.chart figcaption{{font-size:.95rem;margin:0}}
svg text{{font-size:11px;fill:var(--5b6270);font-family:system-ui,sans-serif}}
svg text.x,svg text.count{{text-anchor:middle}}svg text.y{{text-anchor:end;dominant-baseline:central}}
svg text.up{{dominant-baseline:central}}svg text.title{{fill:var(--1f2430)}}
svg text.halo{{paint-order:stroke;stroke:var(--ffffff);stroke-width:4px}}
svg text.count{{dominant-baseline:central;fill:var(--1f2430)}}
svg text.light{{fill:var(--ffffff)}}
svg .grid{{stroke:var(--d5d9e0);stroke-width:.8}}svg .base{{stroke:var(--5b6270);stroke-width:1}}
svg .line{{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}}
svg .dot{{stroke:var(--c);stroke-width:6.5;stroke-linecap:round;stroke-dasharray:none}}
svg .band{{fill:var(--c);fill-opacity:.2}}
.many .line{{stroke-width:1;opacity:.55;stroke-dasharray:none}}.many .dot{{stroke-width:5;opacity:.7}}
svg .right{{fill:{best}}}svg .wrong{{fill:{worst}}}svg .frame{{fill:none;stroke:var(--d5d9e0)}}
svg .on{{stroke-width:3.2;opacity:1}}svg .dot.on{{stroke-width:11}}.off{{display:none}}
svg.parallel{{width:100%;display:block}}svg.matrix{{max-width:none;display:block}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:0 1rem;margin:.2rem 0;padding:0;font-size:.8rem;
color:var(--5b6270)}}
.legend li::before{{content:"";display:inline-block;width:1.1em;height:.28em;border-radius:.14em;background:var(--c);
vertical-align:middle;margin-right:.4em}}
.legend .d1::before,.legend .d2::before,.legend .d3::before{{background:repeating-linear-gradient(90deg,var(--c) 0 .3em,
transparent .3em .45em)}}
"""
