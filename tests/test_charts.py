"""Drawings: no extreme is lost, ticks and places are those worked out by hand, names are text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from spp_cls.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    SHADES,
    WIDTH,
    Axis,
    Series,
    axis_of,
    chart,
    css,
    downsample,
    label,
    look_of,
    matrix,
    parallel,
    shade_of,
    smooth,
)

EVIL = "<script>alert(1)</script>&\"'"


def test_downsampling_by_hand() -> None:
    found = downsample([1, 2, 3, 4, 5, 6], [3, 1, 4, 1, 5, 9], most=3)
    assert [each.tolist() for each in found] == [[1.5, 3.5, 5.5], [2, 2.5, 7], [1, 1, 5], [3, 4, 9]]
    assert [each.tolist() for each in downsample([1, 2], [3, 4], most=2)] == [[1, 2], [3, 4], [3, 4], [3, 4]]
    assert [len(each) for each in downsample([], [])] == [0, 0, 0, 0]


@pytest.mark.parametrize("number", [400, 401, 799, 12_345, 100_000])
def test_downsampling_keeps_extremes_and_the_mean(number: int) -> None:
    chance = np.random.default_rng(number)
    x, y = np.arange(number, dtype=float), chance.normal(size=number)
    y[chance.integers(number)] = 1e6
    y[chance.integers(number)] = -1e6
    found = downsample(x, y)
    assert len(found.x) == min(400, number)
    assert found.high.max() == y.max() and found.low.min() == y.min()
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all() and (np.diff(found.x) > 0).all()
    sizes = np.diff(np.linspace(0, number, len(found.x) + 1).astype(int))
    assert np.dot(found.mean, sizes) / number == pytest.approx(y.mean())


def test_what_is_not_finite_is_left_out() -> None:
    found = downsample([1, 2, 3, 4], [1, math.nan, math.inf, 2])
    assert found.x.tolist() == [1, 4] and found.mean.tolist() == [1, 2]


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_smoothing_against_brute_force(window: int) -> None:
    y = np.random.default_rng(0).normal(size=9)
    low, high = window // 2, window - window // 2
    expected = [y[max(0, i - low) : i + high].mean() for i in range(len(y))]
    np.testing.assert_allclose(smooth(y, window), expected)


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 1, False, "0 0.2 0.4 0.6 0.8 1"),
        (0, 100_000, False, "0 20k 40k 60k 80k 100k"),
        (27.6, 29.3, False, "28 28.5 29"),
        (1e-5, 1, True, "1e-5 1e-4 0.001 0.01 0.1 1"),
        (0.2, 30, True, "0.2 0.5 1 2 5 10 20"),
        (1.1, 1.9, True, "1.2 1.4 1.6 1.8"),  # no decade between
        (-3, 3, False, "-2 0 2"),
    ],
)
def test_ticks(low: float, high: float, log: bool, expected: str) -> None:
    axis = Axis(low, high, log)
    assert " ".join(text for _, text in axis.ticks()) == expected
    for place, text in axis.ticks():
        value = float(text.replace("k", "e3"))
        by_hand = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        assert place == pytest.approx(by_hand)


def test_axes_hold_what_they_are_for() -> None:
    assert axis_of([0.001, 1]).log and not axis_of([0.001, 0.01]).log and not axis_of([0, 1]).log
    for values in ([3.0, 3.0], [0.0], [-5, 5], [1e-9, 1], [math.nan, 2, 4], []):
        places = axis_of(values).place([value for value in values if math.isfinite(value)])
        assert ((places >= 0) & (places <= 1)).all(), values
    words = axis_of(["b", "a", "b"])
    assert words.words == ("b", "a") and words.place(["a", "b"]).tolist() == [0.75, 0.25]
    assert words.ticks() == [(0.25, "b"), (0.75, "a")] and math.isnan(words.place(["c"])[0])


def test_labels() -> None:
    found = [label(value) for value in (0, 1e-5, 0.001, 0.25, 1234, 20_000, 1_500_000, -3)]
    assert found == ["0", "1e-5", "0.001", "0.25", "1234", "20k", "1.5M", "-3"]


def test_a_curve_goes_through_its_points() -> None:
    drawn = chart("t", [Series("s", [0, 10], [1, 3], run=7)], "x", "y")
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") : drawn.index("</figure>")])
    line = next(path for path in svg.iter("path") if path.get("data-run") == "7")
    numbers = [float(each) for each in re.findall(r"[\d.]+", str(line.get("d")))]
    x_low, x_high, _ = map(float, str(svg.get("data-x")).split())
    y_low, y_high, _ = map(float, str(svg.get("data-y")).split())
    left, right, top, bottom = map(float, str(svg.get("data-box")).split())
    assert (left, right) == (LEFT, WIDTH - RIGHT) and bottom < HEIGHT
    for (x, y), at in zip([(0, 1), (10, 3)], (numbers[:2], numbers[2:4]), strict=True):
        assert at[0] == pytest.approx(left + (x - x_low) / (x_high - x_low) * (right - left), abs=0.06)
        assert at[1] == pytest.approx(bottom - (y - y_low) / (y_high - y_low) * (bottom - top), abs=0.06)


def test_a_single_point_is_a_dot_and_no_point_no_chart() -> None:
    assert 'class="dot c0"' in chart("t", [Series("s", [1], [2])], "x", "y")
    assert chart("t", [Series("s", [], [])], "x", "y") == chart("t", [], "x", "y") == ""


def test_looks_are_told_apart() -> None:
    assert len({look_of(i) for i in range(24)}) == 24 and look_of(24) == look_of(0)
    assert (shade_of(0), shade_of(1), shade_of(0.5), shade_of(math.nan)) == ("m0", f"m{SHADES - 1}", "m4", "mx")
    for look in [*look_of(23).split(), f"m{SHADES - 1}", "mx"]:
        assert f".{look}{{" in css()


def test_names_are_text_wherever_they_stand() -> None:
    drawings = [
        chart(EVIL, [Series(EVIL, [1, 2], [1, 2], run=0), Series("b", [1], [1])], EVIL, EVIL),
        chart("t", [Series("a", [EVIL], [1], dots=True)], "x", "y"),
        parallel([(EVIL, axis_of([EVIL])), ("y", axis_of([1.0, 2.0]))], [(EVIL, [EVIL, 1.0], "m0", 0)]),
        matrix([[1, 2], [0, 3]], [EVIL, "b"]),
    ]
    for drawn in drawings:
        assert "<script" not in drawn
        ElementTree.fromstring(drawn)


def test_a_confusion_matrix_shows_each_count_once_and_no_nought() -> None:
    drawn = matrix([[5, 0], [1, 3]], ["a", "b"])
    assert re.findall(r"<title>(.*?)</title>", drawn) == ["a → a: 5", "b → a: 1", "b → b: 3"]
    assert re.findall(r'fill-opacity="(.*?)"', drawn) == ["1.00", "0.25", "0.75"]


def test_a_line_has_a_gap_where_a_run_has_no_value() -> None:
    axes = [(name, axis_of([0.0, 1.0])) for name in "abcd"]
    drawn = parallel(axes, [("r", [0.0, 1.0, math.nan, 1.0], "m0", 0)])
    (path,) = re.findall(r'data-run="0" d="(.*?)"', drawn)
    assert re.sub(r"[\d. ]", "", path) == "MLM"
