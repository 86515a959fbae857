"""After any number of kills each dashboard, read as it reads itself, shows every line of the history once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from conftest import Spp
from dashboards_read import (
    as_csv,
    as_tensorboard,
    as_wandb,
    read_csv,
    read_tensorboard,
    read_wandb,
    shown,
    wandb_offline,
)
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from torch import nn

from spp_cls import dashboards, schedules
from spp_cls.classifier import Classifier
from spp_cls.data import MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.resume import LAST, AtomicCheckpointIO, History, ResumePoint, read_history

Row = dict[str, Any]


def loggers_of(out: Path, *names: str) -> list[Logger]:
    made: dict[str, Any] = {
        "tensorboard": lambda: TensorBoardLogger(out, name="", version="tensorboard"),
        "csv": lambda: CSVLogger(out, name="", version="csv", flush_logs_every_n_steps=3),
        "wandb": lambda: WandbLogger(project="p", save_dir=out, offline=True, id=dashboards.wandb_id(out)),
    }
    return [made[name]() for name in names or made]


def assert_shown(out: Path, *names: str) -> None:
    """Each dashboard shows the history of `out`, all of it, and nothing else."""
    history = read_history(out)
    if not names or "tensorboard" in names:
        assert read_tensorboard(out / "tensorboard") == as_tensorboard(history)
    if not names or "csv" in names:
        assert read_csv(out / "csv") == as_csv(history)
    if not names or "wandb" in names:
        assert read_wandb(out) == as_wandb(history)


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends a run after step `step`, at the hook `at`."""

    def __init__(self, step: int, at: str) -> None:
        def hook(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step:
                raise Killed

        setattr(self, at, hook)


def train(
    pictures: Path,
    out: Path,
    loggers: list[Logger],
    kill: Kill | None = None,
    checkpoint: Path | None = None,
    parts: tuple[int, ...] = (3,),
) -> None:
    """Three epochs of four steps, from `checkpoint` or `last.ckpt` on, in `parts` that end after so many epochs.

    The history is written at each third step.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 5, stride=8), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    classifier = Classifier(net, partial(torch.optim.SGD, lr=0.1), partial(schedules.constant), val_sizes=(32,))
    data = MultiSizeDataModule(
        str(pictures), folder, partial(alternating, sizes=[26, 32]), batch_size=8, region=32, resize=36, num_workers=0
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=parts[0],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=loggers,
        callbacks=[History(out, every=3), ResumePoint(out, every_minutes=60), *([kill] if kill else [])],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = checkpoint or out / LAST
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
        for part in parts[1:]:
            trainer.fit_loop.max_epochs = part
            trainer.fit(classifier, datamodule=data)
    except Killed:
        pass
    else:
        assert kill is None, "was not killed"
    finally:
        dashboards.close(loggers)


@pytest.fixture(scope="module")
def expected(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The history of a run that nobody kills."""
    out = tmp_path_factory.mktemp("whole")
    train(pictures, out, [])
    return (out / "history.jsonl").read_bytes()


pytestmark = [
    pytest.mark.usefixtures(wandb_offline.__name__),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*many workers"),
]


def test_five_kills_and_each_row_stands_once_in_each_dashboard(pictures: Path, tmp_path: Path, expected: bytes) -> None:
    kills = [
        Kill(3, "on_train_batch_start"),  # before anything is saved; three rows are written
        Kill(7, "on_train_batch_start"),  # three past the checkpoint
        Kill(6, "on_train_batch_start"),  # none is written past it
        Kill(8, "on_train_epoch_end"),  # the epoch's row is written, its checkpoint not saved
        Kill(11, "on_before_backward"),
    ]
    for kill in kills:
        train(pictures, tmp_path, loggers_of(tmp_path), kill)
    train(pictures, tmp_path, loggers_of(tmp_path))
    assert (tmp_path / "history.jsonl").read_bytes() == expected
    assert_shown(tmp_path)
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 6  # went on, was not written anew


def test_a_logger_that_was_not_there_from_the_beginning_shows_the_beginning(
    pictures: Path, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = partial(Kill, at="on_before_backward")
    train(pictures, tmp_path, loggers_of(tmp_path, "tensorboard"), kill(5))
    train(pictures, tmp_path, [], kill(9))  # from 4; this run's checkpoint, 8, is in no event file
    train(pictures, tmp_path, loggers_of(tmp_path), kill(11))
    train(pictures, tmp_path, loggers_of(tmp_path))
    assert (tmp_path / "history.jsonl").read_bytes() == expected
    assert_shown(tmp_path)


def test_a_kill_while_earlier_rows_are_written(
    pictures: Path, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at_once(*_: Any) -> None:
        raise Killed

    train(pictures, tmp_path, [], Kill(9, "on_before_backward"))
    with monkeypatch.context() as patch:
        real = dashboards._write_event
        patch.setattr(
            dashboards,
            "_write_event",
            lambda logger, values, step: real(logger, values, step) if step < 5 else killed_at_once(),
        )
        train(pictures, tmp_path, loggers_of(tmp_path, "tensorboard"), Kill(99, "on_before_backward"))
    assert max(step for _, step, _ in read_tensorboard(tmp_path / "tensorboard")) == 4
    train(pictures, tmp_path, loggers_of(tmp_path, "tensorboard"))
    assert_shown(tmp_path, "tensorboard")


def test_a_checkpoint_from_before_an_epochs_row_was_written(pictures: Path, tmp_path: Path, expected: bytes) -> None:
    class Best(Callback):
        """Saves where ModelCheckpoint does: after validation, when the epoch's row is still to come."""

        def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "best.ckpt")

    class KillAndBest(Best, Kill):
        pass

    loggers = partial(loggers_of, tmp_path, "tensorboard", "csv")
    train(pictures, tmp_path, loggers(), KillAndBest(11, "on_before_backward"))
    train(pictures, tmp_path, loggers(), None, tmp_path / "best.ckpt")
    assert_shown(tmp_path, "tensorboard", "csv")


def test_a_trainer_that_goes_on_by_itself(pictures: Path, tmp_path: Path, expected: bytes) -> None:
    train(pictures, tmp_path, loggers_of(tmp_path), parts=(1, 2, 3))
    assert (tmp_path / "history.jsonl").read_bytes() == expected
    assert_shown(tmp_path)


def test_what_was_saved_is_on_the_disk(pictures: Path, tmp_path: Path) -> None:
    """At the very moment of a save, not only when the process ends in good order."""

    class Look(Callback):
        def on_save_checkpoint(self, *_: Any) -> None:
            assert_shown(tmp_path, "tensorboard", "csv")
            looks.append(len(read_history(tmp_path)))

    looks: list[int] = []
    kill = Kill(12, "on_train_end")
    kill.on_save_checkpoint = Look().on_save_checkpoint  # type: ignore[method-assign]
    train(pictures, tmp_path, loggers_of(tmp_path, "tensorboard", "csv"), kill)
    assert looks == [5, 10, 15]


# The functions on loggers


def row(step: int, **values: float) -> Row:
    return {"epoch": step // 3, "step": step, **(values or {"size": 32, "lr": 0.1, "loss": 1 / step})}


ROWS = [row(1), row(2), row(2, **{"val/loss": 3.0}), row(3)]


class Recorder(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, Row]] = []

    def log_metrics(self, metrics: Row, step: int | None = None) -> None:  # type: ignore[override]
        self.rows.append((step, metrics))


def test_event_files_that_a_clock_ahead_has_named_are_read_first(tmp_path: Path) -> None:
    known: list[str] = []
    for turn in range(3):
        (logger,) = loggers_of(tmp_path, "tensorboard")
        known = dashboards.begin([logger], ROWS[:turn], known)
        dashboards.log([logger], ROWS[turn:], turn)
        logger.finalize("failed")
        (newest,) = (tmp_path / "tensorboard").glob("events.out.tfevents.1*")
        second = newest.name.split(".")[3]
        newest.rename(newest.with_name(newest.name.replace(second, f"9{second[1:]}")))
        known = [path.name for path in newest.parent.glob("events*")]
    assert len(known) == 3
    assert read_tensorboard(tmp_path / "tensorboard") == as_tensorboard(ROWS)


def test_other_loggers_get_each_row_as_it_comes_and_none_again() -> None:
    logger = Recorder()
    assert dashboards.begin([logger], ROWS[:2]) == []
    dashboards.log([logger], ROWS[2:], 2)
    assert logger.rows == [(2, {"epoch": 0, "val/loss": 3.0}), (3, shown(ROWS[3]))]


def test_what_a_server_of_weights_and_biases_has_is_not_sent_again(tmp_path: Path) -> None:
    sent: list[tuple[int, Row]] = []

    class Run:
        offline, starting_step, step = False, 3, 3  # it has rows 0, 1 and 2; the history was cut back to two

        def log(self, values: Row, step: int) -> None:
            sent.append((step, values))

    logger = WandbLogger(project="p", save_dir=tmp_path, experiment=Run(), prefix="a")  # type: ignore[arg-type]
    dashboards.begin([logger], ROWS[:2])
    dashboards.log([logger], ROWS[2:], 2)
    values = {f"a-{name}": value for name, value in shown(ROWS[3]).items()}
    assert sent == [(3, {**values, "trainer/global_step": 3})]


def test_the_command_line_goes_on_with_all_of_them(spp: Spp, tmp_path: Path, small: list[str]) -> None:
    words = [word.replace("logger=null", "logger=[tensorboard,csv,wandb]") for word in small]
    assert spp("train", *words, "trainer.max_epochs=1", "test=false").code == 0
    (run,) = (tmp_path / "runs" / "folder-tiny").iterdir()
    own = (run / "wandb_id").read_text()
    answer = spp("train", f"ckpt_path={run}", "trainer.max_epochs=2")
    assert answer.code == 0, answer.err
    assert (run / "wandb_id").read_text() == own and wandb.run is None
    assert len(read_history(run)) == 10
    assert_shown(run)


def test_a_run_keeps_the_id_that_it_was_given_first(tmp_path: Path) -> None:
    made = dashboards.wandb_id(tmp_path / "a")
    assert dashboards.wandb_id(tmp_path / "a") == made != dashboards.wandb_id(tmp_path / "b")
    assert dashboards.wandb_id(tmp_path / "a", "mine") == dashboards.wandb_id(tmp_path / "a") == "mine"


def test_offline_runs_of_other_ids_stay(tmp_path: Path) -> None:
    for name, own in (("20260101_000000-abc", "abc"), ("20260101_000000-abc-1", "abc"), ("1-x-abc", "x-abc")):
        (tmp_path / "wandb" / f"offline-run-{name}").mkdir(parents=True)
        (tmp_path / "wandb" / f"offline-run-{name}" / f"run-{own}.wandb").touch()
    logger = WandbLogger(project="p", save_dir=tmp_path, offline=True, id="abc")
    here = Path(logger.experiment.dir).parent.name
    dashboards.begin([logger], ROWS)
    dashboards.close([logger])
    assert {path.name for path in (tmp_path / "wandb").glob("offline-run-*")} == {here, "offline-run-1-x-abc"}


def test_a_history_whose_last_line_is_half_written(tmp_path: Path) -> None:
    lines = "".join(json.dumps(each) + "\n" for each in ROWS)
    for half in ("", "{", '{"epoch": 1, "st'):
        (tmp_path / "history.jsonl").write_text(lines + half)
        assert read_history(tmp_path) == ROWS
    (tmp_path / "history.jsonl").write_text("{")
    assert read_history(tmp_path) == []


@pytest.mark.slow
def test_five_real_kills(tmp_path: Path, pictures: Path) -> None:
    """`spp train` in a child that is killed (SIGKILL) as soon as it has written so many rows, and gone on with."""
    words = [
        *("data=folder", f"data.root={pictures}", "data.region=32", "data.resize=36", "data.batch_size=8"),
        *("data.num_workers=0", "model.width=0.25", "trainer=cpu", "trainer.max_epochs=40", "test=false"),
        *("logger=[tensorboard,wandb,csv]", "hydra.run.dir=run"),
    ]
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPP_CACHE": str(tmp_path / "cache")}

    def start(*more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "spp_cls", "train", *more]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)

    for wanted in (25, 55, 80, 115, 150):
        child = start(*words) if wanted == 25 else start("ckpt_path=run")
        deadline = time.monotonic() + 100
        while not (out / "history.jsonl").exists() or (out / "history.jsonl").read_bytes().count(b"\n") < wanted:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    _, said = (child := start("ckpt_path=run")).communicate(timeout=100)
    assert child.returncode == 0, said.decode()[-2000:]
    assert len(read_history(out)) == 40 * 5
    assert_shown(out)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
