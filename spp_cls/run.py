"""The run folder: what a training run leaves behind, written and read here and nowhere else.

config.yaml       the whole config, resolved        history.jsonl   a line a step, a line an epoch
environment.json  command, commit, versions, hashes  timing.jsonl    where the time went
results.json      errors at the end, all tests       checkpoints/    last.ckpt, best.ckpt
tensorboard/      if that logger is on, as csv/,     evaluations/    what `spp evaluate` wrote
                  and wandb/ with wandb_id       media/           pictures and tables that dashboards show
events.jsonl      what happened to it: signals, resumes and what they changed
exports/          what `spp export` wrote              key             a hash of what decides its result
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .ranks import job

CHECKPOINTS = "checkpoints"
RESULTS, TIMING, KEY, LOCK = "results.json", "timing.jsonl", "key", "training.lock"
PATIENCE = 10.0
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # the second where there are quotas
_PACKAGES = (
    "spp_cls",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "pillow",
    "wandb",
)


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run: its folder, its config, and the checkpoint that was asked for."""

    folder: Path
    config: dict[str, Any]
    checkpoint: Path

    @property
    def results(self) -> dict[str, Any]:
        """What `results.json` holds; empty where there is none yet."""
        path = self.folder / RESULTS
        return json.loads(path.read_text()) if path.is_file() else {}


def run_folder(path: str | Path, key: str = "run") -> Path:
    """The run folder that `path`, given as `key`, is, or that the checkpoint `path` lies in."""
    given = Path(path)
    for folder in (given, *given.parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder
    reason = "does not exist" if not given.exists() else "holds no config.yaml, so it is no run folder"
    example = "runs/shapes-tiny/<date>_<time>_…"
    raise ValueError(f"{key}={given} {reason}; name a folder that spp train made, like {example}")


def find_checkpoint(path: str | Path, which: str = "last") -> Path:
    """A checkpoint file: `path` itself, or `last` or `best` of a run folder."""
    given = Path(path)
    if given.is_file():
        return given
    checkpoint = run_folder(given) / CHECKPOINTS / f"{which}.ckpt"
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} does not exist; the run has saved no {which!r} checkpoint")
    return checkpoint


def flat(config: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting of a config by its dotted key."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, config


def read_key(folder: Path) -> str:
    """The key of the run of `folder`; empty where it has none."""
    path = folder / KEY
    return path.read_text(errors="replace").strip() if path.is_file() else ""


def has_saved(folder: Path) -> bool:
    """Whether the run of `folder` can be gone on with."""
    return (folder / CHECKPOINTS / "last.ckpt").is_file()


def holds_a_run(folder: Path) -> bool:
    """Whether there is something in `folder` that a run which begins there would destroy."""
    return (folder / RESULTS).is_file() or has_saved(folder)


def how_to_go_on(folder: Path) -> str:
    """The end of a sentence: how the run of `folder` is gone on with; nothing where it has saved nothing."""
    return f"; go on with spp train ckpt_path={folder}" if has_saved(folder) else ""


def started(folder: Path) -> str:
    """When the run or sweep of `folder` was begun, as ISO 8601: by the folder's name, or else by its oldest file."""
    named = re.match(r"(\d{4}-\d\d-\d\d)_(\d\d)-(\d\d)-(\d\d)", folder.name)
    if named:
        return f"{named[1]}T{named[2]}:{named[3]}:{named[4]}"
    files = (folder / ".hydra" / "config.yaml", *folder.glob("*"))
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return datetime.fromtimestamp(min(times)).isoformat(timespec="seconds") if times else ""


def walk(place: Path, marked: str = "config.yaml") -> Iterator[Path]:
    """The run folders that `place` is, or that lie below it, of those that have the file `marked`."""
    for folder, folders, files in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if marked in files:
            folders.clear()  # what lies in a run folder is its own, like W&B's config.yaml
            yield Path(folder)


def newest_run(runs: Path) -> Path:
    """The run folder below `runs` that was begun last; raises ValueError where it has no checkpoint to go on from."""
    folders = sorted(walk(runs), key=lambda folder: (started(folder), folder.name))
    if not folders:
        raise ValueError(f"{runs}: no run there yet; name a run folder or a checkpoint")
    saved = [folder for folder in folders if has_saved(folder)]
    if folders[-1] not in saved:
        instead = f", like {saved[-1]}" if saved else ""
        raise ValueError(f"ckpt_path=last: the newest run, {folders[-1]}, has saved no checkpoint; name one{instead}")
    return folders[-1]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it came of, is that a disk or a quota is used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def note_event(folder: Path, event: str, **facts: Any) -> None:
    """Add a line to `events.jsonl`: what happened to a run from outside, and when (UTC)."""
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **facts}
    path = folder / "events.jsonl"
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a kill
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line, default=str) + "\n")


@contextlib.contextmanager
def in_training(folder: Path) -> Iterator[None]:
    """While this lasts no other process trains the run of `folder`; the system ends it with the process, however.

    Raises ValueError where another does, which is given `PATIENCE` seconds: it may be about to end.
    """
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=PATIENCE)
    except Timeout:
        about = folder / "environment.json"
        who = json.loads(about.read_text()) if about.is_file() else {}
        raise ValueError(
            f"{folder} is in training already, by process {who.get('process')} on {who.get('host')}; wait for it, or "
            "stop it"
        ) from None
    try:
        yield
    finally:
        held.release()


def is_in_training(folder: Path) -> bool:
    """Whether a process trains the run of `folder` now."""
    return is_held(folder / LOCK)


def is_held(lock: Path) -> bool:
    """Whether a living process holds the file `lock`."""
    if not lock.is_file():
        return False
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        return True
    held.release()
    return False


def digest(text: str) -> str:
    """A short hash to tell two configs apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def environment(command: list[str], config_yaml: str, index_digest: str) -> dict[str, Any]:
    """What a result depends on beside the config: command, commit, versions, machine, hashes."""
    import torch

    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": command,
        "job": job(),
        "host": platform.node(),
        "process": os.getpid(),
        "folder": os.getcwd(),
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD"),
        "spp_cls_commit": _git("-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "config_hash": digest(config_yaml),
        "index_hash": index_digest,
    }


def device_of(about: dict[str, Any]) -> str:
    """What the run was computed by of which `about` is the environment, as far as that says."""
    gpus = about.get("gpus")
    return str(about.get("device") or (gpus[0] if isinstance(gpus, list) and gpus else about.get("processor")) or "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def processor() -> str:
    """The name of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
