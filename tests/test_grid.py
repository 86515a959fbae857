"""`spp train -m`: a grid through the ledger, on a stub in place of its runs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spp_train_stub
from conftest import Spp

from spp_cls import build, jobs
from spp_cls.door import register_resolvers
from spp_cls.grid import LedgerLauncher

STUB = (sys.executable, "-S", str(Path(spp_train_stub.__file__)))


@pytest.fixture(scope="module")
def keys(small: list[str]) -> dict[int, str]:
    register_resolvers()
    words = [word for word in small if word != "logger=null"]
    return {seed: build.job_of(build.composed([*words, f"seed={seed}"]), (), Path()).key for seed in range(3)}


@pytest.fixture
def grid(
    spp: Spp, small: list[str], keys: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`spp train -m` with the small settings; the stub finds a run's key by its seed."""
    monkeypatch.setattr(jobs, "COMMAND", STUB)
    monkeypatch.setattr(jobs, "LOOK", 0.02)
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    return lambda *more: spp("train", *small, *more, "-m")


def log(folder: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["word"], line["words"].get("seed", "")) for line in lines]


@pytest.mark.slow
def test_each_run_is_a_process_and_what_is_done_is_passed_over(grid: Callable[..., Any], tmp_path: Path) -> None:
    answer = grid("seed=0,1")
    assert (answer.code, answer.out) == (0, ""), answer.err
    first, second = answer.err.splitlines()[-2:]
    assert first.startswith("[1/2] #0 seed=0: center_crop@32 50.00 % in") and second.startswith("[2/2] #1 seed=1: ")
    (sweep,) = (tmp_path / "multiruns" / "folder-tiny").iterdir()
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
    answer = grid("seed=0,1,2")  # in a folder of its own, as grids are
    assert answer.code == 0 and answer.err.count("(was done)") == 2
    assert [seed for word, seed in log(tmp_path) if word == "begins"] == ["0", "1", "2"]


@pytest.mark.slow
def test_one_that_fails_is_said_with_its_reason_and_the_exit_code_is_1(
    grid: Callable[..., Any], tmp_path: Path
) -> None:
    keys = json.loads((tmp_path / "keys.json").read_text())
    (tmp_path / "keys.json").write_text(json.dumps({seed: key for seed, key in keys.items() if seed != "1"}))
    answer = grid("seed=0,1,2")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "1 of 3 runs failed; the same command goes on with them"
    assert "#1 seed=1: failed: KeyError: '1' (exit code 1; " in answer.err
    assert [seed for word, seed in log(tmp_path) if word == "ends"] == ["0", "2"]


def test_a_signal_ends_it_with_its_code_and_one_line(grid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any) -> Any:
        raise jobs.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(jobs, "run_jobs", stopped)
    assert grid("seed=0") == (143, "", f"{jobs.STOPPED}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=1,2", "data.root=/nope"], "/nope: does not exist; wanted is a folder of pictures"),
        (["seed=1,2", "hydra.launcher.at_once=0"], "at_once=0: use a whole number of at least 1"),
        (["seed=1,2", "trust=true", "resume=auto"], "resume=auto with -m: the runs of a grid go on by themselves"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_begun(
    grid: Callable[..., Any], tmp_path: Path, words: list[str], line: str
) -> None:
    answer = grid(*words)
    assert answer.code == 2
    assert answer.err.splitlines()[-1].startswith(f"spp train: {line}")
    assert "Traceback" not in answer.err and not (tmp_path / "log.jsonl").exists()


def test_several_devices_a_run_are_allowed(grid: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(jobs, "places", lambda *arguments: asked.append(arguments) or [{}])
    monkeypatch.setattr(jobs, "run_jobs", lambda several, *rest: [jobs.Outcome(job, row={}) for job in several])
    assert grid("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1,2").code == 0
    assert asked == [(None, 2, "cpu")]


def test_a_sweeper_is_given_the_optimized_metric_and_no_two_runs_lie_in_one_place(
    grid: Callable[..., Any], tmp_path: Path, keys: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    launch = LedgerLauncher.launch

    def listened(*arguments: Any, **more: Any) -> Any:
        given.extend(done.return_value for done in launch(*arguments, **more))
        return []

    monkeypatch.setattr(LedgerLauncher, "launch", listened)
    for seed in range(2):
        assert grid(f"seed={seed}", "hydra.sweep.dir=runs/mine").code == 0
    assert given == [50.0, 50.0]
    folders = sorted(path for path in (tmp_path / "runs" / "mine").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["0", f"0_{keys[1]}"]
    assert [json.loads((folder / "results.json").read_text())["seed"] for folder in folders] == [0, 1]
