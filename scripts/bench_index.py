"""Measures what an index of ImageNet's size costs: `python scripts/bench_index.py --pictures 1281167`.

The pictures are invented; only their folders are made. Opening, memory and the plan of an epoch are measured, each in a
process of its own, cold in Python and warm in the page cache. The last line is JSON: seconds and MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from spp_cls.data import index as index_module
from spp_cls.data.index import Index, Paths, make_index
from spp_cls.data.layouts import imagenet
from spp_cls.data.plan import order_and_uniforms

CLASSES = 1000
VAL_PER_CLASS = 10
TEST_PER_CLASS = 50
TARGETS = {"open_s": 0.2, "order_s": 0.2, "touched_mb": 200.0}
BATCH = 256
REPEATS = 3  # processes for each number; the median is told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_281_167, help="training pictures (default: ImageNet's)")
    parser.add_argument("--measure", choices=("open", "order"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_opening(args.root) if args.measure == "open" else measure_order(args.pictures)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPP_CACHE"] = f"{folder}/cache"
        root = Path(folder, "imagenet")
        store = make_store(root, args.pictures)
        numbers = {"pictures": args.pictures, "store_mb": round(store.stat().st_size / 1e6, 1)}
        print(f"{numbers['store_mb']} MB in {store.name}")
        for what in ("open", "order"):
            print(f"measuring {what}, {REPEATS} times …")
            command = [sys.executable, __file__, "--measure", what, "--root", root, "--pictures", str(args.pictures)]
            runs = [json.loads(subprocess.run(command, check=True, stdout=-1).stdout) for _ in range(REPEATS)]
            numbers.update({name: round(float(np.median([run[name] for run in runs])), 4) for name in runs[0]})
    for name, target in TARGETS.items():
        print(f"{name}: {numbers[name]} (target {target}: {'met' if numbers[name] <= target else 'MISSED'})")
    print(json.dumps(numbers))


def make_store(root: Path, pictures: int) -> Path:
    """Folders without pictures, and the index that `make_index` opens for them."""
    wnids = [f"n{1440764 + 11 * number:08}" for number in range(CLASSES)]
    for part in ("train", "val"):
        for wnid in wnids:
            (root / part / wnid).mkdir(parents=True)
    for place, _, _ in os.walk(root):
        os.utime(place, ns=(0, 0))  # folders that changed just now are not trusted
    per_class = np.diff(np.linspace(0, pictures, CLASSES + 1).astype(int)).tolist()
    paths: list[str] = []
    splits: list[int] = []
    for wnid, number in zip(wnids, per_class, strict=True):
        paths += sorted(f"train/{wnid}/{wnid}_{10 * i}.JPEG" for i in range(number))
        splits += [1 if i < VAL_PER_CLASS else 0 for i in range(number)]
    for wnid in wnids:
        paths += [f"val/{wnid}/ILSVRC2012_val_{i:08}.JPEG" for i in range(TEST_PER_CLASS)]
    number = len(paths)
    labels = [label for label, count in enumerate(per_class) for _ in range(count)]
    labels += [label for label in range(CLASSES) for _ in range(TEST_PER_CLASS)]
    chance = np.random.default_rng(0)
    index = Index(
        root=root,
        classes=tuple(wnids),
        paths=Paths.of(paths),
        labels=np.array(labels, np.int64),
        splits=np.array(splits + [2] * (CLASSES * TEST_PER_CLASS), np.int8),
        widths=chance.integers(75, 1000, number).astype(np.int32),
        heights=chance.integers(75, 1000, number).astype(np.int32),
        orientations=np.ones(number, np.int8),
        kinds=np.zeros(number, np.int16),
        num_bytes=chance.integers(5_000, 300_000, number),
        mtimes=chance.integers(10**18, 15 * 10**17, number),
        hashes=chance.integers(0, 256, (number, 32), np.uint8),
        kind_names=("JPEG RGB",),
        checked=True,
    )
    folders = [root / part / inside for part in ("train", "val") for inside in ("", *wnids)]
    sources = [index_module._stamp(str(folder)) for folder in folders]
    store = index_module._store(root, imagenet)
    assert index_module._save(store, index, {"listed_at": time.time_ns(), "sources": sources, "bad": []})
    return store


def measure_opening(root: Path) -> dict[str, float]:
    """Seconds to open the index and for what training asks of it; MB that this adds to the process."""
    before, own_before = resident(), resident("RssAnon")
    start = time.perf_counter()
    index = make_index(root, imagenet)  # there are no pictures: it cannot but be opened
    opened = time.perf_counter() - start
    numbers = {"open_s": opened, "opened_mb": resident() - before}
    start = time.perf_counter()
    digest = index.digest
    numbers["digest_s"] = time.perf_counter() - start
    assert len(digest) == 64
    start = time.perf_counter()
    rows = index.rows("train")
    numbers["rows_s"] = time.perf_counter() - start
    batch = rows[np.random.default_rng(0).permutation(len(rows))[:BATCH]]
    start = time.perf_counter()
    paths = index.paths.take(batch)
    numbers["batch_s"] = time.perf_counter() - start
    assert len(paths) == BATCH and index.labels[batch].max() < CLASSES
    return numbers | {"touched_mb": resident() - before, "of_its_own_mb": resident("RssAnon") - own_before}


def measure_order(pictures: int) -> dict[str, float]:
    """Seconds for the order and the uniforms of an epoch, and MB that they take."""
    before = resident()
    start = time.perf_counter()
    kept = order_and_uniforms(0, 1, pictures)
    seconds = time.perf_counter() - start
    assert len(kept[0]) == len(kept[1]) == pictures
    return {"order_s": seconds, "order_mb": resident() - before}


def resident(line: str = "VmRSS") -> float:
    """MB of memory that this process holds, with the mapped files that all processes share; RssAnon: without them."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) / 1000


if __name__ == "__main__":
    main()
