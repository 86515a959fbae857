"""The verbs, and what matters about the process: how little it loads, and that all ways in say the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Spp

from spp_cls import __version__
from spp_cls.__main__ import VERBS

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("spp"))


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_verb(spp: Spp, words: tuple[str, ...]) -> None:
    answer = spp(*words)
    assert answer.code == 0
    for verb, what in VERBS.items():
        assert verb in answer.out and what in answer.out


def test_version(spp: Spp) -> None:
    assert spp("--version") == spp("version") == (0, f"spp {__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(spp: Spp, verb: str) -> None:
    answer = spp(verb, "--help")
    assert answer.code == 0 and answer.err == "" and f"usage: spp {verb}" in answer.out


def test_an_unknown_verb(spp: Spp) -> None:
    assert spp("trian") == (2, "", "spp: there is no verb 'trian'; did you mean spp train?\n")
    verbs = "train, evaluate, predict, export, plan, check, table, sweep, runs, report, log, cache"
    assert spp("xyz") == (2, "", f"spp: there is no verb 'xyz'; verbs: {verbs}\n")


def test_help_and_mistakes_load_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from spp_cls.__main__ import VERBS, main
def loaded(*words):
    try:
        main(list(words))
    except SystemExit:
        pass
    print("LOADED", *{"torch", "lightning", "hydra"} & set(sys.modules))
loaded("--help"); loaded("trian"); loaded("train", "modle=1"); loaded("train", "model=zf6"); loaded("evaluate")
"""
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    said = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert said == [[], [], ["hydra"], ["hydra"], ["hydra"]], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_ways_in_say_the_same(tmp_path: Path) -> None:
    ways = [
        (CONSOLE_SCRIPT, "train"),
        (sys.executable, "-m", "spp_cls", "train"),
        (sys.executable, "-m", "spp_cls.train"),
    ]
    helps = [run(*way, "--help", cwd=tmp_path) for way in ways]
    assert helps[0].stdout == helps[1].stdout == helps[2].stdout
    assert helps[0].stdout.startswith("spp train: train a net")
    for word in ("usage: spp train", "model=zf5", "experiment=table2c_multi_size", "ckpt_path", "trainer=cpu"):
        assert word in helps[0].stdout
    resolved = run(*ways[1], "--cfg", "job", "--resolve", "callbacks=none", "logger=none", cwd=tmp_path)
    config = yaml.safe_load(resolved.stdout)
    assert (config["name"], config["sizes"]["sizes"], config["model"]["levels"]) == (
        "shapes-tiny",
        [180, 224],
        [6, 3, 2, 1],
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("spp train mod", {"model=", "model."}),
        ("spp train model=z", {"model=zf5"}),
        ("spp evaluate views=t", {"views=ten_crop", "views=ten_crop_maps"}),
    ],
)
def test_the_tab_key(tmp_path: Path, line: str, answers: set[str]) -> None:
    done = run(CONSOLE_SCRIPT, "-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))
    assert set(done.stdout.split()) == answers, done.stderr
