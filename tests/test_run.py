"""The run folder: found by what people name, and never half written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spp_cls.run import (
    Run,
    digest,
    environment,
    find_checkpoint,
    in_training,
    newest_run,
    note_event,
    run_folder,
)
from spp_cls.whole import write_json


def make_run(folder: Path, *checkpoints: str) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    for name in checkpoints:
        (folder / "checkpoints" / f"{name}.ckpt").write_bytes(b"weights")
    return folder


def test_a_run_is_named_by_its_folder_or_a_checkpoint_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a" / "2026", "last")
    assert run_folder(run) == run_folder(str(run)) == run
    assert run_folder(run / "checkpoints" / "last.ckpt") == run
    with pytest.raises(ValueError, match=f"^run={tmp_path}/nope does not exist; name a folder that spp train made"):
        run_folder(tmp_path / "nope")
    with pytest.raises(ValueError, match=f"^ckpt_path={tmp_path} holds no config.yaml, so it is no run folder"):
        run_folder(tmp_path, "ckpt_path")
    with pytest.raises(ValueError, match="holds no config.yaml"):
        run_folder(tmp_path / "runs")  # above a run


def test_checkpoints_are_found_by_name_or_as_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "last")
    assert find_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    assert find_checkpoint(run / "checkpoints" / "last.ckpt", "best") == run / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="best.ckpt does not exist; the run has saved no 'best' checkpoint"):
        find_checkpoint(run, "best")


def test_the_newest_run_is_the_one_begun_last_whatever_its_name(tmp_path: Path) -> None:
    for name in ("zf5/2026-01-02_00-00-00_ffff", "tiny/2026-01-03_00-00-00_0000", "zf5/2026-01-01_00-00-00_0000"):
        make_run(tmp_path / name, "last")
    failed = tmp_path / "tiny" / "2026-01-04_00-00-00_0000" / ".hydra"
    failed.mkdir(parents=True)
    (failed / "config.yaml").touch()
    assert newest_run(tmp_path) == tmp_path / "tiny" / "2026-01-03_00-00-00_0000"
    of_a_table = make_run(tmp_path / "table2" / "a_zf5_seed0", "last")  # begun before, says its oldest file
    os.utime(of_a_table / "config.yaml", (0, 0))
    assert newest_run(tmp_path) == tmp_path / "tiny" / "2026-01-03_00-00-00_0000"
    os.utime(of_a_table / "config.yaml", (2e9, 2e9))
    assert newest_run(tmp_path) == of_a_table
    inside = of_a_table / "wandb" / "run-1" / "files"  # W&B's own
    inside.mkdir(parents=True)
    (inside / "config.yaml").touch()
    os.utime(inside / "config.yaml", (2.1e9, 2.1e9))
    assert newest_run(tmp_path) == of_a_table
    shutil.rmtree(of_a_table)
    make_run(tmp_path / "tiny" / "2026-01-05_00-00-00_0000")
    with pytest.raises(
        ValueError, match="the newest run, .*2026-01-05.*, has saved no checkpoint; name one, like .*01-03"
    ):
        newest_run(tmp_path)
    with pytest.raises(ValueError, match="no run there yet"):
        newest_run(failed.parent)
    with pytest.raises(ValueError, match="no run there yet"):
        newest_run(tmp_path / "nope")


def test_results_are_empty_until_there_are_some(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, tmp_path / "last.ckpt")
    assert run.results == {}
    write_json(tmp_path / "results.json", {"test/top1_error": 3.0})
    assert run.results == {"test/top1_error": 3.0}


def test_the_environment_says_what_a_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["spp", "train", "seed=1"])
    found = environment(["spp", "train", "seed=1"], "seed: 1\n", "abc")
    assert found["command"] == ["spp", "train", "seed=1"]
    assert found["folder"] == str(tmp_path)
    assert found["commit"] is None and found["diff"] is None  # no repository here
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert set(found["versions"]) >= {"spp_cls", "lightning", "hydra-core", "numpy", "pillow", "torchvision"}
    assert found["config_hash"] == digest("seed: 1\n") == hashlib.sha256(b"seed: 1\n").hexdigest()[:16]
    assert found["index_hash"] == "abc"
    assert found["threads"] == torch.get_num_threads()
    json.dumps(found)


def test_one_process_trains_a_run(tmp_path: Path) -> None:
    write_json(tmp_path / "environment.json", {"process": 7, "host": "a"})
    with in_training(tmp_path):
        code = f"""if True:
            from pathlib import Path
            from spp_cls import run

            run.PATIENCE = 0.1
            with run.in_training(Path({str(tmp_path)!r})):
                pass
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == (
            f"ValueError: {tmp_path} is in training already, by process 7 on a; wait for it, or stop it"
        )
    with in_training(tmp_path):
        pass


def test_an_event_after_one_that_a_kill_tore_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    note_event(tmp_path, "first")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "ha')
    note_event(tmp_path, "second", step=3)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["event"] == "second" and json.loads(lines[2])["step"] == 3
