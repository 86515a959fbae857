"""`spp train` from the command line to the run folder."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Spp, results_of
from omegaconf import OmegaConf

from spp_cls import train
from spp_cls.door import conf_folder, register_resolvers
from spp_cls.results import is_row, row_of, scores_path, wrong
from spp_cls.resume import read_history
from spp_cls.run import digest


def runs_in(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "folder-tiny").iterdir())


# What a run leaves behind


def test_the_run_folder_holds_what_the_house_says(trained: Path) -> None:
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "environment.json", "history.jsonl", "timing.jsonl", "results.json", "checkpoints/last.ckpt",
        "checkpoints/best.ckpt", "training.lock", "key", ".hydra/config.yaml", ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
    }  # fmt: skip


def test_the_config_is_whole_and_resolved(trained: Path, small: list[str], pictures: Path) -> None:
    text = (trained / "config.yaml").read_text()
    assert "${" not in text and "???" not in text
    config = OmegaConf.create(text)
    assert (config.name, config.seed, config.data.root) == ("folder-tiny", 0, str(pictures))
    assert (config.sizes.sizes, config.data.val_sizes) == ([26, 32], [32])
    kept = OmegaConf.load(trained / ".hydra" / "overrides.yaml")
    assert list(kept) == [word.replace("logger=null", "logger=none") for word in small]


def test_the_environment_says_how_it_came_about(trained: Path, small: list[str]) -> None:
    found = json.loads((trained / "environment.json").read_text())
    assert found["command"] == ["spp", "train", *small]
    assert found["config_hash"] == digest((trained / "config.yaml").read_text())
    assert len(found["index_hash"]) == 64
    assert found["versions"]["lightning"] and "commit" in found and "diff" in found


def test_history_and_timing_and_results_say_the_same(trained: Path) -> None:
    rows = read_history(trained)
    steps, epochs = [row for row in rows if "size" in row], [row for row in rows if "size" not in row]
    assert [(row["epoch"], row["step"], row["size"]) for row in steps] == [
        *((0, step, 26) for step in range(1, 5)),
        *((1, step, 32) for step in range(5, 9)),
    ]
    assert [row["epoch"] for row in epochs] == [0, 1]
    found = results_of(trained)
    assert found["epochs"] == 2
    for name in ("train/loss", "train/top1_error", "val/top1_error", "val/loss"):
        assert found[name] == epochs[-1][name]
    assert {"test/top1_error", "test/top5_error", "test/loss"} < set(found)
    timing = [json.loads(line) for line in (trained / "timing.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["images"]) for row in timing] == [(0, 32), (1, 32)]


def test_checkpoints_load_alone_and_say_what_they_are(trained: Path) -> None:
    for name in ("last", "best"):
        state = torch.load(trained / "checkpoints" / f"{name}.ckpt", weights_only=True)
        identity = state["spp_cls"]["identity"]
        assert identity["classes"] == ["a", "b", "c"]
        assert (identity["region"], identity["resize"], identity["val_sizes"]) == (32, 36, [32])
        assert identity["config"]["model"]["width"] == 0.25
        assert state["state_dict"]["net.head.fc7.weight"].shape[0] == 3


def returned(spp: Spp, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[float | None, Any]:
    """What the door gives to a sweeper, and the answer."""
    values: list[float | None] = []
    run = train.run
    with monkeypatch.context() as patch:
        patch.setattr(train, "run", lambda config: values.append(run(config)) or values[-1])
        answer = spp("train", *words)
    return (values or [None])[0], answer


def test_the_door_returns_the_optimized_metric(
    spp: Spp, tmp_path: Path, small: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, answer = returned(spp, monkeypatch, *small, "optimized_metric=test/loss")
    assert answer.code == 0, answer.err
    assert value == results_of(trained)["test/loss"]  # the same seed, the same bits
    (run,) = runs_in(tmp_path)
    assert (run / "history.jsonl").read_bytes() == (trained / "history.jsonl").read_bytes()
    assert results_of(run) == results_of(trained)

    value, answer = returned(spp, monkeypatch, *small, "trainer.max_epochs=1", "test=false", "optimized_metric=eror")
    assert answer.code == 2
    assert "optimized_metric=eror: a run has no such metric; use one of val/loss, val/top1_error, " in answer.err
    assert len(runs_in(tmp_path)) == 1  # before anything was written
    answer = spp("train", *small, "test=false", "optimized_metric=test/loss")
    assert answer.err.splitlines()[-1] == "spp train: optimized_metric=test/loss: with test=false there is none"


def test_what_it_says_at_the_end(spp: Spp, tmp_path: Path, small: list[str]) -> None:
    answer = spp("train", *small, "trainer.max_epochs=1", "logger=tensorboard", "views=ten_crop")
    assert answer.code == 0, answer.err
    (run,) = runs_in(tmp_path)
    error = results_of(run)["test/top1_error"]
    assert f"test error (ten_crop): top-1 {error:.2f} %" in answer.out
    assert f"spp predict run={run} PICTURE…" in answer.out
    assert list((run / "tensorboard").glob("events*"))
    assert "54 pictures of 3 classes (36 train, 9 val, 9 test)" in answer.err


# Habits


@pytest.mark.parametrize(
    ("words", "steps", "kept"),
    [
        (["debug=fdr"], 1, False),
        (["debug=overfit", "trainer.max_epochs=2"], 6, True),
        (["debug=limit", "trainer.limit_train_batches=3"], 6, True),
        (["debug=profiler"], 8, True),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_debug(spp: Spp, tmp_path: Path, small: list[str], words: list[str], steps: int, kept: bool) -> None:
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("lightning.pytorch.profilers").addHandler(handler)
    answer = spp("train", *(word for word in small if "max_epochs" not in word), *words)
    logging.getLogger("lightning.pytorch.profilers").removeHandler(handler)
    assert answer.code == 0, answer.err
    (run,) = runs_in(tmp_path)
    rows = [row for row in read_history(run) if "size" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert (run / "checkpoints" / "last.ckpt").exists() == kept
    assert ("run_training_epoch" in heard.getvalue()) == (words == ["debug=profiler"])


@pytest.mark.slow
def test_a_grid_has_a_folder_for_each(spp: Spp, tmp_path: Path, small: list[str]) -> None:
    words = [*small, "debug=fdr", "test=false", "model.levels=[1],[2,1]", "-m"]
    answer = spp("train", *words)  # each in a process of its own
    assert answer.code == 0, answer.err
    (grid,) = (tmp_path / "multiruns" / "folder-tiny").iterdir()
    found = [OmegaConf.load(grid / str(i) / "config.yaml") for i in range(2)]
    assert [list(config.model.levels) for config in found] == [[1], [2, 1]]
    date = r"\d{4}(-\d\d){2}_\d\d(-\d\d){2}"
    assert re.fullmatch(rf"{date}_[0-9a-f]{{8}}", grid.name)
    keys = [(grid / str(i) / "key").read_text().strip() for i in range(2)]
    assert [results_of(grid / str(i))["key"] for i in range(2)] == keys and len(set(keys)) == 2
    assert spp("train", *words).err.count("(was done)") == 2


def test_two_starts_in_one_second_have_folders_of_their_own() -> None:
    register_resolvers()
    starts = [OmegaConf.create({"run": "${run_id:}", "sweep": "${run_id:}"}) for _ in range(10)]
    assert all(start.run == start.sweep for start in starts)
    assert len({start.run for start in starts}) > 5
    hydra = OmegaConf.to_container(OmegaConf.load(conf_folder() / "train.yaml").hydra)
    assert hydra["run"]["dir"].endswith("_${run_id:}") and hydra["sweep"]["dir"].endswith("_${run_id:}")


def test_the_papers_recipe_trains_biases_at_twice_the_rate(spp: Spp, tmp_path: Path, small: list[str]) -> None:
    answer = spp("train", *small, "recipe=paper", "test=false")
    assert answer.code == 0, answer.err
    (run,) = runs_in(tmp_path)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    weights, biases = state["optimizer_states"][0]["param_groups"]
    assert (weights["lr"], biases["lr"]) == (0.01, 0.02)
    assert weights["momentum"] == 0.9 and weights["weight_decay"] == 5e-4
    assert state["spp_cls"]["identity"]["std"] == [1, 1, 1]


def test_balanced_classes_and_the_mean_of_the_weights(spp: Spp, tmp_path: Path, small: list[str]) -> None:
    words = ["classifier.class_weights=balanced", "callbacks=[ema,early_stopping]", "callbacks.ema.decay=0.5"]
    answer = spp("train", *small, *words)
    assert answer.code == 0, answer.err
    (run,) = runs_in(tmp_path)
    assert spp("evaluate", f"run={run}", "trainer=cpu").code == 0
    found = json.loads((run / "evaluations" / "test_center_crop_32" / "results.json").read_text())
    assert found["top1_error"] == pytest.approx(results_of(run)["test/top1_error"])


@pytest.mark.slow
def test_weights_and_biases_without_a_key_goes_offline(
    spp: Spp, tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    answer = spp("train", *small, "trainer.max_epochs=1", "test=false", "logger=[wandb,csv]", "tags=[a,b]")
    assert answer.code == 0, answer.err
    (run,) = runs_in(tmp_path)
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert "train/loss" in (run / "csv" / "metrics.csv").read_text().splitlines()[0]


# Several tests


def test_several_tests_are_kept_image_by_image_with_their_scores(
    spp: Spp, tmp_path: Path, small: list[str], trained: Path
) -> None:
    words = [*small, "tests=[ten_crop,center_crop@28,center_crop,train/center_crop]", "keep_scores=true"]
    answer = spp("train", *words)
    assert answer.code == 0, answer.err
    (run,) = runs_in(tmp_path)
    row = row_of(run)
    assert row is not None and is_row(row)
    assert (row["key"], row["epochs"]) == ((trained / "key").read_text().strip(), 2)
    assert [(test["test"], test["images"]) for test in row["tests"]] == [
        *(("center_crop@32", 9), ("ten_crop@32", 9), ("center_crop@28", 9), ("train/center_crop@32", 36)),
    ]
    assert results_of(run)["test/top1_error"] == results_of(trained)["test/top1_error"]  # further tests change nothing
    assert row["tests"][0]["top1_error"] == pytest.approx(results_of(run)["test/top1_error"])
    for test in row["tests"]:
        assert test["top1_error"] == pytest.approx(100 * wrong(test).mean())
        with np.load(scores_path(run / "scores", test["test"])) as kept:
            assert np.array_equal(kept["scores"].astype(np.float32).argmax(1) != kept["labels"], wrong(test))
    assert f"test error (ten_crop@32): top-1 {row['tests'][1]['top1_error']:.2f} %" in answer.out
    assert spp("evaluate", f"run={run}", "trainer=cpu", "views=ten_crop").code == 0
    alone = json.loads((run / "evaluations" / "test_ten_crop_32" / "results.json").read_text())
    assert alone["top1_error"] == pytest.approx(row["tests"][1]["top1_error"])


def test_a_run_is_tested_further_and_what_was_tested_stays(
    spp: Spp, tmp_path: Path, small: list[str], trained: Path
) -> None:
    run = tmp_path / "runs" / "run"
    shutil.copytree(trained, run)
    assert not (run / "scores").exists()

    def tests(*words: str) -> dict[str, str]:
        answer = spp("train", f"ckpt_path={run}", *words)
        assert answer.code == 0, answer.err
        row = row_of(run)
        assert row is not None and (run / "key").read_text() == (trained / "key").read_text()
        return {test["test"]: test["wrong"] for test in row["tests"]}

    first = tests("tests=[ten_crop]")
    second = tests("tests=[ten_crop,center_crop@28]", "keep_scores=true")
    assert set(first) == {"center_crop@32", "ten_crop@32"} and set(second) == {*first, "center_crop@28"}
    assert {name: second[name] for name in first} == first
    assert {path.stem for path in (run / "scores").iterdir()} == set(second)  # those that had been made, too
    other = spp("train", f"ckpt_path={run}", "trainer.max_epochs=3")
    assert other.code == 0, other.err
    assert (run / "key").read_text() == "\n" and row_of(run) is None  # it is no run of either setting


# Pictures that are not as they should be


@pytest.mark.parametrize("what", ["broken", "empty", "none", "one", "nowhere", "cut"])
def test_pictures_that_are_not_right_are_named_in_a_line(
    spp: Spp, tmp_path: Path, small: list[str], pictures: Path, what: str
) -> None:
    root = tmp_path / "pictures"
    if what != "nowhere":
        shutil.copytree(pictures / "train", root)
    named = root
    if what == "broken":
        named = root / "a" / "00.jpg"
        named.write_text("no picture")
    elif what == "cut":
        for named in root.rglob("*.jpg"):
            named.write_bytes(named.read_bytes()[:-200])
        named = root
    elif what == "empty":
        named = root / "d"
        named.mkdir()
    elif what in ("none", "one"):
        for path in root.rglob("*.jpg"):
            if what == "none" or path.parent.name != "a":
                path.unlink()
        for name in "bc":
            (root / name).rmdir()
    answer = spp("train", *small, f"data.root={root}")
    assert answer.code == 2
    line = answer.err.splitlines()[-1]
    assert line.startswith("spp train: ") and str(named) in line
    if what != "cut":  # that is only seen in training
        assert answer.err.count("\n") == 1
        assert not (tmp_path / "runs").exists()


WHOLE = pytest.param(["sizes=full_image", "sizes.multiple=8"], marks=pytest.mark.slow, id="whole")


@pytest.mark.parametrize("sizes", [pytest.param([], id="regions"), WHOLE])
def test_however_the_pictures_are_read_the_weights_and_the_history_are_the_same_bits(
    spp: Spp, tmp_path: Path, small: list[str], sizes: list[str]
) -> None:
    caches = f"data.cache_folder={tmp_path / 'caches'}"
    found = set()
    for name, words in (
        ("workers", ["data.num_workers=2"]),
        ("thread", ["data.num_workers=thread"]),
        ("cache", ["data.num_workers=null", "data.cache=raw", caches]),
    ):
        assert spp("train", *small, *sizes, *words, "test=false", f"name={name}").code == 0
        (run,) = (tmp_path / "runs" / name).iterdir()
        weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        bits = b"".join(value.numpy().tobytes() for value in weights.values())
        found.add((bits, (run / "history.jsonl").read_bytes()))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["trainer.limit_train_batches=3", "trainer.accumulate_grad_batches=2"],
            "trainer.limit_train_batches=3 ends inside an optimizer step: it counts micro-batches, 2 a step",
        ),
        (["tests=[foo]"], "tests: foo: views.crops='foo': use one of center_crop, ten_crop, full_image"),
        (["tests=[center_crop@0]"], "tests: center_crop@0: views.size=0: use a number of px"),
        (["tests=[center_crop@2]"], "center_crop@2: the net does not take images of 2 px"),
        (["data.val_sizes=[32,2]"], "data.val_sizes: the net does not take images of 2 px"),
        (["sizes.sizes=[2,32]"], "sizes: the net does not take images of 2 px"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: order and chance need float32; use 32-true"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(
    spp: Spp, tmp_path: Path, small: list[str], words: list[str], line: str
) -> None:
    answer = spp("train", *small, *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert line in answer.err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("data.batch_size=64", "data.batch_size=64 is more than the 36 training images"),
        ("sizes.sizes=[26,40]", "sizes gave 40 px for epoch 1, more than data.region=32"),
        ("data.resize=30", "data.region=32 is more than data.resize=30"),
        ("seed=-1", "seed=-1: use a whole number from 0 to 4294967295"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_written(
    spp: Spp, tmp_path: Path, small: list[str], word: str, line: str
) -> None:
    answer = spp("train", *small, word)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert line in answer.err
    assert list(tmp_path.iterdir()) == []
