"""Records: what the folders of runs and sweeps say, gathered without torch, for listing and comparing hundreds."""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from .run import RESULTS, TIMING, device_of, flat, has_saved, is_held, is_in_training, read_key, started, walk

FINISHED, TRAINING, UNFINISHED, FAILED, DIVERGED = "finished", "in training", "unfinished", "failed", "diverged"
PRUNED = "pruned"
# Of a sweep's folder: what it is, what came of the trials that have ended, their runs, and who does which.
SWEEP, TABLE, TRIALS, LOCKS = "sweep.json", "trials.csv", "trials", "locks"
NONE = "–"
METRIC = "val/top1_error"
# Settings that differ by nature from run to run, or follow from where a run lies, and change nothing in it.
_NO_DIFFERENCE = re.compile(
    r"(name|tags|ckpt_path|resume|trust|test|tests|keep_scores|optimized_metric|(logger|checkpoint)\..*|.*\.dirpath)"
)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it; `config` and `metrics` by dotted names, `why` in which words it ended early.

    Of a sweep config and metrics are those of its best trial, `epochs` the trials that have ended, `of` its budget.
    """

    run: str
    folder: Path
    state: str
    why: str
    epochs: int
    of: int | None
    metrics: Mapping[str, float]
    train_seconds: float
    images_per_s: float | None
    device: str
    started: str
    key: str
    config: Mapping[str, Any]
    kind: str = "run"

    def value(self, name: str) -> Any:
        """The field, metric or setting `name`; None where the run has none of that name."""
        if name in FIELDS:
            return getattr(self, name)
        return self.metrics[name] if name in self.metrics else self.config.get(name)


FIELDS = ("run", "kind", "state", "epochs", "train_seconds", "images_per_s", "device", "started", "key")


# Reading


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The run folders that `places` are, or that lie below them; raises ValueError where a place has none."""
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            raise ValueError(f"{place}: there is no such folder; name a run folder, or one with run folders below it")
        below = list(walk(place))
        if not below:
            raise ValueError(f"{place}: there is no run in it; spp train makes one")
        found.update(dict.fromkeys(below))
    return list(found)


def read_record(folder: Path) -> Record:
    """The record of the run of `folder`; what is damaged or missing there is left out, and never raises."""
    if not folder.is_dir():
        return _NOTHING
    config, about = dict(flat(read_config(folder))), read_json(folder / "environment.json")
    results, timing = read_json(folder / RESULTS), json_lines(folder / TIMING)
    state, why = _state(folder, bool(results))
    metrics = _numbers(results)
    for test in _tests(results):
        metrics.update({f"{test['test']}/{name}": value for name, value in _numbers(test).items() if "error" in name})
    epochs = results.get("epochs")
    if not isinstance(epochs, int) or state != FINISHED:  # a finished run that goes further has both
        rows = epoch_rows(folder)
        epochs = rows[-1]["epoch"] + 1 if rows else 0
        for row in rows:
            metrics.update(_numbers(row))
    speeds = sorted(_column(timing, "images_per_s"))
    most = config.get("trainer.max_epochs")
    return Record(
        run=str(folder),
        folder=folder,
        state=state,
        why=why,
        epochs=epochs,
        of=most if isinstance(most, int) else None,
        metrics={name: value for name, value in metrics.items() if "/" in name},
        train_seconds=sum(_column(timing, "train_seconds")),
        images_per_s=speeds[len(speeds) // 2] if speeds else None,
        device=device_of(about),
        started=started(folder),
        key=read_key(folder),
        config=config,
    )


def read_config(folder: Path) -> Row:
    """The config of a run, as YAML gives it, to be read alone; empty where it cannot be read."""
    try:
        whole = (folder / "config.yaml").read_text(encoding="utf-8")
        try:  # the runs of a grid have most of their groups in common
            return {key: value for part in re.split(r"(?<=\n)(?=\w)", whole) for key, value in _parsed(part).items()}
        except (yaml.YAMLError, AttributeError):  # of no group by itself
            return {**_parsed(whole)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError):
        return {}


@lru_cache(maxsize=4096)
def _parsed(part: str) -> Any:
    return yaml.load(part, _Loader)


def json_lines(path: Path, holding: bytes = b"") -> list[Row]:
    """The whole rows of a file that may be growing, torn by a kill, or not there; those alone that hold `holding`."""
    data = path.read_bytes() if path.is_file() else b""
    lines = list(_lines_holding(data, holding)) if holding else data.splitlines()
    try:
        rows = json.loads(b"[%s]" % b",".join(filter(None, lines)))
    except ValueError:
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def _lines_holding(data: bytes, word: bytes) -> Iterator[bytes]:
    """Found by the word: of 100,000 lines a hundred are wanted."""
    at = data.find(word)
    while at >= 0:
        end = data.find(b"\n", at)
        yield data[data.rfind(b"\n", 0, at) + 1 : end if end >= 0 else len(data)]
        at = data.find(word, end) if end >= 0 else -1


def epoch_rows(folder: Path) -> list[Row]:
    """The rows of the ends of epochs in the history of a run."""
    rows = json_lines(folder / "history.jsonl", b"/")
    return [row for row in rows if isinstance(row.get("epoch"), int)]


def read_json(path: Path) -> Row:
    """The object that a file holds; empty where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tests(results: Row) -> list[Row]:
    tests = results.get("tests")
    return [test for test in tests if isinstance(test, dict) and "test" in test] if isinstance(tests, list) else []


def _numbers(row: Row) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _column(rows: Iterable[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _state(folder: Path, has_ended: bool) -> tuple[str, str]:
    """The state, and in which words the run ended before its time."""
    with contextlib.suppress(OSError):  # a folder that may only be read is nobody's in training
        if is_in_training(folder):
            return TRAINING, ""
    sweep = sweep_of(folder)
    trial = read_trials(sweep).get(folder.name, {}) if sweep else {}
    if trial.get("state") == "pruned":
        return PRUNED, ""
    if trial.get("state") == "fail":
        said = trial.get("reason") or ""
        return DIVERGED if DIVERGED in said else FAILED, said
    if has_ended:
        return FINISHED, ""
    events = json_lines(folder / "events.jsonl")
    last = events[-1] if events else {}
    event = str(last.get("event", ""))
    why = " ".join([event, *(f"{name}={value}" for name, value in last.items() if name in ("by", "step", "rank"))])
    if event in ("", "resumed"):  # so that it says nothing of the end
        why = _last_words(folder)
    if DIVERGED in why:
        return DIVERGED, why
    can_go_on = has_saved(folder)
    return UNFINISHED if can_go_on and event != "a rank ended" else FAILED, why or (
        "" if can_go_on else "saved nothing"
    )


def _last_words(folder: Path) -> str:
    """What `spp train` said last, if it was a mistake that ended it, where a grid or a table has kept its output."""
    try:
        with (folder / "output.txt").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            last = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
    except OSError:
        return ""
    return last.removeprefix("spp train: ") if last.startswith("spp train: ") else ""


# Sweeps


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that the run of `folder` is a trial of."""
    above = folder.parent.parent
    return above if folder.parent.name == TRIALS and (above / SWEEP).is_file() else None


def read_trials(sweep: Path) -> Mapping[str, Mapping[str, str]]:
    """Name of its folder → what came of a trial that has ended, in the words of the sweep's table."""
    try:
        status = (sweep / TABLE).stat()
        return _trials(sweep / TABLE, status.st_mtime_ns, status.st_size)
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}


@lru_cache(maxsize=64)
def _trials(path: Path, *version: int) -> Mapping[str, Mapping[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if str(row.get("number")).isdecimal()]
    return {f"{int(row['number']):05d}": row for row in rows}


def read_sweep(folder: Path) -> Record:
    """The record of the sweep of `folder`; what is damaged or missing there is left out, and never raises."""
    about, trials = read_json(folder / SWEEP), read_trials(folder)
    runs = sorted(path for path in (folder / TRIALS).glob("*") if path.is_dir())
    sign = -1 if about.get("direction") == "maximize" else 1
    values = {name: value for name, row in trials.items() if (value := _value(row)) is not None}
    best = min(values, key=lambda name: (sign * values[name], name), default=None)
    states = Counter(row.get("state") for row in trials.values())
    going = [path for path in (folder / LOCKS).glob("*.lock") if is_held(path)]
    budget = about.get("trials")
    is_done = isinstance(budget, int) and len(trials) >= budget
    record = read_record(_run_of(folder, best, trials[best])) if best else _NOTHING
    return replace(
        record,
        run=str(folder),
        folder=folder,
        kind="sweep",
        state=TRAINING if going else FINISHED if is_done else UNFINISHED,
        why=", ".join(f"{states[state]} {said}" for state, said in _OTHERWISE.items() if states[state]),
        epochs=len(trials),
        of=budget if isinstance(budget, int) else None,
        train_seconds=sum(sum(_column(json_lines(run / TIMING), "train_seconds")) for run in runs),
        started=min(filter(None, map(started, runs)), default=started(folder)),
        key="",
    )


_OTHERWISE = {"pruned": PRUNED, "fail": FAILED}  # state in the table → in words


def _value(trial: Mapping[str, str]) -> float | None:
    """The metric of a trial that was completed."""
    try:
        return float(trial["value"]) if trial.get("state") == "complete" else None
    except (KeyError, ValueError, TypeError):
        return None


def _run_of(sweep: Path, name: str, trial: Mapping[str, str]) -> Path:
    """Where the run of a trial lies, if it is one that was made elsewhere, too."""
    own, elsewhere = sweep / TRIALS / name, sweep / str(trial.get("run"))
    return own if own.is_dir() else elsewhere


_NOTHING = Record("", Path(), UNFINISHED, "", 0, None, {}, 0.0, None, "", "", "", {})


# Comparing


def text(value: Any) -> str:
    """A setting, metric or field in few letters, as the command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    return str(value)


def differing(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Setting → its value in each run (None where it has none), of those that differ between the runs.

    Of settings that say the same as another throughout, such as `model.seed` and `seed`, the shortest name stays; what
    the choice of a `_target_` decides goes with that.
    """
    keys = dict.fromkeys(key for record in records for key in record.config if not _NO_DIFFERENCE.fullmatch(key))
    texts: dict[str, tuple[str, ...]] = {}
    for key in keys:
        values = tuple(text(record.config.get(key)) for record in records)
        if len(set(values)) > 1:
            texts[key] = values
    for target in [key for key in texts if key.endswith("._target_")]:
        if target not in texts:  # it went with that of what it is a part of
            continue
        for key in [key for key in texts if key.startswith(target[:-8]) and key != target]:
            if len(set(zip(texts[target], texts[key], strict=True))) == len(set(texts[target])):
                del texts[key]
    first: dict[tuple[str, ...], str] = {}
    for key in sorted(texts, key=lambda key: key.count(".")):
        first.setdefault(texts[key], key)
    return {key: [record.config.get(key) for record in records] for key in texts if first[texts[key]] == key}


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Key → its shortest end that no other key has, `_target_` being named after what it is the target of."""
    plain = {key: key.removesuffix("._target_") for key in keys}
    ends = Counter(end for name in plain.values() for end in _ends(name))
    return {key: next((end for end in _ends(name) if ends[end] == 1), key) for key, name in plain.items()}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def short_value(key: str, value: Any) -> str:
    """The value of a differing key; of a `_target_` its last part."""
    return NONE if value is None else text(value).rpartition(".")[2] if key.endswith("_target_") else text(value)


def metric_name(records: Sequence[Record], asked: str | None = None) -> str:
    """The metric that is `asked` for, else what most of the runs optimise; raises ValueError where no run has it."""
    optimised = Counter(text(record.config.get("optimized_metric") or METRIC) for record in records)
    name = asked or optimised.most_common(1)[0][0]
    known = {metric for record in records for metric in record.metrics}
    if asked and asked not in known:
        raise ValueError(f"metric={asked}: no run has that metric{_nearest(asked, known)}")
    return name


def known_name(name: str, records: Sequence[Record], key: str) -> str:
    """`name` if a run has a field, metric or setting of that name; else raises ValueError with the nearest."""
    known = {*FIELDS, *(each for record in records for each in (*record.metrics, *record.config))}
    if name not in known:
        raise ValueError(f"{key}: no run has {name}{_nearest(name, known)}")
    return name


def _nearest(word: str, words: set[str]) -> str:
    by_end = {each.rpartition(".")[2]: each for each in sorted(words, reverse=True)}  # lr for optimizer.lr
    near = [by_end[word]] if word in by_end else difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.5)
    some = ", ".join(sorted(words)) if len(words) <= 12 else "many, see spp runs json=true and a run's config.yaml"
    return f"; did you mean {near[0]}?" if near else f"; there are {some or 'none yet'}"


@dataclass(frozen=True)
class Condition:
    """`name operator value`, as in val/top1_error<30."""

    name: str
    operator: str
    value: str

    def holds(self, record: Record) -> bool:
        """Whether the run meets it; one without the value does not. Raises ValueError for a word beside a number."""
        found = record.value(self.name)
        if self.value == "null":
            return bool(_COMPARE[self.operator](text(found), "null")) if self.operator in ("=", "!=") else False
        if found is None:
            return False
        if self.operator == "~":
            return self.value in text(found)
        if isinstance(found, int | float) and not isinstance(found, bool):
            try:
                ours, theirs = float(found), float(self.value)
            except ValueError:
                raise ValueError(
                    f"filter={self.name}{self.operator}{self.value}: {self.value} is no number; several conditions are "
                    "joined by and"
                ) from None
            return bool(_COMPARE[self.operator](ours, theirs))
        return bool(_COMPARE[self.operator](text(found), re.sub(r",\s+", ",", self.value)))


_COMPARE: dict[str, Any] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
_CONDITION = re.compile(r"\s*([^\s<>=!~]+)\s*(<=|>=|!=|==|[<>=~])\s*([^<>=!~]+?)\s*")


def parse_filter(words: str) -> list[Condition]:
    """Conditions joined by `and`, each of a name, one of < <= > >= = != ~ (contains), and a value."""
    conditions = []
    for part in re.split(r"\s+and(?:\s+|$)", words):
        found = _CONDITION.fullmatch(part)
        if not found:
            raise ValueError(f"filter={words}: {part!r} is no condition; write one like val/top1_error<30 or seed=0")
        conditions.append(Condition(found[1], "=" if found[2] == "==" else found[2], found[3]))
    return conditions


def sorted_by(records: Sequence[Record], name: str) -> list[Record]:
    """By the value of `name`, upwards, or downwards with a minus before it; runs without one come last."""
    down, name = name.startswith("-"), known_name(name.removeprefix("-"), records, f"sort={name}")
    have = [record for record in records if _order(record.value(name)) is not None]
    have.sort(key=lambda record: _order(record.value(name)) or (0, 0.0, ""), reverse=down)
    return [*have, *(record for record in records if _order(record.value(name)) is None)]


def _order(value: Any) -> tuple[int, float, str] | None:
    """Numbers before words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, text(value))
