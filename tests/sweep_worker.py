"""Sweeps on the stub, in this process or in one that can be killed; without torch, so that it starts soon."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.dialects.sqlite  # noqa: F401
import sweep_train_stub
from optuna.samplers import RandomSampler, TPESampler

from spp_cls import jobs, study
from spp_cls.jobs import Job
from spp_cls.study import Claims, Files, Search, open_study, search, seed_of, space_of

STUB = (sys.executable, "-S", str(Path(sweep_train_stub.__file__)))
SPACE = {"x": {"low": 0.0, "high": 1.0}, "n": {"low": 1, "high": 64, "log": True, "type": "int"}}
SAMPLERS: dict[str, Any] = {"random": RandomSampler, "tpe": TPESampler}
PATIENCE = 8.0


def made(number: int, values: dict[str, Any], *words: str) -> Job:
    """The job of a trial."""
    key = f"k{number:05d}"
    own = (*(f"{name}={value!r}" for name, value in values.items()), *words, f"key={key}")
    return Job(own, key, Path("sweeps/s/trials", f"{number:05d}"), ("center_crop@32",), f"trial {number}")


def wanted(
    trials: int,
    *words: str,
    sampler: str = "random",
    pruner: Any = None,
    storage: str = "sqlite",
    space: Any = None,
    retry_failed: bool = False,
    of: Callable[[int], tuple[str, ...]] = lambda number: (),
) -> Search:
    """A search in the working folder."""
    opened = open_study(storage, Path("sweeps/s"), "minimize", pruner or optuna.pruners.NopPruner())
    return Search(
        opened,
        space_of(space or SPACE),
        trials,
        sweep_train_stub.METRIC,
        lambda number, index: SAMPLERS[sampler](seed=seed_of(3, number, index)),
        lambda number, values: made(number, values, *words, *of(number)),
        Path("sweeps/s"),
        retry_failed,
    )


def look_often() -> None:
    jobs.COMMAND, jobs.LOOK, study._PAUSE = STUB, 0.02, 0.1
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _work(here: str, sampler: str, trials: int, storage: str, words: tuple[str, ...]) -> None:
    os.chdir(here)
    look_often()
    what = wanted(trials, *words, sampler=sampler, storage=storage)
    folder = Path("sweeps/s")
    holder = Claims(what.study, folder, PATIENCE) if study.is_url(storage) else Files(folder)
    mine: list[int] = []
    search(what, [{}, {}], holder, lambda trial, reason, ran: mine.append(trial.number))
    Path(f"worker_{os.getpid()}").write_text(" ".join(map(str, mine)))


def worker(sampler: str, trials: int, storage: str, *words: str) -> BaseProcess:
    """A sweep in a process of its own, two trials at once."""
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sweep_worker"])
    process = context.Process(target=_work, args=(os.getcwd(), sampler, trials, storage, words))
    process.start()
    return process


def finished(process: BaseProcess) -> list[int]:
    """The trials that it has done, once it has ended by itself."""
    process.join(200)
    assert process.exitcode == 0, process.exitcode
    return [int(number) for number in Path(f"worker_{process.pid}").read_text().split()]
