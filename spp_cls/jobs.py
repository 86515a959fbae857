"""The ledger: runs to do and done, each an `spp train` process of its own, side by side on the devices there are.

A run is known by its key, the hash of what decides its result (`differences.run_key`), whoever started it: a grid, a
table, a command, another machine. One that is done is passed over, one that was begun is gone on with. The ledger has
no state but the run folders and result rows, so that it can be killed anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .door import check_number, quoted
from .ranks import without_ranks
from .results import SCORES, Row, read_results, read_rows, row_of, scores_path, together
from .run import KEY, RESULTS, has_saved, is_in_training, read_key, walk

OUTPUT = "output.txt"  # of a run folder: what its processes printed
RUNS = (Path("runs"), Path("multiruns"))
LOCKS = Path("runs", ".jobs")
COMMAND = (sys.executable, "-m", "spp_cls", "train")
STOPPED = "stopped: its runs have saved, as far as they had something to save; the same command goes on"
LOOK = 0.05  # seconds between two looks at the processes
AGAIN = 1.0  # seconds between two looks at what another process is doing, which go through all run folders


@dataclass(frozen=True)
class Job:
    """A run to be: its words for `spp train`, its key, where it would lie, and the tests that it must have.

    With `scores` its folder, if it lies here, must have the class probabilities of these tests.
    """

    settings: tuple[str, ...]
    key: str
    folder: Path
    tests: tuple[str, ...] = ()
    name: str = ""
    scores: bool = False


@dataclass
class Outcome:
    """What came of a job: its row, or the reason why there is none."""

    job: Job
    row: Row | None = None
    folder: Path | None = None
    reason: str = ""
    was_done: bool = False
    waits: bool = False  # for another process
    again: float = 0.0  # when to look anew whether that has done it, by the monotonic clock


@dataclass
class Running:
    outcome: Outcome
    process: subprocess.Popen[bytes]
    lock: FileLock
    slot: int
    signals: int = 0  # that it was sent


# What is there


def folders_by_key(places: Iterable[Path] = RUNS) -> dict[str, Path]:
    """Key → run folder, finished ones first, then those that can be gone on with; of several the one begun first."""
    found: dict[str, tuple[int, str, Path]] = {}
    for place in places:
        for folder in walk(place, KEY):
            rank = (0 if (folder / RESULTS).is_file() else 1 if has_saved(folder) else 2, str(folder), folder)
            key = read_key(folder)
            found[key] = min(rank, found.get(key, rank))
    found.pop("", None)  # of runs that went on otherwise than they began
    return {key: folder for key, (_, _, folder) in found.items()}


def known_rows(results: Iterable[Path] = (Path("results"),), places: Iterable[Path] = RUNS) -> dict[str, Row]:
    """Key → row of every finished run that has a row in `results`, or a folder below `places`."""
    rows = read_rows(path for path in results if path.exists())
    for key, folder in folders_by_key(places).items():
        row = _row_of(folder, key)
        if row is not None:
            rows[key] = together(rows[key], row) if key in rows else row
    return rows


def _row_of(folder: Path, key: str) -> Row | None:
    """The row of the run of `folder`, if it is of `key`: the folder may have been named for another run since."""
    row = row_of(folder)
    return row if row is not None and row["key"] == key else None


def lacks(job: Job, row: Row | None) -> list[str]:
    """The tests of `job` that `row` has not."""
    has = {test["test"] for test in row["tests"]} if row else set()
    return [test for test in job.tests if test not in has]


def is_done(job: Job, row: Row | None, folder: Path | None) -> bool:
    """Whether nothing is left to do of `job`, whose row is `row` and whose run lies in `folder`, if here."""
    if row is None or lacks(job, row):
        return False
    if not job.scores or folder is None:
        return True
    return all(scores_path(folder / SCORES, test).is_file() for test in job.tests)


# Running


def places(at_once: int | None, devices: Any, accelerator: str) -> list[dict[str, str]]:
    """What the environment of each of the processes that run side by side says of its device and its threads.

    By default one process has each GPU (or as many as `trainer.devices` says) or, without any, the whole machine;
    `at_once` processes share what there is.
    """
    import torch

    check_number("at_once", at_once)
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    each = int(devices) if str(devices).isdecimal() else max(1, gpus)  # auto takes all
    if each < 1:
        raise ValueError(f"trainer.devices={devices}: use a number of devices of at least 1, or auto")
    many = at_once or max(1, gpus // each)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    found = []
    for number in range(many):
        own: dict[str, str] = {}
        if gpus > each:
            first = number * each % (gpus - gpus % each)
            own["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[first : first + each])
        if many > 1 and "OMP_NUM_THREADS" not in os.environ:
            own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // many))
        found.append(own)
    return found


def in_group(places: Sequence[dict[str, str]], name: str) -> list[dict[str, str]]:
    """`places`, and for Weights & Biases that the runs there belong together; a group of the user's own stays."""
    return [{"WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or name, **place} for place in places]


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[dict[str, str]],
    rows: dict[str, Row],
    told: Callable[[Outcome, int], None],
) -> list[Outcome]:
    """Do what is not done yet of `jobs`, in their order, as many at once as there are `places`; an outcome for each.

    `rows` are those known before. `told(outcome, left)` hears of each job as it ends. A job that fails is an outcome
    with its reason, and the others go on; of jobs of one key the first is run. One that another process is doing is
    waited for. SIGTERM and Ctrl-C are passed on, so that each run saves, a second one kills; then `Interrupted` is
    raised.
    """
    outcomes = [Outcome(job) for job in jobs]
    waiting = list(outcomes)
    running: list[Running] = []
    free = list(range(len(places)))
    asked: list[int] = []
    failed: dict[str, str] = {}
    folders = folders_by_key()
    has_looked = False  # at all of them, for those that are done

    def end(outcome: Outcome) -> None:
        if outcome.row is None:
            failed[outcome.job.key] = outcome.reason
        told(outcome, len(waiting) + len(running))

    with signals_to(lambda number, frame: asked.append(number)):
        try:
            while waiting or running:
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    free.append(each.slot)
                    conclude(each)
                    each.lock.release()
                    if each.outcome.row is not None or not asked:  # else it was stopped, and goes on the next time
                        end(each.outcome)
                if asked and not running:
                    raise Interrupted(asked[0])
                for each in running:
                    pass_on(each, len(asked))
                for outcome in list(waiting) if free or not has_looked else ():
                    if asked:
                        break
                    job = outcome.job
                    if is_done(job, rows.get(job.key), folders.get(job.key)):
                        outcome.row, outcome.was_done = rows[job.key], True
                    elif job.key in failed:
                        outcome.reason = failed[job.key]
                    elif job.key in rows and not _is_here(job, folders):
                        outcome.reason = (
                            f"its result row has no {', '.join(lacks(job, rows[job.key]))}, and its run folder is not "
                            f"here to be tested: put that back below {RUNS[0]}/, or, to train it again, remove the row "
                            f"of key {job.key}"
                        )
                    elif free:
                        started = start(outcome, free[0], places[free[0]])
                        if started is not None:
                            waiting.remove(outcome)
                            running.append(started)
                            free.pop(0)
                    if outcome.row is not None or outcome.reason:
                        waiting.remove(outcome)
                        end(outcome)
                has_looked = True
                time.sleep(LOOK)
        except BaseException:
            stop(running, asked)
            raise
    return outcomes


def _is_here(job: Job, folders: dict[str, Path]) -> bool:
    """Whether the run of `job` has a folder here; one that has come since `folders` were looked for is added."""
    if job.key not in folders:
        folders.update(folders_by_key())
    return job.key in folders


def pass_on(running: Running, signals: int) -> None:
    """Of so many signals send a run those that it has not heard of: one asks it to save and end, one more kills it."""
    if running.signals < signals:
        running.signals = signals
        send(running.process, signal.SIGTERM if signals == 1 else signal.SIGKILL)


def stop(running: Iterable[Running], asked: Sequence[int]) -> None:
    """Have runs save and end, and wait for it; a second one of the signals `asked`, which grows meanwhile, kills."""
    while alive := [each for each in running if each.process.poll() is None]:
        for each in alive:
            pass_on(each, max(1, len(asked)))
        time.sleep(LOOK)


class Interrupted(Exception):
    """A signal stopped the ledger; its runs have saved, and go on with the next."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def start(outcome: Outcome, slot: int, place: dict[str, str]) -> Running | None:
    """A process that does the job; None where another does it, or has (then `outcome.row` is set), or none can."""
    job = outcome.job
    if time.monotonic() < outcome.again:
        return None
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock = FileLock(LOCKS / f"{job.key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say_it_waits(outcome)
        return None
    try:
        process = _begin(outcome, place)
    except BaseException:
        lock.release()
        raise
    if process is None:
        lock.release()
        return None
    return Running(outcome, process, lock, slot)


def _begin(outcome: Outcome, place: dict[str, str]) -> subprocess.Popen[bytes] | None:
    job = outcome.job
    folder = outcome.folder = _folder_of(job)
    if is_in_training(folder):
        _say_it_waits(outcome)
        return None
    row = _row_of(folder, job.key)
    if is_done(job, row, folder):
        outcome.row, outcome.was_done = row, True
        return None
    if has_saved(folder):
        words = [f"ckpt_path={quoted(folder)}", *_words_to_go_on(job)]
    elif (folder / RESULTS).is_file():
        outcome.reason = (
            f"{folder} has ended without the tests {', '.join(lacks(job, row) or job.tests)}, and has no "
            "checkpoints/last.ckpt to test; put that back, or move the folder away to train again"
        )
        return None
    else:
        if read_key(folder) == job.key:
            shutil.rmtree(folder)  # what a run left that had not saved yet
        words = [*job.settings, f"hydra.run.dir={quoted(folder)}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [*COMMAND, *words],
            env={**without_ranks(os.environ), **place},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is passed on once, by the ledger
            preexec_fn=partial(_die_with, os.getpid()) if sys.platform == "linux" else None,
        )


def _words_to_go_on(job: Job) -> list[str]:
    """What a run that is there is told anew: it may have been begun with other tests, and configs may lie elsewhere."""
    kept = [word for word in job.settings if re.match(r"(views|hydra\.searchpath)\b", word)]
    tests = ["test=true", f"tests=[{','.join(job.tests)}]"] if job.tests else []
    return [*kept, *tests, *(["keep_scores=true"] if job.scores else [])]


def _folder_of(job: Job) -> Path:
    """Where the run of `job` lies; else where it is to lie, which is in no folder of another run."""
    there = folders_by_key().get(job.key)
    if there is not None and ((there / RESULTS).is_file() or has_saved(there) or is_in_training(there)):
        return there
    own = job.folder
    is_of_another = (own / "config.yaml").is_file() and read_key(own) != job.key
    return own.with_name(f"{own.name}_{job.key}") if is_of_another else own


def _say_it_waits(outcome: Outcome) -> None:
    outcome.again = time.monotonic() + AGAIN
    if not outcome.waits:
        outcome.waits = True
        print(f"{outcome.job.name or outcome.job.key}: another process is doing it; waiting", file=sys.stderr)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with(ledger: int) -> None:
    """In a run: a ledger that is killed takes its runs along, after they have saved."""
    assert _LIBC is not None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the program is loaded the ledger's own answer would take it
    _LIBC.prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != ledger:  # it was killed just before
        os.kill(os.getpid(), signal.SIGTERM)


def conclude(done: Running) -> None:
    """Fill in what came of a process that has ended."""
    outcome, folder = done.outcome, done.outcome.folder
    assert folder is not None
    row = row_of(folder) if done.process.returncode == 0 else None
    if row is not None and row["key"] != outcome.job.key:
        outcome.reason = f"{folder} has become another run than the one that was asked for"
    elif row is not None and lacks(outcome.job, row):
        outcome.reason = f"{folder}: the tests {', '.join(lacks(outcome.job, row))} were not made"
    elif row is not None and not is_done(outcome.job, row, folder):
        outcome.reason = f"{folder}: the scores of its tests were not kept"
    elif row is None:
        outcome.reason = _why(folder, done.process.returncode)
    else:
        outcome.row = row


def _why(folder: Path, code: int) -> str:
    """The last thing that a process said, and how it ended."""
    output = folder / OUTPUT
    lines = output.read_text(errors="replace").splitlines() if output.is_file() else []
    lines = [line.strip() for line in lines if line.strip() and "HYDRA_FULL_ERROR" not in line]  # an advice of Hydra's
    said = lines[-1] if lines else "it said nothing"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{said} ({how}; {output})"


def send(process: subprocess.Popen[bytes], number: int) -> None:
    """A signal to a run that may have ended; SIGKILL goes to all of its processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)


@contextlib.contextmanager
def signals_to(answer: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, answer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


# For people


class Progress:
    """Says of each job that ends what came of it, and how long the rest will take."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._seconds: list[float] = []
        self._ended, self._began = 0, time.monotonic()

    def __call__(self, outcome: Outcome, left: int) -> None:
        from .words import duration

        self._ended += 1
        name = outcome.job.name or outcome.job.key
        if outcome.row is None:
            said = f"failed: {outcome.reason}"
        else:
            tests = outcome.row["tests"]
            said = f"{tests[0]['test']} {tests[0]['top1_error']:.2f} %" if tests else "done"
            said += " (was done)" if outcome.was_done else f" in {duration(outcome.row['train_seconds'])}"
        if not outcome.was_done:
            self._seconds.append(time.monotonic() - self._began)
        rest = ""
        if left and self._seconds:
            rest = f"; {left} left, about {duration(self._seconds[-1] / len(self._seconds) * left)}"
        print(f"[{self._ended}/{self.jobs}] {name}: {said}{rest}", file=sys.stderr, flush=True)


def metric_of(outcome: Outcome, name: str) -> float | None:
    """A number of the results of a job that is done."""
    results = read_results(outcome.folder) if outcome.folder else {}
    return float(results[name]) if name in results else None
