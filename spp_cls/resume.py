"""What a run leaves behind so that it can go on: checkpoints that are whole or absent, and the history."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

LAST, BEST = "last.ckpt", "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames: a kill or a full disk leaves the old file, never half a new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".tmp")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(target.parent).free
            needed = sum(t.numel() * t.element_size() for t in _tensors(checkpoint))
            if free < needed:
                raise OSError(
                    f"disk full: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free at {target.parent}; "
                    f"{target.name} is as it was"
                ) from error
            raise
        finally:
            beside.unlink(missing_ok=True)
        if os.name == "nt":  # which opens no folders
            return
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


class ResumePoint(Checkpoint):
    """Saves `last.ckpt` where a restart is exact: between two optimizer steps inside an epoch, and at its very end.

    Not after the last batch of an epoch: Lightning would skip that epoch's validation on resume.
    """

    def __init__(self, folder: Path, every_minutes: float = 10.0) -> None:
        self.path = folder / LAST
        self.every_seconds = 60 * every_minutes
        self._saved = time.monotonic()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run folder that was moved still knows its best checkpoint, which a worse one would replace else."""
        here = str(self.path.parent)
        for state in checkpoint["callbacks"].values():
            there = state.get("dirpath")
            if there and Path(here, Path(state["best_model_path"]).name).is_file():
                state.update(_moved(state, there, here))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        due = time.monotonic() - self._saved >= self.every_seconds
        if trainer.strategy.broadcast(due) if trainer.world_size > 1 else due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()


def _moved(value: Any, there: str, here: str) -> Any:
    if isinstance(value, dict):
        return {_moved(k, there, here): _moved(v, there, here) for k, v in value.items()}
    return here + value[len(there) :] if isinstance(value, str) and value.startswith(there) else value


class History(Callback):
    """`history.jsonl`: a line a step (epoch, step, size, loss, lr) and a line an epoch (its errors), nothing else.

    Only what the run determines stands here; the loggers are written from the same rows. A step's loss is the mean
    over the global batch, kept on the device and written out every 50 steps, which costs one synchronisation. A
    checkpoint holds the length of the file, and a resumed run cuts it back to that.
    """

    def __init__(self, folder: Path, every: int = 50) -> None:
        self.path, self.every = folder / "history.jsonl", every
        self._offset = 0
        self._lr = 0.0
        self._losses: list[Tensor] = []  # of the micro-batches of the step that is under way
        self._rows: list[dict[str, Any]] = []  # steps that are done but not written; their loss is still on the device
        self._waiting: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(min(self._offset, file.tell()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the batch's end it is the next step's

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        # Lightning hands out the loss divided by the accumulation; their sum is the mean over the global batch.
        self._losses.append(loss.detach())
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self._rows.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                **_size(batch[0]),
                "lr": self._lr,
            }
        )
        self._waiting.append(torch.stack(self._losses).sum())
        self._losses.clear()
        if len(self._rows) >= self.every:
            self._flush(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)
        values = {
            name: float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if name.startswith(("train/", "val/"))
        }
        if values:
            self._write(trainer, [{"epoch": trainer.current_epoch, "step": trainer.global_step, **values}])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"offset": self._offset}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset = state_dict["offset"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush(trainer)
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:  # taken before the flush
            states[self.state_key] = self.state_dict()

    def _flush(self, trainer: Trainer) -> None:
        if not self._rows:
            return
        losses = trainer.strategy.reduce(torch.stack(self._waiting), reduce_op="mean")
        for row, loss in zip(self._rows, losses.tolist(), strict=True):
            row["loss"] = loss
        rows, self._rows, self._waiting = self._rows, [], []
        self._write(trainer, rows)

    def _write(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        if trainer.is_global_zero:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                self._offset = file.tell()
            for row in rows:
                values = {k if "/" in k else f"train/{k}": v for k, v in row.items() if k not in ("epoch", "step")}
                for logger in trainer.loggers:
                    logger.log_metrics({"epoch": row["epoch"], **values}, step=row["step"])


def _size(images: Tensor) -> dict[str, Any]:
    """The size in px: the shorter side, and for pictures that are not square height and width besides."""
    height, width = images.shape[-2:]
    return {"size": min(height, width), **({} if height == width else {"height": height, "width": width})}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, oldest first."""
    path = folder / "history.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no history there; name a run folder, like runs/shapes-tiny/2026-01-31_12-00-00_0000")
    return [json.loads(line) for line in path.read_text().splitlines()]
