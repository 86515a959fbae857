"""Tables of the paper: which runs they need, and what the rows of these runs say.

A table has rows (ways to train), columns (nets, or ways to test) and comparisons between rows. It knows nothing of
how runs are started: `needed` names them, and `fill` reads what came of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any

import numpy as np

from .data.views import PROTOCOLS
from .intervals import Estimate, conclusion, mean_interval, over_images, paired, paired_over_images
from .results import Row, find_test, wrong
from .tabular import Cell, Curve, Difference, Figure, Table

Runs = Mapping[tuple[str, str], Mapping[int, Row]]  # (row, column) → seed → result row
Names = Mapping[tuple[str, str], Sequence[str]]  # (row, column) → the name of its test, or of both of a difference
METRICS = {"top1_error": "top-1 error", "top5_error": "top-5 error"}


@dataclass(frozen=True)
class Part:
    """A row or a column: what it is called, what it sets of `spp train`, how it is tested if not as the table says.

    `average` names other rows, whose nets of one seed are averaged: then nothing is trained for this one.
    """

    name: str
    settings: tuple[str, ...] = ()
    test: str | None = None
    average: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A table before anything is run: rows and columns by their ids.

    `test` is views[@px], or a difference of two, `A - B`; `compare` are pairs (row, baseline), in every column, or of
    cells, row@column; `paper` is metric → row → numbers by column, None where it has none; `sizes` are test sizes in
    px of a figure, by centre crop; `settings` are every run's.
    """

    name: str
    title: str
    about: str
    rows: Mapping[str, Part]
    columns: Mapping[str, Part]
    test: str
    compare: tuple[tuple[str, str], ...] = ()
    metrics: tuple[str, ...] = ("top1_error",)
    paper: Mapping[str, Mapping[str, Sequence[float | None]]] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    settings: tuple[str, ...] = ()

    def test_of(self, row: str, column: str) -> str:
        """The test whose error stands in a cell."""
        return self.rows[row].test or self.columns[column].test or self.test


def spec_of(name: str, config: Mapping[str, Any]) -> Spec:
    """The table `name` as its YAML file has it; raises ValueError, with the key, where that is wrong."""
    known = {"title", "about", "rows", "columns", "test", "compare", "metrics", "paper", "sizes", "settings"}
    for key in config:
        if key not in known:
            raise ValueError(f"table.{key}: a table has no such key; it has {', '.join(sorted(known))}")
    for key in ("title", "rows", "columns", "test"):
        if not config.get(key):
            raise ValueError(f"table.{key}: has no value; see conf/table/table2.yaml for a table")
    for key in ("compare", "metrics", "sizes", "settings"):
        if not isinstance(config.get(key) or [], list):
            raise ValueError(f"table.{key}={config[key]}: takes a list, like {_LISTS[key]}")
    for key in KINDS:
        if not isinstance(config[key], Mapping):
            raise ValueError(f"table.{key}={config[key]}: give each an id, like {{b: {{name: …, settings: […]}}}}")
    for tested in parts_of(str(config["test"])):
        _check_test("table.test", tested)
    parts = {key: {str(id_): _part(key, id_, one) for id_, one in config[key].items()} for key in KINDS}
    for key in KINDS:
        if len(parts[key]) < len(config[key]):
            raise ValueError(f"table.{key}: two have one id: {', '.join(map(repr, config[key]))}")
    for pair in config.get("compare") or ():
        if not isinstance(pair, list) or len(pair) != 2 or _is_one(*map(str, pair)):
            raise ValueError(f"table.compare: {pair}: a comparison is of a row and its baseline, like [b, a]")
    spec = Spec(
        name,
        str(config["title"]),
        str(config.get("about") or ""),
        parts["rows"],
        parts["columns"],
        str(config["test"]),
        tuple((str(row), str(baseline)) for row, baseline in config.get("compare") or ()),
        tuple(config.get("metrics") or ("top1_error",)),
        _paper_of(config.get("paper") or {}),
        tuple(config.get("sizes") or ()),
        tuple(config.get("settings") or ()),
    )
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in spec.sizes):
        raise ValueError(f"table.sizes={list(spec.sizes)}: takes whole numbers of px, like {_LISTS['sizes']}")
    _check_paper(spec)
    for metric in (*spec.metrics, *spec.paper):
        if metric not in METRICS:
            raise ValueError(f"table.metrics: {metric} is none; use {', '.join(METRICS)}")
    for key in KINDS:
        labels = [part.name for part in parts[key].values()]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"table.{key}: two are called {twice}; give each a name of its own")
    for where, named in (("compare", spec.compare), ("average", [part.average for part in spec.rows.values()])):
        for one in (one for several in named for one in several):
            row, at, column = one.partition("@")
            if row not in spec.rows or (at and column not in spec.columns):
                there = f"rows are {', '.join(spec.rows)}, columns {', '.join(spec.columns)}"
                raise ValueError(f"table.{where}: {one} is not in it; {there}")
            if where == "average" and (at or spec.rows[row].average):
                raise ValueError(f"table.average: {one}: name rows that are trained")
    for row, column in ((row, column) for row, part in spec.rows.items() if part.average for column in spec.columns):
        if len(parts_of(spec.test_of(row, column))) > 1:
            raise ValueError(f"table.rows.{row}: an average has one test, and no {spec.test_of(row, column)}")
    return spec


KINDS = ("rows", "columns")
_LISTS = {
    **{"compare": "[[b, a]]", "metrics": "[top1_error, top5_error]", "sizes": "[128, 224]"},
    **{"settings": "[model=zf5, 'model.levels=[6]']", "average": "[a, b]"},
}


def _is_one(one: str, other: str) -> bool:
    """Whether two, row or row@column, are of one row, and not in two columns."""
    (row, _, column), (against, _, at) = one.partition("@"), other.partition("@")
    return row == against and not (column and at and column != at)


def _paper_of(config: Any) -> dict[str, dict[str, Any]]:
    like = "{top1_error: {a: [35.99]}}"
    if not isinstance(config, Mapping) or not all(isinstance(each, Mapping) for each in config.values()):
        raise ValueError(f"table.paper={config}: give numbers by metric, row and column, like {like}")
    return {metric: {str(row): numbers for row, numbers in by_row.items()} for metric, by_row in config.items()}


def _check_paper(spec: Spec) -> None:
    for metric, by_row in spec.paper.items():
        for row, numbers in by_row.items():
            is_list = isinstance(numbers, list) and all(
                each is None or (isinstance(each, int | float) and not isinstance(each, bool)) for each in numbers
            )
            if row not in spec.rows or not is_list or len(numbers) != len(spec.columns):
                there = f"of the rows {', '.join(spec.rows)}, a number or null for each of {', '.join(spec.columns)}"
                raise ValueError(f"table.paper.{metric}.{row}={numbers}: give {there}")


def _part(kind: str, id_: Any, config: Any) -> Part:
    for what in (id_, config.get("name") if isinstance(config, Mapping) else None):
        if isinstance(what, bool):
            raise ValueError(f"table.{kind}.{id_}: YAML takes no, yes, on and off for false and true; put it in quotes")
    if not isinstance(config, Mapping):
        raise ValueError(
            f"table.{kind}.{id_}={config}: give name and settings, like {{name: …, settings: [model=zf5]}}"
        )
    for key in config:
        if key not in ("name", "settings", "test", "average"):
            raise ValueError(f"table.{kind}.{id_}.{key}: no such key; use name, settings, test, average")
    for key in ("settings", "average"):
        if not isinstance(config.get(key) or [], list):
            raise ValueError(f"table.{kind}.{id_}.{key}={config[key]}: takes a list, like {_LISTS[key]}")
    settings, average = (tuple(map(str, config.get(key) or ())) for key in ("settings", "average"))
    test = config.get("test")
    for tested in () if test is None else parts_of(str(test)):
        _check_test(f"table.{kind}.{id_}.test", tested)
    return Part(str(config.get("name", id_)), settings, None if test is None else str(test), average)


def _check_test(where: str, test: str) -> None:
    crops = test.rpartition("/")[2].partition("@")[0]
    if crops not in PROTOCOLS:
        raise ValueError(f"{where}={test}: there are no such views; use {', '.join(PROTOCOLS)}")


def chosen(spec: Spec, rows: Sequence[Any] | None, columns: Sequence[Any] | None) -> Spec:
    """The table with these rows and columns alone; None keeps all. Raises ValueError where one is not in it."""
    parts: dict[str, Mapping[str, Part]] = {}
    for kind, typed, there in (("rows", rows, spec.rows), ("columns", columns, spec.columns)):
        wanted = [*there] if typed is None else [str(one) for one in typed]  # an id may be a number
        for one in wanted:
            if one not in there:
                raise ValueError(f"{kind}=[{one}]: {spec.name} has {', '.join(there)}")
        parts[kind] = {id_: part for id_, part in there.items() if id_ in wanted}
    for id_, part in parts["rows"].items():
        left_out = [member for member in part.average if member not in parts["rows"]]
        if left_out:
            raise ValueError(
                f"rows: {id_} is an average of {', '.join(part.average)}; choose {', '.join(left_out)} too"
            )
    places = [i for i, id_ in enumerate(spec.columns) if id_ in parts["columns"]]
    paper = {
        metric: {row: [numbers[i] for i in places] for row, numbers in by_row.items()}
        for metric, by_row in spec.paper.items()
    }
    compare = tuple(pair for pair in spec.compare if all(_is_in(one, parts) for one in pair))
    return replace(spec, rows=parts["rows"], columns=parts["columns"], compare=compare, paper=paper)


def _is_in(one: str, parts: Mapping[str, Mapping[str, Part]]) -> bool:
    row, _, column = one.partition("@")
    return row in parts["rows"] and (not column or column in parts["columns"])


def needed(spec: Spec) -> dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]]:
    """(row, column) → the settings of its runs, and the tests that these must make, views[@px]; without averages."""
    cells: dict[tuple[str, str], tuple[str, ...]] = {}
    for row, part in spec.rows.items():
        for column, own in spec.columns.items():
            if not part.average:
                cells[row, column] = last_wins([*spec.settings, *own.settings, *part.settings])
    tests: dict[tuple[str, ...], dict[str, None]] = {}
    for (row, column), settings in cells.items():
        seen = tests.setdefault(settings, {})
        seen.update(dict.fromkeys(parts_of(spec.test_of(row, column))))
        seen.update({f"center_crop@{size}": None for size in spec.sizes})
    for row, part in spec.rows.items():  # what is averaged is tested so
        for column in spec.columns if part.average else ():
            for member in part.average:
                tests[cells[member, column]][spec.test_of(row, column)] = None
    return {cell: (settings, tuple(tests[settings])) for cell, settings in cells.items()}


def last_wins(words: Sequence[str]) -> tuple[str, ...]:
    """Words key=value of which each key stands once, with its last value, where it stood first."""
    found: dict[str, str] = {}
    for word in words:
        found[word.partition("=")[0]] = word
    return tuple(found.values())


# From runs to tables


def fill(spec: Spec, runs: Runs, names: Names, margin: float, level: float = 0.95) -> list[Table]:
    """A table a metric. `names` says what the test of a cell is called in result rows, like ten_crop@224."""
    return [_table(spec, runs, names, metric, margin, level) for metric in spec.metrics]


def _table(spec: Spec, runs: Runs, names: Names, metric: str, margin: float, level: float) -> Table:
    cells, differences = {}, []
    places = {column: i for i, column in enumerate(spec.columns)}

    def of_paper(row: str, column: str) -> float | None:
        numbers = spec.paper.get(metric, {}).get(row)
        return None if numbers is None else numbers[places[column]]

    def tested(row: str, column: str) -> dict[int, Row]:
        return tests_by_seed(runs.get((row, column), {}), names[row, column])

    for row, part in spec.rows.items():
        for column, own in spec.columns.items():
            tests = tested(row, column)
            ours = mean_interval([test[metric] for test in tests.values()], level) if tests else None
            images = (
                over_images(_wrong(tests), level) if tests and metric == "top1_error" and _has_images(tests) else None
            )
            cells[part.name, own.name] = Cell(of_paper(row, column), ours, images)
    for (row, column), (other, at) in _pairs(spec):
        a, b = tested(row, column), tested(other, at)
        pair = of_paper(row, column), of_paper(other, at)
        paper = None if pair[0] is None or pair[1] is None else round(pair[0] - pair[1], 2)
        both = sorted(a.keys() & b.keys())
        ours = images = None
        text = "not run yet"
        if both:
            ours = paired({seed: a[seed][metric] for seed in both}, {seed: b[seed][metric] for seed in both}, level)
            text = conclusion(ours, paper, margin).text
            same = all(a[seed]["of"] == b[seed]["of"] for seed in both)
            if metric == "top1_error" and same and _has_images(a) and _has_images(b):
                first, second = (_wrong({seed: of[seed] for seed in both}) for of in (a, b))
                images = paired_over_images(first, second, level)
        name, against = spec.rows[row].name, spec.rows[other].name
        if column != at:
            name, against = f"{name}, {spec.columns[column].name}", f"{against}, {spec.columns[at].name}"
        differences.append(Difference(name, against, spec.columns[column].name, paper, ours, images, text))
    rows, columns = (tuple(part.name for part in parts.values()) for parts in (spec.rows, spec.columns))
    title = f"{spec.title}: {METRICS[metric]}"
    return Table(title, spec.about, rows, columns, cells, tuple(differences))


def by_size(spec: Spec, runs: Runs, margin: float, level: float = 0.95) -> list[Table]:
    """A table of the error at each of the table's test sizes, by centre crop, for each net that was trained."""
    rows = {row: part for row, part in spec.rows.items() if not part.average}
    sizes = {str(size): Part(f"{size} px") for size in spec.sizes}
    tables = []
    for column, name in _nets(spec).items() if sizes else ():
        of_sizes = replace(
            spec,
            title=f"{spec.title}{name}, by test size",
            about="One view, the centre of the picture.",
            rows=rows,
            columns=sizes,
            compare=tuple(pair for pair in spec.compare if all(one in rows for one in pair)),
            paper={},
        )
        same = {(row, size): runs.get((row, column), {}) for row in rows for size in sizes}
        names = {(row, size): (f"center_crop@{size}",) for row in rows for size in sizes}
        tables.append(_table(of_sizes, same, names, "top1_error", margin, level))
    return tables


def _nets(spec: Spec) -> dict[str, str]:
    """The columns that train nets of their own, each with how a title names it; others test the same nets otherwise."""
    first: dict[tuple[str, ...], str] = {}
    for column, part in spec.columns.items():
        first.setdefault(part.settings, column)
    return {column: f", {spec.columns[column].name}" if len(first) > 1 else "" for column in first.values()}


def _trained(spec: Spec, runs: Runs, column: str) -> list[str]:
    """The rows that train nets of their own in `column`, and have; others test the same nets otherwise."""
    first: dict[tuple[str, ...], str] = {}
    for row, part in spec.rows.items():
        if runs.get((row, column)) and not part.average:
            first.setdefault(part.settings, row)
    return list(first.values())


def parts_of(test: str) -> list[str]:
    """The tests that the cell of a table needs: one, or both of a difference like center_crop - train/center_crop."""
    return test.split(" - ")


def tests_by_seed(by_seed: Mapping[int, Row], names: Sequence[str]) -> dict[int, Row]:
    """Seed → the test of that name, or the difference of the first and the second."""
    found: dict[int, Row] = {}
    for seed, run in sorted(by_seed.items()):
        tests = [{**test, "of": _pictures(run, test)} for name in names if (test := find_test(run, name)) is not None]
        if len(tests) == len(names):
            first, *other = tests
            found[seed] = {**first, "wrong": None} if other else first
            for metric in METRICS if other else ():
                found[seed][metric] = first[metric] - other[0][metric]
    return found


def _pictures(run: Row, test: Row) -> tuple[Any, ...]:
    """What two tests have in common if their images are the same ones."""
    part, slash, _ = test["test"].rpartition("/")
    return run.get("index"), part, test["images"]


def _has_images(tests: Mapping[int, Row]) -> bool:
    return all(test["wrong"] is not None for test in tests.values())


def _wrong(tests: Mapping[int, Row]) -> Any:
    return np.stack([wrong(test) for test in tests.values()])


def _pairs(spec: Spec) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The cells (row, column) that are compared, each with its baseline."""
    found = []
    for row, baseline in spec.compare:
        (row, _, column), (other, _, at) = row.partition("@"), baseline.partition("@")
        for each in spec.columns:
            if not column or each == column:
                found.append(((row, each), (other, at or each)))
    return found


def widths(tables: Sequence[Table]) -> list[float]:
    """Half the widths of the intervals of all differences of the first table, which decide the number of seeds."""
    ours = [difference.ours for difference in tables[0].differences]
    return [float("nan") if one is None else one.half for one in ours]


def average(spec: Spec, row: str, column: str, runs: Runs, name: str, read: Any) -> dict[int, Row]:
    """Seed → the test called `name` of the mean of the scores of the row's members, as a row of its own.

    `read(row, name)` gives labels (n,) and scores (n, K) of a run's test, None where they were not kept. Seeds that not
    all members have are left out.
    """
    from .results import result_of_test

    members = [runs.get((member, column), {}) for member in spec.rows[row].average]
    found: dict[int, Row] = {}
    for seed in sorted(set.intersection(*(set(by_seed) for by_seed in members)) if members else ()):
        kept = [read(by_seed[seed], name) for by_seed in members]
        if all(one is not None for one in kept):
            labels, mean = kept[0][0], np.mean([scores.astype(np.float64) for _, scores in kept], 0)
            found[seed] = {"tests": [result_of_test(name, labels, mean, None)], "curve": []}
    return found


# Figures


def figures(spec: Spec, runs: Runs, names: Names, level: float = 0.95) -> dict[str, Figure]:
    """File name → figure: error by row, error against test size, learning curves."""
    found = {"errors": _errors(spec, runs, names, level)}
    for column, name in _nets(spec).items():
        suffix = f"_{column}" if name else ""
        trained = _trained(spec, runs, column)
        if spec.sizes and trained:
            curves, marks = [], set()
            for row in trained:
                found_at = {size: _top1(runs[row, column], [f"center_crop@{size}"], level) for size in spec.sizes}
                known = {size: one for size, one in found_at.items() if one is not None}
                curves.append(Curve(spec.rows[row].name, tuple(map(float, known)), tuple(known.values())))
                marks |= _training_sizes(runs[row, column])
            found[f"sizes{suffix}"] = Figure(
                f"{spec.title}{name}: error against test size",
                "test size, px (centre crop; dashed: sizes in training)",
                "top-1 error, %",
                tuple(curves),
                tuple(map(float, sorted(marks))) if len(marks) <= 4 else (),
            )
        if trained:
            found[f"learning{suffix}"] = _learning(spec, runs, column, trained, name, level)
    return found


def _errors(spec: Spec, runs: Runs, names: Names, level: float) -> Figure:
    curves = []
    for column, own in spec.columns.items():
        by_row = {
            part.name: _top1(runs.get((row, column), {}), names[row, column], level) for row, part in spec.rows.items()
        }
        known = {row: one for row, one in by_row.items() if one is not None}
        curves.append(Curve(own.name, tuple(known), tuple(known.values())))
    return Figure(f"{spec.title}: error by row", "", "top-1 error, %", tuple(curves), kind="bars")


def _top1(by_seed: Mapping[int, Row], names: Sequence[str], level: float) -> Estimate | None:
    values = [test["top1_error"] for test in tests_by_seed(by_seed, names).values()]
    return mean_interval(values, level) if values else None


def _training_sizes(by_seed: Mapping[int, Row]) -> set[int]:
    return {size for run in by_seed.values() for _, size, *_ in run["curve"] if isinstance(size, int)}


def _learning(spec: Spec, runs: Runs, column: str, rows: Sequence[str], name: str, level: float) -> Figure:
    """The training error of each epoch, a curve a row and size: epochs at one size are compared with each other."""
    curves = []
    for row in rows:
        by_seed = runs[row, column]
        sizes: list[int | None] = [*sorted(_training_sizes(by_seed))]
        for size in sizes or [None]:
            errors: dict[int, list[float]] = {}
            for run in by_seed.values():
                for epoch, px, _, error, *_ in run["curve"]:
                    if error is not None and (size is None or px == size):
                        errors.setdefault(epoch + 1, []).append(error)
            known = sorted(errors)
            if known:
                label = spec.rows[row].name + (f", {size} px" if len(sizes) > 1 else "")
                values = tuple(mean_interval(errors[epoch], level) for epoch in known)
                curves.append(Curve(label, tuple(map(float, known)), values))
    return Figure(f"{spec.title}{name}: learning", "epoch", "training error, %", tuple(curves))


def costs(spec: Spec, runs: Runs, flops: Mapping[tuple[str, str], float], level: float = 0.95) -> list[Table]:
    """A table a column of what its runs took: time, and time and FLOPs against the first row's.

    `flops` are of the whole training of a run, where they are known. Times are compared where all runs had one device.
    """
    tables = []
    for column, name in _nets(spec).items():
        trained = _trained(spec, runs, column)
        cells: dict[tuple[str, str], Cell] = {}
        heads = ("images/s", "minutes a run", "time, % of the first", "FLOPs, % of the first")
        for row in trained:
            label, by_seed, first = spec.rows[row].name, runs[row, column], runs[trained[0], column]
            minutes = {seed: run["train_seconds"] / 60 for seed, run in by_seed.items()}
            pace = [run["images_per_s"] for run in by_seed.values() if run["images_per_s"]]
            cells[label, heads[1]] = Cell(None, mean_interval(list(minutes.values()), level))
            if pace:
                cells[label, heads[0]] = Cell(None, mean_interval(pace, level))
            shares = [
                100 * minutes[seed] * 60 / first[seed]["train_seconds"]
                for seed in sorted(minutes.keys() & first.keys())
                if first[seed]["device"] == by_seed[seed]["device"] and first[seed]["train_seconds"]
            ]
            if shares:
                cells[label, heads[2]] = Cell(None, mean_interval(shares, level))
            if flops.get((row, column)) and flops.get((trained[0], column)):
                share = 100 * flops[row, column] / flops[trained[0], column]
                cells[label, heads[3]] = Cell(None, Estimate(share, nan, nan, len(by_seed)))
        if trained:
            title = f"{spec.title}{name}: cost"
            rows = tuple(spec.rows[row].name for row in trained)
            tables.append(Table(title, "", rows, heads, cells, unit="", missing="–"))
    return tables


def costs_of_tests(spec: Spec, runs: Runs, names: Names, level: float = 0.95) -> list[Table]:
    """How long each test took, where the cells of the table are tested in different ways."""
    if len({spec.test_of(row, column) for row in spec.rows for column in spec.columns}) < 2:
        return []
    cells: dict[tuple[str, str], Cell] = {}
    for (row, column), (name, *other) in names.items():
        found = [find_test(run, name) for run in runs.get((row, column), {}).values()]
        times = [1000 * one["seconds"] / one["images"] for one in found if one is not None and one["seconds"]]
        if times and not other:
            cells[spec.rows[row].name, spec.columns[column].name] = Cell(None, mean_interval(times, level))
    rows, columns = (tuple(part.name for part in parts.values()) for parts in (spec.rows, spec.columns))
    about = "An image, decoding and resizing included."
    return [Table(f"{spec.title}: time of a test", about, rows, columns, cells, unit="ms", missing="–")]
