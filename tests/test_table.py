"""`spp table`: which runs it starts, what it writes, and what it says to mistakes; runs are a stub's."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spp_train_stub
import torch
from conftest import Answer, Spp, call_spp
from omegaconf import OmegaConf

from spp_cls import jobs, render
from spp_cls.door import conf_folder
from spp_cls.results import read_rows
from spp_cls.table import _check

TABLE = """
title: Mine
about: A table of one's own.
rows:
  a: {name: no SPP, settings: [experiment=table2a_no_spp]}
  b: {name: SPP, settings: [experiment=table2b_single_size]}
columns:
  tiny: {name: tiny, settings: [model=tiny]}
test: ten_crop
compare: [[b, a]]
sizes: [28]
settings: [classifier.bias_lr=2.0]
"""
STUB = (sys.executable, "-S", str(Path(spp_train_stub.__file__)))


@pytest.fixture
def table(spp: Spp, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`spp table mine` with the small settings."""
    monkeypatch.setattr(jobs, "COMMAND", STUB)
    monkeypatch.setattr(jobs, "LOOK", 0.02)
    monkeypatch.setattr(render, "draw", lambda figure, path: path.touch())
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "mine.yaml").write_text(TABLE)
    return lambda *more: spp("table", "mine", *small, *more)


def begun(folder: Path, word: str = "begins") -> list[dict[str, str]]:
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line["words"] for line in lines if line["word"] == word]


def cells(folder: Path) -> list[list[str]]:
    with (folder / "tables" / "mine" / "top1_error.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.slow
def test_the_runs_of_a_table_and_what_is_written(table: Callable[..., Answer], tmp_path: Path) -> None:
    answer = table("seeds=2")
    assert answer.code == 0, answer.err
    runs = begun(tmp_path)
    # Each seed a whole table, so that what is stopped is a table of fewer seeds.
    assert [(run["experiment"], run["seed"]) for run in runs] == [
        *(("table2a_no_spp", "0"), ("table2b_single_size", "0")),
        *(("table2a_no_spp", "1"), ("table2b_single_size", "1")),
    ]
    assert {(run["model"], run["tests"]) for run in runs} == {("tiny", "[ten_crop,center_crop@28]")}
    assert "Mine: 4 runs, 0 done" in answer.err and answer.out.startswith("## Mine: top-1 error\n")
    assert answer.out.endswith("all of it: tables/mine/index.html\n")
    names = {path.name for path in (tmp_path / "tables" / "mine").iterdir()}
    drawn = {f"{name}.{form}" for name in ("errors", "sizes", "learning") for form in ("svg", "pdf")}
    assert {"table.md", "top1_error.csv", "top1_error.tex", "index.html", *drawn} <= names
    rows = read_rows([tmp_path / "results"])
    assert len(rows) == 4 and sorted(row["seed"] for row in rows.values()) == [0, 0, 1, 1]

    before = (tmp_path / "tables" / "mine" / "top1_error.csv").read_bytes()
    assert b"50" in before
    shutil.rmtree(tmp_path / "runs")  # the rows are enough
    answer = table("seeds=2")
    assert answer.code == 0 and "4 runs, 4 done" in answer.err and len(begun(tmp_path)) == 4
    assert (tmp_path / "tables" / "mine" / "top1_error.csv").read_bytes() == before
    # Rows of two machines are put together, whatever their files are called.
    lines = (tmp_path / "results" / "mine.jsonl").read_text().splitlines()
    (tmp_path / "results" / "mine.jsonl").unlink()
    for name, part in (("x", lines[:1]), ("y", lines[1:])):
        (tmp_path / "results" / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in part))
    answer = table("seeds=2", "run=false")
    assert answer.code == 0 and (tmp_path / "tables" / "mine" / "top1_error.csv").read_bytes() == before
    # A line that somebody has spoilt is named, and nothing is begun.
    (tmp_path / "results" / "y.jsonl").write_text("".join(f"{line}\n" for line in (lines[1], lines[2][:-9], lines[3])))
    answer = table("seeds=2")
    line = "spp table: results/y.jsonl, line 2: is no result row; remove the line\n"
    assert (answer.code, answer.err) == (2, line) and len(begun(tmp_path)) == 4


AVERAGED = """
title: Averaged
about: Two nets and their average.
settings: [keep_scores=true]
rows:
  a: {name: none, settings: [experiment=table2a_no_spp]}
  b: {name: one size, settings: [experiment=table2b_single_size]}
  both: {name: averaged, average: [a, b]}
columns: {tiny: {name: tiny, test: center_crop}}
test: center_crop
"""


@pytest.mark.slow
def test_an_average_goes_where_the_rows_go_and_shared_runs_count_once(
    table: Callable[..., Answer], tmp_path: Path
) -> None:
    path = tmp_path / "conf" / "table" / "mine.yaml"
    path.write_text(AVERAGED)
    answer = table("seeds=1", "rows=[a,b]")
    assert answer.code == 1 and "the scores of its tests were not kept" in answer.err  # the stub keeps none
    for folder in (tmp_path / "runs" / "mine").iterdir():
        (folder / "scores").mkdir()
        right = [[0.9, 0.1] if "a_tiny" in folder.name else [0.2, 0.8], [0.4, 0.6]]
        np.savez(folder / "scores" / "center_crop@32.npz", labels=np.array([0, 1]), scores=np.array(right))
    assert table("seeds=1").code == 0
    shutil.rmtree(tmp_path / "runs")
    answer = table("seeds=1")  # 0.55 against 0.45, and 0.6: both right
    assert answer.code == 0 and "2 runs, 2 done" in answer.err and cells(tmp_path)[3][:3] == ["averaged", "", "tiny"]
    text = (tmp_path / "tables" / "mine" / "table.md").read_text()
    assert "| averaged | 0.00 (n = 1) " in text and "- 2 runs; " in text
    shutil.rmtree(tmp_path / "results" / "scores")
    answer = table("seeds=1")
    assert (
        "averaged, tiny: not averaged for seeds 0: the scores of its nets are neither in results/scores nor"
        in answer.err
    )


@pytest.mark.slow
def test_the_command_that_is_noted_makes_the_table_again(table: Callable[..., Answer], tmp_path: Path) -> None:
    assert table("seeds=2", "rows=[b]", "margin=0.3", "at_once=2").code == 0
    noted = (tmp_path / "tables" / "mine" / "table.md").read_text().partition("- command: ")[2].partition("\n")[0]
    words = noted.replace("\\", "").split()
    assert words[:3] == ["spp", "table", "mine"] and words[-3:] == ["seeds=2", "rows=[b]", "margin=0.3"]
    before = (tmp_path / "tables" / "mine" / "top1_error.csv").read_bytes()
    assert call_spp(*words[1:], cwd=tmp_path).code == 0 and len(begun(tmp_path)) == 2
    assert (tmp_path / "tables" / "mine" / "top1_error.csv").read_bytes() == before


def test_a_table_that_is_no_yaml_is_named_with_its_line(table: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "conf" / "table" / "mine.yaml"
    path.write_text("title: x\nrows: {a: {settings: [model.levels=[1]]}}\n")
    answer = table()
    assert answer.code == 2 and "mine.yaml, line 2: is no YAML: " in answer.err and answer.err.count("\n") == 1


@pytest.mark.slow
def test_other_settings_are_other_runs(table: Callable[..., Answer], tmp_path: Path) -> None:
    assert table("seeds=1", "rows=[a]").code == 0
    assert table("seeds=1", "rows=[a]", "data.num_workers=1", "logger=csv", "output=elsewhere").code == 0
    assert len(begun(tmp_path)) == 1 and (tmp_path / "elsewhere" / "table.md").is_file()
    assert table("seeds=1", "rows=[a]", "trainer.max_epochs=3").code == 0
    assert [run["trainer.max_epochs"] for run in begun(tmp_path)] == ["2", "3"]


@pytest.mark.slow
def test_runs_that_fail_are_said_and_the_table_is_of_the_others(table: Callable[..., Answer], tmp_path: Path) -> None:
    before = spp_train_stub.__file__
    own = tmp_path / "stub.py"
    # It fails where the experiment is the second row's.
    failing = 'do = "fail" if "table2b" in str(words) else ""'
    text = Path(before).read_text().replace('do = words.get("do", "")', failing)
    own.write_text(text)
    jobs.COMMAND = (sys.executable, "-S", str(own))  # type: ignore[assignment]
    answer = table("seeds=1")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "1 of 2 runs failed; the same command goes on with them"
    assert "b, tiny, seed 0: failed: spp train: that cannot be (exit code 2; runs/mine/b_tiny_seed0_" in answer.err
    assert "not run yet" in (tmp_path / "tables" / "mine" / "table.md").read_text()
    assert [row["seed"] for row in read_rows([tmp_path / "results"]).values()] == [0]
    jobs.COMMAND = STUB
    answer = table("seeds=1")
    assert answer.code == 0 and "2 runs, 1 done" in answer.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["more"], "mine more: one table at a time; rows and columns of it are chosen by rows=[…] columns=[…]"),
        (["-m"], "-m: a table is a grid already; choose of it by rows=[…] columns=[…] seeds=…"),
        (["rows=[z]"], "rows=[z]: mine has a, b"),
        (["seeds=0"], "seeds=0: use a whole number of at least 1"),
        (["precision=1", "most=6", "rows=[a]"], "precision: there are no two of these rows that the table compares; "),
        (["model=zf5"], "model=zf5: the table sets model itself (tiny); choose by rows=[…] and columns=[…], or write"),
        (
            ["classifier.bias_lr=3"],
            "classifier.bias_lr=3: the table sets classifier.bias_lr itself (Mine); choose by rows",
        ),
        (["trainer.fast_dev_run=true"], "trainer.fast_dev_run=True: a table is of whole runs"),
        (["model.levels=[3]"], "model.levels=[3]: the table sets model.levels itself (no SPP); choose by"),
        (["seed=3"], "seed=3: the table sets seed of each run itself; the number of seeds is seeds=5"),
        (["trainer.max_epochs=-1"], "trainer.max_epochs=-1: a table compares runs of a number of epochs, at least 1"),
        (["data.root=/nope"], "/nope: does not exist; wanted is a folder of pictures"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1: use a number above 0, or null for no clip"),
        (["checkpoint.every_minutes=-3"], "checkpoint.every_minutes=-3: use a number, or null"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_begun(
    table: Callable[..., Answer], tmp_path: Path, words: list[str], line: str
) -> None:
    answer = table(*words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert answer.err.startswith(f"spp table: {line}")
    assert {path.name for path in tmp_path.iterdir()} == {"conf"}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rows": "b"}, "rows=b: takes a list of one or more, like rows=[b,c], or null for all"),
        ({"columns": []}, "columns=[]: takes a list of one or more, like columns=[zf5], or null for all"),
        ({"seeds": None}, "seeds=None: use a whole number of at least 1"),
        ({"seeds": True}, "seeds=True: use a whole number of at least 1"),
        ({"seeds": 2.5}, "seeds=2.5: use a whole number of at least 1"),
        (
            {"precision": 1},
            "precision and most go together: until known to ± precision, but with no more than most seeds",
        ),
        ({"most": 9}, "precision and most go together: until known to ± precision, but with no more than most seeds"),
        ({"precision": "x", "most": 9}, "precision=x: use percent points above 0, like 0.5"),
        ({"precision": 1, "most": 4}, "most=4: use a whole number of at least 5"),
        ({"precision": 1, "most": 1, "seeds": 1}, "most=1: use a whole number of at least 2"),
        (
            {"precision": 1, "most": 9, "seeds": 4},
            "seeds=4: with precision at least 5; intervals of fewer would cover less than they say",
        ),
        ({"margin": 0}, "margin=0: use percent points above 0, like 0.5"),
        ({"margin": None}, "margin=None: use percent points above 0, like 0.5"),
        ({"results": "log.txt"}, "results=log.txt: log.txt is a file; name another place"),
        ({"output": "log.txt/x"}, "output=log.txt/x: log.txt is a file; name another place"),
        ({"results": None}, "results=None: takes a folder, like results=mine"),
    ],
    ids=str,
)
def test_what_the_tables_own_settings_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.txt").touch()
    defaults: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "table.yaml"))
    own = {key: value for key, value in defaults.items() if key not in ("defaults", "hydra")}
    _check(OmegaConf.create(own))
    with pytest.raises(ValueError) as caught:
        _check(OmegaConf.create({**own, **settings}))
    assert str(caught.value) == line


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    own = {"seeds": 1, "most": None, "precision": None, "margin": 1, "rows": None, "columns": None, "run": True}
    with pytest.raises(ValueError, match="^results=x: . cannot be written; name another place$"):
        _check(OmegaConf.create({**own, "results": "x", "output": None}))


@pytest.mark.slow
def test_a_size_that_a_net_does_not_take_is_named_before_anything_is_begun(
    table: Callable[..., Answer], tmp_path: Path
) -> None:
    path = tmp_path / "conf" / "table" / "mine.yaml"
    path.write_text(TABLE.replace("sizes: [28]", "sizes: [28, 2]"))
    answer = table("seeds=1")
    *_, said = answer.err.splitlines()  # behind a line on the index, where this is the first to need it
    assert answer.code == 2 and said.startswith("spp table: center_crop@2: the net does not take images of 2 px")
    path.write_text(TABLE.replace("table2b_single_size", "table2a_no_spp"))
    assert table("data.val_sizes=[3]").err.startswith("spp table: data.val_sizes: the net does not take images of 3 px")
    answer = table("seeds=1")
    assert answer.err == (
        "spp table: b, tiny is the same run as a, tiny, tested the same way: what is typed here takes the place of "
        "what sets them apart\n"
    )
    assert not (tmp_path / "log.jsonl").exists()


def test_what_the_table_sets_is_no_setting_of_a_row_either(table: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "conf" / "table" / "mine.yaml"
    path.write_text(TABLE.replace("[experiment=table2a_no_spp]", "[experiment=table2a_no_spp, seed=4]"))
    line = "spp table: table: seed=4, of no SPP: the table sets seed of each run itself\n"
    assert table() == (2, "", line)


@pytest.mark.slow
def test_rows_may_be_called_by_numbers_and_old_files_go(table: Callable[..., Answer], tmp_path: Path) -> None:
    path, output = tmp_path / "conf" / "table" / "mine.yaml", tmp_path / "tables" / "mine"
    assert table("seeds=1").code == 0
    for own in ("notes.csv", "sizes_of_pictures.svg", "learning_rate.pdf"):
        (output / own).touch()
    assert {"sizes.svg", "test_sizes.csv"} < {path.name for path in output.iterdir()}
    text = TABLE.replace("  a:", "  1:").replace("  b:", "  2:").replace("[[b, a]]", "[[2, 1]]")
    path.write_text(text.replace("sizes: [28]\n", ""))
    answer = table("seeds=1", "rows=[2]", "run=false")
    assert answer.code == 0 and "SPP" in answer.out and "no SPP" not in answer.out
    left = {path.name for path in output.iterdir()}
    assert {"notes.csv", "sizes_of_pictures.svg", "learning_rate.pdf", "top1_error.csv"} < left and not {
        "sizes.svg",
        "test_sizes.csv",
    } & left


@pytest.mark.slow
def test_devices_matter_where_there_is_something_to_run(
    table: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert table("seeds=1").code == 0
    moved = ("trainer.accelerator=gpu", "trainer.devices=99")  # which the rows do not hold against each other
    answer = table("seeds=1", *moved, "run=false")
    assert answer.code == 0, answer.err
    answer = table("seeds=2", *moved)
    assert (answer.code, answer.err.splitlines()[-1]) == (
        2,
        "spp table: trainer.accelerator=gpu: no GPU is to be seen here; use trainer=cpu",
    )
    assert len(begun(tmp_path)) == 2


@pytest.mark.slow
def test_most_seeds_before_the_precision_is_said(table: Callable[..., Answer], tmp_path: Path) -> None:
    answer = table("seeds=5", "most=5", "precision=0.0001")
    assert answer.code == 0, answer.err
    assert "most=5: reached before every difference was known to ± 0.0001 points\n" in answer.err


def test_a_table_has_to_be_named(spp: Spp) -> None:
    answer = spp("table")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("spp table: name a table, like spp table table2; there are robustness_small32, study_")


@pytest.mark.slow
def test_equal_cost_gives_the_cheaper_rows_more_epochs(table: Callable[..., Answer], tmp_path: Path) -> None:
    path = tmp_path / "conf" / "table" / "mine.yaml"
    path.write_text(TABLE.replace("table2b_single_size", "table2c_multi_size").replace("2a_no_spp", "2b_single_size"))
    assert table("seeds=1", "trainer.max_epochs=40", "same_compute=true", "rows=[a,b]").code == 0
    # 26 and 32 px in turn cost 22.058 / 22.922 of 32 px throughout, of this net: 41.6 epochs, and the last at 32 px.
    assert [run["trainer.max_epochs"] for run in begun(tmp_path)] == ["40", "42"]
    assert (tmp_path / "tables" / "mine_same_compute" / "table.md").is_file()


# The real thing


def spp_table(folder: Path, small: list[str], *words: str) -> list[str]:
    return [sys.executable, "-m", "spp_cls", "table", "mine", *small, "seeds=2", *words]


@pytest.mark.long
@pytest.mark.slow
def test_a_table_that_is_killed_is_the_one_that_was_not(small: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        (folder / "conf" / "table").mkdir(parents=True)
        (folder / "conf" / "table" / "mine.yaml").write_text(TABLE)
    whole, killed = folders

    def run(folder: Path, *words: str) -> None:
        command = spp_table(folder, small, *words)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr

    run(whole, "at_once=2")
    # Killed once the first run has begun, once it has a checkpoint, and once two runs are done.
    for moment in ("key", "last.ckpt", "results.json"):
        process = subprocess.Popen(spp_table(killed, small), cwd=killed, env=environment, stderr=subprocess.DEVNULL)
        wanted = 2 if moment == "results.json" else 1
        until = time.monotonic() + 120
        while len(list(killed.glob(f"runs/mine/**/{moment}"))) < wanted:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(killed)
    for name in ("top1_error.csv", "top1_error.tex"):
        assert (killed / "tables" / "mine" / name).read_bytes() == (whole / "tables" / "mine" / name).read_bytes()
    assert len(cells(whole)) > 2

    # Two machines: each has the rows of one seed; together they are the table.
    (both := tmp_path / "both").mkdir()
    shutil.copytree(whole / "conf", both / "conf")
    for name, folder, seed in (("a", whole, 0), ("b", killed, 1)):
        rows = [row for row in read_rows([folder / "results"]).values() if row["seed"] == seed]
        assert len(rows) == 2
        (both / "results").mkdir(exist_ok=True)
        (both / "results" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run(both)
    assert not (both / "runs" / "mine").exists()
    csv_ = Path("tables", "mine", "top1_error.csv")
    assert (both / csv_).read_bytes() == (whole / csv_).read_bytes()


def test_nothing_of_a_table_is_imported_for_its_help(spp: Spp) -> None:
    answer: Any = spp("table", "--help")
    assert answer.code == 0 and "table=table2 " in answer.out and "same_compute: false" in answer.out
