"""What `render` shows: tables, figures and pages as data, in points of the unit of each table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .intervals import Estimate


@dataclass(frozen=True)
class Cell:
    """The paper's number and ours; `ours` is over seeds, `over_images` over seeds and test images."""

    paper: float | None = None
    ours: Estimate | None = None
    over_images: Estimate | None = None


@dataclass(frozen=True)
class Difference:
    """Error of `row` − error of `baseline` in `column`, over pairs of runs of one seed."""

    row: str
    baseline: str
    column: str
    paper: float | None
    ours: Estimate | None
    over_images: Estimate | None
    conclusion: str


@dataclass(frozen=True)
class Table:
    """Cells by (row, column); one without a number of ours says what is `missing`."""

    title: str
    about: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "%"
    missing: str = "not run yet"

    def cell(self, row: str, column: str) -> Cell:
        return self.cells.get((row, column), Cell())


@dataclass(frozen=True)
class Curve:
    """An estimate at each x: a number where the figure has lines, the name of a row where it has bars."""

    name: str
    x: tuple[float, ...] | tuple[str, ...]
    estimates: tuple[Estimate, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.estimates):
            raise ValueError(f"curve {self.name}: {len(self.x)} x but {len(self.estimates)} estimates")


@dataclass(frozen=True)
class Figure:
    """Curves in one system of axes; `marks` are vertical dashed lines, such as the training sizes in px."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    marks: tuple[float, ...] = ()
    kind: Literal["lines", "bars"] = "lines"


@dataclass(frozen=True)
class Page:
    """All that one HTML file shows; `config` is the text of the config that it came of."""

    title: str
    about: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    config: str = ""
