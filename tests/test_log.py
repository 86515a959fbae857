from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Spp
from dashboards_read import (
    as_csv,
    as_tensorboard,
    as_wandb,
    read_csv,
    read_tensorboard,
    read_tensorboard_end,
    read_wandb,
    wandb_offline,
)
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spp_cls import build
from spp_cls.resume import read_history

pytestmark = pytest.mark.usefixtures(wandb_offline.__name__)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> list[Path]:
    """Two finished runs without a dashboard; the second has a history of its own, half a line more, and no results."""
    folders = [tmp_path / "runs" / name for name in ("a", "b=c")]
    for folder in folders:
        shutil.copytree(trained, folder)
    rows = [{**row, "lr": 0.5} if "lr" in row else row for row in read_history(trained)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folders[1] / "history.jsonl").write_text(lines + '{"epoch": 2, "st')
    (folders[1] / "results.json").unlink()
    return folders


def test_every_dashboard_of_several_runs_twice(spp: Spp, runs: list[Path]) -> None:
    for _ in range(2):  # the second time over what is there
        answer = spp("log", *runs, "logger=[tensorboard,csv,wandb]")
        assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert len(lines) == 6
    for run, said in zip(runs, (lines[:3], lines[3:]), strict=True):
        history = read_history(run)
        assert read_tensorboard(run / "tensorboard") == as_tensorboard(history)
        assert len(list((run / "tensorboard").glob("events*"))) == 2  # the rows, and the end
        end = read_tensorboard_end(run / "tensorboard")
        results = json.loads((run / "results.json").read_text()) if (run / "results.json").exists() else {}
        expected = {name: [(8, pytest.approx(value))] for name, value in results.items() if name.startswith("test/")}
        assert end.scalars == expected and end.settings["seed"] == 0
        assert read_csv(run / "csv") == as_csv(history)
        assert read_wandb(run) == as_wandb(history)
        (sent,) = (run / "wandb").glob("offline-run-*")
        assert (sent / f"run-{(run / 'wandb_id').read_text().strip()}.wandb").is_file()
        looks = [f"tensorboard --logdir {run}/tensorboard", f"{run}/csv/metrics.csv", f"wandb sync {sent}"]
        names = ("tensorboard", "csv", "wandb")
        assert said == [
            f"{run}: 10 lines of its history to {name}; look: {look}" for name, look in zip(names, looks, strict=True)
        ]
    assert (runs[0] / "wandb_id").read_text() != (runs[1] / "wandb_id").read_text()
    notes = [line for line in answer.err.splitlines() if "has not ended" in line]
    assert notes == [f"{runs[1]}: has not ended; if it is in training now, do this again when it has"]


def test_the_config_stands_beside_it_as_hyperparameters(spp: Spp, runs: list[Path]) -> None:
    assert spp("log", f"run={runs[0]}", "logger=[tensorboard,csv]").code == 0
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    assert yaml.safe_load((runs[0] / "csv" / "hparams.yaml").read_text()) == config
    events = EventAccumulator(str(runs[0] / "tensorboard")).Reload()
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    assert b"optimizer.lr" in events.PluginTagToContent("hparams")["_hparams_/session_start_info"]


@pytest.mark.parametrize(
    ("spoil", "words", "line"),
    [
        ("", ["nowhere"], "run=nowhere does not exist; name a folder that spp train made"),
        ("history.jsonl", ["runs/a"], "runs/a/history.jsonl: no history there; name a run folder"),
        ("config.yaml", ["runs/a"], "run=runs/a holds no config.yaml, so it is no run folder"),
        ("", ["runs/empty", "runs/a"], "runs/empty/history.jsonl: no step is in it yet"),
        ("", ["runs/a", "logger=null"], "logger: nothing chosen; give one, like logger=tensorboard"),
        ("", [], "run has no value: give one, like run="),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    spp: Spp, runs: list[Path], spoil: str, words: list[str], line: str
) -> None:
    shutil.copytree(runs[0], runs[0].with_name("empty"))
    (runs[0].with_name("empty") / "history.jsonl").write_text('{"half')
    if spoil:
        (runs[0] / spoil).unlink()
    answer = spp("log", "runs/b=c", *words) if words else spp("log")
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1
    assert answer.err.startswith(f"spp log: {line}")
    assert not list(runs[0].parent.glob("*/tensorboard"))


def test_a_logger_is_as_the_run_had_it_but_where_the_command_line_says_else(
    spp: Spp, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DictConfig] = []

    def build_logger(config: DictConfig, name: str, folder: Path) -> Any:
        made.append(config.copy())
        made[-1].save_dir = config.save_dir  # as it is at this moment
        return DummyLogger()

    monkeypatch.setattr(build, "build_logger", build_logger)
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    had = {"_target_": "os.system", "project": "p", "entity": "e", "save_dir": "/gone", "settings": {"_target_": "x"}}
    config["logger"] = {"wandb": {**had, "name": "old", "log_model": True}, "csv": {"_target_": "os.system"}}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert spp("log", runs[0], "logger=wandb", "logger.wandb.log_model=false", "tags=[x]").code == 0
    (found,) = made
    assert found._target_ == "lightning.pytorch.loggers.WandbLogger" and "settings" not in found
    assert (found.project, found.entity, found.log_model) == ("p", "e", False)
    assert (found.name, list(found.tags), found.save_dir) == ("old", ["x"], str(runs[0]))
    assert spp("log", runs[0], "logger=wandb", "name=new").code == 0
    assert (made[-1].name, list(made[-1].tags)) == ("new-0", [])
    assert spp("log", runs[1], "logger=wandb").code == 0  # of a run that had no such logger
    assert made[-1].name == "folder-tiny-0"


def test_of_loggers_that_write_files_a_run_folder_does_not_say_where(
    spp: Spp, runs: list[Path], tmp_path: Path
) -> None:
    good = tmp_path / "good" / "tensorboard"
    good.mkdir(parents=True)
    (good / "events.out.tfevents.1").write_text("somebody's")
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    config["logger"] = {"tensorboard": {"name": str(good.parent), "version": "tensorboard"}}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config))
    assert spp("log", runs[0], "logger=tensorboard").code == 0
    assert [path.name for path in good.iterdir()] == ["events.out.tfevents.1"]
    assert list((runs[0] / "tensorboard").iterdir())
