"""Which run a command goes on with, and in which words: its own settings, then those that are typed now."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .door import check, compose, dotted, key_of, quoted
from .ranks import job, place, restarted
from .run import newest_run, run_folder, started

OVERRIDES = Path(".hydra", "overrides.yaml")
# Keys of a foreign config, and words of a foreign command line, that Hydra takes for settings and nothing else.
_KEY = re.compile(r"(?!hydra\b)\w+(\.\w+)*", re.ASCII)
_WORD = re.compile(r"(~|\+{0,2})(?!hydra\b|(resume|ckpt_path|trust)=)[\w./@:]+(=.*)?", re.ASCII | re.DOTALL)
_settings: list[str] = []  # of the run that this command goes on with, if it does


def go_on(arguments: list[str]) -> list[str]:
    """The words of a command line, and before them those of the run that it goes on with, which is written on.

    That is `ckpt_path=` of a run folder, or last: the newest run; or, with `resume=auto`, and where torchrun or SLURM
    starts a job again (or torchrun anew, for one that has more or fewer machines now), the newest unfinished run of the
    same settings, if there is one. Raises ValueError.
    """
    _settings.clear()
    given = [argument for argument in arguments if argument.startswith("ckpt_path=")]
    value = given[-1].partition("=")[2].strip("\"'") if given else ""
    asked = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    own = [argument for argument in arguments if argument not in given]
    if asked[-1:] == ["auto"] and value not in ("", "null"):
        raise ValueError(f"resume=auto with ckpt_path={value}: give one of them")
    if value in ("", "null"):
        auto = asked[-1:] == ["auto"] or (not asked and restarted())
        folder = unfinished(settings_in(arguments)) if auto or (not asked and job()) else None
        if folder is None or not (auto or _about(folder).get("job") == job()):
            if asked[-1:] == ["auto"]:
                print("resume=auto: no unfinished run of these settings; a new one begins", file=sys.stderr)
            return _named(arguments)
        # What is typed here is what its run was started with, and so as trusted.
        return _words(folder, settings_in(own), [*own, "trust=true"], folder / "checkpoints" / "last.ckpt")
    if value == "best":
        raise ValueError("ckpt_path=best: best.ckpt is for testing; training goes on from ckpt_path=last")
    if value == "last":
        folder = newest_run(Path("runs"))
    elif Path(value).is_file() and not any((p / "config.yaml").is_file() for p in Path(value).parents[:2]):
        # A checkpoint by itself: its weights and position, and what is typed here.
        return [*_named(arguments), "trust=true"]
    else:
        folder = run_folder(value, "ckpt_path")
    checkpoint = Path(value) if Path(value).is_file() else folder / "checkpoints" / "last.ckpt"
    return _words(folder, settings_of(folder) or [], own, checkpoint)


def _words(folder: Path, before: list[str], own: list[str], checkpoint: Path) -> list[str]:
    given_anew = {word.partition("=")[0] for word in own}
    kept = [word for word in before if word.partition("=")[0] not in given_anew]
    _settings[:] = settings_in([*kept, *own])
    began = began_with(folder, before, {key_of(word) for word in own})
    # Hydra would write what is typed here into the folder before anybody has looked at it.
    here = f"ckpt_path={quoted(checkpoint)}", f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"
    return [*kept, *began, *own, *here]


def settings() -> list[str]:
    """What the run that this command goes on with is to be gone on with the next time."""
    return list(_settings)


def trained_with() -> list[str]:
    """The words that say what is trained: those of the run that this command goes on with, or those that are typed."""
    if _settings:
        return list(_settings)
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # ${…} as it stands
    return settings_in(typed)


def _named(arguments: list[str]) -> list[str]:
    """With several ranks the run folder has one name, which cannot depend on when each of them asks for it."""
    if place().ranks == 1:
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ValueError("-m under torchrun or srun: each rank would run a grid of its own; start its runs one by one")
    check("train", arguments)
    folder = compose("train", [word for word in arguments if not word.startswith("-")], keep_hydra=True).hydra.run.dir
    return [*arguments, f"hydra.run.dir={quoted(folder)}"]


def unfinished(wanted: list[str]) -> Path | None:
    """The run begun last of those that were started with `wanted`, can be gone on with, and have not ended."""
    folders = {path.parent.parent for path in Path("runs").glob("**/checkpoints/last.ckpt")}
    for folder in sorted(folders, key=lambda folder: (started(folder), folder.name), reverse=True):
        if not (folder / "results.json").is_file() and settings_of(folder) == wanted:
            return folder
    return None


def settings_of(folder: Path) -> list[str] | None:
    """What the run of `folder` was started with; None where that cannot be read: its config says it as well."""
    try:
        words = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return settings_in(map(str, words)) if isinstance(words, list) else None


def settings_in(words: Iterable[str]) -> list[str]:
    """Of the words of a command line those that say what is trained, and nothing that Hydra would run."""
    return [word for word in words if _WORD.fullmatch(word)]


def chosen(words: Iterable[str]) -> dict[str, str]:
    """Of the words of a command line what decides a result, key → value."""
    from .differences import decides

    pairs = ((key_of(word), word.partition("=")[2].strip("\"'")) for word in words if not word.startswith("~"))
    return {key: value for key, value in pairs if decides(key)}


# Defaults that have changed since


def began_with(folder: Path, before: list[str], given_anew: set[str]) -> list[str]:
    """The words that make of today's config of the words `before` the one that the run of `folder` began with.

    They are none unless a default has changed since; a run goes on with the settings that it has. Keys that are
    `given_anew`, and what lies under them, are left out.
    """
    stored = OmegaConf.load(folder / "config.yaml")
    assert isinstance(stored, DictConfig)
    try:
        now = compose("train", before)
    except (HydraException, OmegaConfBaseException, ValueError):
        return []  # what is wrong with the words is said when they are checked
    was, is_ = dict(_leaves(stored)), dict(_leaves(now))
    words = []
    for key, value in was.items():
        if not _KEY.fullmatch(key) or key in ("ckpt_path", "resume", "trust") or is_.get(key) is _LATER:
            continue
        if key == "data.root":
            value = _where_it_is(folder, value)
        if key not in is_ and OmegaConf.select(now, key) is None:
            words.append(f"+{key}={_value(value)}")
        elif is_.get(key, _LATER) != value:
            words.append(f"{key}={_value(value)}")
    gone = {_first_missing(stored, key) for key in is_ if key not in was}
    words += [f"~{key}" for key in sorted(gone) if key and is_.get(key) is not _LATER]
    return [word for word in words if not any(_lies_under(key_of(word), key) for key in given_anew)]


_LATER = object()  # the value of a key that is worked out when the run has its folder


def _leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    for key in dotted(config):
        parent, _, last = key.rpartition(".")
        node: Any = (OmegaConf.select(config, parent) if parent else config)._get_node(last)
        if isinstance(node, DictConfig) and len(node):
            continue
        if "hydra:" in str(node._value()):
            yield key, _LATER
        else:
            value = OmegaConf.select(config, key)
            yield key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _first_missing(stored: DictConfig, key: str) -> str:
    """Of `key` and what it lies under the topmost that `stored` has not, if it is an argument or one of several."""
    parts = key.split(".")
    for i in range(1, len(parts) + 1):
        above, path = ".".join(parts[: i - 1]), ".".join(parts[:i])
        holder = OmegaConf.select(stored, above) if above else stored
        if not isinstance(holder, DictConfig) or parts[i - 1] in holder:
            continue
        return path if "_target_" in holder or above in ("callbacks", "logger") else ""
    return ""


def _lies_under(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _where_it_is(folder: Path, root: Any) -> Any:
    """A path that was given in another working folder, where that is still there."""
    if not isinstance(root, str) or Path(root).exists():
        return root
    there = Path(_about(folder).get("folder", ""), root)
    return str(there) if there.exists() else root


def _about(folder: Path) -> dict[str, Any]:
    """What the run of `folder` wrote down of its surroundings."""
    try:
        about = json.loads((folder / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _value(value: Any) -> str:
    """`value` as Hydra reads it back."""
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return quoted(value) if isinstance(value, str) else "{}" if value == {} else repr(value)
