"""Run folders written by hand: what `spp train` would have left, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIG: dict[str, Any] = {
    "name": "fake",
    "seed": 0,
    "model": {"_target_": "spp_cls.models.sppnet", "name": "tiny", "levels": [6, 3, 2, 1], "seed": 0},
    "data": {"root": "pictures", "batch_size": 32, "seed": 0},
    "sizes": {"_target_": "spp_cls.data.sizes.alternating", "sizes": [180, 224]},
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "trainer": {"max_epochs": 4, "accelerator": "cpu"},
    "callbacks": {"best": {"dirpath": "/somewhere/checkpoints"}},
    "logger": {},
    "optimized_metric": "val/top1_error",
}
SIZES = (180, 224)
ENVIRONMENT = {
    "command": ["/bin/spp", "train", "name=fake"],
    "host": "here",
    "folder": ".",
    "processor": "a processor",
    "gpus": [],
    "versions": {"torch": "2.15.0"},
    "spp_cls_commit": "abc123",
}


def config_with(**settings: Any) -> dict[str, Any]:
    """The config with some settings changed; `__` stands for a dot."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    for key, value in settings.items():
        node = config
        *groups, last = key.split("__")
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return config


def history(epochs: int, steps: int, error: float = 40.0, sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """`steps` steps an epoch of loss 4 − epoch + step/100, at the sizes in turn; the last epoch ends at `error`."""
    rows: list[dict[str, Any]] = []
    for epoch in range(epochs):
        for step in range(steps):
            number, size = epoch * steps + step + 1, sizes[epoch % len(sizes)]
            rows.append({"epoch": epoch, "step": number, "size": size, "lr": 0.1, "loss": 4 - epoch + step / 100})
        ends = {
            "epoch": epoch,
            "step": (epoch + 1) * steps,
            "train/loss": 4.0 - epoch,
            "train/top1_error": 60.0 - epoch,
        }
        rows.append({**ends, "val/loss": 3.0 - epoch, "val/top1_error": error + epochs - 1 - epoch})
    return rows


def write_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    error: float = 40.0,
    epochs: int = 4,
    steps: int = 5,
    done: bool = True,
) -> Path:
    """A run of `epochs` epochs, finished or, if it is not `done`, with a checkpoint to go on from."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "key").write_text("0123456789abcdef\n")
    write_lines(folder / "history.jsonl", history(epochs, steps, error))
    timing = {"images": 160, "train_seconds": 2.5, "waiting_for_data": 0.01, "peak_memory_mb": 500}
    write_lines(folder / "timing.jsonl", [{"epoch": i, "images_per_s": 64.0 + i, **timing} for i in range(epochs)])
    if done:
        tests = [
            {"test": f"center_crop@{size}", "images": 9, "top1_error": error + i} for i, size in enumerate((180, 224))
        ]
        errors = {"val/top1_error": error, "test/top1_error": error + 1}
        (folder / "results.json").write_text(json.dumps({"epochs": epochs, "seed": 0, **errors, "tests": tests}))
    else:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").touch()
    return folder


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_answers(folder: Path, labels: Any, scores: Any, classes: Sequence[str], paths: Sequence[str]) -> None:
    """What `spp evaluate` leaves of the class probabilities."""
    evaluation = folder / "evaluations" / "test_center_crop_224"
    evaluation.mkdir(parents=True)
    kept = {"labels": np.array(labels), "scores": np.array(scores, np.float32)}
    np.savez(evaluation / "scores.npz", paths=np.array(paths), classes=np.array(classes), **kept)
    (evaluation / "results.json").write_text(json.dumps({"top1_error": 25.0, "top5_error": 0.0}))
