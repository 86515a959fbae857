"""`spp train`: train a net and test it."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .door import is_multirun, open_door, typed

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule, Trainer
    from torch import nn

    from .data import MultiSizeDataModule
    from .differences import Difference


def train(
    classifier: LightningModule,
    datamodule: LightningDataModule,
    trainer: Trainer,
    ckpt_path: str | Path | None = None,
    test: bool = True,
) -> dict[str, float]:
    """Fit, then test with the last weights; the errors and losses at the end by name (`val/top1_error` …)."""
    trainer.fit(classifier, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is not None and "train/loss" not in trainer.callback_metrics:
        _take_saved_weights(classifier, trainer, ckpt_path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if test and not trainer.interrupted:
        trainer.test(classifier, datamodule=datamodule, verbose=False)
        metrics.update({name: float(value) for name, value in trainer.callback_metrics.items()})
    return metrics


def _take_saved_weights(classifier: LightningModule, trainer: Trainer, ckpt_path: str | Path) -> None:
    """Where nothing was left to train, the weights of the checkpoint: Lightning leaves those that were not averaged."""
    import torch

    state = torch.load(ckpt_path, map_location="cpu", weights_only=True)
    if state["global_step"] == trainer.global_step:
        classifier.load_state_dict(state["state_dict"])


def check(net: nn.Module, datamodule: MultiSizeDataModule, trainer: Trainer) -> None:
    """Refuse, before anything is written, a batch that does not divide and sizes that region or net do not take."""
    from .cost import cost

    datamodule.trainer = trainer
    plan, limit = datamodule.plan, trainer.limit_train_batches
    limited = limit if isinstance(limit, int) else int(limit * len(plan))
    if limited < len(plan) and limited % plan.accumulation and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            f"trainer.limit_train_batches={limit} ends inside an optimizer step: it counts micro-batches, "
            f"{plan.accumulation} a step; give a multiple of that"
        )
    assert datamodule.index is not None
    for split in ("val", "test"):
        if datamodule.index.counts[split] < trainer.world_size:
            raise ValueError(
                f"{datamodule.root}: has {datamodule.index.counts[split]} {split} pictures, fewer than the "
                f"{trainer.world_size} devices: use fewer devices, or more {split} pictures"
            )
    planned = datamodule.planned_shapes(max(1, trainer.max_epochs or 1), plan.num_batches)
    shapes = sorted({shape for in_epoch in planned.values() for shape in in_epoch}, key=math.prod)
    with contextlib.suppress(NotImplementedError):
        for shape in (shapes[0], shapes[-1], *((size, size) for size in datamodule.val_sizes)):
            cost(net, shape)


def run(config: DictConfig) -> float | None:
    """Everything that `spp train` does with a config; gives `optimized_metric` for sweepers."""
    from . import build, dashboards
    from .ranks import place
    from .run import environment, find_checkpoint, write_json

    folder = Path(HydraConfig.get().runtime.output_dir)
    several_ranks = config.trainer.devices not in (1, "1") or config.trainer.num_nodes != 1 or place().ranks > 1
    if is_multirun() and several_ranks:
        raise ValueError(
            f"trainer.devices={config.trainer.devices} with -m: further ranks would run the whole grid again; "
            "start each of its runs by a command of its own"
        )
    ckpt_path = find_checkpoint(config.ckpt_path) if config.ckpt_path else None
    if ckpt_path and not config.trust:  # before anything that it names is even imported
        build.refuse_untrusted(OmegaConf.to_container(config, resolve=True), ckpt_path)
    build.check_arguments(config)
    if config.resume not in (None, "auto"):
        raise ValueError(f"resume={config.resume}: use auto or null; a run by its folder is ckpt_path=RUN")
    datamodule = build.build_datamodule(config)
    trainer = build.build_trainer(config, folder)
    identity = build.identity(config, datamodule, trainer)
    found = build.differences_from(ckpt_path, identity) if ckpt_path else []
    to_build = config.copy()
    if ckpt_path and "init_from" in config.model:
        to_build.model.init_from = None  # the checkpoint has the weights
    classifier = build.build_classifier(to_build, identity, build.class_weights(config, datamodule))
    check(classifier.net, datamodule, trainer)
    _ = datamodule.pictures  # a cache that is wanted is made here, before other ranks are started

    assert datamodule.index is not None
    if trainer.is_global_zero:
        resolved = OmegaConf.to_yaml(config, resolve=True)
        (folder / "config.yaml").write_text(resolved)
        left_out = {bad.path: bad.reason for bad in datamodule.index.bad}
        about = {**environment(typed(), resolved, datamodule.index.digest), "left_out": left_out}
        write_json(folder / "environment.json", about)
        if ckpt_path:
            _say_what_differs(folder, ckpt_path, found)
        parameters = sum(p.numel() for p in classifier.net.parameters())
        print(f"{datamodule.index.describe()}\nnet: {parameters:,} parameters\nrun: {folder}", file=sys.stderr)

    try:
        metrics = train(classifier, datamodule, trainer, ckpt_path, config.test)
    finally:
        dashboards.close(trainer.loggers)
    if "train/loss" not in metrics:  # nothing was left to train
        metrics = {**_last_epoch(folder), **metrics}

    if trainer.is_global_zero:
        write_json(folder / "results.json", {"epochs": trainer.current_epoch, **metrics})
        _say_where(folder, metrics, config)
    name = config.optimized_metric
    if name and name not in metrics and not config.trainer.fast_dev_run:
        raise ValueError(f"optimized_metric={name}: no such metric; there are {', '.join(sorted(metrics))}")
    return metrics.get(name) if name else None


def _say_what_differs(folder: Path, ckpt_path: Path, found: list[Difference]) -> None:
    from .differences import CHANGES
    from .run import note_event

    changes = [difference for difference in found if difference.kind == CHANGES]
    if changes:
        lines = "\n  ".join(map(str, changes))
        print(f"goes on otherwise than it began, so that the result will be another:\n  {lines}", file=sys.stderr)
    kinds: dict[str, dict[str, Any]] = {}
    for difference in found:
        kinds.setdefault(difference.kind, {})[difference.key] = [difference.before, difference.now]
    note_event(folder, "resumed", checkpoint=ckpt_path, command=typed(), **kinds)


def _last_epoch(folder: Path) -> dict[str, float]:
    from .resume import read_history

    rows = [{name: value for name, value in row.items() if "/" in name} for row in read_history(folder)]
    return next((row for row in reversed(rows) if row), {})


def _say_where(folder: Path, metrics: dict[str, Any], config: DictConfig) -> None:
    if "test/top1_error" in metrics:
        top5 = f", top-5 {metrics['test/top5_error']:.2f} %" if metrics["test/top5_error"] else ""
        print(f"test error ({config.views.crops}): top-1 {metrics['test/top1_error']:.2f} %{top5}")
    print(f"all of it: {folder}")
    if (folder / "tensorboard").is_dir():
        print(f"look:      tensorboard --logdir {folder.parent}")
    if (folder / "checkpoints").is_dir():
        print(f"test more: spp evaluate run={folder} views=ten_crop")
        print(f"use it:    spp predict run={folder} PICTURE…")


def main(arguments: list[str] | None = None) -> None:
    """The door."""
    open_door("train", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
