"""Cut a folder of pictures into batches of whole images, as `sizes=full_image` does, and say what that costs.

    python scripts/bench_full_image.py data/caltech101/101_ObjectCategories
    python scripts/bench_full_image.py data/caltech101/101_ObjectCategories --per-class 30 --batch-size 128

All pictures count, whatever their split. Stretch is that of a picture in its batch: the larger over the smaller aspect
ratio, less 1. A batch is incomplete with fewer images than its shape's pixel budget allows. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from spp_cls.data import Index, make_index
from spp_cls.data.full_image import FullImage, cut, stretch
from spp_cls.data.layouts import folder

T = TypeVar("T")


def first_of_each_class(index: Index, number: int | None) -> np.ndarray:
    """Rows of the first `number` pictures of each class by path; of all without a number."""
    rows = np.arange(len(index))
    if number is None:
        return rows
    return np.sort(np.concatenate([rows[index.labels == label][:number] for label in range(len(index.classes))]))


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the shortest of three times in seconds."""
    seconds = []
    for _ in range(3):
        start = perf_counter()
        result = work()
        seconds.append(perf_counter() - start)
    return result, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a folder with a folder of pictures for each class")
    parser.add_argument("--batch-size", type=int, default=32, help="squares a batch's px make (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="the shorter side in px (default: %(default)s)")
    parser.add_argument("--multiple", type=int, default=16, help="sides are multiples of it (default: %(default)s)")
    parser.add_argument("--per-class", type=int, help="take so many pictures of each class (default: all)")
    arguments = parser.parse_args()
    if min(arguments.batch_size, 1 if arguments.per_class is None else arguments.per_class) < 1:
        parser.error("--batch-size and --per-class: use whole numbers of at least 1")
    try:
        sizes = FullImage(arguments.size, arguments.multiple)
        index = make_index(arguments.root, folder)
    except ValueError as error:
        parser.error(str(error))

    rows = first_of_each_class(index, arguments.per_class)
    widths, heights = index.widths[rows], index.heights[rows]
    homes, homes_seconds = timed(lambda: sizes.homes(widths, heights))
    made, cut_seconds = timed(lambda: cut(homes, arguments.batch_size, arguments.size, sizes.least))
    order = np.random.default_rng(0).permutation(len(rows))
    images, deal_seconds = timed(lambda: made.deal(order))

    shapes = np.repeat(made.shapes, made.counts, axis=0)
    stretched = 100 * stretch(widths[images], heights[images], shapes)
    rounded = 100 * stretch(widths, heights, homes)
    capacities = np.maximum(1, arguments.batch_size * arguments.size**2 // made.shapes.prod(axis=1, dtype=np.int64))
    incomplete = made.counts < capacities
    report: dict[str, Any] = {
        "batch_size": arguments.batch_size,
        "size": arguments.size,
        "multiple": arguments.multiple,
        "images": len(rows),
        "shapes": len(np.unique(homes, axis=0)),
        "batches": len(made),
        "incomplete_batches": int(incomplete.sum()),
        "incomplete_share": 100 * float(made.counts[incomplete].sum()) / len(rows),
        "stretch_of_rounding": float(rounded.mean()),
        "stretch_mean": float(stretched.mean()),
        "stretch_p95": float(np.percentile(stretched, 95)),
        "stretch_p99": float(np.percentile(stretched, 99)),
        "stretch_max": float(stretched.max()),
        "padding": 0.0,  # a batch has one shape, and every picture is resized to it
        "homes_seconds": homes_seconds,
        "cut_seconds": cut_seconds,
        "deal_seconds": deal_seconds,
    }
    for name, value in report.items():
        print(f"{name:20} {value:10.4g}" if isinstance(value, float) else f"{name:20} {value:10,}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
