"""Result rows: a finished run in one line, small enough to be committed, carried to another machine, and added up."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from .run import RESULTS

Row = dict[str, Any]
Wrong = npt.NDArray[np.bool_]


def result_of_test(name: str, labels: npt.NDArray[np.int64], scores: Any, seconds: float | None) -> Row:
    """What a row keeps of a test: errors in percent, and which images were wrong, in the order of the index.

    `labels` (n,), `scores` (n, K).
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5] == labels[:, None]
    return {
        "test": name,
        "images": len(labels),
        "top1_error": 100 * float(1 - best[:, 0].mean()),
        "top5_error": 100 * float(1 - best.any(1).mean()),
        "seconds": None if seconds is None else round(seconds, 2),
        "wrong": base64.b64encode(np.packbits(~best[:, 0]).tobytes()).decode(),
    }


def save_scores(folder: Path, name: str, labels: npt.NDArray[np.int64], scores: Any) -> None:
    """Keep the class probabilities (n, K) of a test in half precision, for averaging over nets."""
    path = scores_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, labels=labels, scores=scores.astype(np.float16))


def scores_path(folder: Path, name: str) -> Path:
    """Where the class probabilities of the test `name` are kept."""
    return folder / f"{name.replace('/', '_')}.npz"


def wrong(test: Row) -> Wrong:
    """Which images of a test were wrong (n,)."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(test["wrong"]), np.uint8))
    return bits[: test["images"]].astype(bool)


def read_results(folder: Path) -> Row:
    """What `results.json` of a run folder holds; nothing where it has not ended."""
    try:
        found: Row = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return {}
    return found


def row_of(folder: Path) -> Row | None:
    """The row of the run of `folder`; None where it has not ended, or has no key."""
    results = read_results(folder)
    if not results.get("key"):
        return None
    about = json.loads((folder / "environment.json").read_text())
    timing = [json.loads(line) for line in _lines(folder / "timing.jsonl")]
    epochs = [json.loads(line) for line in _lines(folder / "history.jsonl") if '"train/loss"' in line]
    sizes = {}
    for line in _lines(folder / "history.jsonl"):
        step = json.loads(line)
        if "size" in step:
            sizes[step["epoch"]] = step["size"]
    return {
        "key": results["key"],
        "settings": results["settings"],
        "seed": results["seed"],
        "index": about.get("index_hash"),
        "epochs": results["epochs"],
        "train_seconds": round(sum(row["train_seconds"] for row in timing), 1),
        "images_per_s": _median([row["images_per_s"] for row in timing]),
        "device": (about.get("gpus") or [about.get("processor")])[0],
        "versions": {name: about["versions"].get(name) for name in ("spp_cls", "torch")},
        "commit": about.get("spp_cls_commit"),
        "tests": results["tests"],
        "curve": [
            [row["epoch"], sizes.get(row["epoch"]), *(_short(row.get(name)) for name in CURVE)] for row in epochs
        ],
    }


CURVE = ("train/loss", "train/top1_error", "val/top1_error")  # of each epoch, behind its number and size in px


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 1) if values else None


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that may be growing, or not there."""
    text = path.read_text() if path.is_file() else ""
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]


def read_rows(paths: Iterable[Path]) -> dict[str, Row]:
    """Key → row, of result files and of folders of them; of rows of one key their tests are put together."""
    found: dict[str, Row] = {}
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    row = json.loads(line)
                    key, _ = row["key"], row["tests"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{file}, line {number}: is no result row; remove the line") from None
                found[key] = together(found[key], row) if key in found else row
    return found


def together(a: Row, b: Row) -> Row:
    """Two rows of one run: `b` with the tests that only `a` has."""
    has = {test["test"] for test in b["tests"]}
    return {**b, "tests": [*b["tests"], *(test for test in a["tests"] if test["test"] not in has)]}


def add_row(path: Path, row: Row) -> None:
    """Add `row` to the file `path`, whoever else does so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        with path.open("a") as file:
            file.write("\n" * torn + json.dumps(row) + "\n")


def find_test(row: Row, name: str) -> Row | None:
    """The test of `row` that is called `name`."""
    return next((test for test in row["tests"] if test["test"] == name), None)
