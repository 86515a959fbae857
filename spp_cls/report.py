"""`spp report`: one HTML page of a run, or of many: curves, errors, mistakes, what differs and what mattered."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import sys
import time
import zipfile
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig

from .charts import (
    Series,
    axis_of,
    chart,
    css,
    downsample,
    legend,
    look_of,
    matrix,
    parallel,
    shade_of,
    smooth,
)
from .door import check_file, names_apart, open_door, quoted, typed
from .evaluate import MATRIX, confusion_matrix, per_class
from .records import (
    DIVERGED,
    FAILED,
    FINISHED,
    NONE,
    SWEEP,
    Record,
    differing,
    epoch_rows,
    find_runs,
    json_lines,
    metric_name,
    read_json,
    read_record,
    short_names,
    short_value,
    sweep_of,
    text,
)
from .render import document
from .whole import write_whole
from .words import duration, printable

NAMED = 24  # runs that have a colour each; of more the colour is the metric
STEPS_OF = 8  # runs whose losses are shown by step
POINTS = 60_000  # of all curves of a chart
KEYS, SLICES, SIZES = 8, 12, 6  # settings in the parallel coordinates; slices; groups of training sizes
TESTS = 8  # columns of the table of runs
PICTURES, SIDE = 24, 160  # px

Row = dict[str, Any]


def run(config: DictConfig) -> None:
    """Everything that `spp report` does with a config."""
    began = time.perf_counter()
    check_file("output", config.output)
    named = [config.run] if isinstance(config.run, str) else list(config.run or ())
    if not named:
        raise ValueError("run: name a run folder, or one with run folders below it")
    records = sorted(map(read_record, find_runs(Path(str(name)) for name in named)), key=lambda each: each.started)
    metric = metric_name(records, config.metric)
    now = datetime.now()
    several = Path("reports", f"{now:%Y-%m-%d_%H-%M-%S}.html")
    sweep = _sweep_of_all(records)
    own = several if len(records) > 1 and not sweep else (sweep or records[0].folder) / "report.html"
    output = Path(str(config.output)) if config.output else own
    # A folder's name may hold bytes that are no text.
    write_whole(output, page(records, metric).encode(errors="backslashreplace").decode())
    megabytes, seconds = output.stat().st_size / 1e6, time.perf_counter() - began
    runs = "1 run" if len(records) == 1 else f"{len(records)} runs"
    print(f"{printable(str(output))} ({runs}, {megabytes:.1f} MB, {seconds:.1f} s)")


def page(records: Sequence[Record], metric: str) -> str:
    """The HTML file of one run or of several."""
    title = Path(records[0].run).name if len(records) == 1 else _title(records)
    sections = _of_one(records[0], metric) if len(records) == 1 else _of_many(records, metric)
    body = "\n".join(part for part in sections if part)
    style, script = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    return document(title, body, css() + style, script)


def _title(records: Sequence[Record]) -> str:
    sweep = _sweep_of_all(records)
    return f"Sweep {sweep.name}: {len(records)} trials" if sweep else f"{len(records)} runs"


def _sweep_of_all(records: Sequence[Record]) -> Path | None:
    """The folder of the sweep whose trials the runs are, if they are several of one."""
    sweeps = {sweep_of(record.folder) for record in records}
    return sweeps.pop() if len(records) > len(sweeps) == 1 else None


# One run


def _of_one(record: Record, metric: str) -> list[str]:
    history = json_lines(record.folder / "history.jsonl")
    about = read_json(record.folder / "environment.json")
    return [
        f"<h1>{escape(Path(record.run).name)}</h1>",
        _facts_of_one(record, about, metric),
        _section("Learning", _charts([*_learning(history), *_costs(record.folder, history)])),
        _section("Tests", _tests(record)),
        _classes(record, about),
        _section("Events", _list(_event(row) for row in json_lines(record.folder / "events.jsonl"))),
        _details("Config", (record.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")),
    ]


def _facts_of_one(record: Record, about: Row, metric: str) -> str:
    versions = about.get("versions") if isinstance(about.get("versions"), dict) else {}
    command = about.get("command") if isinstance(about.get("command"), list) else []
    speed = NONE if record.images_per_s is None else f"{record.images_per_s:.0f}"
    facts = {
        metric: _number(record.metrics.get(metric)),
        "test/top1_error": _number(record.metrics.get("test/top1_error")),
        "state": f"{record.state}{f': {record.why}' if record.why else ''}",
        "epochs": f"{record.epochs} of {NONE if record.of is None else record.of}",
        "training": f"{duration(record.train_seconds)}, {speed} images/s",
        "begun": record.started.replace("T", " "),
        "machine": f"{about.get('host', NONE)}: {record.device}",
        "commit": f"{about.get('spp_cls_commit') or NONE}",
        "torch": f"{(versions or {}).get('torch', NONE)}",
        "key": record.key or NONE,
        "folder": str(record.folder.absolute()),
        "left out": f"{len(about['left_out'])} bad pictures" if about.get("left_out") else "",
        "command": shlex.join(["spp", *map(str, command[1:])]) if command else "",
    }
    return _facts(facts)


def _event(row: Row) -> str:
    more = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("time", "event"))
    return f"{row.get('time', '')} {row.get('event', '')}{f': {more}' if more else ''}"


def _learning(history: Sequence[Row]) -> list[str]:
    """Charts of losses and errors by epoch, for each training size, and of the losses of steps."""
    steps = [row for row in history if all(_is_number(row.get(name)) for name in ("epoch", "step", "size", "loss"))]
    epoch, step, size, loss = (
        np.array([row[name] for row in steps], float) for name in ("epoch", "step", "size", "loss")
    )
    groups = _size_groups(size)
    losses, errors = [], []
    ends = [row for row in history if isinstance(row.get("epoch"), int) and any("/" in name for name in row)]
    names = [name for name in dict.fromkeys(name for row in ends for name in row) if name.startswith("val/")]
    for i, (name, members) in enumerate(groups.items()):
        at, which = np.unique(epoch[members], return_inverse=True)
        means = np.bincount(which, loss[members]) / np.bincount(which)
        losses.append(_curve(f"train, {name}", at + 1, means, look_of(i)))
    size_of = _size_of_epochs(epoch, groups)
    for i, name in enumerate([*groups, ""]):
        rows = [
            row for row in ends if _is_number(row.get("train/top1_error")) and size_of.get(row["epoch"], "") == name
        ]
        ended = [row["epoch"] + 1 for row in rows]
        errors.append(
            _curve(f"train, {name or 'all sizes'}", ended, [row["train/top1_error"] for row in rows], look_of(i))
        )
    for i, name in enumerate(names):
        rows = [row for row in ends if _is_number(row.get(name))]
        into = losses if "loss" in name else errors if "top1_error" in name else []
        ended, values = [row["epoch"] + 1 for row in rows], [row[name] for row in rows]
        into.append(_curve(name, ended, values, look_of(len(groups) + 1 + i)))
    window = max(1, len(loss) // 60)
    smoothed = _curve(f"mean of {window} steps" if window > 1 else "steps", step, smooth(loss, window), "c0")
    band = downsample(step, loss)
    steps_of = Series(smoothed.name, smoothed.x, smoothed.y, "c0", band=band if window > 1 else None)
    return [
        chart("Top-1 error by epoch", errors, "epoch", "error, %"),
        chart("Loss by epoch", losses, "epoch", "loss"),
        chart("Training loss by step; its range behind", [steps_of], "step", "loss"),
    ]


def _size_groups(size: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Name → the steps of these training sizes: each by itself, or, if there are many, some together."""
    sizes = np.unique(size)
    parts = np.array_split(sizes, SIZES) if len(sizes) > SIZES else [sizes[i : i + 1] for i in range(len(sizes))]
    named = {f"{part[0]:g} px" if len(part) == 1 else f"{part[0]:g} to {part[-1]:g} px": part for part in parts}
    return {name: np.isin(size, part) for name, part in named.items()}


def _size_of_epochs(epoch: npt.NDArray[np.float64], groups: Mapping[str, npt.NDArray[np.bool_]]) -> dict[int, str]:
    """Epoch → the group of all its steps, where they are of one."""
    found: dict[int, str] = {}
    for name, members in groups.items():
        for each in np.unique(epoch[members]).tolist():
            found[int(each)] = "" if int(each) in found else name
    return found


def _costs(folder: Path, history: Sequence[Row]) -> list[str]:
    """Charts of the learning rate, and of what `timing.jsonl` says of each epoch."""

    def of(rows: Sequence[Row], x: str, y: str, factor: float = 1) -> list[Series]:
        pairs = [(row[x], factor * row[y]) for row in rows if _is_number(row.get(x)) and _is_number(row.get(y))]
        return [_curve(y, [a for a, _ in pairs], [b for _, b in pairs], "c0")]

    timing = [
        {**row, "epoch": row["epoch"] + 1}
        for row in json_lines(folder / "timing.jsonl")
        if _is_number(row.get("epoch"))
    ]
    return [
        chart("Learning rate", of(history, "step", "lr"), "step", "learning rate", named=False, log=False),
        chart("Speed", of(timing, "epoch", "images_per_s"), "epoch", "images/s", named=False),
        chart("Wait for data", of(timing, "epoch", "waiting_for_data", 100), "epoch", "% of the time", named=False),
        chart("Memory", of(timing, "epoch", "peak_memory_mb", 1e-3), "epoch", "GB, at most so far", named=False),
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curve(name: str, x: Any, y: Any, look: str, run: int | None = None, most: int = 400) -> Series:
    """A curve in at most `most` points; of values in several files, by their x."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    order = np.argsort(x, kind="stable")
    buckets = downsample(x[order], y[order], most)
    return Series(name, buckets.x, buckets.mean, look, run)


def _tests(record: Record) -> str:
    """A table of all tests, those of `spp evaluate` among them, and errors by size for each kind of views."""
    rows: list[list[Any]] = []
    for name in dict.fromkeys(metric.rpartition("/")[0] for metric in record.metrics):
        if name not in ("train", "val"):
            errors = [record.metrics.get(f"{name}/top{k}_error") for k in (1, 5)]
            rows.append(["at the end" if name == "test" else name, *errors])
    for path in sorted((record.folder / "evaluations").glob("*/results.json")):
        found = read_json(path)
        rows.append([f"evaluations/{path.parent.name}", found.get("top1_error"), found.get("top5_error")])
    series = [Series(views, *points, look_of(i)) for i, (views, points) in enumerate(_by_size(record).items())]
    drawn = chart("Top-1 error by test size", series, "test size, px", "error, %")
    return _charts([drawn, _table(["test", "top-1 error, %", "top-5 error, %"], rows)]) if rows else ""


# Classes and mistakes


@dataclass(frozen=True)
class Answers:
    """Labels (n,), class probabilities (n, K), and where they stand; `paths` is empty where it is not known."""

    source: str
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    paths: tuple[str, ...]


_DAMAGE = (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile)  # what numpy says of no .npz


def answers_of(folder: Path) -> Answers | None:
    """The newest class probabilities that `spp evaluate`, or else `keep_scores`, has left in a run folder."""
    evaluated = sorted((folder / "evaluations").glob("*/scores.npz"), key=lambda path: path.stat().st_mtime)
    kept = sorted((folder / "scores").glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [*reversed(evaluated), *kept]:
        with contextlib.suppress(*_DAMAGE), path.open("rb") as file, np.load(file) as found:
            labels, scores = found["labels"].astype(np.int64), found["scores"].astype(np.float32)
            number = scores.shape[1]
            classes = found["classes"].tolist() if "classes" in found else [f"class {k}" for k in range(number)]
            paths = found["paths"].tolist() if "paths" in found else []
            if len(labels) == len(scores) > 0 and len(classes) == number and labels.max() < number:
                source = str(path.relative_to(folder))
                return Answers(source, labels, scores, tuple(map(str, classes)), tuple(map(str, paths)))
    return None


def _classes(record: Record, about: Row) -> str:
    found = answers_of(record.folder)
    how = f"spp evaluate run={record.run}"
    if found is None:
        return _section("Classes", _paragraph(f"Classes, confusions and mistakes are known after: {how}"))
    counts = confusion_matrix(found.labels, found.scores)
    keys = ("class", "images", "top1_error", "precision", "taken_for")
    rows = sorted(per_class(counts, found.classes), key=lambda row: -(row["top1_error"] or 0))
    heads = ["class", "images", "top-1 error, %", "precision, %", "taken most for"]
    wrong = counts - np.diag(np.diag(counts))
    pairs = [np.unravel_index(at, wrong.shape) for at in np.argsort(-wrong, axis=None, kind="stable")[:15]]
    confused = [[found.classes[i], found.classes[j], int(wrong[i, j])] for i, j in pairs if wrong[i, j]]
    columns = [
        f'<div class="scroll">{_table(heads, [[row[key] for key in keys] for row in rows])}</div>',
        f"<h3>Most confused</h3>{_table(['class', 'taken for', 'images'], confused)}" if confused else "",
    ]
    return "".join(
        [
            _section(
                "Classes", _paragraph(f"Of {len(found.labels):,} images, from {found.source}.") + _charts(columns)
            ),
            _section("Confusion matrix", matrix(counts, found.classes) if len(found.classes) <= MATRIX else ""),
            _section("Most confident mistakes", _mistakes(record, about, found, how)),
        ]
    )


def _mistakes(record: Record, about: Row, found: Answers, how: str) -> str:
    answers = found.scores.argmax(1)
    wrong = np.flatnonzero(answers != found.labels)
    if not len(wrong):
        return _paragraph("None: every answer is right.")
    if not found.paths:
        return _paragraph(f"Which pictures they are is known after: {how}")
    sure = wrong[np.argsort(-found.scores[wrong, answers[wrong]], kind="stable")][:PICTURES]
    root = Path(str(record.config.get("data.root")))
    roots = [root, Path(str(about.get("folder", "."))) / root]
    cards = []
    for at in sure.tolist():
        label, answer = found.classes[found.labels[at]], found.classes[answers[at]]
        picture = next(filter(None, (_thumbnail(each, found.paths[at]) for each in roots)), None)
        shown = (
            f'<img alt="" src="data:image/jpeg;base64,{picture}">' if picture else '<div class="gone">not there</div>'
        )
        said = f"<b>{escape(answer)}</b> {100 * found.scores[at, answers[at]]:.0f} %, is {escape(label)}"
        cards.append(f"<li>{shown}<p>{said}<small>{escape(found.paths[at])}</small></p></li>")
    return f'<ul class="pictures">{"".join(cards)}</ul>'


def _thumbnail(root: Path, path: str) -> str | None:
    """The picture as a small JPEG in base64; None where it is not there, or no picture below `root`."""
    from PIL import Image, ImageOps

    file = root / path
    if ".." in Path(path).parts or Path(path).is_absolute() or not file.is_file():
        return None
    buffer = io.BytesIO()
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((SIDE, SIDE))
            small.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return b64encode(buffer.getvalue()).decode()


# Several runs


def _of_many(records: Sequence[Record], metric: str) -> list[str]:
    above = os.path.commonpath([record.folder.absolute().parent for record in records])
    records = [replace(record, run=os.path.relpath(record.folder, above)) for record in records]
    differ = differing(records)
    short = short_names(differ)
    # What has diverged or failed says nothing of how good its settings are, and would squeeze all others.
    known = [
        record.metrics.get(metric, math.nan) if record.state not in (DIVERGED, FAILED) else math.nan
        for record in records
    ]
    values, sign = np.array(known), _sign(records)
    ranks = _ranks(sign * values)
    looks = [look_of(i) if len(records) <= NAMED else shade_of(rank) for i, rank in enumerate(ranks)]
    abouts = [read_json(record.folder / "environment.json") for record in records]
    commits = sorted({str(about["spp_cls_commit"])[:12] for about in abouts if about.get("spp_cls_commit")})
    machines = sorted({f"{about.get('host')}: {record.device}" for about, record in zip(abouts, records, strict=True)})
    states = Counter(record.state for record in records)
    facts = {
        f"best {metric}": _best(records, values, sign) if np.isfinite(values).any() else NONE,
        "states": ", ".join(f"{number} {state}" for state, number in states.items()),
        "training": duration(sum(record.train_seconds for record in records)),
        "begun": f"{records[0].started} to {records[-1].started}".replace("T", " "),
        "machine": "; ".join(machines),
        "commit": ", ".join(commits) or NONE,
        "folder": above,
        "command": shlex.join(["spp", *typed()[1:]]),
    }
    return [
        f"<h1>{escape(_title(records))}</h1>",
        _facts(facts),
        _section("Runs", _runs(records, metric, differ, short, looks)),
        _section("Learning", _overlaid(records, metric, looks)),
        _section("What mattered", _sweep(records, metric, differ, short, values, ranks)),
        _details("Settings that all share", _shared(records)),
    ]


def _best(records: Sequence[Record], values: npt.NDArray[np.float64], sign: int) -> str:
    """Of runs that have ended, if there are any: what was pruned or goes on may yet have been better than it is."""
    ended = np.array([record.state == FINISHED for record in records])
    of = np.where(ended, values, np.nan) if np.isfinite(values[ended]).any() else values
    best = int(np.nanargmin(sign * of))
    return f"{of[best]:.2f}, {records[best].run}"


def _sign(records: Sequence[Record]) -> int:
    """1 where less is better; −1 where the runs are trials of a sweep that maximizes."""
    sweep = _sweep_of_all(records)
    return -1 if sweep is not None and read_json(sweep / SWEEP).get("direction") == "maximize" else 1


def _ranks(values: npt.NDArray[np.float64]) -> list[float]:
    """0 for the least, 1 for the most, nan where there is none; equal values share."""
    finite = np.sort(values[np.isfinite(values)])
    below = np.searchsorted(finite, values) / max(1, len(finite) - 1)
    return [float(rank) if math.isfinite(value) else math.nan for rank, value in zip(below, values, strict=True)]


def _runs(
    records: Sequence[Record],
    metric: str,
    differ: Mapping[str, list[Any]],
    short: Mapping[str, str],
    looks: Sequence[str],
) -> str:
    every = dict.fromkeys(name for record in records for name in record.metrics if name.endswith("/top1_error"))
    tests = [name for name in every if name not in (metric, "train/top1_error", "val/top1_error")][:TESTS]
    made = [name if name == "test/top1_error" else name.rpartition("/")[0] for name in tests]
    heads = ["run", "state", "epochs", metric, *short.values(), *made, "training, s", "images/s", "started"]
    rows = []
    for i, record in enumerate(records):
        settings = [short_value(key, values[i]) for key, values in differ.items()]
        errors = [record.metrics.get(name) for name in tests]
        end = [round(record.train_seconds), record.images_per_s, record.started.replace("T", " ")]
        rows.append([record.run, record.state, record.epochs, record.metrics.get(metric), *settings, *errors, *end])
    return f'<div class="scroll">{_table(heads, rows, looks)}</div>'


def _overlaid(records: Sequence[Record], metric: str, looks: Sequence[str]) -> str:
    most = max(30, min(400, POINTS // len(records)))
    histories = [epoch_rows(record.folder) for record in records]
    drawn = []
    for name in dict.fromkeys([metric, "val/top1_error", "train/top1_error", "train/loss"]):
        series = []
        for i, record in enumerate(records):
            rows = [row for row in histories[i] if _is_number(row.get(name))]
            at, values = [row["epoch"] + 1 for row in rows], [row[name] for row in rows]
            series.append(_curve(record.run, at, values, looks[i], i, most))
        drawn.append(chart(f"{name} by epoch", series, "epoch", "error, %" if "error" in name else name, named=False))
    if len(records) <= STEPS_OF:
        series = []
        for i, record in enumerate(records):
            steps = [
                row
                for row in json_lines(record.folder / "history.jsonl")
                if _is_number(row.get("loss")) and _is_number(row.get("step"))
            ]
            loss = smooth(np.array([row["loss"] for row in steps], float), max(1, len(steps) // 60))
            series.append(_curve(record.run, [row["step"] for row in steps], loss, looks[i], i))
        drawn.append(chart("Training loss by step, smoothed", series, "step", "loss", named=False))
    by_views: dict[str, list[Series]] = {}
    for i, record in enumerate(records):
        for views, points in _by_size(record).items():
            by_views.setdefault(views, []).append(Series(record.run, *points, looks[i], i))
    for views, series in by_views.items():
        title = f"Top-1 error by test size, {views}"
        drawn.append(chart(title, series, "test size, px", "error, %", named=False))
    if len(records) > NAMED:
        return _paragraph(f"Colour: {metric}, from the best (blue) to the worst (orange).") + _charts(drawn, many=True)
    return legend([Series(record.run, (), (), looks[i], i) for i, record in enumerate(records)]) + _charts(drawn)


def _by_size(record: Record) -> dict[str, tuple[list[int], list[float]]]:
    """Views → sizes and top-1 errors of the tests that were made at several sizes."""
    found: dict[str, list[tuple[int, float]]] = {}
    for name, value in record.metrics.items():
        sized = re.fullmatch(r"(.+)@(\d+)/top1_error", name)
        if sized:
            found.setdefault(sized[1], []).append((int(sized[2]), value))
    several = {views: sorted(points) for views, points in found.items() if len(points) > 1}
    return {views: ([size for size, _ in points], [error for _, error in points]) for views, points in several.items()}


@dataclass(frozen=True)
class Importance:
    """What share of a metric's variance a setting explains by itself, and its rank correlation with it, or nan."""

    explained: float
    correlation: float


def what_mattered(differ: Mapping[str, Sequence[Any]], metric: npt.NDArray[np.float64]) -> dict[str, Importance]:
    """Setting → importance, the greatest first; nothing with fewer than four runs that have the metric.

    Between the values of a setting: epsilon squared, that is the share of the variance between its groups, less what
    chance alone would give. A number of many values has its squared rank correlation (Spearman) instead.
    """
    from scipy.stats import spearmanr

    known = np.isfinite(metric)
    found: dict[str, Importance] = {}
    y = metric[known]
    if len(y) < 4 or np.ptp(y) == 0:
        return {}
    for key, values in differ.items():
        here = [value for value, is_known in zip(values, known, strict=True) if is_known]
        _, groups = np.unique([text(value) for value in here], return_inverse=True)
        number = int(groups.max()) + 1
        correlation = math.nan
        if number > 2 and all(map(_is_number, here)):
            correlation = float(spearmanr(here, y).statistic)
        if number > max(5, len(y) // 3) or number == len(y):
            explained = correlation**2
        elif number > 1:
            means = np.bincount(groups, y) / np.bincount(groups)
            within, total = ((y - means[groups]) ** 2).sum() / (len(y) - number), ((y - y.mean()) ** 2).sum()
            explained = max(0.0, 1 - within / (total / (len(y) - 1)))
        else:
            explained = math.nan
        found[key] = Importance(explained, correlation)
    return dict(sorted(found.items(), key=lambda item: -np.nan_to_num(item[1].explained, nan=-1)))


def changed_together(differ: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """Setting → those behind it that part the runs in the same way, so that nothing tells them apart.

    Where each run has a value of its own, as in a random search, that says nothing of the kind.
    """
    found: dict[str, list[str]] = {}
    first: dict[tuple[int, ...], str] = {}
    for key, values in differ.items():
        codes: dict[str, int] = {}
        parts = tuple(codes.setdefault(text(value), len(codes)) for value in values)
        if len(codes) < len(values) and parts in first:
            found[first[parts]].append(key)
        else:
            first[parts], found[key] = key, []
    return found


def _sweep(
    records: Sequence[Record],
    metric: str,
    differ: Mapping[str, list[Any]],
    short: Mapping[str, str],
    values: npt.NDArray[np.float64],
    ranks: Sequence[float],
) -> str:
    """Parallel coordinates, importance, and the metric against each setting."""
    importance = what_mattered(differ, values)
    if not importance:
        return _paragraph(f"Needs four runs with different {metric}.")
    with_others = changed_together(differ)
    keys = [key for key in importance if key in with_others]
    columns: dict[str, list[Any]] = {}
    for key in keys[:SLICES]:
        numeric = all(value is None or _is_number(value) for value in differ[key])
        columns[key] = (
            [math.nan if value is None else value for value in differ[key]]
            if numeric
            else [short_value(key, value) for value in differ[key]]
        )
    known = [i for i in range(len(records)) if math.isfinite(values[i])]
    order = sorted(known, key=lambda i: -ranks[i])  # the best is drawn last, on top
    shown = keys[:KEYS]
    axes = [(short[key], axis_of(columns[key])) for key in shown] + [(metric, axis_of(values.tolist(), log=False))]
    lines = [(records[i].run, [*(columns[key][i] for key in shown), values[i]], shade_of(ranks[i]), i) for i in order]
    rows: list[list[Any]] = []
    for key in keys:
        each, others = importance[key], [short[other] for other in with_others[key]]
        share = max(0.0, min(1.0, each.explained)) if math.isfinite(each.explained) else 0.0
        bar = f'<span class="bar"><span style="width:{100 * share:.0f}%"></span></span>'
        name = f"{short[key]} (changed together with {', '.join(others)})" if others else short[key]
        rows.append([name, None if math.isnan(each.explained) else round(100 * each.explained), bar, each.correlation])
    slices = []
    for key in keys[:SLICES]:
        dots = [
            Series(records[i].run, [columns[key][i]], [values[i]], shade_of(ranks[i]), i, dots=True)
            for i in order
            if not (isinstance(columns[key][i], float) and math.isnan(columns[key][i]))
        ]
        slices.append(chart(short[key], dots, short[key], metric, named=False))
    note = (
        f"Each line is a run; blue is the best {metric}, orange the worst. Share explained: of its variance over "
        f"{len(order)} runs, what each setting explains by itself (epsilon squared; of a number with many values "
        "the squared rank correlation). What two settings do only together is not seen, and settings that were "
        "changed together cannot be told apart."
    )
    heads = ["setting", "share explained, %", "", "rank correlation"]
    return (
        _paragraph(note)
        + f'<div class="{"many" if len(order) > NAMED else ""}">{parallel(axes, lines)}</div>'
        + _table(heads, rows, html_at=2)
        + _charts(slices, many=len(order) > NAMED)
    )


def _shared(records: Sequence[Record]) -> str:
    first = records[0].config
    same = {key: value for key, value in first.items() if all(record.config.get(key) == value for record in records)}
    return "\n".join(f"{key}: {text(value)}" for key, value in same.items())


# HTML


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    return f'<dl class="facts">{rows}</dl>'


def _number(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def _cell(value: Any) -> str:
    """A number bears its own value besides, for sorting."""
    if isinstance(value, float):
        return f'<td data-v="{value!r}">{_number(value)}</td>' if math.isfinite(value) else f"<td>{NONE}</td>"
    if isinstance(value, int):
        return f'<td data-v="{value}">{value:,}</td>'
    return f"<td>{escape(NONE if value is None else str(value))}</td>"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], looks: Sequence[str] | None = None, html_at: int = -1
) -> str:
    """A table to be sorted; with `looks` its rows are runs. The column `html_at` is HTML already."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = []
    for i, row in enumerate(rows):
        mark = f'<i class="swatch {looks[i]}"></i>' if looks else ""
        cells = "".join(f"<td>{value}</td>" if j == html_at else _cell(value) for j, value in enumerate(row) if j)
        of = f' data-run="{i}" title="{escape(str(row[0]))}"' if looks else ""
        lines.append(f'<tr{of}><th scope="row">{mark}{escape(str(row[0]))}</th>{cells}</tr>')
    kind = "sortable runs" if looks else "sortable"
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="{kind}">{body}</table></div>'


def _charts(parts: Sequence[str], many: bool = False) -> str:
    drawn = [f"<div>{part}</div>" for part in parts if part]
    return f'<div class="charts{" many" if many else ""}">{"".join(drawn)}</div>' if drawn else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _list(lines: Any) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def main(arguments: list[str] | None = None) -> None:
    """The door; words that name a folder or are no key=value are runs, or folders of them."""
    folders, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    named = [f"run=[{','.join(map(quoted, folders))}]"] if folders else []
    open_door("report", run, [*others, *named])


if __name__ == "__main__":
    main()
