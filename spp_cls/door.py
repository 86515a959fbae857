"""The door: command line → config. Hydra reads it; what is wrong with it is said here, in a line, before all else."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .ranks import same_words
from .run import how_to_go_on, is_disk_full

Program = Callable[[DictConfig], Any]

# Names that people bring from the well-known Lightning + Hydra templates, and what is meant here.
HINTS = {
    "task_name": "name",
    "paths.data_dir": "data.root",
    "paths.log_dir": "hydra.run.dir",
    "paths.output_dir": "hydra.run.dir",
    "data.data_dir": "data.root",
    "datamodule": "data",
    "datamodule.batch_size": "data.batch_size",
    "data.train_val_test_split": "data.layout.val_share and data.layout.test_share",
    "model.optimizer": "optimizer",
    "model.optimizer.lr": "optimizer.lr",
    "model.optimizer.weight_decay": "optimizer.weight_decay",
    "model.scheduler": "schedule",
    "model.compile": "compile",
    "model.net": "model",
    "model.lr": "optimizer.lr",
    "model.learning_rate": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "epochs": "trainer.max_epochs",
    "max_epochs": "trainer.max_epochs",
    "batch_size": "data.batch_size",
    "trainer.gpus": "trainer.devices",
    "scheduler": "schedule",
    "extras.print_config": "--cfg job --resolve",
    "extras.enforce_tags": "tags",
    "img_size": "data.region",
    "ckpt": "ckpt_path",
    "resume_from": "ckpt_path",
    "levels": "model.levels",
    "size": "sizes",
}


def register_resolvers() -> None:
    """What the configs compute by.

    `${px:180,${data.region}}`: 180 px at a region of 224, in proportion else. `${choice:model}`: which file of the
    group was chosen. `${run_id:}`: eight hex digits, the same throughout a command. `${choices:train}` and
    `${settings:train}`: what --help says, and `${choices_of:table}` of a group alone. `${wandb:NAME,a}`: WANDB_NAME,
    else a. `${readable:${name},${seed}}`: what a run is called on a dashboard. `${pick:${model.name},{zf5:70},90}`: 70
    for zf5, else 90.
    """
    OmegaConf.register_new_resolver("choices", help_on_choices, replace=True)
    OmegaConf.register_new_resolver("choices_of", _help_on_group, replace=True)
    OmegaConf.register_new_resolver("settings", help_on_settings, replace=True)
    OmegaConf.register_new_resolver("px", lambda size, region: round(size * region / 224), replace=True)
    OmegaConf.register_new_resolver("pick", lambda key, values, other: values.get(key, other), replace=True)
    OmegaConf.register_new_resolver("choice", _choice, replace=True)
    OmegaConf.register_new_resolver("wandb", _of_wandb, replace=True)
    OmegaConf.register_new_resolver("readable", _readable, replace=True)
    OmegaConf.register_new_resolver("run_id", lambda: uuid.uuid4().hex[:8], use_cache=True, replace=True)


_choices_of_command: dict[str, str] = {}  # Hydra names the folder of a grid before its own choices can be asked for


def _choice(group: str) -> str:
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else _choices_of_command
    return str(choices.get(group, group))


def _of_wandb(name: str, default: Any = None) -> Any:
    """What the environment says of W&B, else `default`; tags are a list, and those of the config come first."""
    value = os.environ.get(f"WANDB_{name}")
    if name == "TAGS":
        return default or [tag.strip() for tag in (value or "").split(",") if tag.strip()]
    return value or default


def _readable(name: str, seed: Any) -> str:
    """experiment-model-seed; without an experiment, or where a name was typed, that in its place."""
    experiment, model = _choice("experiment"), _choice("model")
    if experiment not in ("experiment", "None", "null") and name == f"{_choice('data')}-{model}":
        name = f"{experiment}-{model}"
    return f"{name}-{seed}"


def conf_folder() -> Path:
    """Where the configs lie: in the installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here / "conf", here.parent / "conf") if folder.is_dir())


def help_on_choices(verb: str) -> str:
    """The config groups of `verb`, each choice with the first line of its file; the default has a star."""
    return "\n".join(_help_on_group(group, default) for group, default in _groups_of(verb).items())


def _help_on_group(group: str, default: str | None = None) -> str:
    lines = [group]
    for path in sorted((conf_folder() / group).glob("*.yaml")):
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        about = next((line for line in comments if not line.startswith("@package")), "")
        if path.stem != "base":
            lines.append(f"  {'*' if path.stem == default else ' '} {group}={path.stem:<20} {about}".rstrip())
    return "\n".join(lines)


def _groups_of(verb: str) -> dict[str, str | None]:
    entries = OmegaConf.to_container(OmegaConf.load(conf_folder() / f"{verb}.yaml").defaults)
    assert isinstance(entries, list)
    if "train" in entries:
        return _groups_of("train")
    chosen = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    return {str(group): default for group, default in chosen if not str(group).startswith("override")}


def help_on_settings(verb: str) -> str:
    """The body of conf/<verb>.yaml, comments and all."""
    text = (conf_folder() / f"{verb}.yaml").read_text(encoding="utf-8")
    body = text.partition("\n\n")[2].partition("\nhydra:\n")[0].strip()
    return body.replace("$", "$$")  # Hydra fills in what a dollar begins


def open_door(verb: str, program: Program, arguments: list[str]) -> None:
    """Run `program` on the config `verb` of the command line `arguments`, as Hydra would.

    A `conf` folder in the working folder adds to ours, and modules of the working folder can be named by `_target_`.
    The user's mistakes end with one line and exit code 2; HYDRA_FULL_ERROR=1 gives the traceback.
    """
    from .going_on import go_on

    register_resolvers()
    sys.path.append(os.getcwd())  # last: a folder of somebody else's may hold a torch.py
    _typed[:] = sys.argv
    program_and_verb = sys.argv[: len(sys.argv) - len(arguments)]
    try:
        # Hydra has no null for a group.
        arguments = [f"{word[:-4]}none" if word in ("logger=null", "callbacks=null") else word for word in arguments]
        arguments = [word for word in arguments if word not in ("experiment=null", "debug=null", "hparams_search=null")]
        arguments = [*arguments, *own_conf(arguments)]
        arguments = _settings_first(arguments)
        if verb == "train" and not _only_asks(arguments):
            arguments = _settings_first(same_words(arguments, go_on))
        if not _only_asks(arguments):
            check(verb, arguments)
    except ValueError as error:
        fail(verb, error)

    def task(config: DictConfig) -> Any:
        sys.argv = [*program_and_verb, *arguments]  # what Lightning starts further ranks with
        try:
            with one_line(verb, Path(HydraConfig.get().runtime.output_dir)):
                return program(config)
        finally:
            _leave_nothing(Path(HydraConfig.get().runtime.output_dir))

    sys.argv = [sys.argv[0], *arguments]
    if {"-m", "--multirun"} & set(arguments):
        from .grid import register

        register()
    try:
        hydra.main(config_path=str(conf_folder()), config_name=verb, version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:  # --help with a mistake in what stands beside it
        fail(verb, _explain(verb, [], str(error)))


@contextlib.contextmanager
def one_line(verb: str, folder: Path) -> Iterator[None]:
    """What the user can mend ends the program `verb`, which writes to `folder`, with a line; all else is raised."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        if isinstance(error, ValueError):
            fail(verb, error)
        if is_disk_full(error):
            fail(verb, _on_full_disk(error, folder), code=1)
        if isinstance(error, PermissionError):
            fail(verb, f"{error.filename}: cannot be written, or read ({error.strerror})")
        if type(error).__name__ != "MisconfigurationException":
            raise
        fail(verb, error)


def check_number(key: str, value: Any, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`; null is the program's own choice."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{key}={value}: use a whole number of at least {least}")


def check_file(key: str, value: Any) -> None:
    """Refuse what cannot be a file to write to; null is the program's own choice."""
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}={value}: takes a file, like {key}=mine.txt")
    if Path(value).is_dir():
        raise ValueError(f"{key}={value}: is a folder; name a file")
    _check_place(key, value, Path(value).parent, True)


def check_folder(key: str, value: Any, to_write: bool = True) -> None:
    """Refuse what cannot be a folder to write to; null is the program's own choice."""
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key}={value}: takes a folder, like {key}=mine")
    _check_place(key, value, Path(value), to_write)


def _check_place(key: str, value: str, folder: Path, to_write: bool) -> None:
    there = next(path for path in (folder, *folder.parents, Path()) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{key}={value}: {there} is a file; name another place")
    if to_write and not os.access(there, os.W_OK):
        raise ValueError(f"{key}={value}: {there} cannot be written; name another place")


def typed() -> list[str]:
    """The command as it was typed, before anything was put to it."""
    return list(_typed)


_typed: list[str] = []


def fail(verb: str, error: BaseException | str, code: int = 2) -> NoReturn:
    """One line on standard error, and the exit code: 2 for what the user can mend in the command."""
    print(f"spp {verb}: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def _on_full_disk(error: Exception, folder: Path) -> str:
    """A checkpoint says itself what did not fit; of all else it is known where."""
    if str(error).startswith("disk full: "):
        return str(error)
    return f"disk full: {shutil.disk_usage(folder).free / 1e6:.0f} MB free at {folder}{how_to_go_on(folder)}"


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean …?` for the word that is nearest, or nothing."""
    words = [str(w) for w in words]
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def _nearest_key(wrong: str, keys: list[str]) -> str:
    """The key whose last part is nearest, of these the one whose whole is; else the one whose whole is nearest."""
    keys = [key for key in keys if not key.rpartition(".")[2].startswith("_")]
    top = difflib.get_close_matches(wrong, [key for key in keys if "." not in key], n=1, cutoff=0.6)
    if top and "." not in wrong:
        return f"; did you mean {top[0]}?"
    last = wrong.rpartition(".")[2]
    parts = difflib.get_close_matches(last, {key.rpartition(".")[2] for key in keys}, n=1, cutoff=0.75)
    same = [key for key in keys if parts and key.rpartition(".")[2] == parts[0]]
    best = difflib.get_close_matches(wrong, same or keys, n=1, cutoff=0.0 if same else 0.75)
    return f"; did you mean {best[0]}?" if best else ""


def own_conf(arguments: list[str]) -> list[str]:
    own = Path.cwd() / "conf"
    if not own.is_dir() or own.resolve() == conf_folder().resolve():
        return []
    if any("hydra.searchpath" in argument for argument in arguments):
        return []
    return [f"hydra.searchpath=[{quoted(f'file://{own}')}]"]


def searched(sources: Iterable[Any]) -> list[str]:
    """The word by which another process finds the configs that this one found, of `hydra.runtime.config_sources`."""
    own = [f"{each.schema}://{each.path}" for each in sources if each.provider not in ("hydra", "main", "schema")]
    return [f"hydra.searchpath=[{','.join(map(quoted, own))}]"] if own else []


def quoted(path: str | Path) -> str:
    """`path` as Hydra reads it back, whatever letters are in it."""
    # A backslash is itself but before a quote, where it must be doubled, and before a dollar, where it hides that.
    text = re.sub(r"(\\*)('|\Z)", lambda end: 2 * end[1] + end[2].replace("'", "\\'"), str(path))
    return "'" + text.replace("${", "\\${") + "'"


def names_apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Of the words of a command line those that name a file or are no key=value, and the others."""
    names: list[str] = []
    others = list(arguments)
    parsed, unknown = get_args_parser().parse_known_args(others)  # it knows the options that take the word behind them
    for word in [*parsed.overrides, *(word for word in unknown if not word.startswith("-"))]:
        if not (word.startswith(("+", "~")) or "=" in word) or Path(word).exists():
            others.remove(word)
            names.append(word)
    return names, others


def _settings_first(arguments: list[str]) -> list[str]:
    """Hydra reads no setting that stands behind an option."""
    parsed, unknown = get_args_parser().parse_known_args(arguments)
    settings = [*parsed.overrides, *(word for word in unknown if not word.startswith("-"))]
    options = list(arguments)
    for word in settings:
        options.remove(word)
    return [*settings, *options]


def _only_asks(arguments: list[str]) -> bool:
    asks = ("--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc")
    return any(argument.split("=")[0] in asks for argument in arguments)


def check(verb: str, arguments: list[str]) -> None:
    """Compose once beforehand, so that what is wrong can be said in one line with the nearest right word."""
    parsed, unknown = get_args_parser().parse_known_args(arguments)
    flags = [word for word in unknown if word.startswith("-")]
    if flags:
        raise ValueError(f"{flags[0]}: no such option; settings are given as key=value, see spp {verb} --help")
    words = [*parsed.overrides, *unknown]
    for word in words:
        if "=" not in word and not word.startswith("~"):
            raise ValueError(f"{word}: settings are given as key=value, see spp {verb} --help")
    overrides = _parse(words)
    if parsed.config_dir:
        more = quoted(f"file://{Path(parsed.config_dir).resolve()}")
        place = next((i for i, word in enumerate(words) if word.startswith("hydra.searchpath=[")), None)
        if place is None:
            words.append(f"hydra.searchpath=[{more}]")
        else:
            words[place] = f"{words[place][:-1]},{more}]"  # of two, Hydra would read the first alone
    sweeps = {i: _choices(o) for i, o in enumerate(overrides) if o.is_sweep_override()}
    if sweeps and not parsed.multirun:
        one = overrides[next(iter(sweeps))].input_line
        raise ValueError(f"{one}: several values; for a run each add -m, for a list write [ ] round them")
    first = [sweeps[i][0] if i in sweeps else word for i, word in enumerate(words)]
    name = parsed.config_name or verb
    _compose_or_explain(name, first, overrides)
    for i, choices in sweeps.items():
        for choice in choices[1:]:
            _compose_or_explain(name, [choice if j == i else word for j, word in enumerate(first)], overrides)


def _check_types(config: DictConfig, defaults: DictConfig) -> None:
    """A number stays a number, a list a list: else the mistake would show up deep in somebody's code."""
    for key in dotted(defaults):
        before, now = (OmegaConf.select(c, key, throw_on_resolution_failure=False) for c in (defaults, config))
        if before is None or now is None or _is(OmegaConf.is_interpolation, config, key):
            continue
        if key == "trainer.devices" or (key.startswith("trainer.") and isinstance(before, bool)):
            continue  # auto, [0, 1], a number of batches, warn
        if isinstance(before, ListConfig) and not OmegaConf.is_config(now):
            raise ValueError(f"{key}={now}: takes a list, like [{', '.join(map(str, before))}]")
        if isinstance(before, bool) and not isinstance(now, bool):
            raise ValueError(f"{key}={now}: takes true or false")
        if isinstance(before, int | float) and not isinstance(now, int | float):
            raise ValueError(f"{key}={now}: takes a number, like {before}")


def _parse(words: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    overrides = []
    for word in words:
        try:
            overrides.append(parser.parse_override(word))
        except HydraException as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"{word}: cannot be read as key=value ({line}); quote what has spaces or commas") from None
    return overrides


def _choices(override: Override) -> list[str]:
    if not override.is_choice_sweep() and not override.is_range_sweep():
        return [f"{override.get_key_element()}={override.get_value_element_as_str()}"]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def compose(name: str, words: Sequence[str], keep_hydra: bool = False) -> DictConfig:
    """The config `name` with the settings `words`, and which file of each group it took known to `${choice:…}`."""
    config = copy.deepcopy(_composed(name, tuple(words)))
    _choices_of_command.update({str(k): str(v) for k, v in config.hydra.runtime.choices.items()})
    with open_dict(config):
        if not keep_hydra:
            del config["hydra"]
    return config


@functools.lru_cache(maxsize=64)  # what is typed is composed to be checked, and again to be used
def _composed(name: str, words: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name=name):
        return hydra.compose(name, list(words), return_hydra_config=True)


def torn(error: yaml.MarkedYAMLError) -> str:
    """A line on a file that is no YAML."""
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a config"
    return f"{where}: is no YAML: {error.problem}; quote what has brackets, colons or commas"


def _compose_or_explain(name: str, words: list[str], overrides: list[Override]) -> None:
    try:
        config = compose(name, words)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(_explain(name, words, str(error))) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(torn(error)) from None
    except RecursionError:
        raise ValueError("defaults: a file of conf/ is among its own defaults, by itself or by others") from None
    of_groups = {*groups(), "hydra.searchpath"}
    _check_types(config, compose(name, [word for word in words if key_of(word) in of_groups]))
    missing = [key for key in dotted(config) if _is(OmegaConf.is_missing, config, key)]
    if missing and name != "sweep":  # which may draw it
        raise ValueError(f"{missing[0]} has no value: give one, like {missing[0]}=…")
    added = [o.key_or_group.partition(".")[0] for o in overrides if o.is_add() or o.is_force_add()]
    known = set(compose(name, [])) if added else set()
    for key in added:
        if key not in known and key not in ("hydra", *groups()):
            raise ValueError(f"+{key}: nothing here reads that key{nearest(key, known)}")


def key_of(word: str) -> str:
    """The key of the word of a command line that sets it."""
    return word.lstrip("+~").partition("=")[0]


def _explain(name: str, words: list[str], message: str) -> str:
    """Hydra's message as one line, with the nearest right word."""
    group = re.search(r"Could not (?:find|load) '([^']+)'", message) or re.search(r"'([^']+)' not found", message)
    if group and "/" in group[1]:
        kind, _, option = group[1].rpartition("/")
        listed = {path.stem for path in choices_of(kind)} | set(re.findall(r"^\t(\w+)$", message, re.MULTILINE))
        options = sorted(listed - {"base"})
        hint = nearest(option, options) or "; choose one"
        return f"{kind}={option}: there is no {kind} of that name{hint} ({', '.join(options)})"
    twice = re.search(r"Multiple values for (\w+)", message)
    if twice:
        return f"{twice[1]}: has a choice already; write {twice[1]}=…, without the plus"
    null = [word for word in words if word.partition("=")[0] in groups() and word.endswith("=null")]
    if null and "Config group override" in message:
        return f"{null[0]}: something must be chosen, see spp {name} --help"
    key = (
        re.search(r"Could not override '([^']+)'", message)
        or re.search(r"Key '([^']+)' is not in", message)
        or re.search(r"Could not delete from config. '([^']+)' does not exist", message)
    )
    if key:
        full = re.search(r"full_key: (\S+)", message)
        wrong = key[1].partition("@")[0]
        wrong = full[1] if full and full[1].endswith(wrong) else wrong
        template = difflib.get_close_matches(wrong, HINTS, n=1, cutoff=0.9)
        if template:
            return f"{wrong}: there is no such key; here it is called {HINTS[template[0]]}"
        others = [word for word in words if key_of(word) != wrong]
        try:
            keys = dotted(compose(name, others))
        except (HydraException, OmegaConfBaseException):
            keys = dotted(compose(name, []))
        return f"{wrong}: there is no such key{_nearest_key(wrong, keys) or f'; see spp {name} --cfg job'}"
    return message.splitlines()[0]


def _is(what: Callable[[Any, str], bool], config: DictConfig, key: str) -> bool:
    folder, _, last = key.rpartition(".")
    holder = OmegaConf.select(config, folder) if folder else config
    return OmegaConf.is_config(holder) and bool(what(holder, last))  # the keys of a space have dots themselves


def choices_of(group: str) -> list[Path]:
    """The files of a config group, ours and those of the working folder."""
    return [path for conf in (conf_folder(), Path.cwd() / "conf") for path in sorted((conf / group).glob("*.yaml"))]


def groups() -> list[str]:
    """The config groups, ours and those of the working folder."""
    return [path.name for conf in (conf_folder(), Path.cwd() / "conf") for path in conf.glob("*") if path.is_dir()]


def dotted(config: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        keys.append(f"{prefix}{key}")
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += dotted(child, f"{prefix}{key}.")
    return keys


def _leave_nothing(folder: Path) -> None:
    """Remove the folder that Hydra made for a program that wrote nothing into it, and what is empty above in ours."""
    if HydraConfig.get().output_subdir and [path.name for path in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
    ours = [Path.cwd() / name for name in ("runs", "multiruns")]
    with contextlib.suppress(OSError):  # it is not empty
        if folder not in (Path.cwd(), *Path.cwd().parents):
            folder.rmdir()
        while any(folder.parent.is_relative_to(place) for place in ours):
            folder = folder.parent
            folder.rmdir()
