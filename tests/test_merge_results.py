"""`scripts/merge_results.py`: files of result rows in one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import spp_train_stub

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "merge_results.py")


def row(key: str, curve_at: float, *tests: str) -> str:
    about = {"settings": [], "seed": 0, "versions": {}, "train_seconds": 1.0, "images_per_s": None, "device": None}
    curve = [[0, 32, 1.0, curve_at, None]]
    return json.dumps({"key": key, **about, "tests": [spp_train_stub.test(t, 25) for t in tests], "curve": curve})


def merge(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["merge_results.py", *map(str, words)])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_a_line_a_run_with_all_of_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there, output = (tmp_path / name for name in ("here.jsonl", "there.jsonl", "all.jsonl"))
    here.write_text(f"{row('a', 50, 'x@32')}\n{row('b', 50, 'x@32')}\n")
    there.write_text(f"{row('a', 50, 'y@32')}\n{row('b', 49, 'x@32', 'y@32')}\n")  # b was trained twice
    output.write_text(f"{row('c', 50, 'x@32')}\n")
    merge(monkeypatch, here, there, "--output", output)
    found = {each["key"]: each for each in map(json.loads, output.read_text().splitlines())}
    names = {key: sorted(test["test"] for test in each["tests"]) for key, each in found.items()}
    assert names == {"a": ["x@32", "y@32"], "b": ["x@32", "y@32"], "c": ["x@32"]} and found["b"]["curve"][0][3] == 49
    assert capsys.readouterr().out == f"{output}: 3 runs, 5 tests\n"
    before = output.read_bytes()
    for words, line in (([tmp_path / "no"], "there is no such file"), ([Path(SCRIPT)], "line 1: is no result row")):
        with pytest.raises(SystemExit) as ended:
            merge(monkeypatch, *words, "--output", output)
        assert ended.value.code == 2 and line in capsys.readouterr().err and output.read_bytes() == before
