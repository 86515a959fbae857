"""`spp runs`: the runs and sweeps there are: their state, errors, cost, and in which settings they differ."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .door import check_number, names_apart, open_door, quoted
from .records import (
    FIELDS,
    NONE,
    Record,
    differing,
    find_runs,
    known_name,
    metric_name,
    parse_filter,
    read_record,
    read_sweep,
    short_names,
    short_value,
    sorted_by,
    sweep_of,
    text,
)
from .run import walk
from .words import duration, printable

PLACES = ("runs", "multiruns", "sweeps")
METRIC, DIFFERS = "metric", "differs"  # columns that are no value of a run
COLUMNS = (
    *("run", "state", "epochs", METRIC, "test/top1_error", DIFFERS),
    *("train_seconds", "started", "images_per_s", "device", "key"),
)
HEADS = {"train_seconds": "time", "images_per_s": "images/s"}
LEAST = 16  # letters that a column keeps, as long as another can go instead


def run(config: DictConfig) -> None:
    """Everything that `spp runs` does with a config."""
    check_number("limit", config.limit)
    if config.columns is not None and not OmegaConf.is_list(config.columns):
        raise ValueError(f"columns={config.columns}: takes a list, like columns=[{config.columns}]")
    places = [Path(str(place)) for place in config.folders or ()] or [p for p in map(Path, PLACES) if any(walk(p))]
    conditions = parse_filter(str(config.filter)) if config.filter else []
    if not places:
        raise ValueError(f"folders: no run below {', '.join(PLACES)} here; name a folder, or make a run by spp train")
    every = list(_records(places))
    metric = metric_name(every, config.metric)
    conditions = [replace(one, name=metric) if one.name == METRIC else one for one in conditions]
    for condition in conditions:
        known_name(condition.name, every, f"filter={config.filter}")
    columns = [str(name) for name in config.columns or COLUMNS if config.columns or _is_of_use(name, every)]
    for name in columns:
        if name not in (METRIC, DIFFERS, *COLUMNS):
            known_name(name, every, f"columns={name}")
    listed = [record for record in every if all(condition.holds(record) for condition in conditions)]
    order = {METRIC: metric, f"-{METRIC}": f"-{metric}"}.get(config.sort, str(config.sort))
    listed = sorted_by(listed, order)[: config.limit] if listed else []
    if config.json:
        differ = differing(listed)
        for i, record in enumerate(listed):
            print(as_json(record, {key: values[i] for key, values in differ.items()}))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(table(listed, columns, metric, width), end="")
    states = ", ".join(f"{number} {state}" for state, number in Counter(record.state for record in listed).items())
    what = "runs and sweeps" if any(record.kind == "sweep" for record in every) else "runs"
    print(f"{len(listed)} of {len(every)} {what}{': ' if states else ''}{states}", file=sys.stderr)


def _records(places: Sequence[Path]) -> Iterator[Record]:
    """Runs, and in the place of trials their sweep, unless it is one of the `places` itself."""
    named = {place.absolute() for place in places}
    seen = set()
    for folder in find_runs(places):
        sweep = sweep_of(folder)
        if sweep is None or named & {sweep.absolute(), folder.parent.absolute(), folder.absolute()}:
            yield read_record(folder)
        elif sweep not in seen:
            seen.add(sweep)
            yield read_sweep(sweep)


def _is_of_use(name: str, records: Sequence[Record]) -> bool:
    """Whether a column that nobody has asked for would have anything in it."""
    return name in (METRIC, DIFFERS) or any(record.value(name) not in (None, "") for record in records)


def as_json(record: Record, differs: dict[str, Any]) -> str:
    """A line with all of a record but the settings that it shares with the other runs; what is no number is null."""
    metrics = {name: value if math.isfinite(value) else None for name, value in record.metrics.items()}
    fields = {name: record.value(name) for name in FIELDS}
    more = {"why": record.why, "of": record.of, "metrics": metrics, DIFFERS: differs}
    return json.dumps({**fields, **more}, default=str)


def table(records: Sequence[Record], columns: Sequence[str], metric: str, width: int | None) -> str:
    """Lines of `records` under heads; what does not fit into `width` letters is cut, and last columns left out."""
    differ = differing(records)
    short = short_names(differ)
    heads = [printable(metric if name == METRIC else HEADS.get(name, name)) for name in columns]
    rows = []
    for i, record in enumerate(records):
        said = " ".join(f"{short[key]}={short_value(key, values[i])}" for key, values in differ.items())
        cells = (said if name == DIFFERS else cell(record, metric if name == METRIC else name) for name in columns)
        rows.append([printable(text) for text in cells])
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    fitted = widths if width is None else _fit(widths, width)
    right = [name not in ("run", "state", DIFFERS, "device", "started", "key") for name in columns]
    lines = []
    for row in [heads, *rows]:
        short_cells = [_cut(each, wide, name == "run") for each, wide, name in zip(row, fitted, columns, strict=False)]
        sides = zip(short_cells, fitted, right, strict=False)
        lines.append("  ".join(each.rjust(wide) if to_right else each.ljust(wide) for each, wide, to_right in sides))
    if len(fitted) < len(heads):
        lines.append(f"(no room for {', '.join(heads[len(fitted) :])}; choose by columns=[…], or pipe it)")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def cell(record: Record, name: str) -> str:
    """What a column shows of a run."""
    value = record.value(name)
    if name == "epochs":
        return f"{record.epochs}/{NONE if record.of is None else record.of}{' trials' * (record.kind == 'sweep')}"
    if name == "state":
        return f"{record.state}: {record.why}" if record.why else record.state
    if value is None or value == "":
        return NONE
    if name == "train_seconds":
        return duration(value)
    if name == "images_per_s":
        return f"{value:.0f}"
    if name == "started":
        return str(value)[:16].replace("T", " ")
    return f"{value:.2f}" if name in record.metrics else text(value)


def _fit(widths: Sequence[int], width: int) -> list[int]:
    """Widths that fit, two spaces between: the widest give way first; where all have given way the last columns go."""
    fitted = list(widths)
    while len(fitted) > 1 and sum(min(each, LEAST) for each in fitted) + 2 * (len(fitted) - 1) > width:
        fitted.pop()
    while sum(fitted) + 2 * (len(fitted) - 1) > width and max(fitted) > 1:
        fitted[fitted.index(max(fitted))] -= 1
    return fitted


def _cut(text: str, width: int, front: bool) -> str:
    """`text` in at most `width` letters; of a path the end stays."""
    if len(text) <= width:
        return text
    return f"…{text[len(text) - width + 1 :]}" if front else f"{text[: width - 1]}…"


def main(arguments: list[str] | None = None) -> None:
    """The door; words that name a folder or are no key=value are folders, and a filter needs no quotes of Hydra's."""
    folders, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    filters = [word.partition("=")[2] for word in others if word.startswith("filter=")]
    words = [word for word in others if not word.startswith("filter=")]
    words += [f"filter={quoted(' and '.join(filters))}"] if filters else []
    words += [f"folders=[{','.join(map(quoted, folders))}]"] if folders else []
    open_door("runs", run, words)


if __name__ == "__main__":
    main()
