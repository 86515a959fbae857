"""Started by test_kill.py: trains on two ranks, a process each, and kills either of them.

    python tests/rank_campaign.py kills PICTURES OUT KILLS
    python tests/rank_campaign.py change PICTURES OUT
    python tests/rank_campaign.py watch OUT

kills: at random instants one of the ranks is killed (SIGKILL); the other must end by itself, and with it all that they
had started; what goes on must end with the same bits. change: one rank, then two, then one again, of one run, without
dropout and in float64, against one rank throughout. watch: two ranks that compute nothing. Each prints a JSON line.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_campaign
import torch
from kill_campaign import STEP, differences, fresh, in_a_child, outcome
from lightning import Callback, Trainer
from torch import Tensor, distributed, nn

from spp_cls import schedules
from spp_cls.callbacks import Watch
from spp_cls.classifier import Classifier
from spp_cls.data import MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.resume import LAST, AtomicCheckpointIO, History, ResumePoint, read_history

WAYS: list[dict[str, Any]] = [
    {"ranks": 2, "num_workers": 0, "accumulation": 1, "save": STEP},
    {"ranks": 2, "num_workers": 1, "accumulation": 2, "save": {"every_minutes": None, "every_steps": 3}, "ema": True},
]
PATIENCE = 30  # seconds that the others have to end


def as_a_rank(work: Callable[[], Any], rank: int, ranks: int, port: int) -> int:
    """Starts `work` as a process of torchrun's would be started, in a group of its own; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "campaign"})
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def on_two_ranks(work: Callable[[], Any], victim: int | None = None, kill_after: float = 600) -> tuple[bool, float]:
    """Whether both came to the end, and how many seconds after the kill the last process was gone."""
    port = free_port()
    ranks = [as_a_rank(work, rank, 2, port) for rank in range(2)]
    began, codes, killed_at = time.monotonic(), {}, 0.0
    while len(codes) < 2:
        for rank in ranks:
            if rank not in codes:
                ended, status = os.waitpid(rank, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if victim is not None and not killed_at and not codes and now - began > kill_after:
            os.kill(ranks[victim], signal.SIGKILL)
            killed_at = now
        assert not killed_at or now - killed_at < PATIENCE, "a rank hung when the other was killed"
        assert now - began < 600, "two ranks hung"
        time.sleep(0.005)
    if set(codes.values()) == {0}:  # it may have ended before the kill came
        return True, 0.0
    assert killed_at, f"a rank failed: {codes}"
    # The other may have been at its end already.
    assert codes[ranks[victim or 0]] == -signal.SIGKILL and codes[ranks[1 - (victim or 0)]] in (0, 1), codes
    while any(map(is_alive, ranks)):  # what they had started
        assert time.monotonic() - killed_at < PATIENCE, "a process was left"
        time.sleep(0.005)
    return False, time.monotonic() - killed_at


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kills(pictures: str, out: Path, wanted: int) -> dict[str, Any]:
    chance = random.Random(0)
    result: dict[str, Any] = {"kills": [0, 0], "runs": 0, "different": [], "slowest": 0.0}
    for number, way in enumerate(WAYS):
        here, caches = out / str(number), str(out / "caches")

        def train(folder: Path, way: dict[str, Any] = way, caches: str = caches) -> None:
            kill_campaign.train(pictures, folder, caches, way, Watch(folder))

        began = time.monotonic()
        assert on_two_ranks(partial(train, fresh(here / "whole")))[0]
        seconds, killed = time.monotonic() - began, 0
        expected = outcome(here / "whole")
        while killed < wanted / len(WAYS):
            fresh(here / "killed")
            while True:
                victim = chance.randrange(2)
                after = chance.uniform(0.2 * seconds, 0.95 * seconds)
                ended, gone_after = on_two_ranks(partial(train, here / "killed"), victim, after)
                if ended:
                    break
                killed += 1
                result["kills"][victim] += 1
                result["slowest"] = max(result["slowest"], round(gone_after, 2))
            same = (here / "killed" / "weights").read_text() == (here / "killed" / "weights1").read_text()
            different = differences(here / "killed", expected) + ([] if same else ["ranks"])
            if different:
                result["different"].append([number, *different])
            result["runs"] += 1
    return result


# Another number of ranks


class InDouble(nn.Module):
    """Five convolutions' worth of nothing: a net in float64, without dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        ).double()

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layers(images.double())
        return out


class Received(Callback):
    """Writes down the pictures of each step, of each rank in its place."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        marks = [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16] for image in batch[0]]
        row = {"step": trainer.global_step, "rank": trainer.global_rank, "px": batch[0].shape[-1], "pictures": marks}
        with (self.out / f"received{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(row) + "\n")


class StopAfter(Callback):
    """Ends the process after the save of this step, as a kill would."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os._exit(0)


def train_in_double(pictures: str, out: Path, ranks: int, stop_after: int | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    half = partial(schedules.step, milestones=(0.5,), factor=0.5)
    classifier = Classifier(InDouble(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), half, val_sizes=(32,))
    datamodule = MultiSizeDataModule(
        pictures, folder, partial(alternating, sizes=[26, 32]), batch_size=8, region=32, resize=36, num_workers=0
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=5,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[Received(out), StopAfter(stop_after), History(out), ResumePoint(out / "checkpoints", None, 1)],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = out / "checkpoints" / LAST
    trainer.fit(classifier, datamodule=datamodule, ckpt_path=last if last.exists() else None, weights_only=True)


def stream(out: Path) -> list[tuple[Any, ...]]:
    """Step by step, of all ranks together: size and pictures."""
    rows = [json.loads(line) for path in sorted(out.glob("received*")) for line in path.read_text().splitlines()]
    steps = sorted({row["step"] for row in rows})
    return [
        (
            step,
            *{row["px"] for row in rows if row["step"] == step},
            {picture for row in rows if row["step"] == step for picture in row["pictures"]},
        )
        for step in steps
    ]


def change(pictures: str, out: Path) -> dict[str, Any]:
    one, changed = fresh(out / "one"), fresh(out / "changed")
    assert in_a_child(partial(train_in_double, pictures, one, 1, None))
    assert in_a_child(partial(train_in_double, pictures, changed, 1, 6))
    on_two_ranks(partial(train_in_double, pictures, changed, 2, 15))
    assert in_a_child(partial(train_in_double, pictures, changed, 1, None))
    losses = [[row["loss"] for row in read_history(folder) if "loss" in row] for folder in (one, changed)]
    apart = [abs(a - b) / abs(a) for a, b in zip(*losses, strict=True)]
    by_rank = [len((changed / f"received{rank}").read_text().splitlines()) for rank in range(2)]
    return {
        "steps": len(apart),
        "steps_by_rank": by_rank,
        "same_stream": stream(one) == stream(changed),
        "largest_difference": max(apart),
        "at_step_20": apart[19],
    }


# Two ranks that compute nothing


def watch_and_wait(out: Path) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    with (out / f"said{rank}").open("w") as said:
        os.dup2(said.fileno(), 2)
    watch: Any = Watch(out / "run")
    watch.setup(SimpleNamespace(world_size=2, global_rank=rank), None, "fit")
    if (out / "farewell").exists():
        watch.teardown(None, None, "fit")
        distributed.destroy_process_group()
        return
    (out / f"up{rank}").touch()
    time.sleep(600)


def watch(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for victim in (0, 1):
        here = fresh(out / str(victim))
        _, gone_after = on_two_ranks(partial(watch_and_wait, here), victim, 2)
        result[str(victim)] = [(here / f"said{rank}").read_text() for rank in (0, 1)]
        assert gone_after < PATIENCE
    (fresh(out / "end") / "farewell").touch()
    assert on_two_ranks(partial(watch_and_wait, out / "end"))[0]
    return result


if __name__ == "__main__":
    campaign, *arguments = sys.argv[1:]
    if campaign == "kills":
        found = kills(arguments[0], Path(arguments[1]), int(arguments[2]))
    elif campaign == "change":
        found = change(arguments[0], Path(arguments[1]))
    else:
        found = watch(Path(arguments[0]))
    print(json.dumps({"script": "rank_campaign", "campaign": campaign, **found}))
