"""`spp sweep` on a stub of `spp train`: spaces, draws, the budget, kills, several workers, pruning, what is written."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import optuna
import pytest
import sweep_train_stub
import yaml
from conftest import Answer, Spp
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sweep_worker import SPACE, finished, look_often, made, wanted, worker

from spp_cls import build, door, jobs, study, sweep
from spp_cls.door import register_resolvers
from spp_cls.jobs import Interrupted, Job
from spp_cls.study import Claims, Files, History, Search, best_of, draw, open_study, search, seed_of, space_of

pytestmark = pytest.mark.slow  # each starts a sweep or more, if of stand-ins for runs
DATABASE = os.environ.get("SPP_SWEEP_DATABASE", "")


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module, name in ((jobs, "COMMAND"), (jobs, "LOOK"), (study, "_PAUSE")):
        monkeypatch.setattr(module, name, getattr(module, name))  # and put back
    look_often()


def log(word: str | None = None) -> list[dict[str, Any]]:
    path = Path("log.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if word in (None, line["word"])]


def go(what: Search, at_once: int = 1) -> list[FrozenTrial]:
    told: list[int] = []
    search(what, [{}] * at_once, Files(Path("sweeps/s")), lambda trial, reason, ran: told.append(trial.number))
    trials = what.study.get_trials()
    assert len(told) == len(set(told))
    return trials


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def as_table(what: Search) -> str:
    return sweep.table(study.ended(what.study.get_trials()), what.space)


# Spaces


def test_a_space_is_what_it_says() -> None:
    space = space_of(
        {
            "optimizer.lr": {"low": 1e-4, "high": 0.1, "log": True},
            "model.dropout": {"low": 0.0, "high": 0.75, "step": 0.1},
            "model.levels": {"choices": [[6], [6, 3, 2, 1], None]},
            "data.batch_size": {"low": 16, "high": 128, "log": True, "type": "int"},
        }
    )
    assert [dimension.distribution for dimension in space.values()] == [
        FloatDistribution(1e-4, 0.1, log=True),
        FloatDistribution(0.0, 0.7, step=0.1),
        CategoricalDistribution(("[6]", "[6, 3, 2, 1]", None)),
        IntDistribution(16, 128, log=True),
    ]
    assert [space["model.levels"].value(stored) for stored in ("[6]", None)] == [[6], None]
    assert space["optimizer.lr"].value(0.01) == 0.01


@pytest.mark.parametrize(
    ("of", "line"),
    [
        ({}, "space: names no key; write like"),
        ({"x": 3}, "space.x=3: write {low: …, high: …} or {choices: […]}"),
        ({"x": {"low": 1, "hihg": 2}}, "space.x.hihg: no such word beside low and high; did you mean high?"),
        ({"x": {"choices": [1], "low": 2}}, "space.x.low: no such word beside choices"),
        ({"x": {"choices": []}}, "space.x.choices=[]: takes a list of values"),
        ({"x": {"choices": [[1], [1]]}}, "space.x.choices: [1] stands there twice"),
        ({"x": {"low": 2, "high": 1}}, "space.x: low=2 must be less than high=1"),
        ({"x": {"low": "a", "high": 1}}, "space.x.low=a: takes a number"),
        ({"x": {"low": 0, "high": 1, "log": True}}, "space.x: log needs low above 0, not 0"),
        ({"x": {"low": 1, "high": 2, "log": True, "step": 1}}, "space.x: give log or step, not both"),
        ({"x": {"low": 0, "high": 1, "step": 2}}, "space.x.step=2: takes a number above 0, and at most high - low"),
        ({"x": {"low": 0.5, "high": 1, "type": "int"}}, "space.x.low=0.5: takes a whole number, because type is int"),
        ({"x": {"low": 0, "high": 1, "type": "real"}}, "space.x.type=real: use int or float"),
    ],
)
def test_a_bad_space_is_named(of: Any, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        space_of(of)
    assert str(caught.value).startswith(line)


# Draws


def drawn(what: Search) -> list[dict[str, Any]]:
    return [trial.params for trial in what.study.get_trials()]


def test_a_trial_whose_drawing_was_killed_half_way_is_drawn_like_any_other() -> None:
    what = wanted(3)
    whole = [trial.params for trial in go(what)]
    assert len({trial["x"] for trial in whole}) == 3
    for keep in ("x", "n"):
        other = optuna.create_study()
        for number in range(3):
            other.add_trial(create_trial(state=TrialState.WAITING))
            other._storage.set_trial_state_values(number, TrialState.RUNNING)
            kind = what.space[keep].distribution
            other._storage.set_trial_param(number, keep, kind.to_internal_repr(whole[number][keep]), kind)
            draw(other, other.get_trials()[number], what.space, what.sampler)
        assert [trial.params for trial in other.get_trials()] == whole


def test_no_two_draws_have_one_seed() -> None:
    seeds = [seed_of(seed, number, index) for seed in range(3) for number in range(50) for index in range(4)]
    assert len(set(seeds)) == 600 and seeds[0] == seed_of(0, 0, 0)


# The budget


def test_the_budget_is_a_total_and_numbers_go_on() -> None:
    first = go(wanted(3), at_once=2)
    assert [(trial.number, trial.state.name) for trial in first] == [(i, "COMPLETE") for i in range(3)]
    assert [trial.value for trial in first] == [sweep_train_stub.error_at(trial.params["x"], 0) for trial in first]
    again = go(wanted(3))
    assert [trial.value for trial in again] == [trial.value for trial in first] and len(log("begins")) == 3
    more = go(wanted(5))
    assert [trial.number for trial in more] == [0, 1, 2, 3, 4] and len(log("begins")) == 5
    assert [trial.params for trial in more[:3]] == [trial.params for trial in first]
    fewer = go(wanted(2))
    assert len(fewer) == 5 and len(log("begins")) == 5
    best = best_of(fewer, "minimize")
    assert best is not None and best.value == min(trial.value or 0.0 for trial in fewer)
    with_most = best_of(fewer, "maximize")
    assert with_most is not None and with_most.value == max(trial.value or 0.0 for trial in fewer)


def test_one_that_is_too_many_waits_until_the_budget_reaches_it() -> None:
    what = wanted(2)
    for _ in range(3):  # as two workers that count at once leave it
        what.study.add_trial(create_trial(state=TrialState.WAITING))
    assert [trial.state.name for trial in go(what)] == ["COMPLETE", "COMPLETE", "WAITING"]
    assert [trial.state.name for trial in go(wanted(3))] == ["COMPLETE"] * 3


def test_a_trial_of_the_settings_of_one_that_is_done_has_its_result() -> None:
    what = wanted(6, space={"x": {"choices": [0.1, 0.2]}})
    what = replace(what, job=lambda number, values: made(int(values["x"] * 10), values))
    trials = go(what, at_once=2)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6 and len(log("ends")) == 2
    assert all(trial.value == sweep_train_stub.error_at(trial.params["x"], 0) for trial in trials)
    assert all(trial.user_attrs["run"].endswith(f"{int(trial.params['x'] * 10):05d}") for trial in trials)


# Kills


def killed(kind: str, trials: int, storage: str, kills: list[tuple[int, float]], *words: str) -> None:
    """A sweep that is killed so many seconds after so many further lines of the log, for each of `kills`; then ends."""
    for lines, seconds in kills:
        before = len(log())
        process = worker(kind, trials, storage, *words)
        wait_for(lambda there=before + lines: len(log()) >= there)  # type: ignore[misc]
        time.sleep(seconds)
        process.kill()
        process.join()
    finished(worker(kind, trials, storage, *words))


def check_that_nothing_was_lost(what: Search, trials: int) -> None:
    states = [trial.state.name for trial in what.study.get_trials()]
    assert states[:trials] == ["COMPLETE"] * trials and set(states[trials:]) <= {"WAITING"}
    assert log("twice") == []
    ends = Counter(line["words"]["key"] for line in log("ends"))
    assert ends == {f"k{number:05d}": 1 for number in range(trials)}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a run that its sweep was killed")
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_sweep_that_is_killed_gives_the_table_of_one_that_was_not(storage: str, tmp_path: Path) -> None:
    words = ("seconds=0.1", "epochs=2")
    chance = random.Random(storage)
    kills = [(0, 0.05), (0, 0.4), *((chance.randrange(1, 6), chance.uniform(0, 0.2)) for _ in range(4))]
    killed("random", 10, storage, kills, *words)
    what = wanted(10, *words, storage=storage)
    check_that_nothing_was_lost(what, 10)
    found = as_table(what)
    other = tmp_path / "undisturbed"
    other.mkdir()
    os.chdir(other)
    undisturbed = wanted(10, *words)
    go(undisturbed, at_once=2)
    assert found == as_table(undisturbed) and found.count("\n") == 11


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a run that its sweep was killed")
def test_a_sweep_by_tpe_that_is_killed_loses_nothing() -> None:
    killed("tpe", 14, "sqlite", [(2, 0.0), (5, 0.05)], "seconds=0.05")
    what = wanted(14)
    check_that_nothing_was_lost(what, 14)
    assert len({trial.params["x"] for trial in what.study.get_trials()}) == 14


def test_two_workers_on_one_journal_share_the_trials() -> None:
    processes = [worker("random", 12, "journal", "seconds=0.2") for _ in range(2)]
    one, two = map(finished, processes)
    assert sorted(one + two) == list(range(12)) and one and two
    check_that_nothing_was_lost(wanted(12, storage="journal"), 12)


def test_a_worker_that_is_killed_is_replaced_by_one_that_runs_beside_it() -> None:
    first = worker("random", 4, "sqlite", "seconds=1.5")
    wait_for(lambda: len(log("begins")) == 2)
    second = worker("random", 4, "sqlite", "seconds=1.5")
    time.sleep(0.5)
    first.kill()
    first.join()
    assert sorted(finished(second)) == [0, 1, 2, 3]
    check_that_nothing_was_lost(wanted(4), 4)


def test_a_signal_lets_the_runs_save_and_the_next_goes_on() -> None:
    def send() -> None:
        wait_for(lambda: len(log("begins")) == 2 and all(Path(f"sweeps/s/trials/0000{i}/key").is_file() for i in "01"))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        go(wanted(3, "seconds=60"), at_once=2)
    thread.join()
    assert caught.value.number == signal.SIGTERM and len(log("saved")) == 2
    what = wanted(3, "seconds=0")
    assert {trial.state.name for trial in what.study.get_trials()} == {"RUNNING"}
    for folder in Path("sweeps/s/trials").iterdir():
        words = json.loads((folder / "words.json").read_text())
        (folder / "words.json").write_text(json.dumps({**words, "seconds": "0"}))
    go(what)
    check_that_nothing_was_lost(what, 3)
    assert len(log("goes on")) == 2 and len(log("begins")) == 3


# Workers that share a database alone


def claims(place: str, storage: str, patience: float = 0.3) -> Claims:
    folder = Path(place)
    folder.mkdir(exist_ok=True)
    opened = open_study(storage, Path("s"), "minimize", optuna.pruners.NopPruner())
    own = Claims(opened, folder, patience)
    own.place = place
    return own


def test_a_trial_is_held_by_one_worker_and_goes_to_one_other_when_that_is_silent(tmp_path: Path) -> None:
    storage = DATABASE or f"sqlite:///{tmp_path}/claims.db"
    a, b, c = (claims(place, storage) for place in "abc")
    a.study.add_trial(create_trial(state=TrialState.WAITING))
    a.storage.set_trial_state_values(a.study.trials[0]._trial_id, TrialState.RUNNING)

    def trial() -> FrozenTrial:
        return a.study.get_trials()[0]

    assert a.hold(trial()) and not b.hold(trial())
    for _ in range(6):
        time.sleep(0.1)
        assert a.lost() == set() and not b.hold(trial())  # it lives
    time.sleep(0.4)
    took = [each.hold(trial()) for each in (b, c)]  # c has not watched it yet
    assert took == [True, False] and a.lost() == {0}
    a.drop(trial())
    assert not a.hold(trial()) and b.lost() == set()
    # Of two that claim at once the first in the log has it.
    time.sleep(0.4)
    a.hold(trial()), c.hold(trial())
    time.sleep(0.4)
    term, _ = a._owner(0)
    for each in (c, a):
        claim = {"trial": 0, "term": term + 1, "worker": each.worker, "place": each.place}
        each.log.add_trial(create_trial(state=TrialState.FAIL, user_attrs=claim))
    assert {each._owner(0)[1]["worker"] for each in (a, b, c)} == {c.worker}  # type: ignore[index]
    assert b.lost() == {0}


def test_workers_that_share_a_database_share_the_trials(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    first = worker("random", 6, storage, "seconds=0.6")
    wait_for(lambda: len(log("begins")) == 2)
    first.kill()
    first.join()
    finished(worker("random", 6, storage, "seconds=0.6"))  # on the same machine it is known at once
    check_that_nothing_was_lost(wanted(6, storage=storage), 6)


# Pruning and failures


def test_a_trial_that_is_worse_than_the_others_is_stopped() -> None:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1)
    xs = [0.3, 0.4, 0.9, 0.31]
    what = wanted(4, "epochs=6", "seconds=0.15", pruner=pruner)
    what = replace(what, job=lambda number, values: made(number, {"x": xs[number]}, "epochs=6", "seconds=0.15"))
    trials = go(what)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    last = max(trials[2].intermediate_values)
    assert 1 <= last < 5 and trials[2].value == sweep_train_stub.error_at(0.9, last)
    assert trials[2].user_attrs["pruned_at"] == last
    assert list(trials[0].intermediate_values) == list(range(6))
    assert trials[0].intermediate_values[3] == sweep_train_stub.error_at(0.3, 3)
    assert [line["words"]["x"] for line in log("saved")] == ["0.9"] and len(log("ends")) == 3
    assert "2,pruned," in as_table(what)


def test_a_decision_to_prune_outlives_its_worker() -> None:
    what = wanted(1)
    what.study.add_trial(create_trial(state=TrialState.WAITING))
    what.study._storage.set_trial_state_values(what.study.trials[0]._trial_id, TrialState.RUNNING)
    what.study._storage.set_trial_intermediate_value(what.study.trials[0]._trial_id, 2, 44.0)
    what.study._storage.set_trial_user_attr(what.study.trials[0]._trial_id, "pruned_at", 2)
    (trial,) = go(what)
    assert (trial.state.name, trial.value, log()) == ("PRUNED", 44.0, [])


def test_a_history_gives_each_line_once_whatever_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path, metric = tmp_path / "history.jsonl", "val/loss"
    row = [
        f'{{"epoch": {i}, "step": {i}, "loss": 1}}\n{{"epoch": {i}, "step": {i}, "val/loss": {i}.5}}\n'
        for i in range(4)
    ]
    history = History(tmp_path, metric)
    assert history.new() == [] and history.epoch is None
    path.write_text(row[0] + row[1][:-5])
    assert history.new() == [(0, 0.5)] and history.epoch == 1
    path.write_text(row[0] + row[1])
    assert history.new() == [(1, 1.5)] and history.new() == []
    path.write_text(row[0])  # a run that goes on from its checkpoint
    assert history.new() == [(0, 0.5)]
    path.write_text("".join(row[:3]) + '{"epoch": 3, "step": 3, "val/loss": NaN}\n')
    assert history.new() == [(1, 1.5), (2, 2.5)] and history.epoch == 3


def test_failures_are_kept_with_their_reasons_and_count() -> None:
    does = {1: "do=fail", 2: "do=kill", 3: "do=nan", 4: "do=other", 6: "do=stopped"}

    def job(number: int, values: dict[str, Any]) -> Job:
        if number == 5:
            raise ValueError("model.levels: these do not fit")
        return made(number, values, does.get(number, ""))

    what = replace(wanted(7), job=job)
    trials = go(what, at_once=2)
    assert [trial.state.name for trial in trials] == ["COMPLETE", *["FAIL"] * 5, "COMPLETE"]
    reasons = [trial.user_attrs.get("reason", "") for trial in trials]
    assert reasons[1] == "spp train: that cannot be (exit code 2; sweeps/s/trials/00001/output.txt)"
    assert reasons[2] == "it said nothing (signal SIGKILL; sweeps/s/trials/00002/output.txt)"
    assert reasons[3:6] == [
        "val/top1_error is nan",
        "its results have no val/top1_error",
        "model.levels: these do not fit",
    ]
    assert len(go(what)) == 7 and len(log("begins")) == 6


@pytest.mark.parametrize("again", [False, True])
def test_a_failure_is_tried_again_where_that_is_asked_for(again: bool) -> None:
    (trial,) = go(wanted(1, "do=once", retry_failed=again))
    assert trial.state.name == ("COMPLETE" if again else "FAIL") and len(log("begins")) == 1 + again
    assert len(go(wanted(2, "do=fail", retry_failed=again))) == 2
    assert len(log("begins")) == 2 * (1 + again)


# The program


MINE = """
space:
  optimizer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}
  model.dropout: {low: 0.0, high: 0.7, step: 0.1}
  model.levels: {choices: [[6], [2, 1]]}
  data.batch_size: {low: 4, high: 12, log: true, type: int}
  sizes: {choices: [single, alternating]}
trials: 3
sampler: {_target_: optuna.samplers.RandomSampler, seed: 1}
pruner: null
metric: null
direction: minimize
"""


def write(name: str, text: str) -> None:
    folder = Path("conf/hparams_search")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)


@pytest.fixture
def program(spp: Spp, small: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`spp sweep mine` with the small settings; the stub is told the key, and has the learning rate as x."""
    real = build.job_of

    def job_of(config: Any, words: Any, *rest: Any) -> Job:
        job = real(config, words, *rest)
        return replace(job, settings=(*job.settings, f"key={job.key}", f"x={config.optimizer.lr}"))

    monkeypatch.setattr(build, "job_of", job_of)
    write("mine", MINE)
    words = [word for word in small if not word.startswith("data.batch_size")]
    return lambda *more: spp("sweep", "mine", *words, *more)


def rows() -> list[dict[str, str]]:
    with Path("sweeps/mine/trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_writes_its_table_and_the_best_as_an_experiment(
    program: Callable[..., Answer], small: list[str]
) -> None:
    answer = program()
    assert answer.code == 0, answer.err
    found = rows()
    assert [row["number"] for row in found] == ["0", "1", "2"] and {row["state"] for row in found} == {"complete"}
    best = min(found, key=lambda row: float(row["value"]))
    assert answer.err.splitlines()[-1].startswith("[3/3] trial 2: val/top1_error ")
    assert answer.out.startswith(f"best: trial {best['number']}, val/top1_error ")
    assert best["run"] == f"trials/{int(best['number']):05d}"  # from the sweep's folder, wherever that lies
    assert f"its run:    sweeps/mine/{best['run']}\n" in answer.out
    assert answer.out.endswith("cp -n sweeps/mine/best.yaml conf/experiment/mine.yaml && spp train experiment=mine\n")
    words = {line["words"]["hydra.run.dir"]: line["words"] for line in log("begins")}[f"'sweeps/mine/{best['run']}'"]
    assert words["name"] == f"mine-{best['number']}"
    assert words["optimizer.lr"] == best["optimizer.lr"] and words["model.levels"] in ("[6]", "[2,1]")
    assert words["sizes"] == best["sizes"] and "hparams_search" not in words
    # The file, as an experiment, and the command that is printed make the same run.
    Path("conf/experiment").mkdir()
    Path("conf/experiment/mine.yaml").write_text(Path("sweeps/mine/best.yaml").read_text())
    register_resolvers()
    own = build.job_of(build.composed(["experiment=mine"]), (), Path())
    assert own.key == words["key"]
    assert Path("conf/experiment/mine.yaml").read_text().splitlines()[:2] == [
        "# @package _global_",
        f"# Trial {best['number']} of sweeps/mine: val/top1_error {best['value']}.",
    ]
    # Once more: nothing is left to do; further: it goes on; otherwise: it is refused.
    before = Path("sweeps/mine/trials.csv").read_text()
    answer = program()
    assert answer.code == 0 and Path("sweeps/mine/trials.csv").read_text() == before
    assert answer.out.endswith("conf/experiment/mine_best.yaml && spp train experiment=mine_best\n")
    assert program("trials=4", "data.num_workers=1").code == 0
    assert Path("sweeps/mine/trials.csv").read_text().startswith(before) and len(log("begins")) == 4
    answer = program("trainer.max_epochs=3")
    assert answer.code == 2 and answer.err.splitlines()[-1].startswith(
        "spp sweep: sweeps/mine is a sweep with another trainer.max_epochs (2, now 3); go on with the same, or"
    )
    assert program("trainer.max_epochs=3", "output=sweeps/other", "trials=1", "tags=['${seed}']").code == 0
    assert log("begins")[-1]["words"]["tags"] == "['${seed}']"  # for the run to fill in


def test_what_a_file_of_the_users_says_may_not_change_on_the_way(program: Callable[..., Answer]) -> None:
    path = Path("conf/experiment/own.yaml")
    path.parent.mkdir()
    path.write_text("# @package _global_\ntrainer: {gradient_clip_val: 1.0}\n")
    assert program("experiment=own", "trials=1").code == 0
    path.write_text("# @package _global_\ntrainer: {gradient_clip_val: 2.0}\n")
    door._composed.cache_clear()  # as in another process
    answer = program("experiment=own", "trials=2")
    assert answer.code == 2 and len(log("begins")) == 1
    assert answer.err.splitlines()[-1].startswith(
        "spp sweep: sweeps/mine is a sweep with another trainer.gradient_clip_val (1, now 2); go on with the same, or"
    )


def test_a_key_that_has_no_value_can_be_drawn(spp: Spp, program: Callable[..., Answer], small: list[str]) -> None:
    root = next(word.partition("=")[2] for word in small if word.startswith("data.root="))
    write("mine", f"space: {{data.root: {{choices: ['{root}']}}}}\npruner: null\n")
    answer = spp("sweep", "mine", *(word for word in small if not word.startswith("data.root")), "trials=1")
    assert answer.code == 0, answer.err
    assert log("begins")[0]["words"]["data.root"] == root or root in log("begins")[0]["words"]["data.root"]


def test_keys_below_a_group_that_is_drawn_may_be_set() -> None:
    sizes = space_of({"sizes": {"choices": ["single", "alternating"]}})
    sweep._refuse_what_the_sweep_sets(sizes, ["sizes.size=26"])
    with pytest.raises(ValueError, match="^sizes=single: the sweep draws sizes itself"):
        sweep._refuse_what_the_sweep_sets(sizes, ["sizes=single"])


def test_words_that_yaml_would_read_as_values_stay_words() -> None:
    for word, value in (("null", "null"), ("true", "true"), ("NaN", "NaN"), ("adam", "adam"), ("a b", "a b")):
        parsed = OverridesParser.create().parse_override(sweep._word("name", value))
        assert parsed.value() == word


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_quasi_random_numbers_of_a_first_trial_are_not_one_number() -> None:
    space = space_of({name: {"low": 0.0, "high": 1.0} for name in "abc"})
    sampler = sweep.sampler_of({"_target_": "optuna.samplers.QMCSampler", "seed": 3}, space)
    what = replace(wanted(1), space=space, sampler=sampler)
    what.study.add_trial(create_trial(state=TrialState.RUNNING))
    draw(what.study, what.study.get_trials()[0], space, sampler)
    assert len(set(what.study.get_trials()[0].params.values())) == 3


def test_no_trial_that_was_completed_is_exit_code_1(
    program: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; raise SystemExit('no memory' if not {'SLURM_PROCID', 'RANK'} & set(os.environ) else 'a rank')"
    jobs.COMMAND = (sys.executable, "-c", code)  # type: ignore[assignment]
    monkeypatch.setenv("SLURM_PROCID", "1")  # as a task of srun, which is no business of a trial
    monkeypatch.setenv("RANK", "1")
    answer = program("output=sweeps/none", "trials=2")
    assert answer.code == 1
    assert "no trial was completed; sweeps/none/trials.csv says why: no memory (exit code 1; " in answer.err
    assert "[2/2] trial 1: failed: no memory (exit code 1; " in answer.err
    assert not Path("sweeps/none/best.yaml").exists()


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("optimizer.lr", "optimizer.lrr", "space: optimizer.lrr: there is no such key; did you mean optimizer.lr?"),
        ("low: 4,", "low: 40,", "space.data.batch_size: low=40 must be less than high=12"),
        (", type: int", "", "space.data.batch_size: 32 is a whole number in the config; add type: int"),
        ("alternating]", "alternatin]", "space: sizes=alternatin: there is no sizes of that name; did you mean"),
        ("[[6], [2, 1]]", "[[6], 3]", "space: model.levels=3: takes a list, like"),
        ("RandomSampler", "RandomSample", "sampler._target_=optuna.samplers.RandomSample: cannot be imported"),
        ("seed: 1", "sede: 1", "sampler.sede: optuna.samplers.RandomSampler has no such argument; did you mean seed?"),
        ("pruner: null", "pruner: {_target_: optuna.pruners.MedianPruner, n: 1}", "pruner.n: optuna.pruners.MedianPr"),
        ("trials: 3", "trials: 0", None),
        ("metric: null", "metric: accuracy", None),
        ("metric: null", "metric: val/top_error", None),
        (
            "{_target_: optuna.samplers.RandomSampler, seed: 1}",
            "TPESampler",
            "sampler=TPESampler: write sampler: {_ta",
        ),
        ("pruner: null", "pruner: MedianPruner", "pruner=MedianPruner: write pruner: {_target_: optuna.pruners.Median"),
        ("direction: minimize", "direction: down", None),
        ("trials: 3", "trails: 3", "trails: no such key of a space; did you mean trials?"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_begun(
    program: Callable[..., Answer], before: str, after: str, line: str | None
) -> None:
    assert before in MINE
    write("mine", MINE.replace(before, after))
    answer = program()
    assert answer.code == 2 and answer.err.count("\n") == 1 and answer.err.startswith("spp sweep: ")
    own = {
        "trials: 0": "trials=0: use a whole",
        "metric: accuracy": "hparams_search.metric=accuracy: name one of a run",
        "metric: val/top_error": "metric=val/top_error: a run has no such metric; did you mean val/top",
    }
    said = f"hparams_search=mine: {line}" if line else own.get(after, "hparams_search.direction=down: use minimize")
    assert answer.err.startswith(f"spp sweep: {said}"), answer.err
    assert not Path("sweeps").exists() and log() == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "hparams_search: nothing chosen; give one of optimizer, pyramid, mine, see spp sweep --help"),
        (("lr",), "hparams_search=lr is a grid: run it by spp train -m hparams_search=lr; spaces are optimizer, "),
        (("mine", "optimizer.lr=1"), "hparams_search=mine: optimizer.lr=1: the sweep draws optimizer.lr itself"),
        (("mine", "resume=auto"), "hparams_search=mine: resume=auto: the trials of a sweep go on by themselves"),
        (("mine", "storage=mysql"), "storage=mysql: use sqlite, journal or a URL"),
        (("mine", "storage=nosuch://u:secret@h/x"), "storage=nosuch://u:***@h/x: "),
        (("mine", "storage=postgresql://u:secret@h:port/x"), "storage: is no URL of a database; write like postgresql"),
        (("mine", "output=conf/hparams_search/mine.yaml"), "output=conf/hparams_search/mine.yaml: conf/hparams_sear"),
        (("mine", "-m"), "-m: a grid is spp train -m; a sweep has its trials by trials=…"),
    ],
)
def test_a_wrong_command_is_one_line(spp: Spp, small: list[str], words: tuple[str, ...], line: str) -> None:
    write("mine", MINE)
    write("torn", "- [1,2")  # is nobody's business
    answer = spp("sweep", *words, *(word for word in small if not word.startswith("data.batch_size")))
    assert answer.code == 2 and answer.err.splitlines()[-1].startswith(f"spp sweep: {line}"), answer.err


def test_a_space_is_nothing_for_spp_train(spp: Spp, small: list[str]) -> None:
    answer = spp("train", *small, "hparams_search=optimizer")
    assert answer.code == 2
    assert (
        answer.err == "spp train: hparams_search=optimizer is a space: run it by spp sweep hparams_search=optimizer\n"
    )


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sampler_that_tries_all_ends_when_it_has() -> None:
    space = {"x": {"choices": [0.1, 0.2, 0.3]}, "n": {"low": 1, "high": 2, "type": "int"}}
    found = space_of(space)
    for name in ("GridSampler", "BruteForceSampler"):
        sampler = sweep.sampler_of({"_target_": f"optuna.samplers.{name}"}, found)
        os.makedirs(name)
        os.chdir(name)
        trials = go(replace(wanted(6, space=space), sampler=sampler), at_once=2)
        assert len({(trial.params["x"], trial.params["n"]) for trial in trials}) == 6
        os.chdir("..")
    with pytest.raises(ValueError, match="space.x: to try all values the sampler needs choices, or a step"):
        sweep.sampler_of({"_target_": "optuna.samplers.GridSampler"}, space_of(SPACE))


def test_the_table_of_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    what = wanted(3, "epochs=3", "seconds=0.4", of=lambda number: ("do=fail",) if number == 1 else ())
    told = sweep.Told(what, "minimize")
    told.live = True
    seen: list[str] = []
    lines = told.lines
    monkeypatch.setattr(
        told, "lines", lambda *arguments: seen.append("\n".join(lines(*arguments))) or lines(*arguments)
    )
    search(what, [{}], Files(Path("sweeps/s")), told.ended, told.look)
    told.clear()
    assert any("3 trials: 1 done, 1 running, 0 pruned, 1 failed; 1 left, about " in each for each in seen)
    assert any("  trial 2: epoch 0, " in each and "  best: val/top1_error " in each for each in seen)
    out = capsys.readouterr().err
    assert "\x1b[" in out and out.count("[3/3] trial 2: val/top1_error ") == 1


# Weights & Biases


def wandb_file(program: Callable[..., Answer], text: str = MINE) -> dict[str, Any]:
    write("mine", text)
    answer = program("--wandb", "tags=[a,b]")
    assert answer.code == 0 and answer.out.startswith("wandb sweep sweeps/mine/wandb.yaml"), answer.err
    found: dict[str, Any] = yaml.safe_load(Path("sweeps/mine/wandb.yaml").read_text())
    return found


@pytest.mark.parametrize("sampler", ["RandomSampler", "TPESampler", "GridSampler"])
def test_the_sweep_of_wandb_is_the_same_space_and_its_commands_run(
    program: Callable[..., Answer], sampler: str
) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    text = MINE.replace("RandomSampler", sampler)
    if sampler == "GridSampler":
        lines = [line for line in text.splitlines() if "optimizer.lr" not in line]
        text = "\n".join(lines).replace("log: true, type: int", "step: 4, type: int")
    found = wandb_file(program, text)
    assert found["method"] == {"RandomSampler": "random", "TPESampler": "bayes", "GridSampler": "grid"}[sampler]
    assert (found["metric"], found["run_cap"]) == ({"name": "val/top1_error", "goal": "minimize"}, 3)
    of = found["parameters"]
    assert of["model.levels"] == {"values": ["[6]", "[2,1]"]} and of["sizes"] == {"values": ["single", "alternating"]}
    if sampler == "GridSampler":
        assert of["data.batch_size"] == {"values": [4, 8, 12]} and len(of["model.dropout"]["values"]) == 8
    else:
        assert of["optimizer.lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}
        assert of["data.batch_size"] == {"distribution": "q_log_uniform_values", "q": 1, "min": 4, "max": 12}
        assert of["model.dropout"] == {"distribution": "q_uniform", "q": 0.1, "min": 0.0, "max": pytest.approx(0.7)}
    assert found["command"][:3] == ["${env}", "spp", "train"] and found["command"][-1] == "${args_no_hyphens}"
    assert "logger=wandb" in found["command"] and "logger=null" not in found["command"]
    # As its agent makes them of what a controller has drawn.
    for end in (0, -1):
        drawn = {k: {"value": p["values"][end] if "values" in p else p[("min", "max")[end]]} for k, p in of.items()}
        words = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
        assert ("model.levels=[6]", "model.levels=[2,1]")[end] in words
        config = build.composed([*found["command"][3:-1], *words])
        assert list(config.model.levels) == [[6], [2, 1]][end] and list(config.tags) == ["a", "b"]
        build.check_arguments(config)
    # W&B's own schema; its package cannot be imported beside today's numpy, and need not be.
    spec = importlib.util.find_spec("sweeps")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps sweeps"
    schema = Path(spec.submodule_search_locations[0], "config", "schema.json").read_text()
    jsonschema.Draft7Validator(json.loads(schema)).validate(found)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(json.loads(schema)).validate({**found, "method": "guess"})


def test_a_step_that_wandb_would_round_away_becomes_values_and_hyperband_is_handed_on(
    program: Callable[..., Answer],
) -> None:
    text = MINE.replace("low: 0.0, high: 0.7, step: 0.1", "low: 0.05, high: 0.25, step: 0.1")
    text = text.replace("pruner: null", "pruner: {_target_: optuna.pruners.HyperbandPruner, min_resource: 2}")
    found = wandb_file(program, text)
    assert found["parameters"]["model.dropout"]["values"] == pytest.approx([0.05, 0.15, 0.25])
    assert found["early_terminate"] == {"type": "hyperband", "min_iter": 2, "eta": 3}
    assert not Path("sweeps/mine/study.db").exists()
