"""What watches over training: the planned size, the memory it will take, other ranks, where the time goes."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import distributed
from tqdm import tqdm

from .cost import available_memory, cost, in_px, too_large
from .differences import of_all_ranks
from .media import keep_first_batch
from .ranks import end, refuse_different
from .run import TIMING, how_to_go_on, note_event


class SameRun(Callback):
    """Ends all ranks before the first step where they would not train the same: see `differences.of_all_ranks`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        identity = getattr(pl_module, "identity", None)
        if stage == "fit" and identity:
            refuse_different(of_all_ranks(identity, self.folder))


class PlannedSize(Callback):
    """Stops a run whose batches do not have the size that the plan gives them."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        epoch = 0 if getattr(trainer, "overfit_batches", 0) else trainer.current_epoch
        planned = datamodule.shape_at(epoch, batch_idx // trainer.accumulate_grad_batches)
        shape = tuple(batch[0].shape[-2:])
        assert shape == planned, f"epoch {epoch}, batch {batch_idx}: {shape} px arrived, {planned} were planned"


class FirstBatch(Callback):
    """Keeps, for dashboards, the pictures of a run's first batch as they arrived at the net."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the run

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and trainer.global_step == 0 and batch_idx == 0 and trainer.current_epoch == 0:
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            keep_first_batch(self.folder, batch[0], datamodule.mean, datamodule.std)


class MemoryProbe(Callback):
    """Before the first step: can the largest planned size be trained in the memory there is?

    On a GPU one micro-batch is computed and thrown away; elsewhere the need is worked out and compared with what is
    free. So a run fails in its first seconds, not hours later when the largest size comes up.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        net = getattr(pl_module, "net", None)
        if net is None or trainer.max_epochs is None or trainer.max_epochs < 1:
            return
        images, shape = datamodule.largest(trainer.max_epochs)
        advice = too_large(images, shape, trainer.accumulate_grad_batches)
        if pl_module.device.type == "cuda":
            try:
                _one_step(trainer, pl_module, images, shape)
            except torch.cuda.OutOfMemoryError as error:
                raise ValueError(advice) from error
            return
        free = available_memory()
        try:
            needed = cost(net, shape).training_bytes(images, type(trainer.optimizers[0]).__name__)
        except NotImplementedError:  # a net of the user's own that cannot be measured so
            return
        if free is not None and needed > free:
            raise ValueError(f"{advice} ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free)")


def _one_step(trainer: Trainer, module: Any, images: int, shape: tuple[int, int]) -> None:
    """Forward and backward on zeros, leaving weights, buffers, gradients and random numbers as they were."""
    buffers = {name: buffer.clone() for name, buffer in module.net.named_buffers()}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.precision_plugin.train_step_context():
        batch = torch.zeros(images, 3, *shape, device=module.device).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(images, dtype=torch.int64, device=module.device)
        module.losses(module.net(batch), labels).mean().backward()
    for parameter in module.parameters():
        parameter.grad = None
    for name, buffer in module.net.named_buffers():
        buffer.copy_(buffers[name])


class Watch(Callback):
    """Ends this rank when another has ended before its time, instead of waiting for it in the next collective.

    Each rank waits in a thread for a last word from rank 0, and that from each of the others, by connections that the
    system closes when a process dies, however it dies. It costs a step nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the run
        self._group: Any = None
        self._threads: list[threading.Thread] = []
        self._rank, self._done = 0, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or not distributed.is_initialized() or self._group is not None:
            return
        self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=1000))
        self._rank, self._done = trainer.global_rank, False
        others = range(1, trainer.world_size) if self._rank == 0 else (0,)
        self._threads = [threading.Thread(target=self._wait_for, args=(other,), daemon=True) for other in others]
        for thread in self._threads:
            thread.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._say_farewell()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SystemExit):  # all ranks leave at this point
            self._say_farewell()
        elif self._threads and isinstance(exception, RuntimeError):
            time.sleep(2)  # it may come of another's end, which `_wait_for` tells better

    def _wait_for(self, other: int) -> None:
        word = torch.zeros(1, dtype=torch.int64)
        try:
            distributed.recv(word, src=other, group=self._group)
        except RuntimeError:
            word[0] = 0 if self._done else 1 + other
        if word:
            ended = int(word) - 1
            if self._rank == 0:
                self._tell(1 + ended, [t for t in range(1, distributed.get_world_size()) if t != ended])
            if self._rank == (1 if ended == 0 else 0) and self.folder.is_dir():
                note_event(self.folder, "a rank ended", rank=ended)
            end(f"rank {ended} ended before its time, so rank {self._rank} does{how_to_go_on(self.folder)}")

    def _say_farewell(self) -> None:
        if self._group is None:
            return
        self._done = True
        self._tell(0, range(1, distributed.get_world_size()) if self._rank == 0 else (0,))
        for thread in self._threads:
            thread.join(timeout=10)
        self._group, self._threads = None, []

    def _tell(self, word: int, others: Iterable[int]) -> None:
        for other in others:
            with contextlib.suppress(RuntimeError):
                distributed.send(torch.tensor([word]), dst=other, group=self._group)


class Timing(Callback):
    """`timing.jsonl`: a line an epoch with its seconds, images/s, share of time waited for data, and memory.

    A checkpoint holds what has been timed of its epoch and the length of the file, so that of a run that was killed the
    time counts that its weights took, and no other.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / TIMING
        self.images_per_s = self.waiting = self._step_seconds = 0.0
        self._before: dict[str, Any] = {}  # what the checkpoint holds that the run goes on from
        self._offset = 0
        self._start_epoch()

    def _start_epoch(self, images: int = 0, seconds: float = 0.0, waited: float = 0.0) -> None:
        self._images, self._waited, now = images, waited, time.perf_counter()
        self._began, self._batch_ended, self._trained = now - seconds, now, now

    def state_dict(self) -> dict[str, Any]:
        own = {"images": self._images, "seconds": self._trained - self._began, "waited": self._waited}
        return {"offset": self._offset, "epoch": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._offset, self._before = state_dict["offset"], state_dict["epoch"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.truncate(min(self._offset, file.tell()))
        self._start_epoch(**self._before)  # a run that goes on inside an epoch does not start that one

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The device step, which on a CPU takes its time, is no wait.
        step = getattr(getattr(trainer, "datamodule", None), "device_step_seconds", 0.0)
        self._waited += time.perf_counter() - self._batch_ended - (step - self._step_seconds)
        self._step_seconds = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        self._batch_ended = self._trained = time.perf_counter()
        elapsed = max(1e-9, self._batch_ended - self._began)
        self.images_per_s, self.waiting = self._images / elapsed, self._waited / elapsed

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        row = {
            "epoch": trainer.current_epoch,
            "images": self._images,
            "train_seconds": round(self._trained - self._began, 3),
            "val_seconds": round(time.perf_counter() - self._trained, 3),
            "images_per_s": round(self.images_per_s, 1),
            "waiting_for_data": round(self.waiting, 4),
            "peak_memory_mb": round(peak_memory(pl_module.device) / 1e6),
        }
        with self.path.open("ab") as file:
            file.write(f"{json.dumps(row)}\n".encode())
            self._offset = file.tell()


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on the GPU if there is one, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress(TQDMProgressBar):
    """A bar with size, loss, images/s and the wait for data, and a line an epoch; without a terminal, the lines."""

    def __init__(self, timing: Timing) -> None:
        # Lightning draws it on standard output, which may well be a file.
        in_terminal = sys.stderr.isatty() and sys.stdout.isatty()
        super().__init__(refresh_rate=10 if in_terminal else 0, leave=False)
        self._timing = timing
        self._shapes: list[tuple[int, int]] = []  # those of this epoch, in the order that they came
        self._loss = torch.tensor(0.0)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._shapes.clear()
        super().on_train_epoch_start(trainer, *_)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        height, width = batch[0].shape[-2:]
        if not self._shapes or self._shapes[-1] != (height, width):
            self._shapes.append((height, width))
        self._loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {
            "px": in_px(self._shapes[-1]).removesuffix(" px") if self._shapes else "",
            "loss": f"{float(self._loss):.3f}",  # waits for the device, but only when the bar is drawn anew
            **metrics,
            "images/s": round(self._timing.images_per_s),
            "wait": f"{self._timing.waiting:.0%}",
        }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        values = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"]
        if self._shapes:  # none where a run goes on from the end of an epoch's validation
            least, most = (which(self._shapes, key=math.prod) for which in (min, max))
            parts.append(in_px(most) if least == most else f"{in_px(least).removesuffix(' px')} … {in_px(most)}")
        if "train/loss" in values:
            parts.append(f"loss {float(values['train/loss']):.3f}")
        if "val/top1_error" in values:
            parts.append(f"val error {float(values['val/top1_error']):.2f} %")
        parts.append(f"{self._timing.images_per_s:.0f} images/s")
        parts.append(f"{self._timing.waiting:.0%} waiting for data")
        tqdm.write("  ".join(parts), file=sys.stderr)
