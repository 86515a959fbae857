"""After any number of kills each dashboard, read as it reads itself, shows every line of the history once."""

from __future__ import annotations

import itertools
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

import numpy as np
import pytest
import torch
import wandb
import yaml
from conftest import Spp
from dashboards_read import (
    as_csv,
    as_tensorboard,
    as_wandb,
    offline_file,
    read_csv,
    read_tensorboard,
    read_tensorboard_end,
    read_wandb,
    read_wandb_run,
    shown,
    wandb_offline,
)
from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context as BackendContext
from torch import nn

from spp_cls import build, dashboards, schedules
from spp_cls.classifier import Classifier
from spp_cls.data import MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.door import compose, register_resolvers
from spp_cls.media import LastTest
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


CONFIG = {"model": {"width": 0.5, "levels": [2, 1]}, "seed": 3}


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
    identity = {"config": CONFIG}
    optimizer, schedule = partial(torch.optim.SGD, lr=0.1), partial(schedules.constant)
    classifier = Classifier(net, optimizer, schedule, val_sizes=(32,), identity=identity)
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
    assert yaml.safe_load((tmp_path / "csv" / "hparams.yaml").read_text()) == CONFIG
    run = read_wandb_run(offline_file(tmp_path))
    assert {key: value for key, value in run.config.items() if key != "_wandb"} == CONFIG
    errors = [row["val/top1_error"] for row in read_history(tmp_path) if "val/top1_error" in row]
    assert run.summary["val/top1_error"] == {"min": min(errors)} and len(errors) == 3


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


@pytest.mark.slow
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


def test_a_run_keeps_the_id_that_it_was_given_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def begin(name: str, chosen: str | None = None) -> str:
        own = dashboards.wandb_id(tmp_path / name, chosen)
        logger = WandbLogger(project="p", save_dir=tmp_path, id=own)
        dashboards.describe([logger], {}, tmp_path / name)
        dashboards.begin([logger], ROWS)
        dashboards.end([logger], tmp_path / name, ROWS, {"test/loss": 1.0}, {}, {})
        dashboards.close([logger])
        return own

    assert dashboards.wandb_id(tmp_path / "a") != dashboards.wandb_id(tmp_path / "a")  # until something is written
    made = begin("a")
    assert begin("a") == made != begin("b")
    assert begin("a", "mine") == begin("a") == "mine"
    assert not list(tmp_path.glob("wandb/*run*"))


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


# The end of a run, and what W&B and TensorBoard are told beside the rows


def wandb_words(small: list[str], *more: str) -> list[str]:
    kept = [word for word in small if not word.startswith("logger=")]
    return [*kept, "logger=[tensorboard,wandb]", "logger.wandb.media=6", "logger.wandb.artifacts=all", *more]


ERRORS = ["test/loss", "test/top1_error", "test/top5_error"]


@pytest.mark.slow
def test_the_end_of_a_run_stands_there_once_however_it_came_about(
    spp: Spp, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed amid its end, gone on with, tested anew, and written from its history: always the same."""
    real = dashboards._end_wandb
    monkeypatch.setenv("WANDB_RUN_GROUP", "campaign")
    monkeypatch.setenv("WANDB_NOTES", "none")
    with monkeypatch.context() as patch:
        patch.setattr(dashboards, "_end_wandb", lambda *_: 1 / 0)  # TensorBoard has been written
        words = ["experiment=table2c_multi_size", "tags=[x,y]", "tests=[ten_crop]", "hydra.run.dir=run"]
        assert spp("train", *wandb_words(small, *words)).code == 1
    assert dashboards._end_wandb is real
    monkeypatch.delenv("WANDB_RUN_GROUP")
    monkeypatch.setenv("WANDB_NOTES", "others")
    out, seen = tmp_path / "run", []
    for command in (
        ["train", "ckpt_path=run"],
        ["train", "ckpt_path=run"],
        ["log", "run", "logger=[tensorboard,wandb]"],
    ):
        answer = spp(*command)
        assert answer.code == 0, answer.err
        assert_shown(out, "tensorboard", "wandb")
        seen.append((read_wandb_run(offline_file(out)), read_tensorboard_end(out / "tensorboard")))
        assert len(list((out / "tensorboard").glob("*.end"))) == 1
        config = yaml.safe_load((out / "config.yaml").read_text())
        assert {k: v for k, v in seen[-1][0].config.items() if k != "_wandb"} == config
    first = seen[0]
    found = json.loads((out / "results.json").read_text())
    history = read_history(out)

    run, board = first
    assert run.place == {
        "run_id": (out / "wandb_id").read_text().strip(), "project": "spp_cls", "entity": "", "run_group": "campaign",
        "job_type": "train", "display_name": "table2c_multi_size-tiny-0", "notes": "none", "tags": ["x", "y"],
    }  # fmt: skip
    assert run.end == [
        *("test/confusion_matrix_table", "test/confusions", "test/loss", "test/per_class", "test/predictions"),
        *("test/ten_crop@32/top1_error", "test/ten_crop@32/top5_error", *ERRORS[1:], "train/first_batch"),
    ]
    for name in ERRORS:
        assert run.summary[name] == found[name]
    assert run.summary["test/ten_crop@32/top1_error"] == found["tests"][1]["top1_error"]
    for name in ("val/top1_error", "val/loss", "train/top1_error", "train/epoch_loss"):
        assert run.summary[name] == {"min": min(shown(row)[name] for row in history if name in shown(row))}
        assert run.metrics[name] == ("epoch", True)
    assert run.summary["train/loss"] == history[-2]["loss"] and "train/loss" not in run.metrics
    assert run.summary["test/predictions"]["nrows"] == min(6, 9)
    own, digest = run.place["run_id"], json.loads((out / "environment.json").read_text())["index_hash"]
    assert run.artifacts == [
        ("dataset", f"index-{digest[:12]}", ["latest"], True, True),
        ("model", f"checkpoint-{own}", ["best", "latest"], False, False),
        ("model", f"checkpoint-{own}", ["latest"], False, True),
        ("evaluation", f"evaluation-{own}", ["latest"], False, False),
    ]

    last = history[-1]["step"]
    assert {name: board.scalars[name] for name in ERRORS} == {
        name: [(last, pytest.approx(found[name]))] for name in ERRORS
    }
    assert set(board.images) == {"train/first_batch", "test/confusion_matrix", "test/mistakes"}
    assert [len(points) for points in board.images.values()] == [1, 1, 1]
    (_, height, width) = board.images["train/first_batch"][0]
    assert (height, width) == (3 * 26, 3 * 26)  # the first batch: 8 pictures of 26 px
    assert board.settings["experiment"] == "table2c_multi_size" and board.settings["model.width"] == 0.25

    for other, again in seen[1:]:
        assert (other.place, other.summary, other.end, other.metrics) == (run.place, run.summary, run.end, run.metrics)
        assert again == board
    assert seen[1][0].config == run.config and seen[2][0].artifacts == []  # which are asked for


def test_settings_of_several_runs_are_compared_by_tensorboard_itself(tmp_path: Path) -> None:
    config = {"model": {"width": 1.0}, "optimizer": {"lr": 0.1}, "data": {"root": "r"}, "trainer": {"devices": 1}}
    for i, typed in enumerate(({"model.width": "1.0"}, {"trainer.devices": "1", "model": "zf5"})):
        out = tmp_path / str(i)
        logger = TensorBoardLogger(out, name="", version="tensorboard")
        dashboards.begin([logger], ROWS)
        own = {**config, "optimizer": {"lr": 0.1 * (i + 1)}}
        dashboards.end([logger], out, ROWS, {"test/top1_error": 10.0 * i}, own, typed)
        logger.finalize("success")
    multiplexer = EventMultiplexer(tensor_size_guidance={"scalars": 0}).AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = BackendContext(TBContext(data_provider=provider))
    request = RequestContext()
    hparams = provider.list_tensors(request, experiment_id="", plugin_name="hparams")
    assert set(hparams) == {"0/tensorboard", "1/tensorboard"}
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), context.hparams_from_data_provider(request, "", 100)
    )
    assert {"optimizer.lr", "model.width", "data.root", "trainer.devices", "model"} == {
        info.name for info in experiment.hparam_infos
    }
    assert {info.name.tag for info in experiment.metric_infos} >= {"test/top1_error", "train/loss"}


def test_what_is_in_the_environment_wins_over_defaults_not_over_what_is_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    register_resolvers()

    def place(*words: str) -> dict[str, Any]:
        found = compose("train", ["logger=wandb", *words]).logger.wandb
        keys = ("project", "entity", "group", "job_type", "name", "notes", "id")
        return {**{key: found[key] for key in keys}, "tags": list(found.tags)}

    defaults = {
        **{"project": "spp_cls", "entity": None, "group": None, "job_type": "train", "name": "shapes-tiny-0"},
        **{"notes": None, "id": None, "tags": []},
    }
    assert place() == defaults
    assert place("name=mine", "seed=3", "tags=[a]") == {**defaults, "name": "mine-3", "tags": ["a"]}
    assert place("experiment=table2b_single_size", "model=zf5")["name"] == "table2b_single_size-zf5-0"
    assert place("experiment=table2b_single_size", "name=mine")["name"] == "mine-0"
    env = {"PROJECT": "P", "ENTITY": "E", "RUN_GROUP": "G", "JOB_TYPE": "J", "NAME": "N", "NOTES": "O", "RUN_ID": "I"}
    for name, value in {**env, "TAGS": "x, y"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    theirs = {
        **{"project": "P", "entity": "E", "group": "G", "job_type": "J", "name": "N", "notes": "O", "id": "I"},
        "tags": ["x", "y"],
    }
    assert place() == theirs
    typed = {key: f"my {key}" for key in theirs if key != "tags"}
    words = [f"logger.wandb.{key}='{value}'" for key, value in typed.items()]
    assert place(*words, "tags=[z]") == {**typed, "tags": ["z"]}
    assert place("logger.wandb.tags=[w]")["tags"] == ["w"]

    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "theirs"))
    for save_dir, expected in ((tmp_path, tmp_path / "theirs"), (tmp_path / "typed", tmp_path / "typed")):
        config = OmegaConf.create({"_target_": "lightning.pytorch.loggers.WandbLogger", "save_dir": str(save_dir)})
        assert build.build_logger(config, "wandb", tmp_path).save_dir == str(expected)


@pytest.mark.parametrize(
    ("kind", "key", "value", "use"),
    [
        ("Wandb", "media", -1, "a whole number of pictures, or 0 for none"),
        ("TensorBoard", "media", 1.5, "a whole number of pictures, or 0 for none"),
        ("Wandb", "artifacts", "none", "last, best, all or null"),
        ("Wandb", "watch", "weights", "gradients, all or null"),
        ("Wandb", "alert", "no", "true or false"),
    ],
)
def test_options_that_there_are_not(tmp_path: Path, kind: str, key: str, value: Any, use: str) -> None:
    target = f"lightning.pytorch.loggers.{kind}Logger"
    config = OmegaConf.create({"_target_": target, "save_dir": str(tmp_path), key: value})
    with pytest.raises(ValueError, match=rf"^logger\.mine\.{key}={value}: use {use}$"):
        build.build_logger(config, "mine", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_tells_whoever_waits_for_it(spp: Spp, tmp_path: Path, small: list[str]) -> None:
    words = ["logger=wandb" if word == "logger=null" else word for word in small]
    more = ["logger.wandb.alert=true", "logger.wandb.media=0", "hydra.run.dir=run"]
    answer = spp("train", *words, *more, "optimizer.lr=1e30", "trainer.gradient_clip_val=null", "test=false")
    assert answer.code == 2 and "the run diverged" in answer.err
    run = read_wandb_run(offline_file(tmp_path / "run"))
    assert run.alerts == [("ERROR", "folder-tiny-0 ended by an error")] and run.end == []
    assert not (tmp_path / "run" / "media").exists()


def test_confusions_are_named_most_often_first(tmp_path: Path) -> None:
    tested = LastTest(tmp_path, ["a", "b", "c"], [], [], np.array([[5, 1, 0], [0, 3, 4], [2, 0, 9]]))
    rows = [(row["label"], row["answer"], row["images"]) for row in dashboards._confusions(tested)]
    assert rows == [("b", "c", 4), ("c", "a", 2), ("a", "b", 1)]


@pytest.mark.slow
def test_three_runs_side_by_side_in_one_folder(tmp_path: Path, small: list[str]) -> None:
    words = ["logger=wandb" if word == "logger=null" else word for word in small]
    names = {"WANDB_DIR": str(tmp_path / "wandb_of_all"), "WANDB_RUN_GROUP": "seeds", "WANDB_PROJECT": "mine"}
    environment = {**os.environ, **names, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spp_cls", "train", *words]
    children = [
        subprocess.Popen([*command, f"seed={i}"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        for i in range(3)
    ]
    for child in children:
        _, said = child.communicate(timeout=250)
        assert child.returncode == 0, said.decode()[-2000:]
    found = [read_wandb_run(path) for path in (tmp_path / "wandb_of_all").glob("wandb/offline-run-*/*.wandb")]
    found.sort(key=lambda run: str(run.place["display_name"]))
    assert [run.place["display_name"] for run in found] == [f"folder-tiny-{seed}" for seed in range(3)]
    assert [run.config["seed"] for run in found] == [0, 1, 2]
    assert {(run.place["run_group"], run.place["project"]) for run in found} == {("seeds", "mine")}
    assert len({run.place["run_id"] for run in found}) == 3
    assert len({run.summary["test/loss"] for run in found}) == 3
    assert all(run.summary["test/predictions"]["nrows"] == 9 for run in found)


@pytest.mark.slow
def test_five_real_kills(tmp_path: Path, pictures: Path) -> None:
    """`spp train` in a child that is killed (SIGKILL) as soon as it has written so many rows, and gone on with."""
    words = [
        *("data=folder", f"data.root={pictures}", "data.region=32", "data.resize=36", "data.batch_size=8"),
        *("data.num_workers=0", "model.width=0.25", "trainer=cpu", "trainer.max_epochs=40"),
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
        while _lines(out) < wanted:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    _, said = (child := start("ckpt_path=run")).communicate(timeout=100)
    assert child.returncode == 0, said.decode()[-2000:]
    assert len(read_history(out)) == 40 * 5
    assert_shown(out)
    run, board = read_wandb_run(offline_file(out)), read_tensorboard_end(out / "tensorboard")
    assert run.end.count("test/per_class") == run.end.count("test/top1_error") == 1
    assert {name: len(points) for name, points in board.scalars.items()} == dict.fromkeys(ERRORS, 1)
    assert [len(points) for points in board.images.values()] == [1, 1, 1]
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def _lines(run: Path) -> int:
    history = run / "history.jsonl"
    return history.read_bytes().count(b"\n") if history.is_file() else 0


NINE = """
title: Three rows
about: Three rows of three seeds.
rows:
  a: {name: none, settings: [experiment=table2a_no_spp]}
  b: {name: one size, settings: [experiment=table2b_single_size]}
  c: {name: two sizes, settings: [experiment=table2c_multi_size]}
columns: {tiny: {name: tiny, settings: [model=tiny]}}
test: center_crop
"""


@pytest.mark.long
@pytest.mark.slow
def test_nine_runs_of_a_table_side_by_side_one_of_them_killed_five_times(tmp_path: Path, pictures: Path) -> None:
    """Each is read back by W&B's own reader: its place, config, summary, and every row of its history once."""
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "mine.yaml").write_text(NINE)
    words = [
        *("data=folder", f"data.root={pictures}", "data.region=64", "data.resize=72", "data.batch_size=8"),
        *("data.num_workers=0", "model.width=0.2", "trainer=cpu", "trainer.max_epochs=40", "logger=wandb"),
        *("tags=[nine]", "seeds=3", "at_once=9", "results=results"),
    ]

    def folder_of(run: str) -> Path:
        return next((tmp_path / "runs" / "mine").glob(f"{run}_*"), tmp_path)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "spp_cls", "table", "mine", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)

    for kill in range(5):
        table, wanted = start(), 20 * (kill + 1)
        until = time.monotonic() + 500
        while _lines(victim := folder_of("c_tiny_seed1")) < wanted:
            assert table.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        os.kill(json.loads((victim / "environment.json").read_text())["process"], signal.SIGKILL)
        table.terminate()  # its other runs save
        table.wait(timeout=200)
    assert start().wait(timeout=1000) == 0
    for row, seed in itertools.product("abc", range(3)):
        out = folder_of(f"{row}_tiny_seed{seed}")
        assert_shown(out, "wandb")
        run, results = read_wandb_run(offline_file(out)), json.loads((out / "results.json").read_text())
        assert (run.place["run_group"], run.place["tags"]) == ("mine", ["nine"])
        experiment = {"a": "table2a_no_spp", "b": "table2b_single_size", "c": "table2c_multi_size"}[row]
        assert (run.place["display_name"], run.place["job_type"]) == (f"{experiment}-tiny-{seed}", "train")
        assert run.config == yaml.safe_load((out / "config.yaml").read_text())
        assert run.summary["test/top1_error"] == pytest.approx(results["test/top1_error"])
        assert run.end.count("test/per_class") == 1
