"""`spp log`: write the dashboard of runs anew, from their histories."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from yaml import YAMLError

from .door import key_of, names_apart, open_door, quoted

# What of its place on a dashboard a run keeps. Of the other loggers `name` is a part of a path.
KEPT = {"WandbLogger": ("project", "entity", "group", "job_type", "name", "tags", "notes", "media")}


def run(config: DictConfig) -> None:
    """Everything that `spp log` does with a config."""
    from . import build, dashboards
    from .going_on import chosen, settings_of
    from .results import read_results
    from .resume import read_history
    from .run import run_folder

    build.quieten()
    hydra: Any = HydraConfig.get()
    if not config.logger:
        raise ValueError("logger: nothing chosen; give one, like logger=tensorboard")
    folders = [run_folder(path) for path in ([config.run] if isinstance(config.run, str) else config.run)]
    for folder in folders:  # all of them, before anything is removed
        if not read_history(folder):
            raise ValueError(f"{folder / 'history.jsonl'}: no step is in it yet; name a run that has been trained")
    for folder in folders:
        rows, whole = read_history(folder), run_config(folder, config)
        about: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # as it stands: it is resolved
        with read_write(hydra), open_dict(hydra):  # the loggers write where this says
            hydra.runtime.output_dir = str(folder.absolute())
            hydra.runtime.choices = choices(folder)  # by which a run is named
        results = read_results(folder)
        errors = dashboards.errors_of(results) if results.get("epochs") == rows[-1]["epoch"] + 1 else {}
        ended, typed = bool(results), chosen(settings_of(folder) or [])
        for name, one in whole.logger.items():
            logger = build.build_logger(one, str(name), folder)
            try:
                look = dashboards.rebuild(logger, rows, about, folder, errors, typed, ended)
            finally:
                dashboards.close([logger])
            print(f"{folder}: {len(rows):,} lines of its history to {name}; look: {look}")
        if not ended:
            print(f"{folder}: has not ended; if it is in training now, do this again when it has", file=sys.stderr)


def run_config(folder: Path, config: DictConfig) -> DictConfig:
    """The config of the run `folder`, but with the loggers that `config` names.

    What the run itself called its place on a dashboard, `KEPT`, holds where the command line says nothing else. Nothing
    that somebody's run folder names is built, and no file but those of the run folder is written.
    """
    path = folder / "config.yaml"
    own = OmegaConf.load(path)
    assert isinstance(own, DictConfig)
    # spp train writes what all is, not what it is to be worked out from.
    if "${" in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{path}: holds ${{…}}, so that it is no config that spp train has written")
    before = own.get("logger") or {}
    own.logger = OmegaConf.to_container(config.logger)
    said = {key_of(word) for word in HydraConfig.get().overrides.task}
    for name, one in own.logger.items():
        for key, value in (before.get(name) or {}).items():
            plain = isinstance(value, str | int) or (
                isinstance(value, ListConfig) and all(isinstance(v, str) for v in value)
            )
            kept = KEPT.get(str(one.get("_target_")).rpartition(".")[2], ("media",))
            if key in kept and plain and not {key, f"logger.{name}.{key}"} & said:
                one[key] = value
    for key in ("name", "tags"):
        own[key] = own.get(key) if config[key] is None else config[key]
    return own


def choices(folder: Path) -> dict[str, str]:
    """Which file of each config group the run of `folder` was composed of; nothing where that cannot be read."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "hydra.yaml"))
        chosen = found["hydra"]["runtime"]["choices"]
        return {str(group): str(choice) for group, choice in chosen.items() if "${" not in str(choice)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError):
        return {}


def main(arguments: list[str] | None = None) -> None:
    """The door; words that name a folder or are no key=value are run folders."""
    folders, others = names_apart(sys.argv[1:] if arguments is None else arguments)
    named = [f"run=[{','.join(map(quoted, folders))}]"] if folders else []
    open_door("log", run, [*others, *named])


if __name__ == "__main__":
    main()
