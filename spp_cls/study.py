"""A study: trials of a space, each an `spp train` process, by Optuna's samplers, pruners and storages.

A study's state is its storage and its run folders, nothing else, so that any of its workers can be killed anywhere:
whoever starts next goes on. A trial is a number. It is created waiting, held by one worker at a time, drawn, run, told.
Hydra is not known here.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import platform
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from . import jobs
from .jobs import Interrupted, Job, Outcome
from .records import LOCKS

STORAGES = {"sqlite": "study.db", "journal": "journal.log"}
# User attributes of a trial.
KEY, RUN, REASON, PRUNED_AT, SAME_AS, EPOCHS = "key", "run", "reason", "pruned_at", "same_as", "epochs"
BEAT = "spp_cls:beat"  # a system attribute: a number that a living worker changes
STOPPED_BY = {129, 130, 138, 143, -1, -2, -10, -15}  # exit codes of a run that was asked to save and end
TIMES = 3  # that a run stopped by somebody else is gone on with
PATIENCE_WITH_PRUNED = 120.0  # seconds in which a pruned run can save, before it is killed
_PAUSE = 1.0  # seconds between two looks for a trial where there was none


# The space


@dataclass(frozen=True)
class Dimension:
    """A key of the config and what is drawn for it; of choices that Optuna cannot store (lists) the text is stored."""

    key: str
    distribution: BaseDistribution
    choices: Mapping[Any, Any] = field(default_factory=dict)  # as stored → as it is

    def value(self, stored: Any) -> Any:
        """What the config is given."""
        return self.choices.get(stored, stored)


def space_of(text: Mapping[str, Any]) -> dict[str, Dimension]:
    """The dimensions that a space's YAML names; raises ValueError."""
    if not isinstance(text, Mapping) or not text:
        raise ValueError("space: names no key; write like {optimizer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}}")
    return {str(key): _dimension(str(key), of) for key, of in text.items()}


def _dimension(key: str, of: Any) -> Dimension:
    if not isinstance(of, Mapping) or not of:
        raise ValueError(f"space.{key}={of}: write {{low: …, high: …}} or {{choices: […]}}")
    known = ("choices",) if "choices" in of else ("low", "high", "log", "step", "type")
    for word in of:
        if word not in known:
            near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
            raise ValueError(
                f"space.{key}.{word}: no such word beside {'choices' if 'choices' in of else 'low and high'}"
                + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")
            )
    return _of_choices(key, of["choices"]) if "choices" in of else _of_numbers(key, of)


def _of_choices(key: str, choices: Any) -> Dimension:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise ValueError(f"space.{key}.choices={choices}: takes a list of values, like [[6], [6, 3, 2, 1]]")
    stored: dict[Any, Any] = {}
    for choice in choices:
        name = choice if choice is None or isinstance(choice, bool | int | float | str) else json.dumps(choice)
        if name in stored:
            raise ValueError(f"space.{key}.choices: {choice} stands there twice")
        stored[name] = choice
    return Dimension(key, CategoricalDistribution(tuple(stored)), stored)


def _of_numbers(key: str, of: Mapping[str, Any]) -> Dimension:
    low, high, step, log, kind = of.get("low"), of.get("high"), of.get("step"), of.get("log", False), of.get("type")
    for name, value in (("low", low), ("high", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"space.{key}.{name}={value}: takes a number")
    assert isinstance(low, int | float) and isinstance(high, int | float)
    if not low < high:
        raise ValueError(f"space.{key}: low={low} must be less than high={high}")
    if not isinstance(log, bool):
        raise ValueError(f"space.{key}.log={log}: takes true or false")
    if log and low <= 0:
        raise ValueError(f"space.{key}: log needs low above 0, not {low}")
    if kind not in (None, "int", "float"):
        raise ValueError(f"space.{key}.type={kind}: use int or float")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step <= high - low):
        raise ValueError(f"space.{key}.step={step}: takes a number above 0, and at most high - low")
    if step is not None and log:
        raise ValueError(f"space.{key}: give log or step, not both")
    if kind == "int":
        for name, value in (("low", low), ("high", high), ("step", 1 if step is None else step)):
            if value != int(value):
                raise ValueError(f"space.{key}.{name}={value}: takes a whole number, because type is int")
        return Dimension(key, IntDistribution(int(low), int(high), log, 1 if step is None else int(step)))
    if step is not None:
        first, by = Decimal(str(low)), Decimal(str(step))
        high = float(first + by * ((Decimal(str(high)) - first) // by))  # the last that a step reaches
    return Dimension(key, FloatDistribution(float(low), float(high), log, step))


# Drawing


def seed_of(seed: int, number: int, index: int) -> int:
    """The seed for dimension `index` of trial `number`: the same after any number of restarts, and no other's."""
    return int(np.random.SeedSequence((seed, number, index)).generate_state(1)[0])


def draw(study: Study, trial: FrozenTrial, space: Mapping[str, Dimension], sampler: Callable[[int, int], Any]) -> None:
    """Draw what is not drawn yet of `trial`, and store it.

    `sampler(number, index)` gives a sampler seeded for this number and dimension, so that a trial whose drawing was
    killed half way is drawn like any other.
    """
    drawing: optuna.Trial | None = None
    study._thread_local.cached_all_trials = None  # Optuna takes the trials from there that a sampler looks at
    for index, (key, dimension) in enumerate(space.items()):
        if key in trial.params:  # the worker that drew it died before the next
            continue
        study.sampler = sampler(trial.number, index)
        if drawing is None:
            drawing = optuna.Trial(study, trial._trial_id)
        kind: Any = dimension.distribution
        if isinstance(kind, CategoricalDistribution):
            drawing.suggest_categorical(key, kind.choices)
        elif isinstance(kind, IntDistribution):
            drawing.suggest_int(key, kind.low, kind.high, step=kind.step, log=kind.log)
        else:
            drawing.suggest_float(key, kind.low, kind.high, step=kind.step, log=kind.log)


# Storages


class KernelLock(BaseJournalFileLock):
    """A lock of a journal that the system releases with the process; Optuna's own outlive a kill by half a minute."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire()
        return True

    def release(self) -> None:
        self._lock.release()


def open_study(storage: str, folder: Path, direction: Any, pruner: BasePruner) -> Study:
    """The study of the sweep in `folder`, made if there is none; `storage` is sqlite, journal or a database's URL."""
    folder.mkdir(parents=True, exist_ok=True)
    at = folder.absolute()
    with FileLock(at / "opening.lock"):  # two workers that make the tables of a database at once fail
        if storage == "journal":
            lock = KernelLock(at / "journal.lock")
            kept: Any = optuna.storages.JournalStorage(JournalFileBackend(str(at / STORAGES["journal"]), lock))
        elif storage == "sqlite":
            kept = _database(f"sqlite:///{at / STORAGES['sqlite']}", {"connect_args": {"timeout": 120}})
        else:
            kept = _database(storage, {"pool_pre_ping": True})
        study = optuna.create_study(
            storage=kept, study_name=folder.name, direction=direction, load_if_exists=True, pruner=pruner
        )
    study._thread_local.in_optimize_loop = True  # samplers that have tried all call study.stop(), which else raises
    return study


def _database(url: str, arguments: dict[str, Any]) -> optuna.storages.RDBStorage:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        make_url(url)
    except (ArgumentError, ValueError):  # with its password, maybe
        raise ValueError("storage: is no URL of a database; write like postgresql+psycopg://USER@HOST/NAME") from None
    for attempt in range(5):  # workers of several machines may make its tables at once
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
        except (ImportError, NoSuchModuleError) as error:
            raise ValueError(f"storage={_without_password(url)}: {str(error).splitlines()[0]}") from None
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if attempt == 4:
                lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
                raise ValueError(f"storage={_without_password(url)}: {lines[0]}") from None
            time.sleep(0.5 * (attempt + 1))
    raise AssertionError


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def is_url(storage: str) -> bool:
    """Whether `storage` is a database, which workers may share without sharing a disk."""
    return "://" in storage


# Who does which trial


class Holder(Protocol):
    """Gives each trial to one living worker."""

    def hold(self, trial: FrozenTrial) -> bool:
        """Whether `trial` is this worker's from now on; one whose worker is dead is given to exactly one."""

    def drop(self, trial: FrozenTrial) -> None:
        """Let go of it."""

    def lost(self) -> set[int]:
        """Numbers of trials that have been taken from this worker, because it gave no sign of life."""


class Files:
    """For workers that share a disk: a locked file a trial, which the system releases with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / LOCKS
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held: dict[int, FileLock] = {}

    def hold(self, trial: FrozenTrial) -> bool:
        lock = FileLock(self.folder / f"{trial.number:05d}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        self._held[trial.number] = lock
        return True

    def drop(self, trial: FrozenTrial) -> None:
        self._held.pop(trial.number).release()

    def lost(self) -> set[int]:
        return set()


class Claims:
    """For workers that share a database alone: a log of claims there, and a sign of life of each trial's worker.

    A claim is (trial, term, worker); of a term the claim that stands first in the log counts, and a database gives
    each its place in it. A trial whose sign of life has not changed for `patience` seconds, by this worker's own clock,
    can be claimed for the next term. Workers of one machine and folder know of each other by locked files, at once.
    """

    def __init__(self, study: Study, folder: Path, patience: float) -> None:
        self.study, self.patience = study, patience
        self.storage = study._storage
        self.log = optuna.create_study(
            storage=self.storage, study_name=f"{study.study_name}:claims", load_if_exists=True
        )
        self.files = Files(folder)
        self.place = f"{platform.node()} {folder.resolve()} {folder.stat().st_ino}"
        self.worker = f"{platform.node()} {os.getpid()} {uuid.uuid4().hex}"
        self._held: dict[int, tuple[FrozenTrial, int]] = {}
        self._seen: dict[tuple[int, int], tuple[Any, float]] = {}
        self._beat, self._beat_at = 0, -math.inf

    def hold(self, trial: FrozenTrial) -> bool:
        if not self.files.hold(trial):
            return False
        term, owner = self._owner(trial.number)
        if owner is None or (owner["place"] == self.place) or self._is_silent(trial, term):
            claim = {"trial": trial.number, "term": term + 1, "worker": self.worker, "place": self.place}
            self.log.add_trial(create_trial(state=TrialState.FAIL, user_attrs=claim))
            now, owner = self._owner(trial.number)
            if owner is not None and owner["worker"] == self.worker and now == term + 1:
                self._held[trial.number] = (trial, now)
                self._sign(trial)
                return True
        self.files.drop(trial)
        return False

    def _owner(self, number: int) -> tuple[int, dict[str, Any] | None]:
        """The last term of a trial, and the claim that counts in it; -1 and None where nobody has claimed it."""
        claims = [(each.user_attrs["term"], each.number, each.user_attrs) for each in self._claims(number)]
        if not claims:
            return -1, None
        last = max(term for term, _, _ in claims)
        return last, min((place, claim) for term, place, claim in claims if term == last)[1]

    def _claims(self, number: int) -> list[FrozenTrial]:
        return [each for each in self.log.get_trials(deepcopy=False) if each.user_attrs.get("trial") == number]

    def _is_silent(self, trial: FrozenTrial, term: int) -> bool:
        sign, now = trial.system_attrs.get(BEAT), time.monotonic()
        before, since = self._seen.get((trial.number, term), (None, now))
        if (trial.number, term) not in self._seen or before != sign:
            self._seen[trial.number, term] = (sign, now)
            return False
        return now - since > self.patience

    def _sign(self, trial: FrozenTrial) -> None:
        self._beat += 1
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_system_attr(trial._trial_id, BEAT, f"{self.worker} {self._beat}")

    def drop(self, trial: FrozenTrial) -> None:
        self._held.pop(trial.number, None)
        self.files.drop(trial)

    def lost(self) -> set[int]:
        if time.monotonic() - self._beat_at < self.patience / 6:
            return set()
        self._beat_at = time.monotonic()
        taken = {number for number, (_, term) in self._held.items() if self._owner(number)[0] != term}
        for number, (trial, _) in self._held.items():
            if number not in taken:
                self._sign(trial)
        return taken


# The trials


@dataclass(frozen=True)
class Search:
    """What a study looks for, and how: `job(number, values)` makes the job of a trial, or raises ValueError."""

    study: Study
    space: Mapping[str, Dimension]
    trials: int
    metric: str
    sampler: Callable[[int, int], BaseSampler]
    job: Callable[[int, dict[str, Any]], Job]
    folder: Path = Path()  # of the sweep; where runs lie is written down from there
    retry_failed: bool = False


@dataclass
class Attempt:
    """A trial that this worker holds; its process, once there is one, and how far that has come."""

    trial: FrozenTrial
    outcome: Outcome
    began: float
    process: jobs.Running | None = None
    history: History | None = None
    reported: set[int] = field(default_factory=set)
    value: float | None = None
    pruned_at: int | None = None
    asked_to_end: float = 0.0
    times: int = 0
    failures: int = 0

    @property
    def number(self) -> int:
        return self.trial.number

    @property
    def epoch(self) -> int | None:
        """The last epoch that the history of its run has lines of."""
        return self.history.epoch if self.history else None


class History:
    """A run's history, read as it grows; what a run that goes on cuts off it writes again, to the same bytes."""

    def __init__(self, folder: Path, metric: str) -> None:
        self.path, self.metric = folder / "history.jsonl", metric
        self.epoch: int | None = None
        self._offset = 0

    def new(self) -> list[tuple[int, float]]:
        """(epoch, value of the metric) of what has been written since the last look; an epoch can come twice."""
        try:
            if self.path.stat().st_size < self._offset:
                self._offset = 0
            with self.path.open("rb") as file:
                file.seek(self._offset)
                lines, _, torn = file.read().rpartition(b"\n")
                self._offset = file.tell() - len(torn)
        except OSError:
            return []
        found = []
        name = json.dumps(self.metric).encode()
        every = lines.splitlines()
        for i, line in enumerate(every):
            if name in line or i == len(every) - 1:
                row = _read(line)
                self.epoch = row.get("epoch", self.epoch)
                if isinstance(row.get(self.metric), int | float) and math.isfinite(row[self.metric]):
                    found.append((int(row["epoch"]), float(row[self.metric])))
        return found


def _read(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("epoch"), int) else {}


def search(
    what: Search,
    places: Sequence[dict[str, str]],
    holder: Holder,
    told: Callable[[FrozenTrial, str, bool], None],
    look: Callable[[list[Attempt]], None] = lambda running: None,
) -> None:
    """Do trials until `what.trials` have ended, over all starts and all workers; as many at once as `places`.

    `told(trial, reason, ran)` hears of each that ended here, and whether a run of it did; `look` hears of those that
    run, at each look at them. A trial whose worker is dead is taken over and its run gone on with; one that another
    worker does is waited for. SIGTERM and Ctrl-C are passed on, so that each run saves, a second one kills; then
    `jobs.Interrupted` is raised.
    """
    held: list[Attempt] = []
    free = list(range(len(places)))
    asked: list[int] = []
    wait_until = 0.0
    with jobs.signals_to(lambda number, frame: asked.append(number)):
        try:
            while True:
                for number in holder.lost():
                    _give_up(holder, number, held, free)
                for attempt in list(held):
                    try:
                        has_ended = _step(what, attempt, bool(asked), places, free)
                    except UpdateFinishedTrialError:  # by the worker that took it over
                        _give_up(holder, attempt.number, held, free)
                        continue
                    if has_ended:
                        _let_go(what, holder, attempt, held, told)
                if asked and not any(attempt.process for attempt in held):
                    raise Interrupted(asked[0])
                for attempt in held:
                    if attempt.process:
                        jobs.pass_on(attempt.process, len(asked))
                if not asked and len(held) < len(places) and time.monotonic() >= wait_until:
                    attempt_ = _take(what, holder, {attempt.number for attempt in held})
                    if attempt_ is not None:
                        held.append(attempt_)
                        continue
                    if not held and _is_over(what):
                        return
                    wait_until = time.monotonic() + _PAUSE
                look(held)
                time.sleep(jobs.LOOK)
        except BaseException:
            jobs.stop([attempt.process for attempt in held if attempt.process], asked)
            raise
        finally:
            for attempt in held:
                if attempt.process:
                    attempt.process.lock.release()
                holder.drop(attempt.trial)


def _let_go(
    what: Search, holder: Holder, attempt: Attempt, held: list[Attempt], told: Callable[[FrozenTrial, str, bool], None]
) -> None:
    held.remove(attempt)
    holder.drop(attempt.trial)
    trial = what.study._storage.get_trial(attempt.trial._trial_id)
    told(trial, str(trial.user_attrs.get(REASON, "")), attempt.times > 0)


def _give_up(holder: Holder, number: int, held: list[Attempt], free: list[int]) -> None:
    """End the run of a trial that another worker has taken over, because this one gave no sign of life."""
    attempt = next(attempt for attempt in held if attempt.number == number)
    held.remove(attempt)
    if attempt.process:
        while attempt.process.process.poll() is None:
            jobs.send(attempt.process.process, signal.SIGKILL)
            time.sleep(jobs.LOOK)
        attempt.process.lock.release()
        free.append(attempt.process.slot)
    holder.drop(attempt.trial)


def ended(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those that have a result, or a reason why not, by number."""
    return sorted((trial for trial in trials if trial.state.is_finished()), key=lambda trial: trial.number)


def best_of(trials: Iterable[FrozenTrial], direction: str) -> FrozenTrial | None:
    """The best that was completed; of equals the first."""
    sign = 1 if direction == "minimize" else -1
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    return min(complete, key=lambda trial: (sign * float(trial.value or 0.0), trial.number), default=None)


def _is_over(what: Search) -> bool:
    trials = what.study.get_trials(deepcopy=False)
    running = any(trial.state == TrialState.RUNNING for trial in trials)
    return not running and sum(trial.number < what.trials for trial in ended(trials)) >= what.trials


def _take(what: Search, holder: Holder, mine: set[int]) -> Attempt | None:
    """A trial that nobody does: one whose worker is dead, one that waits, or a new one if the budget has one left."""
    study = what.study
    while True:
        trials = study.get_trials(deepcopy=False)
        started = [trial for trial in trials if trial.state == TrialState.RUNNING]
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING and trial.number < what.trials]
        for trial in (*started, *waiting):
            if trial.number in mine or not holder.hold(trial):
                continue
            now = study._storage.get_trial(trial._trial_id)  # somebody may have ended it meanwhile
            if now.state.is_finished():
                holder.drop(trial)
                continue
            if now.state == TrialState.WAITING:
                study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            draw(study, now, what.space, what.sampler)
            return _attempt(what, study._storage.get_trial(trial._trial_id))
        if len(trials) >= what.trials or waiting:
            return None
        # Workers that do this at once make one too many; it waits until the budget reaches it.
        study.add_trial(create_trial(state=TrialState.WAITING))


def _attempt(what: Search, trial: FrozenTrial) -> Attempt:
    values = {key: what.space[key].value(stored) for key, stored in trial.params.items()}
    pruned_at = trial.user_attrs.get(PRUNED_AT)
    try:
        outcome = Outcome(what.job(trial.number, values))
    except ValueError as error:
        outcome = Outcome(Job((), "", Path()), reason=" ".join(str(error).split()))
    else:
        what.study._storage.set_trial_user_attr(trial._trial_id, KEY, outcome.job.key)
    outcome.reason = outcome.reason or str(trial.user_attrs.get(REASON, ""))  # its worker died before it told
    reported = set(trial.intermediate_values)
    return Attempt(trial, outcome, time.monotonic(), reported=reported, pruned_at=pruned_at)


def _step(what: Search, attempt: Attempt, asked: bool, places: Sequence[dict[str, str]], free: list[int]) -> bool:
    """One look at a trial: start its run, read on in its history, prune it, say what came of it; whether it ended."""
    outcome, running = attempt.outcome, attempt.process
    if running is None:
        if asked:
            return False
        if not (outcome.reason or attempt.pruned_at is not None or _is_another(what, attempt)):
            if not free:
                return False
            attempt.process = jobs.start(outcome, free[0], places[free[0]])
            if attempt.process is not None:
                free.pop(0)
                attempt.times += 1
                attempt.history = History(_folder(outcome), what.metric)
                return False
            if outcome.row is None and not outcome.reason:
                return False  # another process does it
            attempt.history = History(_folder(outcome), what.metric)
    elif running.process.poll() is None:
        _report(what, attempt)
        if attempt.pruned_at is not None and not asked:
            _stop(attempt)
        return False
    else:
        jobs.conclude(running)
        running.lock.release()
        free.append(running.slot)
        attempt.process = None
        stopped = running.process.returncode in STOPPED_BY
        if outcome.row is None and attempt.pruned_at is None:
            if stopped and (asked or attempt.times <= TIMES):  # it has saved, and goes on
                outcome.reason = ""
                return False
            if what.retry_failed and not attempt.failures and not asked:
                attempt.failures, outcome.reason = 1, ""
                return False
            if asked and running.signals:
                return False
    _report(what, attempt)
    _tell(what, attempt)
    return True


def _is_another(what: Search, attempt: Attempt) -> bool:
    """Whether a trial of the same settings is done: its result is this one's, too."""
    key = attempt.outcome.job.key
    for trial in what.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if trial.user_attrs.get(KEY) == key and trial.number != attempt.number:
            same = trial.user_attrs.get(SAME_AS, trial.number)
            what.study._storage.set_trial_user_attr(attempt.trial._trial_id, SAME_AS, same)
            attempt.outcome.folder, attempt.value = what.folder / trial.user_attrs[RUN], trial.value
            return True
    return False


def _folder(outcome: Outcome) -> Path:
    return outcome.folder or outcome.job.folder


def _report(what: Search, attempt: Attempt) -> None:
    """Store each epoch's value once, and ask the pruner after each while the run goes."""
    if attempt.history is None:
        return
    for epoch, value in attempt.history.new():
        if epoch in attempt.reported or attempt.pruned_at is not None:
            continue
        what.study._storage.set_trial_intermediate_value(attempt.trial._trial_id, epoch, value)
        attempt.reported.add(epoch)
        if attempt.process is not None:
            now = what.study._storage.get_trial(attempt.trial._trial_id)
            if what.study.pruner.prune(optuna.pruners._filter_study(what.study, now), now):
                # Written down before the run hears of it, so that whoever takes the trial over decides the same.
                what.study._storage.set_trial_user_attr(attempt.trial._trial_id, PRUNED_AT, epoch)
                attempt.pruned_at = epoch


def _stop(attempt: Attempt) -> None:
    """Ask a pruned run to save and end; after a while kill it."""
    assert attempt.process is not None
    now = time.monotonic()
    if not attempt.asked_to_end:
        attempt.asked_to_end = now
        jobs.send(attempt.process.process, signal.SIGTERM)
    elif now - attempt.asked_to_end > PATIENCE_WITH_PRUNED:
        jobs.send(attempt.process.process, signal.SIGKILL)


def _tell(what: Search, attempt: Attempt) -> None:
    """Store what came of a trial: its facts first, for once it has ended nothing can be added."""
    outcome, storage, trial_id = attempt.outcome, what.study._storage, attempt.trial._trial_id
    value = attempt.value
    if attempt.pruned_at is None and outcome.row is not None:
        value = jobs.metric_of(outcome, what.metric)
        if value is None:
            outcome.reason = f"its results have no {what.metric}"
        elif not math.isfinite(value):
            outcome.reason, value = f"{what.metric} is {value}", None
    if outcome.folder is not None:
        storage.set_trial_user_attr(trial_id, RUN, os.path.relpath(outcome.folder, what.folder))
    if attempt.reported:
        storage.set_trial_user_attr(trial_id, EPOCHS, max(attempt.reported) + 1)
    study = what.study
    study.sampler = what.sampler(attempt.number, len(what.space))
    if attempt.pruned_at is not None:
        study.tell(attempt.number, state=TrialState.PRUNED, skip_if_finished=True)
    elif value is not None:
        study.tell(attempt.number, value, skip_if_finished=True)
    else:
        storage.set_trial_user_attr(trial_id, REASON, outcome.reason or "it said nothing")
        study.tell(attempt.number, state=TrialState.FAIL, skip_if_finished=True)
