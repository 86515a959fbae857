"""`spp runs`: states, differing settings and filters of run folders written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Spp
from fake_runs import config_with, history, write_lines, write_run
from filelock import FileLock

from spp_cls.records import (
    Condition,
    differing,
    find_runs,
    json_lines,
    known_name,
    parse_filter,
    read_config,
    read_record,
    read_sweep,
    short_names,
    sorted_by,
    text,
)
from spp_cls.run import in_training, note_event
from spp_cls.runs import table


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three finished runs in runs/, of three learning rates and errors."""
    rates = {0.001: 40.0, 0.01: 30.0, 0.1: 50.0}
    return [
        write_run(tmp_path / "runs" / f"2026-01-0{i}_12-00-00_{i}", config_with(optimizer__lr=rate), error)
        for i, (rate, error) in enumerate(rates.items(), start=1)
    ]


# Records


def test_a_finished_run(runs: list[Path]) -> None:
    record = read_record(runs[0])
    assert (record.state, record.why, record.epochs, record.of) == ("finished", "", 4, 4)
    assert record.metrics == {
        **{"val/top1_error": 40.0, "test/top1_error": 41.0},
        **{"center_crop@180/top1_error": 40.0, "center_crop@224/top1_error": 41.0},
    }
    assert (record.train_seconds, record.images_per_s, record.device) == (10.0, 66.0, "a processor")
    assert (record.started, record.key) == ("2026-01-01T12:00:00", "0123456789abcdef")
    assert record.config["optimizer.lr"] == 0.001 and record.value("optimizer.lr") == 0.001
    assert record.value("state") == "finished" and record.value("val/top1_error") == 40.0 and record.value("x") is None


def test_an_unfinished_run_has_the_latest_of_each_metric(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=False, epochs=3)
    rows = history(3, 5)
    del rows[-1]["val/top1_error"]  # no validation in the last epoch
    write_lines(folder / "history.jsonl", rows)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train/lo')  # torn by a kill
    record = read_record(folder)
    assert (record.state, record.why, record.epochs, record.of) == ("unfinished", "", 3, 4)
    assert record.metrics == {"train/loss": 2.0, "train/top1_error": 58.0, "val/loss": 1.0, "val/top1_error": 41.0}


def test_a_run_in_training_is_known_by_its_lock_whatever_else_is_there(runs: list[Path]) -> None:
    with in_training(runs[0]):
        assert read_record(runs[0]).state == "in training"
    assert read_record(runs[0]).state == "finished"


@pytest.mark.parametrize(
    ("event", "state", "why"),
    [
        ({"event": "ended", "by": "SIGTERM", "step": 7, "saved": 7}, "unfinished", "ended by=SIGTERM step=7"),
        ({"event": "diverged", "step": 3, "loss": "nan"}, "diverged", "diverged step=3"),
        ({"event": "a rank ended", "rank": 1}, "failed", "a rank ended rank=1"),
        ({"event": "resumed", "step": 3}, "unfinished", ""),
    ],
)
def test_states_by_the_last_event(tmp_path: Path, event: dict[str, Any], state: str, why: str) -> None:
    folder = write_run(tmp_path / "run", done=False)
    note_event(folder, "signal", name="SIGINT")
    note_event(folder, **event)
    assert (read_record(folder).state, read_record(folder).why) == (state, why)


def test_states_without_events(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", done=False)
    (folder / "checkpoints" / "last.ckpt").unlink()
    assert (read_record(folder).state, read_record(folder).why) == ("failed", "saved nothing")
    (folder / "output.txt").write_text(
        "12 %\rspp train\nspp train: the loss is nan at step 3: the run diverged; use …\n"
    )
    assert read_record(folder).state == "diverged"
    assert read_record(folder).why == "the loss is nan at step 3: the run diverged; use …"


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("a: [\n")
    (folder / "results.json").write_text("{")
    (folder / "environment.json").write_text("[1]")
    (folder / "history.jsonl").write_bytes(b"\xff/\n[/]\n{}\n")
    (folder / "timing.jsonl").write_text('{"train_seconds": "x"}\n')
    (folder / "key").write_bytes(b"\xea\xff\n")
    record = read_record(folder)
    assert (record.config, record.metrics, record.epochs, record.device) == ({}, {}, 0, "")


def test_a_config_read_group_by_group_is_what_yaml_reads(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for whole, meant in {
        "a: 1\nb:\n- 1\n- c: 2\nd: |\n  x\n  y\ne:\n  f: [1,\n    2]\n": {
            **{"a": 1, "b": [1, {"c": 2}], "d": "x\ny\n", "e": {"f": [1, 2]}}
        },
        "a: &x [1]\nb: *x\n": {"a": [1], "b": [1]},  # no group by itself
        "{a: 1,\nb: 2}": {"a": 1, "b": 2},
        "just words": {},
        "": {},
    }.items():
        (folder / "config.yaml").write_text(whole)
        assert read_config(folder) == meant, whole


def test_lines_that_hold_a_word_are_those_a_search_line_by_line_finds(tmp_path: Path) -> None:
    rows = history(3, 4)
    write_lines(tmp_path / "x", rows)
    assert json_lines(tmp_path / "x") == rows
    assert json_lines(tmp_path / "x", b"/") == [row for row in rows if "train/loss" in row]
    assert json_lines(tmp_path / "missing") == []


def test_run_folders_are_found_once_and_nothing_inside_them(tmp_path: Path) -> None:
    one = write_run(tmp_path / "runs" / "a")
    two = write_run(tmp_path / "runs" / "grid" / "0")
    for inside in (one / "wandb" / "files", tmp_path / "runs" / ".hidden"):
        inside.mkdir(parents=True)
        (inside / "config.yaml").touch()
    assert find_runs([tmp_path / "runs", one]) == [one, two]
    assert find_runs([two]) == [two]


# Differences


def test_settings_that_differ(tmp_path: Path) -> None:
    configs = [
        config_with(seed=0, model__seed=0, data__seed=0, name="a", optimizer__lr=0.1),
        config_with(seed=1, model__seed=1, data__seed=1, name="b", optimizer__lr=0.1, new=None),
        config_with(seed=2, model__seed=2, data__seed=2, name="c", sizes={"_target_": "x.single", "size": 224}),
    ]
    configs[2]["callbacks"]["best"]["dirpath"] = "/elsewhere"
    records = [read_record(write_run(tmp_path / str(i), config)) for i, config in enumerate(configs)]
    alternating = "spp_cls.data.sizes.alternating"
    found = differing(records)
    assert found == {
        "seed": [0, 1, 2],
        "sizes._target_": [alternating, alternating, "x.single"],
        "optimizer.lr": [0.1, 0.1, 0.001],
    }
    assert short_names(found) == {"seed": "seed", "sizes._target_": "sizes", "optimizer.lr": "lr"}
    assert differing(records[:1]) == {}
    assert short_names(["a.lr", "b.lr", "lr.x"]) == {"a.lr": "a.lr", "b.lr": "b.lr", "lr.x": "x"}


def test_a_target_goes_with_that_of_what_it_is_a_part_of(tmp_path: Path) -> None:
    nets = [
        {"_target_": net, "head": {"_target_": head, "dim": dim}} for net, head, dim in (("A", "f", 1), ("B", "c", 2))
    ]
    records = [read_record(write_run(tmp_path / str(i), config_with(model=net))) for i, net in enumerate(nets)]
    assert differing(records) == {"model._target_": ["A", "B"]}


def test_values_as_the_command_line_takes_them() -> None:
    assert [text(value) for value in (None, True, 1e-5, 0.30000000000000004, [6, [1.0, None]], "x")] == [
        *("null", "true", "1e-05", "0.3", "[6,[1,null]]", "x"),
    ]


# Filters


def test_the_parser_of_filters() -> None:
    assert parse_filter("val/top1_error<30 and  seed == 0 and model.levels=[6, 3] and run~a b") == [
        *(Condition("val/top1_error", "<", "30"), Condition("seed", "=", "0")),
        *(Condition("model.levels", "=", "[6, 3]"), Condition("run", "~", "a b")),
    ]
    assert [parse_filter(f"a{op}1")[0].operator for op in ("<", "<=", ">", ">=", "=", "!=", "~")] == [
        *("<", "<=", ">", ">=", "=", "!=", "~"),
    ]
    for wrong in ("", "a", "<3", "a<", "a<3 and", "a<b<c", "__import__('os')"):
        with pytest.raises(ValueError, match="is no condition"):
            parse_filter(wrong)


def test_which_conditions_hold(runs: list[Path]) -> None:
    record = read_record(runs[0])  # of learning rate 0.001 and error 40
    holding = [
        "val/top1_error<=40",
        "optimizer.lr<0.01",
        "optimizer.lr=1e-3",
        "seed!=1",
        "state=finished",
        "run~2026-01",
    ]
    holding += ["model.levels=[6, 3, 2, 1]", "started>2026-01-01", "started<2026-01-02", "missing=null"]
    failing = [
        "val/top1_error<40",
        "optimizer.lr>0.001",
        "seed=1",
        "missing=1",
        "missing!=1",
        "state~x",
        "model.name=TINY",
    ]
    assert [each for each in holding if not parse_filter(each)[0].holds(record)] == []
    assert [each for each in failing if parse_filter(each)[0].holds(record)] == []
    with pytest.raises(ValueError, match="filter=seed<x, seed=1: x, seed|x is no number"):
        parse_filter("seed<x")[0].holds(record)


def test_names_and_order(runs: list[Path]) -> None:
    records = [read_record(folder) for folder in runs]
    with pytest.raises(ValueError, match=r"^sort: no run has val/top1_eror; did you mean val/top1_error\?$"):
        known_name("val/top1_eror", records, "sort")
    with pytest.raises(ValueError, match=r"no run has lr; did you mean optimizer.lr\?"):
        known_name("lr", records, "sort")
    assert [each.config["optimizer.lr"] for each in sorted_by(records, "val/top1_error")] == [0.01, 0.001, 0.1]
    assert [each.config["optimizer.lr"] for each in sorted_by(records, "-val/top1_error")] == [0.1, 0.001, 0.01]


# Sweeps


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Of five trials: two finished, the second the better, one pruned, one failed, one begun."""
    folder = tmp_path / "sweeps" / "mine"
    for i, (rate, error) in enumerate({0.1: 40.0, 0.2: 30.0, 0.3: 60.0, 0.4: 10.0, 0.5: 50.0}.items()):
        write_run(folder / "trials" / f"0000{i}", config_with(optimizer__lr=rate), error, done=i < 2)
    (folder / "sweep.json").write_text(json.dumps({"trials": 6, "direction": "minimize"}))
    (folder / "trials.csv").write_text(
        "number,state,value,optimizer.lr,epochs,run,reason\n0,complete,40.0,0.1,4,,\n1,complete,30.0,0.2,4,,\n"
        "2,pruned,,0.3,4,,\n3,fail,,0.4,4,,no memory\n"
    )
    return folder


def test_a_sweep_has_the_settings_and_errors_of_its_best_trial_and_the_time_of_all(sweep: Path) -> None:
    record = read_sweep(sweep)
    assert (record.kind, record.state, record.why) == ("sweep", "unfinished", "1 pruned, 1 failed")
    assert (record.epochs, record.of, record.train_seconds, record.key) == (4, 6, 50.0, "")
    assert (record.config["optimizer.lr"], record.metrics["val/top1_error"]) == (0.2, 30.0)
    (sweep / "sweep.json").write_text(json.dumps({"trials": 4, "direction": "maximize"}))
    assert (read_sweep(sweep).state, read_sweep(sweep).config["optimizer.lr"]) == ("finished", 0.1)
    (sweep / "locks").mkdir()
    with FileLock(sweep / "locks" / "00004.lock"):
        assert read_sweep(sweep).state == "in training"


def test_a_trial_is_called_what_the_sweep_decided(sweep: Path) -> None:
    records = [read_record(sweep / "trials" / f"0000{i}") for i in range(5)]
    assert [each.state for each in records] == ["finished", "finished", "pruned", "failed", "unfinished"]
    assert records[3].why == "no memory"


@pytest.mark.parametrize("damaged", ["", "number\n1\n", "number,state,value\n0,complete,x\n", "\0\n"])
def test_a_damaged_table_of_a_sweep_is_left_out(sweep: Path, damaged: str) -> None:
    (sweep / "trials.csv").write_text(damaged)
    (sweep / "sweep.json").write_text("[")
    record = read_sweep(sweep)
    assert (record.state, record.of, record.metrics, record.train_seconds) == ("unfinished", None, {}, 50.0)


def test_a_sweep_is_one_line_and_its_own_folder_lists_the_trials(spp: Spp, sweep: Path, runs: list[Path]) -> None:
    lines = [json.loads(line) for line in spp("runs", "json=true").out.splitlines()]
    assert sorted((line["run"], line["kind"]) for line in lines) == [
        *((str(run.relative_to(sweep.parents[1])), "run") for run in runs),
        ("sweeps/mine", "sweep"),
    ]
    answer = spp("runs", "columns=[run,epochs]")
    assert "sweeps/mine                 4/6 trials" in answer.out and answer.err.startswith("4 of 4 runs and sweeps: ")
    assert len(spp("runs", "sweeps/mine", "json=true").out.splitlines()) == 5
    assert len(spp("runs", "sweeps/mine/trials/00001", "json=true").out.splitlines()) == 1


# The table


def test_the_table_fits_its_width_and_is_whole_without_one(runs: list[Path]) -> None:
    records = [read_record(folder) for folder in runs]
    columns = ["run", "state", "epochs", "metric", "differs", "train_seconds", "key"]
    whole = table(records, columns, "val/top1_error", None).splitlines()
    assert [line.split() for line in whole] == [
        ["run", "state", "epochs", "val/top1_error", "differs", "time", "key"],
        *(
            [str(runs[i]), "finished", "4/4", f"{error:.2f}", f"lr={rate}", "10", "s", "0123456789abcdef"]
            for i, (rate, error) in enumerate({0.001: 40, 0.01: 30, 0.1: 50}.items())
        ),
    ]
    least = 16 + 8 + 6 + 14 + 8 + 4 + 16 + 6 * 2  # a column of more than 16 letters gives way first
    for width in (30, least - 1, least, 100, 300):
        lines = table(records, columns, "val/top1_error", width).splitlines()
        assert max(map(len, lines[:4])) <= width, width
        assert ("no room for" in lines[-1]) == (width < least)
        assert lines[1].split()[0].endswith("_1") and (width == 300 or lines[1].startswith("…"))


def test_names_of_others_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a\n\x1b[31mred", config_with(model__name="\x1b]0;title\x07"))
    other = write_run(tmp_path / "b")
    shown = table([read_record(folder), read_record(other)], ["run", "differs"], "val/top1_error", None)
    assert shown.count("\n") == 3 and "\x1b" not in shown and "\x07" not in shown
    assert r"a\n\x1b[31mred" in shown and r"name=\x1b]0;title\x07" in shown


# The command


def test_the_command(spp: Spp, runs: list[Path]) -> None:
    answer = spp("runs")
    assert answer.code == 0 and answer.err == "3 of 3 runs: 3 finished\n"
    assert [line.split()[0] for line in answer.out.splitlines()[1:]] == [
        *(f"runs/2026-01-0{i}_12-00-00_{i}" for i in (3, 2, 1)),
    ]
    best = spp("runs", "runs", "sort=metric", "limit=1", "columns=[optimizer.lr,metric]")
    assert best.out.split() == ["optimizer.lr", "val/top1_error", "0.01", "30.00"]
    worst = spp("runs", "runs", "sort=-metric", "limit=1", "columns=[metric]")
    assert worst.out.split() == ["val/top1_error", "50.00"]
    some = spp("runs", "filter=val/top1_error<45", "filter=optimizer.lr<0.005 and seed=0", "json=true")
    (line,) = map(json.loads, some.out.splitlines())
    assert line["run"] == "runs/2026-01-01_12-00-00_1" and line["metrics"]["val/top1_error"] == 40.0
    assert len(spp("runs", "filter=metric<45").out.splitlines()) == 3
    none = spp("runs", "filter=seed=7")
    assert (none.code, none.out.count("\n"), none.err) == (0, 1, "0 of 3 runs\n")


def test_what_is_no_number_is_null_in_json(spp: Spp, runs: list[Path]) -> None:
    (runs[0] / "results.json").write_text('{"epochs": 4, "val/top1_error": NaN}')
    answer = spp("runs", runs[0], "json=true")
    assert json.loads(answer.out, parse_constant=pytest.fail)["metrics"] == {"val/top1_error": None}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "nowhere: there is no such folder; name a run folder"),
        (["empty"], "empty: there is no run in it"),
        (["metric=val/top1_err"], "metric=val/top1_err: no run has that metric; did you mean val/top1_error?"),
        (["filter=val/top1_eror<3"], "filter=val/top1_eror<3: no run has val/top1_eror; did you mean val/top1_error?"),
        (["filter=seed"], "filter=seed: 'seed' is no condition; write one like val/top1_error<30 or seed=0"),
        (["filter=seed<x"], "filter=seed<x: x is no number; several conditions are joined by and"),
        (["sort=sed"], "sort=sed: no run has sed; did you mean seed?"),
        (["columns=[run,sed]"], "columns=sed: no run has sed; did you mean seed?"),
        (["limit=0"], "limit=0: use a whole number of at least 1"),
        (["srot=x"], "srot: there is no such key; did you mean sort?"),
    ],
)
def test_mistakes_are_one_line(spp: Spp, runs: list[Path], tmp_path: Path, words: list[str], line: str) -> None:
    (tmp_path / "empty").mkdir()
    answer = spp("runs", *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert answer.err.startswith(f"spp runs: {line}")


def test_no_runs_at_all(spp: Spp) -> None:
    assert spp("runs").err.startswith("spp runs: folders: no run below runs, multiruns, sweeps here")


def test_to_list_runs_loads_no_torch(runs: list[Path], tmp_path: Path) -> None:
    code = "import sys; from spp_cls.runs import main; main([]); print(*{'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 5 and done.stdout.splitlines()[-1] == ""


@pytest.mark.slow
def test_five_hundred_runs(spp: Spp, tmp_path: Path) -> None:
    for i in range(500):
        write_run(tmp_path / "runs" / f"{i:03}", config_with(seed=i, optimizer__lr=0.1 / (1 + i % 5)), float(i), 1, 1)
    answer = spp("runs", "sort=metric", "filter=optimizer.lr>=0.1", "limit=3", "json=true")
    assert [json.loads(line)["run"] for line in answer.out.splitlines()] == ["runs/000", "runs/005", "runs/010"]
    assert answer.err == ""
    piped = f"{sys.executable} -m spp_cls runs json=true | head -c 10"  # which has enough
    assert subprocess.run(piped, shell=True, cwd=tmp_path, capture_output=True).stderr == b""
