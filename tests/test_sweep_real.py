"""`spp sweep` on runs of `spp train` themselves: killed at random instants; on two ranks."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dashboards_read import read_wandb_run
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

SPACE = """
space:
  optimizer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
  model.dropout: {low: 0.0, high: 0.7}
  model.levels: {choices: [[2, 1], [1]]}
trials: TRIALS
sampler: {_target_: optuna.samplers.SAMPLER, seed: 1}
pruner: null
metric: null
direction: minimize
"""
# A run's own record: each rank writes down what it trains with.
NOTE = """
import json
from pathlib import Path
from lightning import Callback

class Note(Callback):
    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        config = pl_module.identity["config"]
        dropout = [module.p for module in pl_module.net.modules() if type(module).__name__ == "Dropout"]
        shapes = [list(parameter.shape) for parameter in pl_module.net.parameters()]
        about = {"lr": config["optimizer"]["lr"], "levels": config["model"]["levels"]}
        about |= {"dropout": dropout, "shapes": shapes}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(about))
"""


def settings(pictures: Path) -> list[str]:
    return [
        *("data=folder", f"data.root={pictures}", "data.region=32", "data.resize=36", "data.batch_size=12"),
        *("data.num_workers=0", "model.width=0.2", "sizes=single", "trainer.max_epochs=1", "logger=null"),
    ]


def sweep(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "spp_cls", "sweep", "mine", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def write(folder: Path, trials: int, sampler: str) -> None:
    (folder / "conf" / "hparams_search").mkdir(parents=True)
    text = SPACE.replace("TRIALS", str(trials)).replace("SAMPLER", sampler)
    (folder / "conf" / "hparams_search" / "mine.yaml").write_text(text)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweeps" / "mine" / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
@pytest.mark.slow
def test_a_sweep_of_real_runs_killed_ten_times_has_the_table_of_one_that_was_not(
    pictures: Path, tmp_path: Path
) -> None:
    share = float(os.environ.get("SPP_PROVE_SHARE", "1"))
    tables = []
    for name, kills, trials in (("killed", 10, round(24 * max(0.25, share))), ("undisturbed", 0, 6)):
        folder = tmp_path / name
        write(folder, trials, "RandomSampler")
        words = [*settings(pictures), "trainer=cpu", "at_once=2"]
        chance = random.Random(0)
        database = folder / "sweeps" / "mine" / "study.db"
        for _ in range(kills):
            process = sweep(folder, *words)
            there = len(list(folder.glob("sweeps/mine/trials/*/config.yaml")))
            until = time.monotonic() + 90
            while time.monotonic() < until and process.poll() is None and not database.exists():
                time.sleep(0.05)
            grown = there + chance.randrange(3)
            while process.poll() is None and time.monotonic() < until:
                if len(list(folder.glob("sweeps/mine/trials/*/config.yaml"))) >= grown:
                    break
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 3))
            process.kill()
            process.wait()
        assert sweep(folder, *words).wait(timeout=1500) == 0
        found = rows(folder)
        assert [(row["number"], row["state"]) for row in found] == [(str(i), "complete") for i in range(trials)]
        results = [json.loads((folder / "sweeps" / "mine" / row["run"] / "results.json").read_text()) for row in found]
        assert [float(row["value"]) for row in found] == [one["val/top1_error"] for one in results]
        assert len({one["key"] for one in results}) == trials
        tables.append((folder / "sweeps" / "mine" / "trials.csv").read_bytes())
    assert tables[0].startswith(tables[1])  # a smaller budget is the beginning of a larger one


@pytest.mark.slow
def test_a_command_of_the_sweep_file_of_wandb_trains(pictures: Path, tmp_path: Path) -> None:
    write(tmp_path, 3, "RandomSampler")
    assert sweep(tmp_path, *settings(pictures), "trainer=cpu", "--wandb").wait(timeout=200) == 0
    found = yaml.safe_load((tmp_path / "sweeps" / "mine" / "wandb.yaml").read_text())
    drawn = {"optimizer.lr": {"value": 0.01}, "model.dropout": {"value": 0.3}, "model.levels": {"value": "[2,1]"}}
    words = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    assert found["command"][:3] == ["${env}", "spp", "train"] and found["command"][-1] == "${args_no_hyphens}"
    command = [sys.executable, "-m", "spp_cls", "train", *found["command"][3:-1], *words, "hydra.run.dir=run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["optimizer"]["lr"], config["model"]["levels"], config["model"]["dropout"]) == (0.01, [2, 1], 0.3)
    assert found["metric"]["name"] in read_wandb_run(next(tmp_path.glob("wandb/offline-run-*/*.wandb"))).summary


FAILING = """
space:
  model.width: {choices: [0.2, 100000]}
  optimizer.lr: {choices: [1.0e-3, 1.0e+30]}
sampler: {_target_: optuna.samplers.GridSampler, seed: 0}
pruner: null
"""


@pytest.mark.long
@pytest.mark.slow
def test_trials_that_have_no_memory_or_diverge_are_kept_with_their_reasons(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "hparams_search").mkdir(parents=True)
    (tmp_path / "conf" / "hparams_search" / "mine.yaml").write_text(FAILING)
    words = [word for word in settings(pictures) if not word.startswith("model.width")]
    assert sweep(tmp_path, *words, "trainer=cpu", "at_once=2").wait(timeout=600) == 0
    found = {(row["model.width"], row["optimizer.lr"]): row for row in rows(tmp_path)}
    assert {key: row["state"] for key, row in found.items()} == {
        ("0.2", "0.001"): "complete",
        ("0.2", "1e+30"): "fail",
        ("100000", "0.001"): "fail",
        ("100000", "1e+30"): "fail",
    }
    assert "diverged" in found["0.2", "1e+30"]["reason"]
    assert "memory" in found["100000", "0.001"]["reason"]


@pytest.mark.long
@pytest.mark.slow
def test_both_ranks_of_a_trial_have_the_settings_that_were_drawn(pictures: Path, tmp_path: Path) -> None:
    write(tmp_path, 3, "TPESampler")
    (tmp_path / "note_rank.py").write_text(NOTE)
    note = ["+callbacks.note._target_=note_rank.Note", "+callbacks.note.folder=${hydra:runtime.output_dir}"]
    words = [*settings(pictures), "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", *note]
    assert sweep(tmp_path, *words).wait(timeout=600) == 0
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["complete"] * 3
    for row in found:
        folder = tmp_path / "sweeps" / "mine" / row["run"]
        first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
        assert first == second
        assert first["lr"] == float(row["optimizer.lr"]) and str(first["levels"]) == row["model.levels"]
        assert set(first["dropout"]) == {float(row["model.dropout"])}
    assert len({row["optimizer.lr"] for row in found}) == 3
