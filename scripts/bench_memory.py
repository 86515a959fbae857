"""Does the memory of the loader stay flat? Reads a folder for many epochs, in each way there is, and looks after each.

    python scripts/bench_memory.py data/caltech101 --epochs 20

Memory is what this process and its workers hold beside files that are mapped (Pss_Anon of Linux's smaps_rollup, shared
pages counted once), in MB. Whole pictures come in batches of many shapes, which is hardest on an allocator. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spp_cls.data import FullImage, MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating

WAYS: dict[str, dict[str, Any]] = {
    "folder, 2 workers": {"num_workers": 2},
    "folder, thread": {"num_workers": "thread"},
    "folder, whole pictures": {"num_workers": 2, "sizes": FullImage(224)},
    "jpeg cache, 2 workers": {"num_workers": 2, "cache": "jpeg"},
    "raw cache, thread": {"cache": "raw"},
}


def memory() -> float:
    """MB of anonymous memory of this process and all below it."""
    total, todo = 0, [os.getpid()]
    while todo:
        process = Path("/proc", str(todo.pop()))
        try:
            rollup = (process / "smaps_rollup").read_text()
            todo += [int(child) for task in (process / "task").iterdir() for child in _children(task)]
        except OSError:  # it ended meanwhile
            continue
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon:"))
    return total / 1000


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def by_epoch(datamodule: MultiSizeDataModule, epochs: int, look: Callable[[], float]) -> list[float]:
    """The memory at the end of each epoch, with the last batch in hand and the workers alive."""
    datamodule.setup()
    loader = datamodule.train_dataloader()
    found = []
    for _ in range(epochs):
        for batch in loader:
            datamodule.on_after_batch_transfer(batch, 0)
        found.append(round(look(), 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--test-share", type=float, default=0.8, help="of the pictures, which are not read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layout = partial(folder, val_share=0.05, test_share=arguments.test_share)
    sizes = partial(alternating, sizes=[180, 224])
    result: dict[str, Any] = {"script": "bench_memory", "epochs": arguments.epochs, "mb": {}}
    with tempfile.TemporaryDirectory() as caches:
        for name, options in WAYS.items():
            options = {"sizes": sizes, "batch_size": 64, "cache_folder": caches, **options}
            found = by_epoch(MultiSizeDataModule(arguments.root, layout, **options), arguments.epochs, memory)
            half = found[len(found) // 2 :]
            result["mb"][name] = {
                "first": found[0],
                "second": found[1],
                "last": found[-1],
                "growth": half[-1] - half[0],
            }
            print(f"{name:<24} after epoch 1, 2, …: {' '.join(f'{mb:.0f}' for mb in found)} MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
