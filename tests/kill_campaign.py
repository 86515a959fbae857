"""Started by test_kill.py: kills what runs in child processes (SIGKILL), lets it go on, and looks at what came out.

    python tests/kill_campaign.py random PICTURES OUT KILLS
    python tests/kill_campaign.py hooks PICTURES OUT WAY EVERY
    python tests/kill_campaign.py torn FOLDER MB KILLS
    python tests/kill_campaign.py few PICTURES OUT FOLDER

random: for each way to train, once without a kill, then again and again with kills at random instants until there were
KILLS. hooks: a kill in every hook of a callback that a training calls and round every save, at its first, middle and
last time and at its first after a resume, or in each EVERYth of them. Every run must end with the same weights, bit for
bit, in memory, last.ckpt and best.ckpt, and the same history, byte for byte. torn: kills at random instants while
checkpoints of MB are saved into FOLDER; one must always be there, and whole. few: a few of hooks and
torn. Each prints a JSON line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from lightning import Callback, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from torch import nn  # noqa: E402

from spp_cls import schedules  # noqa: E402
from spp_cls.classifier import Classifier  # noqa: E402
from spp_cls.data import FullImage, MultiSizeDataModule  # noqa: E402
from spp_cls.data.layouts import folder  # noqa: E402
from spp_cls.data.sizes import alternating  # noqa: E402
from spp_cls.resume import BEST, LAST, AtomicCheckpointIO, History, ResumePoint  # noqa: E402
from spp_cls.train import train as fit_and_test  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

STEP, END = {"every_minutes": None, "every_steps": 1}, {"every_minutes": None}  # at each step, at the ends of epochs
RANDOM_WAYS: list[dict[str, Any]] = [
    {"num_workers": 0, "accumulation": 1, "save": {"every_minutes": 0}},
    {"num_workers": 2, "accumulation": 4, "save": STEP},
    {"num_workers": None, "cache": "raw", "accumulation": 1, "save": END, "ema": True},
    {"num_workers": "thread", "whole": True, "accumulation": 1, "save": STEP, "ema": True},
]
HOOK_WAYS: list[dict[str, Any]] = [
    {"num_workers": 0, "accumulation": accumulation, "save": save, "ema": ema, "val_sizes": (32, 26)}
    for accumulation, save, ema in (
        (1, STEP, True),
        (4, STEP, False),
        (1, {"every_minutes": None, "every_steps": 7}, False),  # in the middle of the second of three epochs alone
        (4, {"every_minutes": None, "every_steps": 7}, True),
        (1, END, True),
        (4, END, False),
    )
]
EPOCHS = 3
BEST_WEIGHTS = {"monitor": "val/top1_error", "mode": "min", "save_top_k": 1}  # as conf/callbacks/default.yaml has it
BEST_FILE = {"filename": "best", "auto_insert_metric_name": False, "enable_version_counter": False}

# All that a fit calls of a callback; the rest belongs to tests, to checks that are off, and to errors.
OTHERS = ("test", "predict", "sanity", "exception")
HOOKS = [
    name
    for name, member in vars(Callback).items()
    if callable(member) and not name.startswith("_") and not any(other in name for other in OTHERS)
]
SAVED_AT = [
    name
    for name in HOOKS
    if any(getattr(c, name) is not getattr(Callback, name) for c in (ModelCheckpoint, ResumePoint))
]
ON_RESUME = ["on_load_checkpoint", "load_state_dict"]  # called in no other run
SAVES = ["before a save", "in a save", "before the rename", "after the rename"]


class Point(NamedTuple):
    """An instant of a training: the `number`th time (from 1) of a hook, before or after all other callbacks."""

    hook: str  # or one of SAVES
    number: int
    after: bool = False  # the saving ones too
    resumed: bool = False  # in a run that was killed before, and goes on


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Reach(Callback):
    """Calls `reached` with the name of each hook of HOOKS that is called."""

    def __init__(self, reached: Callable[[str], None]) -> None:
        for name in HOOKS:
            setattr(self, name, partial(self._reach, name, reached))

    @property
    def state_key(self) -> str:
        return "Reach"

    def _reach(self, name: str, reached: Callable[[str], None], *_: Any, **__: Any) -> dict[str, int] | None:
        reached(name)
        return {"some": 1} if name == "state_dict" else None  # for nothing would be loaded else


class ReachLast(Reach, Checkpoint):
    """Is called after the other callbacks that save, which Lightning puts last."""


def reach_saves(reached: Callable[[str], None]) -> None:
    """From now on, in this process, call `reached` with the name of each instant of SAVES."""
    save, replace = torch.save, os.replace

    def torn_save(checkpoint: Any, file: Any) -> None:
        reached(SAVES[0])
        save(checkpoint, file)
        file.flush()
        whole = file.tell()
        file.truncate(whole // 2)
        reached(SAVES[1])
        file.seek(0)
        file.truncate(0)
        save(checkpoint, file)

    def watched_replace(source: Any, target: Any) -> None:
        if Path(target).suffix != ".ckpt":
            return replace(source, target)
        reached(SAVES[2])
        replace(source, target)
        reached(SAVES[3])

    torch.save, os.replace = torn_save, watched_replace


def train(pictures: str, out: Path, caches: str, way: dict[str, Any], *more: Callback) -> None:
    """Trains, from last.ckpt on where there is one; leaves hashes of all weights, EMA's among them, in `weights`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(8, 3)),
    )
    half = partial(schedules.step, milestones=(0.5,), factor=0.5)
    val_sizes = way.get("val_sizes", (32,))
    classifier = Classifier(net, partial(torch.optim.SGD, lr=0.1, momentum=0.9), half, val_sizes=val_sizes)
    datamodule = MultiSizeDataModule(
        pictures,
        folder,
        FullImage(32, 8, least=1) if way.get("whole") else partial(alternating, sizes=[26, 32]),
        batch_size=8,
        region=32,
        resize=36,
        val_sizes=val_sizes,
        num_workers=way["num_workers"],
        cache=way.get("cache"),
        cache_folder=caches,
    )
    checkpoints = out / "checkpoints"
    trainer = Trainer(
        accelerator="cpu",
        devices=way.get("ranks", 1),
        strategy="ddp" if "ranks" in way else "auto",
        max_epochs=EPOCHS,
        accumulate_grad_batches=way["accumulation"],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[
            *([EMAWeightAveraging(decay=0.9)] if way.get("ema") else []),
            History(out, every=3),
            ModelCheckpoint(checkpoints, **BEST_FILE, **BEST_WEIGHTS),
            ResumePoint(checkpoints, **way["save"]),
            *more,
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = checkpoints / LAST
    fit_and_test(classifier, datamodule, trainer, last if last.exists() else None, test=False)
    saved = [torch.load(checkpoints / name, weights_only=True)["state_dict"] for name in (LAST, BEST)]
    hashes = [digest(weights) for weights in (classifier.state_dict(), *saved)]
    (out / f"weights{trainer.global_rank or ''}").write_text(" ".join(hashes))


def digest(weights: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()


def outcome(out: Path) -> dict[str, str]:
    """Hashes of all that must be the same at the end of a run."""
    weights = zip(("weights", LAST, BEST), (out / "weights").read_text().split(), strict=True)
    return {**dict(weights), "history": hashlib.sha256((out / "history.jsonl").read_bytes()).hexdigest()}


def differences(out: Path, expected: dict[str, str]) -> list[str]:
    found = outcome(out)
    return [name for name in expected if found[name] != expected[name]]


def in_a_child(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Does `work` in a child, which is killed after so many seconds or kills itself; whether it came to the end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + (kill_after if kill_after is not None else 120)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status in (0, signal.SIGKILL), f"a child failed: {status}"
            return status == 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert kill_after is not None, "a child hung"
    return False


# At random instants


def random_campaign(pictures: str, out: Path, kills: int) -> dict[str, Any]:
    chance = random.Random(0)
    result: dict[str, Any] = {"kills": 0, "runs": 0, "different": []}
    for number, way in enumerate(RANDOM_WAYS):
        here, caches = out / str(number), str(out / "caches")
        began = time.monotonic()
        assert in_a_child(partial(train, pictures, fresh(here / "whole"), caches, way))
        seconds = time.monotonic() - began
        expected, killed = outcome(here / "whole"), 0
        while killed < kills:
            work = partial(train, pictures, fresh(here / "killed"), caches, way)
            while not in_a_child(work, chance.uniform(0.1 * seconds, 0.9 * seconds)):
                killed += 1
            different = differences(here / "killed", expected)
            if different:
                result["different"].append([number, *different])
            result["runs"] += 1
        result["kills"] += killed
    return result


def fresh(out: Path) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return out


# At each hook


def train_to(pictures: str, out: Path, way: dict[str, Any], point: Point) -> None:
    """Trains, and is killed at `point`."""
    times: Counter[str] = Counter()

    def reached(name: str) -> None:
        times[name] += 1
        if name == point.hook and times[name] == point.number:
            kill()

    reach_saves(reached)
    train(pictures, out, str(out / "caches"), way, ReachLast(reached) if point.after else Reach(reached))


def train_and_count(pictures: str, out: Path, way: dict[str, Any]) -> None:
    """Trains, and leaves how often each hook was called in the file `times`."""
    times: Counter[str] = Counter()
    reach_saves(lambda name: times.update([name]))
    train(pictures, out, str(out / "caches"), way, Reach(lambda name: times.update([name])))
    (out / "times").write_text(json.dumps(times))


def two_thirds(number: int) -> int:
    """In the second of three epochs, after its seventh step of eight."""
    return max(1, 2 * number // 3)


def points(times: dict[str, int]) -> list[Point]:
    """All at which a run is killed whose hooks are called so often."""
    found = []
    for hook in [*HOOKS, *SAVES]:
        for after in (False, True) if hook in SAVED_AT else (False,):
            if hook not in ON_RESUME:
                numbers = {1, two_thirds(times[hook]), times[hook]}
                found += [Point(hook, number, after) for number in sorted(numbers)]
            found.append(Point(hook, 1, after, resumed=True))
    return found


def hooks_campaign(pictures: str, out: Path, way: dict[str, Any], chosen: list[Point] | slice) -> dict[str, Any]:
    """A run for each point of `chosen`, or of this slice of all points."""
    assert in_a_child(partial(train_and_count, pictures, fresh(out / "whole"), way))
    expected, times = outcome(out / "whole"), json.loads((out / "whole" / "times").read_text())
    middle = Point("on_before_backward", two_thirds(times["on_before_backward"]))
    assert not in_a_child(partial(train_to, pictures, fresh(out / "before"), way, middle))
    result: dict[str, Any] = {"kills": 0, "hooks": {}, "alive": [], "different": []}
    for point in points(times)[chosen] if isinstance(chosen, slice) else chosen:
        killed = fresh(out / "killed")
        if point.resumed:
            shutil.copytree(out / "before", killed, dirs_exist_ok=True)
        if in_a_child(partial(train_to, pictures, killed, way, point)):
            result["alive"].append(point)
            continue
        assert in_a_child(partial(train, pictures, killed, str(killed / "caches"), way))
        result["kills"] += 1
        result["hooks"][point.hook] = result["hooks"].get(point.hook, 0) + 1
        different = differences(killed, expected)
        if different:
            result["different"].append([point, *different])
    return result


# While saving


def save_on_and_on(path: Path, mb: float) -> None:
    """Saves checkpoints of 1, 2, … in turn, each larger than the one before."""
    number = 0
    while True:
        number += 1
        tensors = [torch.full((int(mb * 1e6 / 8 / 4) + number,), float(number)) for _ in range(8)]
        AtomicCheckpointIO().save_checkpoint({"number": number, "tensors": tensors}, path)


def torn_campaign(out: Path, mb: float, kills: int) -> dict[str, Any]:
    chance = random.Random(0)
    path = fresh(out) / LAST
    began = time.monotonic()
    AtomicCheckpointIO().save_checkpoint({"tensors": [torch.zeros(int(mb * 1e6 / 4))]}, path)
    seconds = time.monotonic() - began
    path.unlink()
    result: dict[str, Any] = {"kills": 0, "absent": 0, "left_over": 0, "torn": [], "seconds_a_save": round(seconds, 3)}
    for _ in range(kills):
        if chance.random() < 0.1:
            path.unlink(missing_ok=True)
        before = path.is_file()
        assert not in_a_child(partial(save_on_and_on, path, mb), chance.uniform(0, 8 * seconds))
        result["kills"] += 1
        names = sorted(file.name for file in out.iterdir())
        result["left_over"] += f"{LAST}.tmp" in names
        if not set(names) <= {LAST, f"{LAST}.tmp"}:
            result["torn"].append(names)
        if not path.is_file():
            result["absent"] += 1
            if before:
                result["torn"].append("last.ckpt is gone")
            continue
        state = torch.load(path, weights_only=True)
        number, tensors = state["number"], state["tensors"]
        if not all(tensor.numel() == tensors[0].numel() and (tensor == number).all() for tensor in tensors):
            result["torn"].append(number)
    return result


FEW = [
    Point("on_fit_start", 1, resumed=True),  # where the history has been cut, and no step done
    Point("on_load_checkpoint", 1),
    Point("on_train_batch_end", 7, after=True),
    Point("on_validation_batch_end", 3),
    Point("on_train_epoch_end", 2, after=True),
    Point("in a save", 5),
]


def main(campaign: str, *arguments: str) -> None:
    if campaign == "random":
        result = random_campaign(arguments[0], Path(arguments[1]), int(arguments[2]))
    elif campaign == "hooks":
        way, every = int(arguments[2]), int(arguments[3])
        result = hooks_campaign(arguments[0], Path(arguments[1]), HOOK_WAYS[way], slice(way % every, None, every))
    elif campaign == "torn":
        result = torn_campaign(Path(arguments[0]), float(arguments[1]), int(arguments[2]))
    else:
        chosen = [point._replace(resumed=point.resumed or point.hook in ON_RESUME) for point in FEW]
        result = {
            "hooks": hooks_campaign(arguments[0], Path(arguments[1]), HOOK_WAYS[0], chosen),
            "torn": torn_campaign(Path(arguments[2]), 1, 5),
        }
    print(json.dumps({"script": "kill_campaign", "campaign": campaign, **result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
