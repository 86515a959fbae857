"""What a run leaves behind so that it can go on: checkpoints that are whole or absent, and the history."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from . import dashboards
from .ranks import largest, place
from .run import CHECKPOINTS, how_to_go_on, is_disk_full, note_event

LAST, BEST = "last.ckpt", "best.ckpt"
PATIENCE = 20  # seconds; clusters give a job 30 between SIGTERM and SIGKILL
REQUEUE = getattr(signal, "SIGUSR1", None)  # what SLURM is asked to send before a job's time is over
HANGUP = getattr(signal, "SIGHUP", None)  # a terminal that is closed
SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, REQUEUE, HANGUP)))


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
            beside.unlink(missing_ok=True)  # what it took is free again
            free = shutil.disk_usage(target.parent).free
            needed = sum(t.numel() * t.element_size() for t in _tensors(checkpoint))
            if is_disk_full(error):
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

    Every `every_minutes` by rank 0's clock, every `every_steps` steps besides, where these are given. Not after the
    last batch of an epoch: Lightning would skip that epoch's validation on resume.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP are answered at the next such point: it is saved, and the program ends with exit
    code 143, 130 or 129; a second signal ends it at once. SIGUSR1 asks SLURM to queue the job anew besides. In a
    validation no restart would be exact: a rank that is alone ends unsaved if that takes `PATIENCE` seconds more.
    """

    def __init__(self, folder: Path, every_minutes: float | None = 10.0, every_steps: int | None = None) -> None:
        for name, value in {"every_minutes": every_minutes, "every_steps": every_steps}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise ValueError(f"checkpoint.{name}={value}: use a number, or null for the ends of epochs alone")
        self.path = folder / LAST
        self.every_seconds = math.inf if every_minutes is None else 60 * every_minutes
        self.every_steps = every_steps
        self._saved = time.monotonic()
        self._step = -1  # of the last save
        self._asked, self._asked_at = 0, 0.0  # the signal that came, and when
        self._handlers: dict[int, Any] = {}  # those that were there before
        self.stays_stopped = True  # unless it goes on with other callbacks, or further
        self._validating = False
        self._ignored = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run folder that was moved still knows its best checkpoint, which a worse one would replace else.

        And of a folder of somebody else's no file but its own is known, for Lightning removes what is no longer best.
        """
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and isinstance(state, dict) and callback.dirpath is not None:
                state.update(_moved(state, Path(callback.dirpath)))
        trainer.should_stop = self.stays_stopped and bool(checkpoint.get("stopped"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["stopped"] = bool(trainer.should_stop)  # early; Lightning forgets it

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self._alone = time.monotonic(), trainer.world_size == 1
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            for number in SIGNALS:
                # What was ignored stays so, as nohup and a shell's background want it; Lightning has put its own there.
                answer = signal.SIG_IGN if number in self._ignored else self._answer
                self._handlers[number] = signal.signal(number, answer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.is_last_batch or loop._should_accumulate():
            return
        fetcher = trainer.fit_loop._data_fetcher
        if fetcher is not None and loop._should_check_val_fx(fetcher):  # which a run that goes on from here would skip
            return
        due = trainer.is_global_zero and time.monotonic() - self._saved >= self.every_seconds
        due = due or bool(self.every_steps and trainer.global_step % self.every_steps == 0)
        wanted = largest(self._asked + 1 if self._asked else int(due))  # of all ranks; 1 is to save and go on
        if wanted:
            self._save(trainer)
        if wanted > 1:
            self._leave(trainer, wanted - 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = False

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        # Of several ranks each would have to ask the others at each batch.
        if self._asked and trainer.world_size == 1 and time.monotonic() - self._asked_at > PATIENCE:
            self._leave(trainer, self._asked)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        asked = largest(self._asked)
        if asked:
            self._leave(trainer, asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hand_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._hand_back()

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved, self._step = time.monotonic(), trainer.global_step

    def _answer(self, number: int, frame: Any) -> None:
        """Take note of a signal; called by Python between two lines of anything."""
        if self._asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._asked, self._asked_at = number, time.monotonic()
        name = signal.Signals(number).name
        ends = "after this step"
        if self._validating:
            ends = (
                f"after this validation, or unsaved after {PATIENCE} seconds"
                if self._alone
                else "after this validation"
            )
        try:
            os.write(2, f"\n{name}: ends {ends}; again to end at once\n".encode())
        except OSError:
            _print_nowhere()
        with contextlib.suppress(OSError):
            note_event(self.path.parent.parent, "signal", name=name)

    def _leave(self, trainer: Trainer, asked: int) -> None:
        """End the program: what was asked for is saved, or cannot be."""
        self._hand_back()
        name, code = signal.Signals(asked).name, 128 + asked
        if trainer.is_global_zero:
            saved = f"saved after step {self._step}" if self._step >= 0 else "nothing was saved yet"
            go_on = how_to_go_on(self.path.parent.parent)
            print(f"{name} at step {trainer.global_step}: {saved}{go_on}", file=sys.stderr)
            note_event(self.path.parent.parent, "ended", by=name, step=trainer.global_step, saved=self._step)
        if asked == REQUEUE and requeue(trainer.is_global_zero):
            code = 0
        if place().started_by == "Lightning":  # which would kill rank 0 amid its farewell
            code = 0
        raise SystemExit(code)

    def _hand_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


def _print_nowhere() -> None:
    """The terminal is gone: whoever prints, the bar above all, would raise amid the step that is to be saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)


def requeue(is_global_zero: bool) -> bool:
    """Ask SLURM to queue this job anew, once; whether there is a job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job and is_global_zero:
        if os.environ.get("SLURM_ARRAY_JOB_ID"):
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
        subprocess.run(["scontrol", "requeue", job], check=False)
    return bool(job)


def _moved(state: dict[str, Any], here: Path) -> dict[str, Any]:
    """The state of a ModelCheckpoint whose files lie in `here` now; those that do not are forgotten."""

    def found(path: Any) -> str:
        file = here / Path(str(path)).name
        return str(file) if file.is_file() and not file.is_symlink() else ""

    kept = {found(path): score for path, score in (state.get("best_k_models") or {}).items() if found(path)}
    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    paths = {name: found(state[name]) if state.get(name) else "" for name in names if name in state}
    return {"dirpath": str(here), "best_k_models": kept, **paths}


class History(Callback):
    """`history.jsonl`: a line a step (epoch, step, size, loss, lr) and a line an epoch (its errors), nothing else.

    Only what the run determines stands here; the loggers are written from the same rows. A step's loss is the mean
    over the global batch, kept on the device and written out every 50 steps, which costs one synchronisation. A
    checkpoint holds the length of the file, and a resumed run cuts it back to that.
    """

    def __init__(self, folder: Path, every: int = 50) -> None:
        self.path, self.every = folder / "history.jsonl", every
        self._offset = 0
        self._number = 0  # of rows in the file
        self._events: list[str] = []  # TensorBoard's files that show them all
        self._lr = 0.0
        self._losses: list[Tensor] = []  # of the micro-batches of the step that is under way
        self._rows: list[dict[str, Any]] = []  # steps that are done but not written; their loss is still on the device
        self._waiting: list[Tensor] = []
        self._errors: dict[str, float] = {}  # of this epoch's validation

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(min(self._offset, file.tell()))
            rows = read_history(self.path.parent) if trainer.loggers else []
            about = getattr(pl_module, "identity", {})
            dashboards.describe(trainer.loggers, about.get("config", {}), self.path.parent, pl_module)
            self._number, self._events = len(rows), dashboards.begin(trainer.loggers, rows, self._events)

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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            values = trainer.callback_metrics
            self._errors = {name: float(value) for name, value in values.items() if name.startswith("val/")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)
        # Of the validation's errors those of an earlier epoch are still among them.
        metrics = trainer.callback_metrics
        means = {name: float(value) for name, value in sorted(metrics.items()) if name.startswith("train/")}
        values = {**means, **dict(sorted(self._errors.items()))}
        self._errors = {}
        if values:
            self._write(trainer, [{"epoch": trainer.current_epoch, "step": trainer.global_step, **values}])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"offset": self._offset, "events": self._events, "errors": self._errors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset, self._events = state_dict["offset"], state_dict.get("events", [])
        self._errors = state_dict.get("errors", {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._flush(trainer)
        if trainer.is_global_zero:
            dashboards.save(trainer.loggers)  # which go on from here, too
            with self.path.open("ab") as file:
                os.fsync(file.fileno())  # a checkpoint that outlives a power cut counts on these lines
        states = checkpoint.get("callbacks", {})
        if self.state_key in states:  # taken before the flush
            states[self.state_key] = self.state_dict()

    def _flush(self, trainer: Trainer) -> None:
        if not self._rows:
            return
        losses = trainer.strategy.reduce(torch.stack(self._waiting), reduce_op="mean")
        for row, loss in zip(self._rows, losses.tolist(), strict=True):
            row["loss"] = loss
            if not math.isfinite(loss):
                if trainer.is_global_zero:
                    note_event(self.path.parent, "diverged", step=row["step"], loss=str(loss))
                self._refuse(row)
        rows, self._rows, self._waiting = self._rows, [], []
        self._write(trainer, rows)

    def _refuse(self, row: dict[str, Any]) -> None:
        """End a run that diverged; one that is about to be saved is not, so that the last checkpoint is a good one."""
        self._rows, self._waiting = [], []
        last = self.path.parent / CHECKPOINTS / LAST
        good = f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint was saved before"
        raise ValueError(
            f"the loss is {row['loss']} at step {row['step']} (epoch {row['epoch']}, {row['size']} px, learning rate "
            f"{row['lr']:g}): the run diverged; {good}; use a smaller optimizer.lr or trainer.gradient_clip_val"
        )

    def _write(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        if trainer.is_global_zero:
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                self._offset = file.tell()
            dashboards.log(trainer.loggers, rows, self._number)
            self._number += len(rows)


def _size(images: Tensor) -> dict[str, Any]:
    """The size in px: the shorter side, and for pictures that are not square height and width besides."""
    height, width = images.shape[-2:]
    return {"size": min(height, width), **({} if height == width else {"height": height, "width": width})}


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, oldest first; a last one that is only half written is left out."""
    path = folder / "history.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no history there; name a run folder, like runs/shapes-tiny/2026-01-31_12-00-00_0000")
    rows = []
    for number, line in enumerate(path.read_text().rpartition("\n")[0].splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"epoch": int(row["epoch"]), "step": int(row["step"]), **row})
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: not a row of a history, with its epoch and step") from None
    return rows
