"""`spp sweep hparams_search=NAME`: look for good settings, each trial an `spp train` process of its own."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .door import check_folder, choices_of, compose, fail, groups, key_of, names_apart, nearest, open_door, searched
from .records import SWEEP, TABLE, TRIALS
from .records import text as text_of

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

    from .study import Attempt, Dimension, Search

# What of a command `spp sweep` reads itself, and what it sets of each run.
OWN = ("hparams_search", "trials", "storage", "at_once", "retry_failed", "patience", "output", "wandb")
SETS = ("ckpt_path", "resume")
KNOWN = ("space", "trials", "sampler", "pruner", "metric", "direction")
# Samplers whose seed orders what they go through, so that it has to stay; all others are seeded for each trial.
ONE_ORDER = ("GridSampler", "QMCSampler")
TRY_ALL = ("GridSampler", "BruteForceSampler")
BEST = "best.yaml"
BEGUN_WITH = "spp_cls"  # a user attribute of the study


def run(config: DictConfig) -> None:
    """Everything that `spp sweep` does with a config."""
    import optuna

    from . import build, jobs, study
    from .whole import write_json

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    hydra: Any = HydraConfig.get()
    choice = str(hydra.runtime.choices.get("hparams_search"))
    text = _text(config, choice)
    of = f"hparams_search={choice}"
    typed: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # ${…} is for the runs to fill in
    words = [word for word in typed if key_of(word).partition(".")[0] not in OWN]
    search = searched(hydra.runtime.config_sources)
    try:
        space = study.space_of(text["space"])
        _refuse_what_the_sweep_sets(space, words)
        _check_values(space, words, search)
        sampler = sampler_of(text.get("sampler"), space)
        by = _target(text.get("pruner"), "pruner", "MedianPruner")
        pruner = build.instantiate(OmegaConf.create(by), "pruner") if by else None
    except ValueError as error:
        raise ValueError(f"{of}: {error}") from None
    trials = budget(config, text, space)
    metric, direction = _aim(config, text)
    first = build.composed([*words, *_first(space), *search])
    build.check_metric("metric", metric, first)
    check_folder("output", config.output)
    folder = Path(config.output or Path("sweeps", choice))
    if config.wandb:
        path = write_wandb(folder, text, space, words, metric, direction, trials)
        print(f"wandb sweep {path}   # names the sweep")
        print("wandb agent …        # as that says, on as many machines as you like")
        return
    if not isinstance(config.storage, str) or not (study.is_url(config.storage) or config.storage in study.STORAGES):
        raise ValueError(f"storage={config.storage}: use sqlite, journal or a URL, like postgresql+psycopg://HOST/NAME")
    if not _is_number(config.patience) or config.patience <= 0:
        raise ValueError(f"patience={config.patience}: use seconds above 0")
    places = jobs.places(config.at_once, config.trainer.devices, config.trainer.accelerator)
    places = jobs.in_group(places, folder.name)
    named = any(key_of(word) == "name" for word in words)
    whole: Any = optuna.pruners.NopPruner() if pruner is None else pruner
    # Of the pictures, of what every trial has in common: said once, not by each trial.
    build.job_of(first, (), folder)
    opened = study.open_study(config.storage, folder, direction, whole)
    _refuse_another(opened, build.what_decides(first), space, metric, direction, folder)
    write_json(folder / SWEEP, {"trials": trials, "metric": metric, "direction": direction, "command": sys.argv})

    def job(number: int, values: dict[str, Any]) -> jobs.Job:
        # A name of its own, by which dashboards tell it from the others.
        own = [] if named else [_word("name", f"{folder.name}-{number}")]
        every = [*words, *(_word(key, value) for key, value in values.items()), *own, *search]
        return build.job_of(build.composed(every), every, folder / TRIALS / f"{number:05d}", f"trial {number}")

    what = study.Search(opened, space, trials, metric, sampler, job, folder, bool(config.retry_failed))
    holder = study.Claims(opened, folder, config.patience) if study.is_url(config.storage) else study.Files(folder)
    told = Told(what, direction)

    def ended(trial: FrozenTrial, reason: str, ran: bool) -> None:
        _write_table(what, folder)
        told.ended(trial, reason, ran)

    try:
        study.search(what, places, holder, ended, told.look)
    except jobs.Interrupted as stopped:
        told.clear()
        _write_best(what, folder, direction, words)
        print(jobs.STOPPED, file=sys.stderr)
        sys.exit(128 + stopped.number)
    told.clear()
    _conclude(what, folder, direction, words)


def _text(config: DictConfig, choice: str) -> dict[str, Any]:
    """What the space's file says."""
    if config.get("hparams_search") is None:
        files = {path.stem: path for path in choices_of("hparams_search")}
        spaces = [name for name, path in files.items() if re.search("^space:", path.read_text(errors="replace"), re.M)]
        if choice in files:
            raise ValueError(
                f"hparams_search={choice} is a grid: run it by spp train -m hparams_search={choice}; spaces are "
                f"{', '.join(spaces)}"
            )
        raise ValueError(f"hparams_search: nothing chosen; give one of {', '.join(spaces)}, see spp sweep --help")
    text: Any = OmegaConf.to_container(config.hparams_search, resolve=True)
    if not isinstance(text, dict):
        raise ValueError(f"hparams_search={choice}: is a list, no space; see spp sweep --help for what a file holds")
    for key in text:
        if key not in KNOWN:
            raise ValueError(f"hparams_search={choice}: {key}: no such key of a space{nearest(key, KNOWN)}")
    if "space" not in text:
        raise ValueError(f"hparams_search={choice}: has no space; see spp sweep --help for what a file holds")
    return dict(text)


def _refuse_what_the_sweep_sets(space: Mapping[str, Dimension], words: Sequence[str]) -> None:
    for word in words:
        key = key_of(word)
        if key in SETS:
            raise ValueError(f"{word}: the trials of a sweep go on by themselves; weights alone are model.init_from")
        if key in space:
            raise ValueError(f"{word}: the sweep draws {key} itself; leave it out here, or in the space")


def _check_values(space: Mapping[str, Dimension], words: Sequence[str], search: Sequence[str]) -> None:
    """Compose the config with every choice and both ends of every range, so that a mistake is said before a run."""
    from . import build

    config = None
    ends = {key: _ends(dimension) for key, dimension in space.items()}
    for turn in range(max(map(len, ends.values()))):
        drawn = [_word(key, values[turn % len(values)]) for key, values in ends.items()]
        try:
            config = build.composed([*words, *drawn, *search])
            build.check_arguments(config)
        except ValueError as error:
            raise ValueError(f"space: {error}") from None
    plain = compose("train", [*words, *search])
    for key, dimension in space.items():
        now = OmegaConf.select(plain, key, throw_on_resolution_failure=False)
        low, high = ends[key][0], ends[key][-1]
        fractions = type(dimension.distribution).__name__ == "FloatDistribution"
        if fractions and type(now) is int and low >= 1 and low == int(low) and high == int(high):
            raise ValueError(
                f"space.{key}: {now} is a whole number in the config; add type: int, or give low or high a fraction"
            )


def _first(space: Mapping[str, Dimension]) -> list[str]:
    """A value of each dimension, as words."""
    return [_word(key, _ends(dimension)[0]) for key, dimension in space.items()]


def _ends(dimension: Dimension) -> list[Any]:
    of: Any = dimension.distribution
    return list(dimension.choices.values()) if dimension.choices else [of.low, of.high]


def _word(key: str, value: Any) -> str:
    from .going_on import _value

    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value.lower() not in _NO_NAMES:
        return f"{key}={value}"
    return f"{key}={_value(value)}"


_NO_NAMES = ("null", "none", "true", "false", "yes", "no", "on", "off", "nan", "inf")  # that may be read as values


def sampler_of(text: Any, space: Mapping[str, Dimension]) -> Callable[[int, int], Any]:
    """`sampler(number, index)` of what a file says under `sampler`: seeded for a trial and a dimension of it."""
    import optuna

    from . import build
    from .study import seed_of

    own = dict(_target(text, "sampler", "TPESampler") or {"_target_": "optuna.samplers.TPESampler"})
    name = str(own.get("_target_", "")).rpartition(".")[2]
    seed = own.pop("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"sampler.seed={seed}: use a whole number of at least 0")
    if name == "GridSampler" and "search_space" not in own:
        own["search_space"] = {key: _every(dimension) for key, dimension in space.items()}
    made = OmegaConf.create(own, flags={"allow_objects": True})

    def sampler(number: int, index: int) -> Any:
        own_seed = seed_of(seed, number, index)
        more: dict[str, Any] = {}
        if name == "QMCSampler" and "independent_sampler" not in own:
            # Its first trial is drawn by that one; of one seed it would have one number throughout.
            more = {"independent_sampler": optuna.samplers.RandomSampler(own_seed)}
        return build.instantiate(made, "sampler", seed=seed if name in ONE_ORDER else own_seed, **more)

    try:
        _try(sampler, space)
    except ImportError as error:
        raise ValueError(f"sampler: {name} needs a package more: {error}") from None
    return sampler


def _target(text: Any, key: str, example: str) -> Any:
    if text is not None and not isinstance(text, Mapping):
        name = str(text).rpartition(".")[2] or example
        raise ValueError(f"{key}={text}: write {key}: {{_target_: optuna.{key}s.{name}}}")
    return text


def _try(sampler: Callable[[int, int], Any], space: Mapping[str, Dimension]) -> None:
    """Draw a few trials for nothing: Optuna imports what a sampler needs when that begins to look at results."""
    import optuna

    from .study import draw

    trials = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trials._thread_local.in_optimize_loop = True  # a sampler that has tried all stops the study
    for number in range(12):
        trial = trials.ask({key: dimension.distribution for key, dimension in space.items()})
        trials.tell(trial, float(number))
    trial = trials.ask()
    draw(trials, trials._storage.get_trial(trial._trial_id), space, sampler)


def _every(dimension: Dimension) -> list[Any]:
    """Every value of a dimension, as Optuna stores it; raises ValueError where there are infinitely many."""
    of: Any = dimension.distribution
    if dimension.choices:
        return list(dimension.choices)
    if of.step is None or of.log:
        raise ValueError(f"space.{dimension.key}: to try all values the sampler needs choices, or a step")
    return [of.low + i * of.step for i in range(round((of.high - of.low) / of.step) + 1)]


def budget(config: DictConfig, text: Mapping[str, Any], space: Mapping[str, Dimension]) -> int:
    """How many trials there are to be; of a sampler that tries all values no more than there are."""
    trials = text.get("trials", 24) if config.trials is None else config.trials
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials={trials}: use a whole number of at least 1")
    if str((text.get("sampler") or {}).get("_target_", "")).endswith(TRY_ALL):
        return min(trials, math.prod(len(_every(dimension)) for dimension in space.values()))
    return trials


def _aim(config: DictConfig, text: Mapping[str, Any]) -> tuple[str, str]:
    metric, direction = text.get("metric") or config.optimized_metric, text.get("direction", "minimize")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"hparams_search.direction={direction}: use minimize or maximize")
    if not isinstance(metric, str) or not metric.startswith(("val/", "train/", "test/")):
        raise ValueError(f"hparams_search.metric={metric}: name one of a run, like val/top1_error or val/loss")
    if text.get("pruner") and metric.startswith("test/"):
        raise ValueError(f"hparams_search.metric={metric} comes at a run's end; with it use pruner: null")
    return metric, direction


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_another(
    opened: Study,
    settings: Mapping[str, Any],
    space: Mapping[str, Dimension],
    metric: str,
    direction: str,
    folder: Path,
) -> None:
    """A sweep goes on with the settings and pictures that it began with; budget, sampler and pruner may change."""
    now: dict[str, Any] = {
        **{key: text_of(value) for key, value in settings.items()},
        "space": str({key: [of.distribution, list(of.choices.values())] for key, of in space.items()}),
        "metric": metric,
        "direction": direction,
    }
    before = opened.user_attrs.get(BEGUN_WITH)
    if before is None:
        opened.set_user_attr(BEGUN_WITH, now)
        return
    others = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if others:
        known = [f"{name} ({before.get(name)}, now {now.get(name)})" for name in others if name != "space"]
        raise ValueError(
            f"{folder} is a sweep with another {', '.join(known[:3]) or 'space'}; go on with the same, or begin one in "
            "another folder by output=sweeps/MINE"
        )


# For people


class Told:
    """Says what comes of the trials: a table that is drawn anew on a terminal, a line a trial elsewhere."""

    def __init__(self, what: Search, direction: str) -> None:
        self.what, self.direction = what, direction
        self.live = sys.stderr.isatty()
        self._drawn, self._drawn_at, self._ended, self._began = 0, 0.0, 0, time.monotonic()

    def ended(self, trial: FrozenTrial, reason: str, ran: bool = True) -> None:
        from .study import EPOCHS, ended

        self._ended += ran
        trials = self.what.study.get_trials(deepcopy=False)
        value = "" if trial.value is None else f" {trial.value:.4g}"
        said = {"COMPLETE": f"{self.what.metric}{value}", "FAIL": f"failed: {reason}"}.get(
            trial.state.name, f"pruned after {trial.user_attrs.get(EPOCHS)} epochs:{value}"
        )
        line = f"[{len(ended(trials))}/{self.what.trials}] trial {trial.number}: {said}{self._rest(trials)}"
        self.clear()
        print(line, file=sys.stderr, flush=True)

    def look(self, running: list[Attempt]) -> None:
        """Draw the table anew, twice a second."""
        if not self.live or time.monotonic() - self._drawn_at < 0.5:
            return
        lines = self.lines(running, self.what.study.get_trials(deepcopy=False))
        self.clear()
        print("\n".join(lines), file=sys.stderr, flush=True)
        self._drawn, self._drawn_at = len(lines), time.monotonic()

    def clear(self) -> None:
        """Take the table away."""
        if self._drawn:
            print(f"\x1b[{self._drawn}F\x1b[J", end="", file=sys.stderr, flush=True)
        self._drawn = 0

    def lines(self, running: list[Attempt], trials: Sequence[FrozenTrial]) -> list[str]:
        """The table: how many are in which state, those that run here, and the best."""
        import shutil

        from .study import best_of
        from .words import duration

        number = {name: sum(trial.state.name == name for trial in trials) for name in ("COMPLETE", "PRUNED", "FAIL")}
        going = sum(trial.state.name == "RUNNING" for trial in trials)
        found = [
            f"{self.what.trials} trials: {number['COMPLETE']} done, {going} running, {number['PRUNED']} pruned, "
            f"{number['FAIL']} failed{self._rest(trials)}"
        ]
        for attempt in running:
            epoch = "starting" if attempt.epoch is None else f"epoch {attempt.epoch}"
            now = duration(time.monotonic() - attempt.began)
            found.append(f"  trial {attempt.number}: {epoch}, {now}; {_shown(attempt.trial.params)}")
        best = best_of(trials, self.direction)
        if best is not None:
            found.append(f"  best: {self.what.metric} {best.value:.4g}, trial {best.number}; {_shown(best.params)}")
        width = shutil.get_terminal_size().columns - 1
        return [line[:width] for line in found]

    def _rest(self, trials: Sequence[FrozenTrial]) -> str:
        from .study import ended
        from .words import duration

        left = max(0, self.what.trials - len(ended(trials)))
        if not left or not self._ended:
            return ""
        return f"; {left} left, about {duration((time.monotonic() - self._began) / self._ended * left)}"


def _shown(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


# What is left behind


def _conclude(what: Search, folder: Path, direction: str, words: Sequence[str]) -> None:
    from .study import REASON, RUN

    trials = _write_table(what, folder)
    found = _write_best(what, folder, direction, words)
    if found is None:
        reasons = sorted({str(trial.user_attrs.get(REASON, "")) for trial in trials} - {""})
        why = f": {reasons[0]}" if reasons else ""
        print(f"no trial was completed; {folder}/{TABLE} says why{why}", file=sys.stderr)
        sys.exit(1)
    best, drawn = found
    command = _command(words, drawn)
    print(f"best: trial {best.number}, {what.metric} {best.value:.6g}")
    for word in drawn:
        print(f"  {word}")
    print(f"all of it:  {folder}/{TABLE}")
    print(f"its run:    {os.path.normpath(folder / best.user_attrs[RUN])}")
    print(f"train with: {command}")
    name = _free_name(folder.name)
    kept = f"mkdir -p conf/experiment && cp -n {_in_shell(f'{folder}/{BEST}')} conf/experiment/{name}.yaml"
    print(f"or keep it: {kept} && spp train experiment={name}")


def _write_best(
    what: Search, folder: Path, direction: str, words: Sequence[str]
) -> tuple[FrozenTrial, list[str]] | None:
    """Write the settings of the best trial as an experiment; gives it and what was drawn for it, if there is one."""
    from .study import best_of
    from .whole import write_whole

    best = best_of(what.study.get_trials(deepcopy=False), direction)
    if best is None:
        return None
    drawn = [_word(key, what.space[key].value(stored)) for key, stored in best.params.items()]
    about = [f"Trial {best.number} of {folder}: {what.metric} {best.value!r}.", _command(words, drawn)]
    write_whole(folder / BEST, experiment([*words, *drawn], about))
    return best, drawn


def _command(words: Sequence[str], drawn: Sequence[str]) -> str:
    return " ".join(_in_shell(word) for word in ["spp", "train", *words, *drawn])


def _free_name(name: str) -> str:
    """`name`, or, where an experiment is called so, the first of name_best, name_best2 … that is none."""
    taken = {path.stem for path in choices_of("experiment")}
    more = (f"{name}_best{number}" for number in range(2, 10**6))
    return next(each for each in (name, f"{name}_best", *more) if each not in taken)


def _write_table(what: Search, folder: Path) -> list[FrozenTrial]:
    """Write what came of the trials that have ended, and give them."""
    from .study import ended
    from .whole import write_whole

    trials = ended(what.study.get_trials(deepcopy=False))
    write_whole(folder / TABLE, table(trials, what.space))
    return trials


def _in_shell(word: str) -> str:
    import shlex

    return shlex.quote(word)


def table(trials: Sequence[FrozenTrial], space: Mapping[str, Dimension]) -> str:
    """The trials as CSV; nothing that differs between a sweep that was killed and one that was not."""
    from .study import EPOCHS, REASON, RUN

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "state", "value", *space, "epochs", "run", "reason"])
    for trial in trials:
        facts = [trial.user_attrs.get(name, "") for name in (EPOCHS, RUN, REASON)]
        drawn = [trial.params.get(key, "") for key in space]
        value = "" if trial.value is None else trial.value
        writer.writerow([trial.number, trial.state.name.lower(), value, *drawn, *facts])
    return text.getvalue()


def experiment(words: Sequence[str], about: Sequence[str]) -> str:
    """The words of a command as a file of conf/experiment."""
    known = groups()
    defaults: list[Any] = []
    values: dict[str, Any] = {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key == "experiment":
            defaults.insert(0, value)
        elif key in known:
            defaults.append({f"override /{key}": yaml.safe_load(value)})
        elif not word.startswith("~") and not key.startswith("hydra."):
            at = values
            *above, last = key.split(".")
            for part in above:
                at = at.setdefault(part, {})
            at[last] = OmegaConf.to_container(_parsed(word))["value"]  # type: ignore[call-overload,index]
    body = {**({"defaults": [*defaults, "_self_"]} if defaults else {}), **values}
    header = "".join(f"# {line}\n" for line in about)
    return f"# @package _global_\n{header}{yaml.safe_dump(body, sort_keys=False)}"


def _parsed(word: str) -> DictConfig:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OmegaConf.create({"value": OverridesParser.create().parse_override(word).value()})


# Weights & Biases


def write_wandb(
    folder: Path,
    text: Mapping[str, Any],
    space: Mapping[str, Dimension],
    words: Sequence[str],
    metric: str,
    direction: str,
    trials: int,
) -> Path:
    """Write the space as a sweep of W&B, whose agents start `spp train`."""
    from .whole import write_whole

    sampler = str((text.get("sampler") or {}).get("_target_", "")).rpartition(".")[2]
    method = {"RandomSampler": "random", "QMCSampler": "random", **dict.fromkeys(TRY_ALL, "grid")}.get(sampler, "bayes")
    loggers = [word for word in words if word.startswith("logger=") and "wandb" in word]
    fixed = [*(word for word in words if not word.startswith("logger=")), *(loggers or ["logger=wandb"])]
    sweep: dict[str, Any] = {
        "name": folder.name,
        "method": method,
        "metric": {"name": metric, "goal": direction},
        "run_cap": trials,
        "parameters": {key: parameter(dimension, method) for key, dimension in space.items()},
        "command": ["${env}", "spp", "train", *fixed, "${args_no_hyphens}"],
    }
    pruner = text.get("pruner") or {}
    if str(pruner.get("_target_", "")).endswith(("HyperbandPruner", "SuccessiveHalvingPruner")):
        eta = pruner.get("reduction_factor", 3 if "Hyperband" in pruner["_target_"] else 4)
        least = pruner.get("min_resource", 1)
        sweep["early_terminate"] = {"type": "hyperband", "min_iter": least if isinstance(least, int) else 1, "eta": eta}
    elif pruner:
        print("W&B stops runs early by Hyperband alone; the pruner of the space is left out", file=sys.stderr)
    path = folder / "wandb.yaml"
    write_whole(path, yaml.safe_dump(sweep, sort_keys=False, allow_unicode=True))
    return path


def parameter(dimension: Dimension, method: str) -> dict[str, Any]:
    """A dimension as a parameter of a W&B sweep; lists are given as the text that `spp train` reads."""
    of: Any = dimension.distribution
    if dimension.choices:
        return {"values": [_of_wandb(value) for value in dimension.choices.values()]}
    ends = {"min": of.low, "max": of.high}
    whole = isinstance(of.low, int)
    if method == "grid":
        return {"values": _every(dimension)}
    if of.log:
        quantum = {"distribution": "q_log_uniform_values", "q": 1} if whole else {"distribution": "log_uniform_values"}
        return {**quantum, **ends}
    if of.step is None or (whole and of.step == 1):
        return {"distribution": "int_uniform" if whole else "uniform", **ends}
    if abs(of.low / of.step - round(of.low / of.step)) > 1e-9:  # W&B rounds to multiples of q, whatever the lowest is
        return {"values": _every(dimension)}
    return {"distribution": "q_uniform", **ends, "q": of.step}


def _of_wandb(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else _word("", value)[1:]


def main(arguments: list[str] | None = None) -> None:
    """The door; a word that is no key=value names the space."""
    named, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    if len(named) > 1:
        fail("sweep", f"{' '.join(named)}: one space at a time")
    if {"-m", "--multirun"} & set(others):
        fail("sweep", "-m: a grid is spp train -m; a sweep has its trials by trials=…")
    others = ["wandb=true" if word == "--wandb" else word for word in others]
    open_door("sweep", run, [*others, *(f"hparams_search={name}" for name in named)])


if __name__ == "__main__":
    main()
