from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from torch import Tensor, nn

from spp_cls import schedules
from spp_cls.classifier import Classifier
from spp_cls.data import MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.resume import LAST, AtomicCheckpointIO, History, ResumePoint, read_history

HALF = partial(schedules.step, milestones=(0.5,), factor=0.5)


def net(dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 3),
    )


def make_classifier(dropout: float = 0.5) -> Classifier:
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    return Classifier(net(dropout), sgd, HALF, val_sizes=(32, 26))


def make_datamodule(pictures: Path, num_workers: int = 0) -> MultiSizeDataModule:
    return MultiSizeDataModule(
        str(pictures),
        folder,
        partial(alternating, sizes=[26, 32]),
        batch_size=8,
        region=32,
        resize=36,
        val_sizes=(32, 26),
        num_workers=num_workers,
    )


def make_trainer(callbacks: list[Callback], accumulation: int = 2, logger: Any = False, epochs: int = 2) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=logger,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=any(isinstance(callback, ResumePoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# Checkpoints are whole or absent


def write(path: Path, **content: Any) -> None:
    AtomicCheckpointIO().save_checkpoint(content, path)


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int, number: int = errno.ENOSPC) -> None:
    """`torch.save` writes half of what it should, then fails with error `number`; `free` bytes are left on the disk."""

    def save(checkpoint: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("spp_cls.resume.torch.save", save)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9 - free, free=free))


def test_a_checkpoint_comes_back_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / LAST
    write(path, weights=torch.arange(5), epoch=3)
    write(path, weights=torch.arange(6), epoch=4)
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert loaded["epoch"] == 4 and torch.equal(loaded["weights"], torch.arange(6))
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LAST
    write(path, epoch=1)
    before = path.read_bytes()
    full_disk(monkeypatch, free=1_400_000)
    with pytest.raises(OSError) as caught:
        # 4 + 2 + 1 MB, in a dict, a list and a tuple, as in a real checkpoint
        tensors = {"a": torch.zeros(1_000_000), "b": [torch.zeros(250_000, dtype=torch.int64)]}
        write(path, state=tensors, more=(torch.zeros(1_000_000, dtype=torch.uint8), "text", 1))
    assert str(caught.value) == f"disk full: 7 MB needed, 1 MB free at {tmp_path}; last.ckpt is as it was"
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch, free=0)
    with pytest.raises(OSError, match="^disk full: 4 MB needed, 0 MB free at "):
        write(tmp_path / LAST, weights=torch.zeros(1_000_000))
    assert not list(tmp_path.iterdir())


def test_another_error_comes_through_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LAST
    write(path, epoch=1)
    before = path.read_bytes()
    full_disk(monkeypatch, free=10**9, number=errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(path, weights=torch.zeros(10))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_between_writing_and_renaming_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / LAST
    write(path, epoch=1)
    before = path.read_bytes()
    for target in ("spp_cls.resume.os.replace", "spp_cls.resume.torch.save"):
        with monkeypatch.context() as patch:
            patch.setattr(target, killed)
            with pytest.raises(KeyboardInterrupt):
                write(path, epoch=2)
        assert path.read_bytes() == before
    (tmp_path / "last.ckpt.tmp").write_bytes(b"left by a kill -9")
    write(path, epoch=3)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True) == {"epoch": 3}
    assert list(tmp_path.iterdir()) == [path]


# When a resume point is saved


class Saves(Callback):
    """Writes down what each save holds: epoch, steps, and the position in the data."""

    def __init__(self) -> None:
        self.points: list[tuple[int, int, dict[str, int]]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.points.append((trainer.current_epoch, trainer.global_step, checkpoint["MultiSizeDataModule"]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_points_lie_between_steps_and_at_the_very_end_of_epochs(
    pictures: Path, tmp_path: Path, accumulation: int
) -> None:
    saves = Saves()
    trainer = make_trainer([saves, ResumePoint(tmp_path, every_minutes=0)], accumulation)
    trainer.fit(make_classifier(), datamodule=make_datamodule(pictures))
    assert saves.points == [
        (epoch, 4 * epoch + done, {"epoch": epoch, "batch": done}) for epoch in (0, 1) for done in (1, 2, 3, 4)
    ]
    checkpoint = torch.load(tmp_path / LAST, weights_only=True)
    assert checkpoint["global_step"] == 8
    # The last save of an epoch comes after its validation.
    assert len(checkpoint["spp_cls"]["past_errors"]) == 2


def test_resume_points_wait_for_their_time(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("spp_cls.resume.time.monotonic", lambda: clock.now)

    class Tick(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            clock.now += 60

    saves = Saves()
    trainer = make_trainer([saves, Tick(), ResumePoint(tmp_path, every_minutes=2)], accumulation=1)
    trainer.fit(make_classifier(), datamodule=make_datamodule(pictures))
    # After minutes 2, 4 (the end), 6, 8.
    assert [step for _, step, _ in saves.points] == [2, 4, 6, 8]


# History


class Recorder(DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step, metrics))


def losses_by_hand(pictures: Path) -> list[float]:
    """Of each step of two epochs: plain torch, one batch of 8, no Lightning, no accumulation."""
    model, datamodule = net(dropout=0), make_datamodule(pictures)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    datamodule.setup()
    loader, losses = datamodule.train_dataloader(), list[Tensor]()
    for epoch in range(2):
        for batch in loader:
            images, labels = datamodule.on_after_batch_transfer(batch, 0)
            optimizer.param_groups[0]["lr"] = 0.1 if epoch == 0 else 0.05
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()


@pytest.mark.parametrize("every", [1, 3, 50])
def test_history_of_two_epochs_by_hand(pictures: Path, tmp_path: Path, every: int) -> None:
    classifier, logger = make_classifier(dropout=0), Recorder()
    trainer = make_trainer([History(tmp_path, every=every)], logger=logger)
    trainer.fit(classifier, datamodule=make_datamodule(pictures))
    rows = read_history(tmp_path)

    steps = [row for row in rows if "loss" in row]
    assert [list(row) for row in steps] == [["epoch", "step", "size", "lr", "loss"]] * 8
    assert [(row["epoch"], row["step"], row["size"], row["lr"]) for row in steps] == [
        *((0, step, 26, 0.1) for step in (1, 2, 3, 4)),
        *((1, step, 32, 0.05) for step in (5, 6, 7, 8)),
    ]
    torch.testing.assert_close([row["loss"] for row in steps], losses_by_hand(pictures), rtol=1e-5, atol=1e-6)

    assert [rows.index(row) for row in rows if "loss" not in row] == [4, 9]
    for epoch, row in enumerate((rows[4], rows[9])):
        names = [f"val/{name}{size}" for size in ("", "_26") for name in ("loss", "top1_error", "top5_error")]
        assert list(row) == [
            "epoch",
            "step",
            "train/loss",
            "train/top1_error",
            "train/top5_error",
            *sorted(names),
        ]
        assert (row["epoch"], row["step"]) == (epoch, 4 * (epoch + 1))
        mean = sum(step["loss"] for step in steps[4 * epoch : 4 * epoch + 4]) / 4
        assert row["train/loss"] == pytest.approx(mean, abs=1e-5)
        assert row["train/top5_error"] == row["val/top5_error"] == 0  # of three classes
    errors = [rows[4]["val/top1_error"], rows[9]["val/top1_error"]]
    assert errors == pytest.approx(classifier.past_errors, rel=1e-6)  # Lightning keeps them in float32

    # The loggers have the history's rows, and no others.
    def as_logged(row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        names = {"size": "train/size", "lr": "train/lr", "loss": "train/loss", "train/loss": "train/epoch_loss"}
        return row["step"], {names.get(name, name): value for name, value in row.items() if name != "step"}

    assert logger.rows == [as_logged(row) for row in rows]
    assert isinstance(logger, Logger)


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a run without a word: in the middle of step `step` + 1, or at the first hook `at` after it."""

    def __init__(self, step: int, at: str = "on_before_backward") -> None:
        def hook(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step:
                raise Killed

        setattr(self, at, hook)


def run(
    pictures: Path,
    out: Path,
    kill: Callback | None = None,
    num_workers: int = 0,
    every_minutes: float = 0,
) -> dict[str, Tensor]:
    """The weights at the end of a run that goes on from `last.ckpt` if it is there."""
    callbacks = [History(out, every=3), ResumePoint(out, every_minutes), *([kill] if kill else [])]
    classifier, trainer = make_classifier(), make_trainer(callbacks, epochs=3)
    last = out / LAST
    trainer.fit(
        classifier,
        datamodule=make_datamodule(pictures, num_workers),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )
    return copy.deepcopy(classifier.state_dict())


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], bytes]:
    out = tmp_path_factory.mktemp("uninterrupted")
    weights = run(pictures, out)
    return weights, (out / "history.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("step", "at"),
    [
        (0, "on_before_backward"),  # nothing saved yet
        (2, "on_before_backward"),
        (4, "on_validation_batch_start"),  # after an epoch's last step, before its save
        (4, "on_train_epoch_start"),  # between two epochs
        (6, "on_before_backward"),
        (6, "on_before_optimizer_step"),
        (12, "on_validation_end"),  # the last validation
        (12, "on_train_end"),
    ],
)
@pytest.mark.parametrize("every_minutes", [0, 60])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    pictures: Path,
    tmp_path: Path,
    uninterrupted: tuple[dict[str, Tensor], bytes],
    step: int,
    at: str,
    every_minutes: float,
) -> None:
    with pytest.raises(Killed):
        run(pictures, tmp_path, Kill(step, at), every_minutes=every_minutes)
    weights = run(pictures, tmp_path)
    assert_same(weights, uninterrupted[0])
    assert (tmp_path / "history.jsonl").read_bytes() == uninterrupted[1]


def test_killed_again_and_again(pictures: Path, tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], bytes]) -> None:
    for step in (1, 3, 5, 5, 9, 11):
        with pytest.raises(Killed):
            run(pictures, tmp_path, Kill(step), num_workers=2 * (step == 5))
    assert_same(run(pictures, tmp_path), uninterrupted[0])
    history = (tmp_path / "history.jsonl").read_bytes()
    assert history == uninterrupted[1]
    steps = [row["step"] for row in map(json.loads, history.splitlines()) if "loss" in row]
    assert steps == list(range(1, 13))


class Signal(Callback):
    """Sends itself the signal `number` in the middle of step `step` + 1, or at the first hook `at` after it."""

    def __init__(self, number: int, step: int, at: str = "on_before_backward") -> None:
        def hook(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step and not self.sent:
                self.sent = True
                os.kill(os.getpid(), number)

        self.sent = False
        setattr(self, at, hook)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Ctrl-C is not ignored, as in a shell's background it is; and all is as before when a test ends."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == ours
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)],
    ids=["TERM", "INT", "USR1", "HUP"],
)
@pytest.mark.parametrize(
    ("step", "at", "saved"),
    [
        (2, "on_before_backward", 3),  # saved at the end of this step
        (3, "on_before_backward", 4),  # the epoch's last: saved when the epoch ends, and with it its validation
        (4, "on_train_epoch_start", 5),
        (4, "on_validation_batch_start", 2),  # no restart would be exact: what was saved before is left
    ],
)
def test_a_signal_is_answered_at_the_next_exact_point(
    pictures: Path,
    tmp_path: Path,
    uninterrupted: tuple[dict[str, Tensor], bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
    step: int,
    at: str,
    saved: int,
) -> None:
    if at == "on_validation_batch_start":
        monkeypatch.setattr("spp_cls.resume.PATIENCE", 0)
        with pytest.raises(Killed):
            run(pictures, tmp_path, Kill(2))  # leaves what was saved after step 2
    with pytest.raises(SystemExit) as ended:
        run(pictures, tmp_path, Signal(number, step, at), every_minutes=60)
    assert ended.value.code == code
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == saved
    name = signal.Signals(number).name
    assert f"{name} at step {max(saved, step)}: " in capsys.readouterr().err
    assert_same(run(pictures, tmp_path, num_workers=2), uninterrupted[0])
    assert (tmp_path / "history.jsonl").read_bytes() == uninterrupted[1]


@pytest.mark.usefixtures("handlers")
def test_slurm_is_asked_to_queue_the_job_anew(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("spp_cls.resume.subprocess.run", lambda command, check: asked.append(command))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(SystemExit) as ended:
        run(pictures, tmp_path / "one", Signal(signal.SIGUSR1, 2))
    assert (ended.value.code, asked) == (0, [["scontrol", "requeue", "17"]])
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(SystemExit):
        run(pictures, tmp_path / "two", Signal(signal.SIGUSR1, 2))
    assert asked[1:] == [["scontrol", "requeue", "16_3"]]
    with pytest.raises(SystemExit) as ended:
        run(pictures, tmp_path / "three", Signal(signal.SIGTERM, 2))
    assert ended.value.code == 143 and len(asked) == 2


def test_a_second_signal_ends_the_program_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, Any]] = []
    monkeypatch.setattr("spp_cls.resume.os.kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr("spp_cls.resume.signal.signal", lambda number, handler: sent.append((number, handler)))
    point = ResumePoint(tmp_path)
    point._answer(signal.SIGTERM, None)
    assert sent == []
    point._answer(signal.SIGTERM, None)
    assert sent == [(signal.SIGTERM, signal.SIG_DFL), (os.getpid(), signal.SIGTERM)]


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_ignored_stays_so(pictures: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run(pictures, tmp_path, Signal(signal.SIGTERM, 2))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("every_minutes", [0, 60])
def test_a_run_that_diverges_ends_with_its_last_good_checkpoint(
    pictures: Path, tmp_path: Path, every_minutes: float
) -> None:
    class Poison(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                for parameter in trainer.lightning_module.parameters():
                    assert parameter.grad is not None
                    parameter.grad.fill_(float("inf"))

    folder = tmp_path / "checkpoints"
    callbacks = [Poison(), History(tmp_path), ResumePoint(folder, every_minutes)]
    with pytest.raises(ValueError) as caught:
        make_trainer(callbacks, epochs=3).fit(make_classifier(), datamodule=make_datamodule(pictures))
    # The weights are infinite after step 6, the loss is nan in step 7; epochs 0 and 2 are of 26 px.
    message = str(caught.value)
    assert message.startswith("the loss is nan at step 7 (epoch 1, 32 px, learning rate 0.05): the run diverged; ")
    assert f"the last good checkpoint is {folder / LAST}; " in message
    steps = [row["step"] for row in read_history(tmp_path) if "loss" in row]
    assert steps == list(range(1, max(steps) + 1)) and max(steps) <= 6


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    pictures: Path, tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], bytes]
) -> None:
    for _ in range(2):
        assert_same(run(pictures, tmp_path), uninterrupted[0])
        assert (tmp_path / "history.jsonl").read_bytes() == uninterrupted[1]


def test_dropout_is_on_in_these_proofs(pictures: Path) -> None:
    classifier = make_classifier().train()
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(classifier(images), classifier(images))


def test_a_checkpoint_holds_the_length_of_the_history(pictures: Path, tmp_path: Path) -> None:
    class Compare(Callback):
        compared = 0

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if (tmp_path / LAST).exists():
                offset = torch.load(tmp_path / LAST, weights_only=True)["callbacks"]["History"]["offset"]
                assert offset == (tmp_path / "history.jsonl").stat().st_size
                self.compared += 1

    compare = Compare()
    run_callbacks = [History(tmp_path), ResumePoint(tmp_path, every_minutes=0), compare]
    make_trainer(run_callbacks, accumulation=1).fit(make_classifier(), datamodule=make_datamodule(pictures))
    assert compare.compared == 7


def test_a_fresh_run_begins_a_fresh_history(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"epoch": 99}\n')
    make_trainer([History(tmp_path)], epochs=1).fit(make_classifier(), datamodule=make_datamodule(pictures))
    assert [row["epoch"] for row in read_history(tmp_path)] == [0] * 5


def test_read_history(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"history.jsonl: no history there; name a run folder, like runs/") as caught:
        read_history(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)
    (tmp_path / "history.jsonl").write_text('{"epoch": 0, "step": 1, "loss": 1.5}\n{"epoch": 1, "step": 2}\n{"epo')
    assert read_history(tmp_path) == [{"epoch": 0, "step": 1, "loss": 1.5}, {"epoch": 1, "step": 2}]
    (tmp_path / "history.jsonl").write_text('{"epoch": 0, "step": 1}\n[1, 2]\n')
    with pytest.raises(ValueError, match="history.jsonl, line 2: not a row of a history, with its epoch and step"):
        read_history(tmp_path)


def test_a_best_checkpoint_that_is_not_in_the_run_is_forgotten_and_never_removed(tmp_path: Path) -> None:
    here, victim = tmp_path / "checkpoints", tmp_path / "victim"
    here.mkdir()
    victim.mkdir()
    (here / "best.ckpt").touch()
    (here / "link.ckpt").symlink_to(victim)
    best = ModelCheckpoint(here, filename="best", monitor="val/top1_error")
    trainer = make_trainer([best, ResumePoint(here)])
    state: dict[str, Any] = {
        "dirpath": str(tmp_path / "moved"),
        "best_model_path": str(tmp_path / "moved" / "best.ckpt"),
        "kth_best_model_path": str(victim),
        "best_k_models": {str(tmp_path / "moved" / "best.ckpt"): 1.0, str(victim): 9.0, "link.ckpt": 3.0},
    }
    checkpoint = {"callbacks": {best.state_key: state, "Other": {"dirpath": 3}, "Odd": 5}}
    ResumePoint(here).on_load_checkpoint(trainer, Classifier(net(), torch.optim.SGD, HALF), checkpoint)
    assert state == {
        "dirpath": str(here),
        "best_model_path": str(here / "best.ckpt"),
        "kth_best_model_path": "",
        "best_k_models": {str(here / "best.ckpt"): 1.0},
    }


def test_a_run_that_was_stopped_early_stays_so(tmp_path: Path) -> None:
    trainer = make_trainer([ResumePoint(tmp_path)])
    for stopped in (True, False):
        trainer.should_stop = stopped
        checkpoint: dict[str, Any] = {"callbacks": {}}
        point = ResumePoint(tmp_path)
        classifier = Classifier(net(), torch.optim.SGD, HALF)
        point.on_save_checkpoint(trainer, classifier, checkpoint)
        trainer.should_stop = False
        point.on_load_checkpoint(trainer, classifier, checkpoint)
        assert trainer.should_stop is stopped
        point.stays_stopped = False
        point.on_load_checkpoint(trainer, classifier, checkpoint)
        assert not trainer.should_stop


@pytest.mark.parametrize("every_epochs", [1, 2])
def test_errors_stand_in_the_history_where_they_were_measured(
    pictures: Path, tmp_path: Path, every_epochs: int
) -> None:
    trainer = make_trainer([History(tmp_path)], epochs=4)
    trainer.check_val_every_n_epoch = every_epochs
    trainer.fit(make_classifier(), datamodule=make_datamodule(pictures))
    rows = [row for row in read_history(tmp_path) if "train/loss" in row]
    assert ["val/top1_error" in row for row in rows] == [(epoch + 1) % every_epochs == 0 for epoch in range(4)]


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_ends(pictures: Path, tmp_path: Path, small: list[str]) -> None:
    """The bar's terminal is gone before the step ends: to print there would raise amid what is to be saved."""
    ours, terminal = pty.openpty()
    command = [sys.executable, "-m", "spp_cls", "train", *small, "trainer.max_epochs=1000", "hydra.run.dir=run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPP_CACHE": str(tmp_path / "cache")}

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        preexec_fn=own_terminal,
    )
    os.close(terminal)
    history = tmp_path / "run" / "history.jsonl"
    while process.poll() is None and not (history.is_file() and history.stat().st_size > 2000):
        if select.select([ours], [], [], 0.1)[0]:
            os.read(ours, 65536)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    ended = next(event for event in events if event["event"] == "ended")
    assert ended["by"] == "SIGHUP" and ended["saved"] == ended["step"] > 0
