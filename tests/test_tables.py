"""Tables as data: what they need, and what rows of results say, by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spp_train_stub
from omegaconf import OmegaConf

from spp_cls import build, tables
from spp_cls.door import compose, conf_folder, register_resolvers
from spp_cls.results import Row, wrong
from spp_cls.tables import (
    Spec,
    average,
    by_size,
    chosen,
    costs,
    costs_of_tests,
    figures,
    fill,
    last_wins,
    needed,
    spec_of,
    widths,
)

T2 = 4.302652729911275  # Student's t at 97.5 %, 2 degrees of freedom

CONFIG: dict[str, Any] = {
    "title": "Mine",
    "about": "A table.",
    "rows": {
        "a": {"name": "no SPP", "settings": ["model.levels=[6]"]},
        "b": {"name": "SPP", "settings": ["model.levels=[6,3,2,1]"]},
        "both": {"name": "averaged", "average": ["a", "b"]},
    },
    "columns": {
        "zf5": {"name": "ZF-5", "settings": ["model=zf5"]},
        "full": {"name": "full image", "settings": ["model=zf5"], "test": "full_image"},
    },
    "test": "ten_crop",
    "compare": [["b", "a"], ["b@full", "b@zf5"]],
    "paper": {"top1_error": {"a": [35.99, 30.0], "b": [34.98, None]}},
    "settings": ["data=shapes", "model=tiny"],
}


def spec(**changes: Any) -> Spec:
    return spec_of("mine", {**CONFIG, **changes})


def names_of(of: Spec) -> dict[tuple[str, str], list[str]]:
    return {(row, column): [f"{of.test_of(row, column)}@32"] for row in of.rows for column in of.columns}


def a_run(*tests: Row, seconds: float = 60.0, device: str = "p", pace: float | None = 100.0) -> Row:
    curve = [[0, 26, 1.0, 60.0, 70.0], [1, 32, 0.9, 50.0, None]]
    about = {"train_seconds": seconds, "images_per_s": pace, "device": device}
    return {"key": "k", "seed": 0, "settings": [], **about, "tests": list(tests), "curve": curve}


def ten_and_full(ten: float, full: float) -> Row:
    return a_run(spp_train_stub.test("ten_crop@32", ten), spp_train_stub.test("full_image@32", full))


# What is needed


def test_the_last_setting_of_a_key_wins_where_the_first_stood() -> None:
    assert last_wins(["model=a", "x.y=1", "model=b", "x.z=2"]) == ("model=b", "x.y=1", "x.z=2")


def test_what_runs_are_needed_and_which_tests_each_must_make() -> None:
    found = needed(spec(sizes=[26, 40]))
    settings = ("data=shapes", "model=zf5", "model.levels=[6]")
    sizes = ("center_crop@26", "center_crop@40")
    # One run for both columns, which differ in the test alone; nothing is trained for an average.
    assert set(found) == {("a", "zf5"), ("a", "full"), ("b", "zf5"), ("b", "full")}
    assert found["a", "zf5"] == found["a", "full"] == (settings, ("ten_crop", *sizes, "full_image"))


def test_a_difference_needs_both_of_its_tests() -> None:
    gap = {"gap": {"test": "center_crop - train/center_crop"}}
    assert needed(spec(columns=gap, paper={}, compare=[], rows={"a": {}}))["a", "gap"][1] == (
        "center_crop",
        "train/center_crop",
    )


# What rows say


def test_means_and_intervals_by_hand() -> None:
    runs = {("a", "zf5"): {0: ten_and_full(20, 10), 1: ten_and_full(30, 10), 2: ten_and_full(25, 10)}}
    of = spec()
    (table,) = fill(of, runs, names_of(of), margin=0.5)
    cell = table.cell("no SPP", "ZF-5")
    assert cell.paper == 35.99 and cell.ours is not None and cell.over_images is not None
    half = T2 * 5 / math.sqrt(3)  # their standard deviation is 5
    assert (cell.ours.mean, cell.ours.low, cell.ours.high) == pytest.approx((25, 25 - half, 25 + half))
    assert cell.over_images.mean == pytest.approx(25) and cell.ours.n == 3
    assert table.cell("SPP", "full image") == tables.Cell(None, None, None)
    assert table.cell("SPP", "ZF-5").paper == 34.98
    assert (table.title, table.rows) == ("Mine: top-1 error", ("no SPP", "SPP", "averaged"))


def test_images_are_paired_where_they_are_the_same_ones() -> None:
    of = spec()
    for index, known in (("x", True), ("y", False)):  # as many pictures, but others
        a, b = ({seed: {**ten_and_full(20 + seed, 0), "index": name} for seed in (0, 1)} for name in ("x", index))
        (table,) = fill(of, {("a", "zf5"): a, ("b", "zf5"): b}, names_of(of), margin=0.5)
        assert (table.differences[0].over_images is not None) is known and table.differences[0].ours is not None


def test_differences_are_of_pairs_of_one_seed_alone() -> None:
    a = {seed: ten_and_full(error, 0) for seed, error in ((0, 20), (1, 30), (2, 25), (7, 95))}
    b = {seed: ten_and_full(error, error - 5) for seed, error in ((0, 15), (1, 20), (2, 10), (8, 5))}
    of = spec()
    (table,) = fill(of, {("a", "zf5"): a, ("b", "zf5"): b, ("b", "full"): b}, names_of(of), margin=0.5)
    first, missing, cells = table.differences
    # −5, −10, −15: mean −10, deviation 5; seeds 7 and 8 have no partner.
    half = T2 * 5 / math.sqrt(3)
    assert first.ours is not None and first.over_images is not None
    assert (first.row, first.baseline, first.column) == ("SPP", "no SPP", "ZF-5")
    assert (first.ours.mean, first.ours.low, first.ours.high, first.ours.n) == pytest.approx(
        (-10, -10 - half, -10 + half, 3)
    )
    assert first.over_images.mean == pytest.approx(-10) and first.paper == -1.01  # 34.98 − 35.99
    assert (missing.column, missing.ours, missing.paper, missing.conclusion) == (
        "full image",
        None,
        None,
        "not run yet",
    )
    # A comparison of cells: every seed's full image is 5 below its ten crops.
    assert (cells.row, cells.baseline, cells.column) == ("SPP, full image", "SPP, ZF-5", "full image")
    assert cells.ours is not None and (cells.ours.mean, cells.ours.half) == pytest.approx((-5, 0))
    assert cells.conclusion.startswith("not known yet: all 4 seeds give −5.00 points")
    found = widths([table])
    assert found[0] == pytest.approx(half) and math.isnan(found[1]) and found[2] == pytest.approx(0)


def test_other_test_images_are_not_paired() -> None:
    short = {**spp_train_stub.test("ten_crop@32", 50), "images": 10}
    runs = {("a", "zf5"): {0: a_run(short)}, ("b", "zf5"): {0: ten_and_full(25, 0)}}
    of = spec()
    (table,) = fill(of, runs, names_of(of), margin=0.5)
    first = table.differences[0]
    assert first.ours is not None and first.ours.mean == -25 and first.over_images is None


def test_a_table_a_metric_and_no_images_where_it_is_not_known_which_were_wrong() -> None:
    of = spec(metrics=["top5_error", "top1_error"], paper={"top5_error": {"a": [14.76, 1]}})
    top5, top1 = fill(of, {("a", "zf5"): {0: ten_and_full(25, 0)}}, names_of(of), margin=0.5)
    first, second = top5.cell("no SPP", "ZF-5"), top1.cell("no SPP", "ZF-5")
    assert first.ours is not None and (first.paper, first.ours.mean, first.over_images) == (14.76, 5, None)
    assert second.ours is not None and second.paper is None and second.ours.mean == 25


def test_a_cell_may_be_the_difference_of_two_tests() -> None:
    gap = {"gap": {"name": "gap", "test": "center_crop - train/center_crop"}}
    of = spec(columns=gap, compare=[], paper={}, rows={"a": {}})
    tests = [("center_crop@32", 40.0), ("train/center_crop@32", 15.0)]
    runs = {("a", "gap"): {0: a_run(*(spp_train_stub.test(*test) for test in tests)), 1: ten_and_full(5, 5)}}
    (table,) = fill(of, runs, {("a", "gap"): [name for name, _ in tests]}, margin=0.5)
    cell = table.cell("a", "gap")
    assert cell.ours is not None and (cell.ours.mean, cell.ours.n, cell.over_images) == (25, 1, None)


def test_an_average_is_of_the_softmax_by_hand() -> None:
    labels = np.array([0, 1, 1])
    scores = {
        "a": np.array([[0.6, 0.4], [0.9, 0.1], [0.6, 0.4]], np.float32),  # right, wrong, wrong
        "b": np.array([[0.3, 0.7], [0.8, 0.2], [0.1, 0.9]], np.float32),  # wrong, wrong, right
    }  # mean: 0.45 0.55, 0.85 0.15, 0.35 0.65 → wrong, wrong, right
    by_row = {row: {seed: {**a_run(), "key": row} for seed in seeds} for row, seeds in (("a", (0, 1)), ("b", (1, 2)))}
    runs = {(row, "zf5"): by_seed for row, by_seed in by_row.items()}
    asked = []

    def read(row: Row, name: str) -> Any:
        asked.append(name)
        return labels, scores[row["key"]]

    found = average(spec(), "both", "zf5", runs, "ten_crop@32", read)
    assert list(found) == [1] and set(asked) == {"ten_crop@32"}
    (test,) = found[1]["tests"]
    assert wrong(test).tolist() == [True, True, False]
    assert test["top1_error"] == pytest.approx(200 / 3) and test["test"] == "ten_crop@32"
    assert average(spec(), "both", "zf5", runs, "x", lambda row, name: None) == {}
    assert average(spec(), "both", "full", runs, "x", read) == {}


# A part of a table


def test_chosen_rows_and_columns_keep_the_papers_numbers_in_place() -> None:
    of = chosen(spec(), ["a", "b"], ["full"])
    assert (list(of.rows), list(of.columns)) == (["a", "b"], ["full"])
    assert of.paper == {"top1_error": {"a": [30.0], "b": [None]}}
    assert of.compare == (("b", "a"),)  # the other one needs the other column
    (table,) = fill(of, {}, names_of(of), margin=0.5)
    assert table.cell("no SPP", "full image").paper == 30.0
    assert chosen(spec(), None, None) == spec()
    assert list(chosen(spec(), ["b", "a"], None).rows) == ["a", "b"]  # in the table's order


def test_ids_may_be_numbers() -> None:
    rows, columns = {1: {"name": "one"}, 2: {"name": "two"}}, {224: {}, 180: {"test": "center_crop@180"}}
    paper = {"top1_error": {2: [3.0, 4.0]}}
    found = spec_of("x", {"title": "X", "rows": rows, "columns": columns, "test": "ten_crop", "paper": paper})
    assert chosen(found, [2], [180]).paper == {"top1_error": {"2": [4.0]}}
    assert list(chosen(found, [2], [180]).rows) == ["2"] and list(chosen(found, ["1"], ["224"]).columns) == ["224"]


@pytest.mark.parametrize(
    ("rows", "columns", "line"),
    [
        (["z"], None, r"^rows=\[z\]: mine has a, b, both$"),
        (None, ["z"], r"^columns=\[z\]: mine has zf5, full$"),
        (["a", "both"], None, "^rows: both is an average of a, b; choose b too$"),
    ],
)
def test_what_cannot_be_chosen(rows: Sequence[str] | None, columns: Sequence[str] | None, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        chosen(spec(), rows, columns)


# Figures and costs


def test_figures_by_hand() -> None:
    of = spec(sizes=[26, 40], rows={"a": {"name": "no SPP"}}, compare=[], paper={})
    tests = [spp_train_stub.test(name, error) for name, error in (("ten_crop@32", 25), ("center_crop@40", 35))]
    found = figures(of, {("a", "zf5"): {0: a_run(*tests)}}, names_of(of))
    assert set(found) == {"errors", "sizes", "learning"}  # of one net, whose second column is another test of it
    (bars, empty) = found["errors"].curves
    assert (bars.x, [one.mean for one in bars.estimates], empty.x) == (("no SPP",), [25], ())
    (curve,) = found["sizes"].curves
    assert (curve.x, [one.mean for one in curve.estimates]) == ((40.0,), [35])
    assert found["sizes"].marks == (26.0, 32.0)
    learning = {curve.name: (curve.x, [one.mean for one in curve.estimates]) for curve in found["learning"].curves}
    assert learning == {"no SPP, 26 px": ((1.0,), [60.0]), "no SPP, 32 px": ((2.0,), [50.0])}


def test_costs_by_hand() -> None:
    of = spec()
    runs = {
        ("a", "zf5"): {0: a_run(seconds=60), 1: a_run(seconds=120)},
        ("b", "zf5"): {0: a_run(seconds=90), 1: a_run(seconds=120, device="another")},
    }
    flops = {("a", "zf5"): 2e15, ("b", "zf5"): 3e15}
    (table,) = costs(of, runs, flops)
    found = {cell: one.ours.mean for cell, one in table.cells.items() if one.ours}
    assert found["no SPP", "minutes a run"] == 1.5 and found["SPP", "images/s"] == 100
    assert found["SPP", "time, % of the first"] == pytest.approx(150)  # seed 0 alone: seed 1 had another device
    assert found["SPP", "FLOPs, % of the first"] == pytest.approx(150)


def test_a_table_of_test_sizes_by_hand() -> None:
    of = spec(sizes=[26, 40])
    at = {seed: [spp_train_stub.test(f"center_crop@{size}", seed + size) for size in (26, 40)] for seed in (0, 1)}
    runs = {
        ("a", "zf5"): {seed: a_run(*tests) for seed, tests in at.items()},
        ("b", "zf5"): {0: a_run(spp_train_stub.test("center_crop@40", 39))},
    }
    (table,) = by_size(of, runs, margin=0.5)
    assert (table.rows, table.columns) == (("no SPP", "SPP"), ("26 px", "40 px"))
    means = {cell: one.ours.mean for cell, one in table.cells.items() if one.ours}
    assert means == {("no SPP", "26 px"): 26.5, ("no SPP", "40 px"): 40.5, ("SPP", "40 px"): 39.0}
    found = {(one.row, one.baseline, one.column): one.ours and one.ours.mean for one in table.differences}
    assert found == {("SPP", "no SPP", "26 px"): None, ("SPP", "no SPP", "40 px"): -1.0}
    assert by_size(spec(), runs, margin=0.5) == []


def test_the_time_of_tests_by_hand() -> None:
    def timed(name: str, seconds: float | None) -> Row:
        return {**spp_train_stub.test(name, 10), "seconds": seconds}

    runs = {("a", "zf5"): {0: a_run(timed("ten_crop@32", 2.0), timed("full_image@32", None))}}
    (table,) = costs_of_tests(spec(), runs, names_of(spec()))
    images = spp_train_stub.test("ten_crop@32", 10)["images"]
    assert {cell: one.ours and one.ours.mean for cell, one in table.cells.items()} == {
        ("no SPP", "ZF-5"): pytest.approx(2000 / images)
    }
    alike = spec(columns={"zf5": {"settings": ["model=zf5"]}}, compare=[], paper={})
    assert costs_of_tests(alike, runs, names_of(alike)) == []  # all cells are tested in one way


# Mistakes in a table


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"colums": {}}, "^table.colums: a table has no such key; it has about, columns, "),
        ({"rows": {}}, "^table.rows: has no value; see conf/table/table2.yaml"),
        ({"test": None}, "^table.test: has no value"),
        ({"rows": ["a"]}, "^table.rows=.*: give each an id"),
        ({"rows": {"a": "x"}}, "^table.rows.a=x: give name and settings"),
        ({"rows": {"a": {"setings": []}}}, "^table.rows.a.setings: no such key; use name, settings, test, average"),
        ({"metrics": ["top2_error"]}, "^table.metrics: top2_error is none; use top1_error, top5_error"),
        ({"compare": [["b", "z"]]}, "^table.compare: z is not in it; rows are a, b, both, columns zf5, full"),
        ({"compare": [["b@z", "a"]]}, "^table.compare: b@z is not in it"),
        ({"compare": [["b"]]}, "^table.compare: .*: a comparison is of a row and its baseline"),
        *(
            ({"compare": compare}, "^table.compare: .*: a comparison is of a row and its baseline, like ")
            for compare in ([["b", "b"]], [["b@zf5", "b"]], [2, 1], [{"a": 1, "b": 2}])
        ),
        ({"columns": {1: {}, "1": {}}}, "^table.columns: two have one id: 1, '1'"),
        ({"test": "centre_crop"}, "^table.test=centre_crop: there are no such views; use center_crop, ten_crop, "),
        ({"columns": {"x": {"test": "ten_crop - foo@3"}}}, "^table.columns.x.test=foo@3: there are no such views"),
        ({"rows": {False: {"name": "no SPP"}}}, "^table.rows.False: YAML takes no, yes, on and off for false and true"),
        ({"rows": {"a": {"name": True}}}, "^table.rows.a: YAML takes no, yes, on and off"),
        ({"compare": ["ba"]}, "^table.compare: ba: a comparison is of a row and its baseline"),
        ({"paper": {"top1_error": {"a": [1.0]}}}, r"^table.paper.top1_error.a=\[1.0\]: give of the rows a, b, both, a"),
        ({"paper": {"top1_error": {"z": [1.0, 2.0]}}}, "^table.paper.top1_error.z="),
        ({"paper": {"top2_error": {}}}, "^table.metrics: top2_error is none"),
        (
            {"columns": {"zf5": {"name": "x"}, "full": {"name": "x"}}},
            "^table.columns: two are called x; give each a na",
        ),
        ({"rows": {"a": {"average": ["z"]}}, "compare": [], "paper": {}}, "^table.average: z is not in it"),
        (
            {"rows": {"a": {"average": ["a"]}}, "compare": [], "paper": {}},
            "^table.average: a: name rows that are train",
        ),
        ({"sizes": 32}, r"^table.sizes=32: takes a list, like \[128, 224\]"),
        ({"sizes": ["x"]}, r"^table.sizes=\['x'\]: takes whole numbers of px"),
        ({"metrics": "top1_error"}, "^table.metrics=top1_error: takes a list, like "),
        ({"settings": "model=zf5"}, "^table.settings=model=zf5: takes a list, like "),
        ({"rows": {"a": {"settings": "model=zf5"}}}, "^table.rows.a.settings=model=zf5: takes a list, like "),
        ({"paper": [1]}, r"^table.paper=\[1\]: give numbers by metric, row and column"),
        ({"paper": {"top1_error": {"a": 3}}}, "^table.paper.top1_error.a=3: give of the rows a, b, both, a number"),
        ({"paper": {"top1_error": {"a": ["x", 1]}}}, "^table.paper.top1_error.a=.*: give of the rows"),
        (
            {"test": "center_crop - ten_crop"},
            "^table.rows.both: an average has one test, and no center_crop - ten_crop",
        ),
    ],
)
def test_a_mistake_in_a_table_is_one_line_that_names_its_key(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        spec(**changes)
    assert "\n" not in str(caught.value)


# Those that there are


def of_conf(path: Path) -> Spec:
    register_resolvers()
    content = OmegaConf.create({"data": {"region": 224}, "table": OmegaConf.load(path)})
    config: Any = OmegaConf.to_container(content.table, resolve=True)
    return spec_of(path.stem, config)


FILES = sorted((conf_folder() / "table").glob("*.yaml"))
# He et al. 2014, arXiv:1406.4729v4, Tables 2 to 5, §3.1.2 and §3.1.3: table → metric → row → numbers by column.
PAPER: dict[str, Mapping[str, Mapping[str, list[float | None]]]] = {
    "table2": {
        "top1_error": {
            "a": [35.99, 34.93, 34.13, 32.01],
            "b": [34.98, 34.38, 32.87, 30.36],
            "c": [34.60, 33.94, 32.26, 29.68],
        },
        "top5_error": {
            "a": [14.76, 13.92, 13.52, 11.97],
            "b": [14.14, 13.54, 12.80, 11.12],
            "c": [13.64, 13.33, 12.33, 10.95],
        },
    },
    "table3": {
        "top1_error": {
            "zf5_single": [38.01, 37.55],
            "zf5_multi": [37.57, 37.07],
            "overfeat7_single": [33.18, 32.72],
            "overfeat7_multi": [32.57, 31.25],
        }
    },
    "table4": {
        "top1_error": {"one": [32.57], "ten": [29.68], "all_full": [27.86]},
        "top5_error": {"ten": [10.95], "all": [9.36], "all_full": [9.14]},
    },
    "table5": {"top5_error": {"overfeat7": [9.14]}, "top1_error": {"overfeat7": [27.86]}},
    "text_30_bins": {
        "top1_error": {"none": [35.99], "bins30": [35.06], "bins50": [34.98]},
        "top5_error": {"none": [14.76], "bins30": [14.04], "bins50": [14.14]},
    },
    "text_random_size": {
        "top1_error": {"single": [30.36], "two": [29.68], "random": [30.06]},
        "top5_error": {"single": [11.12], "two": [10.95], "random": [10.96]},
    },
}
# Of Table 2, as the paper prints them in brackets: the gains over (a).
GAINS = {"b": [-1.01, -0.55, -1.26, -1.65], "c": [-1.39, -0.99, -1.87, -2.33]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_table_of_the_house_reads_and_has_the_papers_numbers(path: Path) -> None:
    of = of_conf(path)
    assert {metric: dict(rows) for metric, rows in of.paper.items()} == PAPER.get(path.stem, {})
    assert set(of.paper) <= set(of.metrics)
    assert len(path.read_text().splitlines()[0]) <= 130 and path.read_text().startswith("# ")
    for table in fill(of, {}, names_of(of), margin=0.5):
        assert all(difference.conclusion == "not run yet" for difference in table.differences)
    assert build.tests_of([test for _, tests in needed(of).values() for test in tests], 224)


def test_the_papers_gains_are_those_between_its_errors() -> None:
    of = of_conf(conf_folder() / "table" / "table2.yaml")
    top1, _ = fill(of, {}, names_of(of), margin=0.5)
    found = {
        id_: [
            one.paper for one in top1.differences if (one.row, one.baseline) == (of.rows[id_].name, of.rows["a"].name)
        ]
        for id_ in GAINS
    }
    assert found == GAINS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_settings_of_a_table_compose(path: Path) -> None:
    seen: set[str] = set()
    for settings, _ in needed(of_conf(path)).values():
        if set(settings) <= seen:  # each word once, among others where it stands
            continue
        seen |= set(settings)
        words = settings if any(word.startswith("data=") for word in settings) else ["data=shapes", *settings]
        config = compose("train", list(words))
        levels = [word.partition("=")[2] for word in settings if word.startswith("model.levels=")]
        assert [str(list(config.model.levels)).replace(" ", "")] == levels or not levels
