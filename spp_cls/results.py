"""Result rows: a finished run in one line, small enough to be committed, carried to another machine, and added up."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from .run import RESULTS, TIMING, device_of
from .whole import write_whole, written_whole

SCORES = "scores"  # a folder of the run: class probabilities of each image by test, if they are kept
Row = dict[str, Any]
Wrong = npt.NDArray[np.bool_]


def result_of_test(name: str, labels: npt.NDArray[np.int64], scores: Any, seconds: float | None) -> Row:
    """What a row keeps of a test: errors in percent, and which images were wrong, in the order of the index.

    `labels` (n,), `scores` (n, K); `seconds` None where nothing was run for it, as for an average.
    """
    return {
        "test": name,
        "images": len(labels),
        **errors(labels, scores),
        "seconds": None if seconds is None else round(seconds, 4),
        "wrong": base64.b64encode(np.packbits(_better(labels, scores) > 0).tobytes()).decode(),
    }


def errors(labels: npt.NDArray[np.int64], scores: Any) -> dict[str, float]:
    """Top-1 and top-5 error in percent of scores (n, K)."""
    better = _better(labels, scores)
    return {
        "top1_error": 100 * float(1 - (better < 1).mean()),
        "top5_error": 100 * float(1 - (better < 5).mean()),
    }


def _better(labels: npt.NDArray[np.int64], scores: Any) -> npt.NDArray[np.int64]:
    """How many answers are better than the right one (n,); of equal scores the first class goes before."""
    own = np.take_along_axis(scores, labels[:, None], 1)  # (n, 1)
    before = np.arange(scores.shape[1]) < labels[:, None]  # (n, K)
    better: npt.NDArray[np.int64] = ((scores > own) | ((scores == own) & before)).sum(1)
    return np.where(np.isnan(own[:, 0]), scores.shape[1], better)  # what is no number is no answer


def save_scores(folder: Path, name: str, labels: npt.NDArray[np.int64], scores: Any) -> None:
    """Keep the class probabilities (n, K) of a test in half precision, for averaging over nets."""
    path = scores_path(folder, name)
    with written_whole(path, ".npz") as beside:
        np.savez_compressed(beside, labels=labels, scores=scores.astype(np.float16))


def scores_path(folder: Path, name: str) -> Path:
    """Where the class probabilities of the test `name` are kept."""
    return folder / f"{name.replace('/', '_')}.npz"


def wrong(test: Row) -> Wrong:
    """Which images of a test were wrong (n,)."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(test["wrong"]), np.uint8))
    return bits[: test["images"]].astype(bool)


def read_results(folder: Path) -> Row:
    """What `results.json` of a run folder holds; nothing where it has not ended."""
    return _read(folder / RESULTS)


def _read(path: Path) -> Row:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def row_of(folder: Path) -> Row | None:
    """The row of the run of `folder`; None where it has not ended, has no key, or is damaged."""
    results, about = read_results(folder), _read(folder / "environment.json")
    if not results.get("key"):
        return None
    try:
        return _row(folder, results, about)
    except (KeyError, TypeError, AttributeError):  # of files that somebody has edited
        return None


def _row(folder: Path, results: Row, about: Row) -> Row:
    timing = _rows(folder / TIMING)
    return {
        "key": results["key"],
        "settings": results["settings"],
        "seed": results["seed"],
        "index": about.get("index_hash"),
        "epochs": results["epochs"],
        "train_seconds": round(sum(row["train_seconds"] for row in timing), 1),
        "images_per_s": _median([row["images_per_s"] for row in timing]),
        "device": device_of(about),
        "versions": {name: about["versions"].get(name) for name in ("spp_cls", "torch")},
        "commit": about.get("spp_cls_commit"),
        "tests": results["tests"],
        "curve": _curve(_text(folder / "history.jsonl")),
    }


# Of each epoch, behind its number and the size in px of its batches, null where there were several.
CURVE = ("train/loss", "train/top1_error", "val/top1_error")
_STEP = re.compile(r'"epoch": (\d+),.*"size": (\d+)')


def _curve(history: str) -> list[list[Any]]:
    sizes: dict[int, set[int]] = {}
    epochs = []
    for line in history.splitlines():
        if '"train/loss"' in line:
            epochs.append(_parsed(line))
        elif step := _STEP.search(line):  # of which there may be a million
            sizes.setdefault(int(step[1]), set()).add(int(step[2]))
    return [
        [row["epoch"], _the_one(sizes.get(row["epoch"], set())), *(_short(row.get(name)) for name in CURVE)]
        for row in epochs
        if row is not None
    ]


def _the_one(sizes: set[int]) -> int | None:
    return next(iter(sizes)) if len(sizes) == 1 else None


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 1) if values else None


def _rows(path: Path) -> list[Row]:
    """The whole rows of a file that may be growing, torn by a kill, or not there."""
    rows = [_parsed(line) for line in _text(path).splitlines()]
    return [row for row in rows if row is not None]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _parsed(line: str) -> Row | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_rows(paths: Iterable[Path]) -> dict[str, Row]:
    """Key → row, of result files and of folders of them; of rows of one key their tests are put together.

    Raises ValueError, with file and line, where a line is no result row. A last line that a kill has torn is left out.
    """
    found: dict[str, Row] = {}
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            text = _text(file)
            lines = text.splitlines()
            for number, line in enumerate(lines, start=1):
                row = _parsed(line)
                if row is not None and is_row(row):
                    key = row["key"]
                    found[key] = together(found[key], row) if key in found else row
                elif line.strip() and (number < len(lines) or text.endswith("\n")):
                    raise ValueError(f"{file}, line {number}: is no result row; remove the line")
    return found


_ROW: dict[str, tuple[type, ...]] = {
    **{"key": (str,), "settings": (list,), "seed": (int,), "tests": (list,), "curve": (list,), "versions": (dict,)},
    **{"train_seconds": (int, float), "images_per_s": (int, float, type(None)), "device": (str, type(None))},
}
_TEST: dict[str, tuple[type, ...]] = {
    **{"test": (str,), "images": (int,), "wrong": (str,), "top1_error": (int, float), "top5_error": (int, float)},
}


def is_row(row: Row) -> bool:
    """Whether `row` has what tables read of a row."""
    if not all(key in row and isinstance(row[key], kind) for key, kind in _ROW.items()):
        return False
    tests, curve = row["tests"], row["curve"]
    return all(map(_is_test, tests)) and all(
        isinstance(epoch, list) and len(epoch) == 2 + len(CURVE) and isinstance(epoch[0], int) for epoch in curve
    )


def _is_test(test: Any) -> bool:
    if not isinstance(test, dict) or not all(isinstance(test.get(key), kind) for key, kind in _TEST.items()):
        return False
    try:
        return len(wrong(test)) == int(test["images"]) > 0
    except ValueError:  # no base64
        return False


def together(a: Row, b: Row) -> Row:
    """Two rows of a run: `b` with the tests that only `a` has; of one that was trained twice the row of more tests."""
    if a["curve"] != b["curve"]:  # other weights, such as those of another machine
        return a if len(a["tests"]) > len(b["tests"]) else b
    has = {test["test"] for test in b["tests"]}
    return {**b, "tests": [*b["tests"], *(test for test in a["tests"] if test["test"] not in has)]}


def add_row(path: Path, row: Row) -> None:
    """Add `row` to the file `path`, whoever else does so at the same time; not if it is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row)
    with FileLock(f"{path}.lock"):
        text = _text(path)
        lines = text.splitlines()
        if line in lines:
            return
        if text and not text.endswith("\n"):
            whole = _parsed(lines[-1]) is not None
            write_whole(
                path, "".join(f"{each}\n" for each in (lines if whole else lines[:-1]))
            )  # less what a kill tore
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def find_test(row: Row, name: str) -> Row | None:
    """The test of `row` that is called `name`."""
    return next((test for test in row["tests"] if test["test"] == name), None)
