"""Started by test_kill.py: trains in child processes that are killed (SIGKILL) at random instants and resumed.

    python tests/kill_campaign.py PICTURES OUT KILLS

For each way to train: once without a kill, then again and again with kills until there were KILLS; every run must end
with the same weights, bit for bit, and the same history, byte for byte. Prints a JSON line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import torch  # noqa: E402
from lightning import Trainer  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: E402
from torch import nn  # noqa: E402

from spp_cls import schedules  # noqa: E402
from spp_cls.classifier import Classifier  # noqa: E402
from spp_cls.data import FullImage, MultiSizeDataModule  # noqa: E402
from spp_cls.data.layouts import folder  # noqa: E402
from spp_cls.data.sizes import alternating  # noqa: E402
from spp_cls.resume import LAST, AtomicCheckpointIO, History, ResumePoint  # noqa: E402
from spp_cls.train import train as fit_and_test  # noqa: E402

# Minutes between saves: at each step, or at the ends of epochs only.
WAYS: list[dict[str, Any]] = [
    {"num_workers": 0, "accumulation": 1, "every_minutes": 0},
    {"num_workers": 2, "accumulation": 4, "every_minutes": 0},
    {"num_workers": None, "cache": "raw", "accumulation": 1, "every_minutes": 60, "ema": True},
    {"num_workers": "thread", "whole": True, "accumulation": 1, "every_minutes": 0, "ema": True},
]
EPOCHS = 3


def train(pictures: str, out: Path, caches: str, way: dict[str, Any]) -> str:
    """Trains, from last.ckpt on where there is one; the hash of the weights, EMA's among them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(8, 3)),
    )
    half = partial(schedules.step, milestones=(0.5,), factor=0.5)
    classifier = Classifier(net, partial(torch.optim.SGD, lr=0.1, momentum=0.9), half, val_sizes=(32,))
    datamodule = MultiSizeDataModule(
        pictures,
        folder,
        FullImage(32, 8, least=1) if way.get("whole") else partial(alternating, sizes=[26, 32]),
        batch_size=8,
        region=32,
        resize=36,
        num_workers=way["num_workers"],
        cache=way.get("cache"),
        cache_folder=caches,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=way["accumulation"],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[
            *([EMAWeightAveraging(decay=0.9)] if way.get("ema") else []),
            *(History(out, every=3), ResumePoint(out / "checkpoints", way["every_minutes"])),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = out / "checkpoints" / LAST
    fit_and_test(classifier, datamodule, trainer, last if last.exists() else None, test=False)
    state = torch.load(last, weights_only=True)
    return " ".join(digest(weights) for weights in (state["state_dict"], classifier.state_dict()))


def digest(weights: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()


def in_a_child(pictures: str, out: Path, caches: str, way: dict[str, Any], kill_after: float | None) -> bool:
    """Trains in a child; whether it came to the end. It leaves its hash in the file `weights`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "weights").write_text(train(pictures, out, caches, way))
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 120)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"a child failed: {way}"
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert kill_after is not None, f"a child hung: {way}"
    return False


def outcome(out: Path) -> tuple[str, str]:
    return (out / "weights").read_text(), hashlib.sha256((out / "history.jsonl").read_bytes()).hexdigest()


def main(pictures: str, folder: str, kills: str) -> None:
    chance = random.Random(0)
    result: dict[str, Any] = {"script": "kill_campaign", "kills": 0, "runs": 0, "different": []}
    for number, way in enumerate(WAYS):
        here, caches = Path(folder, str(number)), str(Path(folder, "caches"))
        began = time.monotonic()
        assert in_a_child(pictures, here / "whole", caches, way, None)
        seconds = time.monotonic() - began
        expected, killed = outcome(here / "whole"), 0
        while killed < int(kills):
            out = here / "killed"
            shutil.rmtree(out, ignore_errors=True)
            while not in_a_child(pictures, out, caches, way, chance.uniform(0.1 * seconds, 0.9 * seconds)):
                killed += 1
            if outcome(out) != expected:
                what = [
                    name for name, a, b in zip(("weights", "history"), outcome(out), expected, strict=True) if a != b
                ]
                result["different"].append([number, *what])
            result["runs"] += 1
        result["kills"] += killed
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
