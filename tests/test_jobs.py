"""The ledger on a stub of `spp train`: order, failures, what is passed over and gone on with, signals, kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spp_train_stub
import torch
from filelock import FileLock

from spp_cls import jobs
from spp_cls.jobs import Interrupted, Job, Outcome, folders_by_key, in_group, known_rows, places, run_jobs
from spp_cls.results import Row, add_row, row_of, save_scores

STUB = (sys.executable, "-S", str(Path(spp_train_stub.__file__)))
ONE: list[dict[str, str]] = [{}]


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "COMMAND", STUB)
    monkeypatch.setattr(jobs, "LOOK", 0.02)
    monkeypatch.setattr(jobs, "AGAIN", 0.05)


def job(key: str, *words: str, tests: tuple[str, ...] = ("center_crop@32",), scores: bool = False) -> Job:
    return Job((f"key={key}", *words), key, Path("runs", "t", key), tests, key, scores)


def log(word: str | None = None) -> list[dict[str, Any]]:
    path = Path("log.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if word in (None, line["word"])]


def begun(word: str = "begins") -> list[str]:
    return [line["words"]["key"] for line in log(word)]


def run(*several: Job, at: list[dict[str, str]] = ONE, rows: dict[str, Row] | None = None) -> list[Outcome]:
    told: list[Outcome] = []
    outcomes = run_jobs(several, at, {} if rows is None else rows, lambda outcome, left: told.append(outcome))
    assert sorted(map(id, told)) == sorted(map(id, outcomes))  # each is told once
    return outcomes


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


# Order and failures


def test_jobs_are_done_in_their_order_and_give_their_rows() -> None:
    outcomes = run(*(job(key, f"error={error}") for key, error in (("c", 10), ("a", 20), ("b", 30))))
    assert begun() == ["c", "a", "b"]
    assert [one.row["tests"][0]["top1_error"] for one in outcomes if one.row] == [10, 20, 30]
    assert [(one.was_done, one.reason) for one in outcomes] == [(False, "")] * 3
    assert [one.folder for one in outcomes] == [Path("runs/t/c"), Path("runs/t/a"), Path("runs/t/b")]


def test_as_many_run_at_once_as_there_are_places_and_each_in_its_own() -> None:
    at = [{"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": str(i)} for i in range(2)]
    run(*(job(key, "seconds=0.3") for key in "abcd"), at=at)
    lines = log()
    now = most = 0
    for line in lines:
        now += {"begins": 1, "ends": -1}[line["word"]]
        most = max(most, now)
    assert most == 2
    here = [line["environment"] for line in log("begins")]
    assert {one["OMP_NUM_THREADS"] for one in here} == {"7"}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in here[:2]} == {"0", "1"}


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("fail", "spp train: that cannot be (exit code 2; runs/t/b/output.txt)"),
        ("silent", "it said nothing (exit code 3; runs/t/b/output.txt)"),
        ("kill", "it said nothing (signal SIGKILL; runs/t/b/output.txt)"),
        ("other", "runs/t/b has become another run than the one that was asked for"),
    ],
)
def test_one_that_fails_says_why_and_the_others_go_on(do: str, reason: str) -> None:
    outcomes = run(job("a"), job("b", f"do={do}"), job("c"))
    assert [one.row is None for one in outcomes] == [False, True, False]
    assert outcomes[1].reason == reason


def test_of_several_of_one_key_the_first_is_run() -> None:
    outcomes = run(job("a"), job("a"), job("b", "do=silent"), job("b", "do=silent"), at=[{}, {}])
    assert sorted(begun()) == ["a", "b"]
    assert [one.was_done for one in outcomes] == [False, True, False, False]
    assert outcomes[2].reason == outcomes[3].reason != ""


def test_a_test_that_was_not_made_is_missed() -> None:
    (outcome,) = run(job("a", tests=("center_crop@32", "ten_crop@32")))
    assert outcome.reason == "runs/t/a: the tests ten_crop@32 were not made"


def test_the_progress_says_what_came_of_each_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    told = jobs.Progress(3)
    outcomes = run_jobs([job("a", "error=25"), job("b", "do=fail"), job("a")], ONE, {}, told)
    assert [one.row is None for one in outcomes] == [False, True, False]
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("[1/3] a: center_crop@32 25.00 % in 60 s; 2 left, about ")
    assert second.startswith("[2/3] b: failed: spp train: that cannot be (exit code 2; runs/t/b/output.txt); 1 left")
    assert third == "[3/3] a: center_crop@32 25.00 % (was done)"


# What is there already


def test_what_is_done_is_passed_over_whoever_did_it_and_wherever_it_lies() -> None:
    run(job("a"))
    Path("runs/by_hand").mkdir()
    Path("runs/t/a").rename("runs/by_hand/2026")
    (outcome,) = run(job("a"))
    assert (outcome.was_done, outcome.folder) == (True, Path("runs/by_hand/2026")) and begun() == ["a"]
    row = outcome.row
    assert row is not None
    shutil.rmtree("runs")
    add_row(Path("results/t.jsonl"), row)  # as if from another machine
    (outcome,) = run(job("a"), rows=known_rows())
    assert outcome.was_done and outcome.row == row and begun() == ["a"]


def test_known_rows_are_those_of_result_files_and_of_folders_test_by_test() -> None:
    run(job("a", "tests=[ten_crop]", "error=10"), job("b"))
    rows = known_rows()
    assert set(rows) == {"a", "b"}
    add_row(Path("results/t.jsonl"), {**rows["a"], "tests": [spp_train_stub.test("full_image@32", 40)]})
    add_row(Path("results/t.jsonl"), {**rows["a"], "key": "c"})
    found = known_rows()
    assert set(found) == {"a", "b", "c"}
    assert [test["test"] for test in found["a"]["tests"]] == ["center_crop@32", "ten_crop@32", "full_image@32"]
    assert known_rows([Path("nowhere")], [Path("nowhere")]) == {}


def test_one_that_lacks_a_test_is_gone_on_with_and_not_begun_again() -> None:
    run(job("a", "seed=0"))
    more = Job(("key=a", "tests=[ten_crop]", "views=x", "seed=0"), "a", Path("elsewhere"), ("ten_crop@32",), "a")
    Path("runs/t/a/checkpoints").mkdir()
    Path("runs/t/a/checkpoints/last.ckpt").touch()
    (outcome,) = run(more)
    assert outcome.row is not None and not outcome.was_done
    assert [test["test"] for test in outcome.row["tests"]] == ["center_crop@32", "ten_crop@32"]
    (line,) = log("goes on")
    assert line["words"]["ckpt_path"] == "'runs/t/a'"
    typed = Path("runs/t/a/words.json").read_text()
    assert "views" in typed and begun() == ["a"]


def test_a_run_is_told_the_tests_that_are_wanted_whatever_it_was_begun_with() -> None:
    run(job("a", "views=ten_crop", "test=false"))
    Path("runs/t/a/checkpoints").mkdir()
    Path("runs/t/a/checkpoints/last.ckpt").touch()
    search = "hydra.searchpath=['file:///mine']"
    (outcome,) = run(job("a", "seed=0", search, tests=("center_crop@32", "full_image@28"), scores=True))
    (line,) = log("goes on")
    wanted = {"test": "true", "tests": "[center_crop@32,full_image@28]", "keep_scores": "true"}
    assert {**line["words"], **wanted, "hydra.searchpath": "['file:///mine']"} == line["words"]
    assert "seed" not in line["words"] and outcome.row is None  # of which the stub keeps no scores


def test_a_run_that_was_done_by_this_ledger_is_here_to_be_tested() -> None:
    rows: dict[str, Row] = {}
    checkpoints = Path("runs/t/a/checkpoints")

    def told(outcome: Outcome, left: int) -> None:
        if outcome.row is not None:
            rows[outcome.job.key] = outcome.row
            checkpoints.mkdir(exist_ok=True)
            (checkpoints / "last.ckpt").touch()

    more = job("a", tests=("center_crop@32", "ten_crop@32"))
    outcomes = run_jobs([job("a"), more], ONE, rows, told)
    assert [one.reason for one in outcomes] == ["", ""]
    assert (begun(), begun("goes on")) == (["a"], ["a"])


def test_results_of_another_run_in_the_folder_are_not_its_own() -> None:
    run(job("a"))
    Path("runs/t/a/key").write_text("b\n")  # as if a run of other settings was begun there, and killed
    assert known_rows() == {}
    (outcome,) = run(job("b"))
    assert outcome.row is None and "has ended without the tests" in outcome.reason


def test_runs_are_no_ranks_of_who_started_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run(job("a"))
    (line,) = log("begins")
    assert line["of_ranks"] == ["SLURM_JOB_ID"]


def test_one_that_lacks_a_test_and_lies_elsewhere_is_not_trained_again() -> None:
    run(job("a"))
    rows = known_rows()
    shutil.rmtree("runs/t/a")
    (outcome,) = run(job("a", tests=("center_crop@32", "ten_crop@32")), rows=rows)
    assert outcome.reason == (
        "its result row has no ten_crop@32, and its run folder is not here to be tested: put that back below runs/, "
        "or, to train it again, remove the row of key a"
    )
    assert begun() == ["a"] and not Path("runs/t/a").exists()


def test_a_finished_run_without_a_checkpoint_is_not_removed() -> None:
    run(job("a"))
    before = sorted(path.read_bytes() for path in Path("runs/t/a").iterdir())
    (outcome,) = run(job("a", tests=("center_crop@32", "ten_crop@32")))
    assert outcome.reason == (
        "runs/t/a has ended without the tests ten_crop@32, and has no checkpoints/last.ckpt to test; put that back, or "
        "move the folder away to train again"
    )
    assert sorted(path.read_bytes() for path in Path("runs/t/a").iterdir()) == before


def test_scores_that_were_not_kept_are_made_up_for_where_the_run_lies_here() -> None:
    run(job("a"))
    rows = known_rows()
    Path("runs/t/a/checkpoints").mkdir()
    Path("runs/t/a/checkpoints/last.ckpt").touch()
    wanted = job("a", "keep_scores=true", scores=True)
    (outcome,) = run(wanted, rows=rows)
    assert begun("goes on") == ["a"] and outcome.reason == "runs/t/a: the scores of its tests were not kept"
    save_scores(Path("runs/t/a/scores"), "center_crop@32", torch.zeros(2).numpy(), torch.zeros(2, 2).numpy())
    (outcome,) = run(wanted, rows=rows)
    assert outcome.was_done
    shutil.rmtree("runs/t/a")
    (outcome,) = run(wanted, rows=rows)  # its row came from elsewhere
    assert outcome.was_done and begun() == ["a"]


def test_an_unfinished_one_that_has_saved_goes_on() -> None:
    Path("runs/old/checkpoints").mkdir(parents=True)
    Path("runs/old/checkpoints/last.ckpt").touch()
    Path("runs/old/key").write_text("a\n")
    Path("runs/old/words.json").write_text('{"key": "a"}')
    (outcome,) = run(job("a"))
    assert (begun("goes on"), begun(), outcome.folder) == (["a"], [], Path("runs/old"))


def test_what_an_unsaved_one_left_is_removed_where_the_ledger_began_it_and_nowhere_else() -> None:
    for folder in ("runs/t/a", "runs/by_hand"):
        Path(folder).mkdir(parents=True)
        Path(folder, "key").write_text("a\n")
        Path(folder, "config.yaml").touch()
        Path(folder, "leftover").touch()
    (outcome,) = run(job("a"))
    assert outcome.folder == Path("runs/t/a") and outcome.row is not None
    assert not Path("runs/t/a/leftover").exists() and Path("runs/by_hand/leftover").exists()


@pytest.mark.parametrize("key", ["b", "", None])
def test_no_other_run_is_written_over(key: str | None) -> None:
    Path("runs/t/a").mkdir(parents=True)
    Path("runs/t/a/config.yaml").touch()
    if key is not None:
        Path("runs/t/a/key").write_text(f"{key}\n")
    (outcome,) = run(job("a"))
    assert outcome.folder == Path("runs/t/a_a") and outcome.row is not None
    assert sorted(path.name for path in Path("runs/t/a").iterdir())[0] == "config.yaml"
    assert not Path("runs/t/a/results.json").exists()


def test_files_of_a_users_own_are_not_removed() -> None:
    Path("runs/t/a").mkdir(parents=True)
    Path("runs/t/a/thesis.tex").write_text("years of work")
    run(job("a"))
    assert Path("runs/t/a/thesis.tex").read_text() == "years of work"


def test_of_several_folders_of_a_key_the_finished_one_counts_then_the_saved_one_and_the_first_of_these() -> None:
    def folder(name: str, key: str = "a", *files: str) -> None:
        for file in ("key", *files):
            path = Path("runs", name, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{key}\n")

    folder("1")
    assert folders_by_key() == {"a": Path("runs/1")}
    folder("3", "a", "checkpoints/last.ckpt")
    folder("2", "a", "checkpoints/last.ckpt")
    assert folders_by_key() == {"a": Path("runs/2")}
    folder("5/deep", "a", "results.json")
    folder("4", "")  # went on otherwise than it began
    assert folders_by_key() == {"a": Path("runs/5/deep")}


# Others at the same time


@pytest.mark.parametrize("lock", ["runs/.jobs/a.lock", "runs/t/a/training.lock"])
def test_what_another_process_is_doing_is_waited_for(lock: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(job("a"))
    results = Path("runs/t/a/results.json")
    row, content = row_of(Path("runs/t/a")), results.read_text()
    results.unlink()
    held = FileLock(lock, thread_local=False)
    held.acquire()
    began = threading.Event()

    def other() -> None:
        wait_for(lambda: begun() == ["a", "b"])
        results.write_text(content)
        began.set()
        held.release()

    thread = threading.Thread(target=other)
    thread.start()
    first, second = run(job("a"), job("b"))
    thread.join()
    assert began.is_set() and first.was_done and first.row == row and second.row is not None
    assert begun() == ["a", "b"]
    assert capsys.readouterr().err == "a: another process is doing it; waiting\n"


LEDGER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_jobs import STUB, job, jobs, run_jobs
jobs.COMMAND, jobs.LOOK = STUB, 0.02
print("ready", flush=True)
words = sys.argv[3:]
try:
    run_jobs([job(key, *words) for key in sys.argv[2]], [{}, {}], {}, lambda outcome, left: None)
except jobs.Interrupted as stopped:
    sys.exit(128 + stopped.number)
"""


def ledger(keys: str, *words: str) -> subprocess.Popen[str]:
    """A ledger in a process of its own, two runs at once."""
    command = [sys.executable, "-c", LEDGER, str(Path(__file__).parent), keys, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a run that its ledger was killed")
def test_a_ledger_that_is_killed_takes_its_runs_along_and_the_next_goes_on() -> None:
    process = ledger("abc", "seconds=60")
    wait_for(lambda: len(log("begins")) == 2 and all(Path("runs/t", key, "key").is_file() for key in "ab"))
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    runs = [line["process"] for line in log("begins")]
    wait_for(lambda: not any(map(lives, runs)))
    assert sorted(begun("saved")) == ["a", "b"]
    outcomes = run(job("a"), job("b"), job("c"))
    assert all(one.row is not None for one in outcomes)
    assert (begun("goes on"), sorted(begun())) == (["a", "b"], ["a", "b", "c"])


# Signals


def interrupted(number: int, *several: Job, times: int = 1, at: list[dict[str, str]] = ONE) -> list[Outcome]:
    """What was told until a signal, sent when as many run as there are places, ended it."""
    told: list[Outcome] = []

    def send() -> None:
        wait_for(lambda: sum((Path("runs/t") / one.key / "key").is_file() for one in several) == len(at))
        for i in range(times):
            os.kill(os.getpid(), number)
            if i == 0 and times > 1:
                time.sleep(0.3)

    thread = threading.Thread(target=send)
    before = signal.getsignal(number)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        run_jobs(several, at, {}, lambda outcome, left: told.append(outcome))
    thread.join()
    assert caught.value.number == number and signal.getsignal(number) is before
    return told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_so_that_each_run_saves_and_the_next_ledger_goes_on(number: int) -> None:
    several = [job(key, "seconds=60") for key in "abc"]
    assert interrupted(number, *several, at=[{}, {}]) == []  # stopped is not failed
    assert (sorted(begun()), sorted(begun("saved"))) == (["a", "b"], ["a", "b"])
    outcomes = run(*(job(key) for key in "abc"))
    assert all(one.row is not None for one in outcomes) and sorted(begun("goes on")) == ["a", "b"]


def test_a_second_signal_kills_what_does_not_end() -> None:
    interrupted(signal.SIGTERM, job("a", "do=stubborn", "seconds=60"), times=2)
    assert begun() == ["a"] and log("saved") == log("ends") == []
    (run_,) = [line["process"] for line in log("begins")]
    assert not lives(run_)


def test_a_mistake_of_the_ledgers_own_leaves_no_run_behind() -> None:
    def told(outcome: Outcome, left: int) -> None:
        wait_for(Path("runs/t/b/key").is_file)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run_jobs([job("a"), job("b", "seconds=60")], [{}, {}], {}, told)
    assert begun("saved") == ["b"] and not any(lives(line["process"]) for line in log("begins"))


# Places


@pytest.mark.parametrize(
    ("gpus", "visible", "at_once", "devices", "expected"),
    [
        (0, None, None, 1, [None]),
        (0, None, 3, 1, [None] * 3),
        (1, None, None, 1, [None]),
        (4, None, None, 1, ["0", "1", "2", "3"]),
        (4, None, 2, 1, ["0", "1"]),
        (2, None, 4, 1, ["0", "1", "0", "1"]),
        (4, "4,5,6,7", None, 2, ["4,5", "6,7"]),
        (5, None, None, 2, ["0,1", "2,3"]),
        (4, None, None, "auto", [None]),
        (4, None, None, 4, [None]),
        (2, None, None, 4, [None]),
    ],
)
def test_each_process_has_a_gpu_of_its_own_or_as_many_as_it_asks_for(
    gpus: int,
    visible: str | None,
    at_once: int | None,
    devices: int | str,
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = places(at_once, devices, "auto")
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in found] == expected
    assert all("CUDA_VISIBLE_DEVICES" not in one for one in places(at_once, devices, "cpu"))


def test_processes_that_share_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert places(None, 1, "cpu") == [{}]
    assert places(3, 1, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    assert places(20, 1, "cpu")[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert places(3, 1, "cpu") == [{}] * 3


@pytest.mark.parametrize("at_once", [0, -1, 1.5, "two", True])
def test_a_number_of_runs_at_once_that_is_none(at_once: Any) -> None:
    with pytest.raises(ValueError, match=rf"^at_once={at_once}: use a whole number of at least 1$"):
        places(at_once, 1, "cpu")


def test_no_devices_are_none() -> None:
    with pytest.raises(ValueError, match=r"^trainer.devices=0: use a number of devices of at least 1, or auto$"):
        places(None, 0, "cpu")


def test_runs_of_a_grid_or_table_are_a_group_unless_the_user_has_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert in_group([{}, {"A": "1"}], "g") == [{"WANDB_RUN_GROUP": "g"}, {"WANDB_RUN_GROUP": "g", "A": "1"}]
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert in_group([{}], "g") == [{"WANDB_RUN_GROUP": "mine"}]
