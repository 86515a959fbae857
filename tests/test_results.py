"""Result rows: what a row keeps of a run, and files of rows that many write and kills tear."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spp_train_stub

from spp_cls.results import (
    add_row,
    errors,
    find_test,
    is_row,
    read_results,
    read_rows,
    result_of_test,
    row_of,
    save_scores,
    scores_path,
    together,
    wrong,
)


def test_errors_and_wrong_images_by_hand() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], np.float32)
    found = result_of_test("center_crop@32", np.array([0, 0, 1, 2, 2]), scores, 1.23451)
    assert wrong(found).tolist() == [False, True, False, False, True]
    assert (found["top1_error"], found["top5_error"]) == (pytest.approx(40), 0)
    assert (found["test"], found["images"], found["seconds"]) == ("center_crop@32", 5, 1.2345)


def test_errors_against_sorting(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, (400, 9)).astype(np.float32)  # with ties
    scores[generator.random((400, 9)) < 0.05] = np.nan
    labels = generator.integers(0, 9, 400)
    best = np.argsort(-scores, axis=1, kind="stable") == labels[:, None]
    best &= ~np.isnan(scores[np.arange(400), labels])[:, None]  # no number is no answer, wherever it is sorted to
    found = errors(labels, scores)
    assert found["top1_error"] == pytest.approx(100 * (1 - best[:, 0].mean()))
    assert found["top5_error"] == pytest.approx(100 * (1 - best[:, :5].any(1).mean()))


def test_of_equal_scores_the_first_class_is_the_answer_and_five_count() -> None:
    scores = np.zeros((2, 7), np.float32)
    found = result_of_test("x", np.array([4, 5]), scores, None)
    assert (found["top1_error"], found["top5_error"], found["seconds"]) == (100, 50, None)


@pytest.mark.parametrize("images", [1, 7, 8, 9, 1000])
def test_wrong_images_come_back_as_they_were(images: int) -> None:
    labels = np.random.default_rng(images).integers(0, 4, images)
    scores = np.random.default_rng(0).random((images, 4)).astype(np.float32)
    found = json.loads(json.dumps(result_of_test("x", labels, scores, None)))
    assert np.array_equal(wrong(found), scores.argmax(1) != labels)


def test_scores_are_kept_in_half_precision(tmp_path: Path) -> None:
    scores = np.array([[0.1, 0.9], [0.75, 0.25]], np.float32)
    save_scores(tmp_path / "scores", "train/center_crop@32", np.array([1, 0]), scores)
    assert scores_path(tmp_path / "scores", "train/center_crop@32").parent == tmp_path / "scores"
    with np.load(scores_path(tmp_path / "scores", "train/center_crop@32")) as kept:
        assert kept["labels"].tolist() == [1, 0] and kept["scores"].dtype == np.float16
        assert np.abs(kept["scores"].astype(np.float32) - scores).max() < 1e-3


# From a run folder


def run_folder(folder: Path, **results: Any) -> Path:
    """Of two epochs, at 26 and 32 px."""
    folder.mkdir(parents=True)
    about = {
        "index_hash": "i",
        "gpus": ["a GPU", "a GPU"],
        "processor": "p",
        "versions": {"spp_cls": "1", "torch": "2"},
    }
    (folder / "environment.json").write_text(json.dumps({**about, "spp_cls_commit": "c"}))
    rows = [
        {"epoch": 0, "step": 1, "size": 26, "loss": 2.0},
        {"epoch": 0, "step": 1, "train/loss": 1.23456, "train/top1_error": 60.0, "val/top1_error": 70.0},
        {"epoch": 1, "step": 2, "size": 32, "loss": 1.0},
        {"epoch": 1, "step": 2, "train/loss": 1.0, "train/top1_error": 50.0},
    ]
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    times = [(10.04, 90.0), (20.0, 110.0)]
    timing = [{"epoch": e, "train_seconds": s, "images_per_s": p} for e, (s, p) in enumerate(times)]
    (folder / "timing.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in timing))
    whole = {"key": "k", "seed": 3, "settings": ["seed=3"], "epochs": 2, "tests": [spp_train_stub.test("a@32", 25)]}
    (folder / "results.json").write_text(json.dumps({**whole, **results}))
    return folder


def test_the_row_of_a_run_by_hand(tmp_path: Path) -> None:
    row = row_of(run_folder(tmp_path / "run"))
    assert row is not None and is_row(row)
    assert row == {
        "key": "k",
        "settings": ["seed=3"],
        "seed": 3,
        "index": "i",
        "epochs": 2,
        "train_seconds": 30.0,  # 10.04 + 20.0, in tenths
        "images_per_s": 100.0,  # the median of two
        "device": "a GPU",
        "versions": {"spp_cls": "1", "torch": "2"},
        "commit": "c",
        "tests": [spp_train_stub.test("a@32", 25)],
        "curve": [[0, 26, 1.2346, 60.0, 70.0], [1, 32, 1.0, 50.0, None]],
    }


def test_an_epoch_of_several_sizes_has_none_and_the_device_is_the_one_that_was_used(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with (folder / "history.jsonl").open("a") as history:
        history.write('{"epoch": 1, "step": 3, "size": 26, "height": 26, "width": 40, "loss": 1.0}\n')
    about = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**about, "device": "p"}))
    row = row_of(folder)
    assert row is not None and [size for _, size, *_ in row["curve"]] == [26, None] and row["device"] == "p"


@pytest.mark.parametrize("key", ["", None])
def test_what_has_not_ended_or_has_no_key_is_no_row(tmp_path: Path, key: str | None) -> None:
    assert row_of(run_folder(tmp_path / "run", key=key)) is None
    (tmp_path / "run" / "results.json").unlink()
    assert row_of(tmp_path / "run") is None and read_results(tmp_path / "run") == {}
    assert row_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("environment.json", None),
        ("environment.json", "{}"),
        ("results.json", "[1, 2]"),
        ("results.json", '{"key": "k"}'),
        ("results.json", '{"key"'),
        ("timing.jsonl", '{"epoch": 0}\n'),
    ],
)
def test_a_damaged_folder_is_no_row_and_no_crash(tmp_path: Path, file: str, content: str | None) -> None:
    path = run_folder(tmp_path / "run") / file
    path.unlink() if content is None else path.write_text(content)
    assert row_of(tmp_path / "run") is None


def test_lines_that_a_kill_tore_are_left_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    before = row_of(folder)
    for name in ("history.jsonl", "timing.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"epoch": 2, "train_sec')
    assert row_of(folder) == before is not None


# Files of rows


def a_row(key: str = "k", *tests: str, error: float = 25, **more: Any) -> dict[str, Any]:
    tested = [spp_train_stub.test(name, error) for name in tests or ("a@32",)]
    about = {"versions": {"torch": "2"}, "device": "p", "train_seconds": 1.0, "images_per_s": 5.0}
    return {"key": key, "settings": [], "seed": 0, **about, "tests": tested, "curve": [[0, 26, 1.0, 2.0, 3.0]], **more}


def test_rows_come_back_from_files_and_folders(tmp_path: Path) -> None:
    add_row(tmp_path / "b" / "t.jsonl", a_row("1"))
    add_row(tmp_path / "b" / "t.jsonl", a_row("2"))
    add_row(tmp_path / "b" / "u.jsonl", a_row("3"))
    (tmp_path / "b" / "notes.txt").write_text("no row")
    assert list(read_rows([tmp_path / "b"])) == ["1", "2", "3"]
    assert read_rows([tmp_path / "b" / "u.jsonl"]) == {"3": a_row("3")}
    assert read_rows([tmp_path / "nowhere"]) == read_rows([]) == {}


def test_a_row_is_added_once(tmp_path: Path) -> None:
    for _ in range(3):
        add_row(tmp_path / "t.jsonl", a_row("1"))
    assert (tmp_path / "t.jsonl").read_text() == json.dumps(a_row("1")) + "\n"


def test_rows_of_one_run_are_put_together_test_by_test(tmp_path: Path) -> None:
    first, second = a_row("k", "a@32", "b@32", error=20), a_row("k", "b@32", "c@32", error=40)
    both = together(first, second)
    assert {test["test"]: test["top1_error"] for test in both["tests"]} == {"b@32": 40, "c@32": 40, "a@32": 20}
    add_row(tmp_path / "1.jsonl", first)
    add_row(tmp_path / "2.jsonl", second)
    assert read_rows([tmp_path]) == {"k": both}
    test = find_test(both, "a@32")
    assert test is not None and test["top1_error"] == 20 and find_test(both, "d@32") is None


@pytest.mark.parametrize("length", [0, 1, 10, -1])
def test_a_last_line_that_a_kill_tore_is_left_out_and_goes_with_the_next_row(tmp_path: Path, length: int) -> None:
    path = tmp_path / "t.jsonl"
    add_row(path, a_row("1"))
    with path.open("a") as file:
        file.write(json.dumps(a_row("2"))[:length] if length else "")
    assert list(read_rows([path])) == ["1"]
    add_row(path, a_row("3"))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["1", "3"]


def test_a_last_row_without_a_line_break_counts(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(a_row("1")))  # as some editors leave it
    assert list(read_rows([path])) == ["1"]
    add_row(path, a_row("2"))
    assert list(read_rows([path])) == ["1", "2"]


CUT = {"top1_error": 1.0, "top5_error": 1.0, "test": "a@32", "images": 20}


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "5",
        "[]",
        "{}",
        '{"key": "k", "tests": []}',
        json.dumps(a_row(key=5)),  # type: ignore[arg-type]
        json.dumps(a_row(tests=3)),
        json.dumps(a_row(tests=["a"])),
        json.dumps(a_row(tests=[CUT])),
        json.dumps(a_row(tests=[{**CUT, "wrong": "!"}])),
        json.dumps(a_row(tests=[{**CUT, "wrong": "AAAA", "images": 25}])),
        json.dumps(a_row(curve=[1])),
        json.dumps(a_row(curve=[[0, 26]])),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(a_row("1")) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"t.jsonl, line 3: is no result row; remove the line$"):
        read_rows([tmp_path])


def test_many_add_at_the_same_time_and_no_row_is_lost_or_torn(tmp_path: Path) -> None:
    def add(first: int) -> None:
        for number in range(first, first + 10):
            add_row(tmp_path / "t.jsonl", a_row(str(number)))

    threads = [threading.Thread(target=add, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, read_rows([tmp_path]))) == list(range(40))
