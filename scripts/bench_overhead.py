"""What a step of `spp train` costs beside its net: against a bare PyTorch loop, and Lightning with nothing added.

    python scripts/bench_overhead.py --rounds 7

All ways train the same net with the same loss, optimizer and batches, which lie ready in memory as floats; reading
them is measured by bench_loader.py, and no checkpoint is saved. `classifier` is ours in a Trainer that has no
callbacks, `ours` has all that spp train adds, `+bar` a progress bar besides, `+tensorboard` a logger, `+exact`
trainer.deterministic=true, `bare+exact` torch's deterministic algorithms. A linear net on one image shows the cost in
ms, ZF-5 the share of a step. Ways take turns; each is timed between two fetches of one epoch, its first steps left
out. Medians of process CPU time and wall time, and the shortest step; one thread. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import json
import pstats
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from spp_cls import schedules
from spp_cls.build import quieten
from spp_cls.callbacks import MemoryProbe, PlannedSize, Progress, Timing, Watch
from spp_cls.classifier import Classifier
from spp_cls.models import sppnet
from spp_cls.resume import AtomicCheckpointIO, History, ResumePoint

WAYS = ("bare", "lightning", "classifier", "ours", "ours+bar", "ours+tensorboard", "bare+exact", "ours+exact")
CLASSES = 102
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
WARM = 10  # steps that are not timed; 2 of a net that takes long


class Ready(LightningDataModule):
    """The same `batch` again and again; notes the time when each is fetched. Answers what our callbacks ask."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps
        self.fetched: list[tuple[float, float]] = []  # CPU and wall time

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.steps):
            self.fetched.append((time.process_time(), time.perf_counter()))
            yield self.batch

    def train_dataloader(self) -> Any:
        return self

    def shape_at(self, epoch: int, step: int) -> tuple[int, int]:
        return tuple(self.batch[0].shape[-2:])

    def largest(self, epochs: int) -> tuple[int, tuple[int, int]]:
        return len(self.batch[0]), self.shape_at(0, 0)


class Plain(LightningModule):
    """As little as Lightning needs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters())


class Terminal(io.StringIO):
    """Where a progress bar draws itself, and nobody looks."""

    def isatty(self) -> bool:
        return True


def make(model: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    if model == "linear":
        net: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))
        images = torch.randn(1, 3, 32, 32)
    else:
        net, images = sppnet(model, num_classes=CLASSES), torch.randn(32, 3, 224, 224)
    images = images.contiguous(memory_format=torch.channels_last)
    return net.to(memory_format=torch.channels_last), (images, torch.arange(len(images)) % CLASSES)


def train_bare(net: nn.Module, ready: Ready) -> None:
    optimizer = SGD(net.parameters())
    net.train()
    for images, labels in ready:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


def train(way: str, net: nn.Module, ready: Ready, folder: Path) -> None:
    name, _, more = way.partition("+")
    if name == "bare":
        torch.use_deterministic_algorithms(more == "exact")
        return train_bare(net, ready)
    callbacks: list[Callback] = []
    if name == "ours":  # as build_trainer puts them together
        timing = Timing(folder)
        callbacks = [PlannedSize(), MemoryProbe(), Watch(folder), timing, History(folder)]
        callbacks += [Progress(timing)] if more == "bar" else []
        callbacks += [ModelCheckpoint(folder, "best", monitor="val/top1_error", mode="min")]
        callbacks += [ResumePoint(folder, every_minutes=None)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(folder, name="", version="tensorboard") if more == "tensorboard" else False,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()] if callbacks else [],
        deterministic=more == "exact",
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=more == "bar",
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Plain(net) if name == "lightning" else Classifier(net, SGD, partial(schedules.step, milestones=(0.5,)))
    trainer.fit(module, datamodule=ready)


def ms_a_step(way: str, model: str, steps: int, warm: int) -> tuple[float, float, float]:
    """CPU and wall time, and the CPU time of the shortest step, which other programs disturb least."""
    net, batch = make(model)
    ready = Ready(batch, warm + steps + 1)
    gc.collect()
    with ExitStack() as stack:
        if way.endswith("bar"):
            stack.enter_context(redirect_stderr(Terminal()))
            stack.enter_context(redirect_stdout(Terminal()))
        train(way, net, ready, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    torch.use_deterministic_algorithms(False)
    timed = ready.fetched[warm : warm + steps + 1]
    cpu, wall = ([1e3 * (b[clock] - a[clock]) for a, b in pairwise(timed)] for clock in (0, 1))
    return sum(cpu) / steps, sum(wall) / steps, min(cpu)


def measure(model: str, ways: tuple[str, ...], rounds: int, steps: int, warm: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for i in range(rounds):
        for way in ways if i % 2 else ways[::-1]:
            found[way].append(ms_a_step(way, model, steps, warm))
    result: dict[str, Any] = {"rounds": rounds, "steps": steps}
    for way, all_rounds in found.items():
        cpu, wall, _ = (round(statistics.median(times), 4) for times in zip(*all_rounds, strict=True))
        added, added_wall = (
            [round_[clock] - bare[clock] for round_, bare in zip(all_rounds, found["bare"], strict=True)]
            for clock in (0, 1)
        )
        share = [100 * extra / bare[0] for extra, bare in zip(added, found["bare"], strict=True)]
        result[way] = {
            "cpu_ms": cpu,
            "wall_ms": wall,
            "least_cpu_ms": round(min(least for _, _, least in all_rounds), 4),
            "added_cpu_ms": round(statistics.median(added), 4),
            "added_wall_ms": round(statistics.median(added_wall), 4),
            "added_percent": round(statistics.median(share), 2),
        }
    for name in ("bare", "ours"):
        if f"{name}+exact" in found:
            ratios = [exact[0] / plain[0] for exact, plain in zip(found[f"{name}+exact"], found[name], strict=True)]
            result[f"{name}_exact_ratio"] = round(statistics.median(ratios), 3)
    return result


def print_profile(steps: int) -> None:
    """Where the time of `ours` on the linear net goes, by file and function."""
    profile = cProfile.Profile()
    profile.enable()
    ms_a_step("ours", "linear", steps, WARM)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of the linear net (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of the linear net (default: %(default)s)")
    parser.add_argument("--net-rounds", type=int, default=3, help="of ZF-5, 0 for none (default: %(default)s)")
    parser.add_argument("--net-steps", type=int, default=4, help="of ZF-5 (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="print instead what the functions of `ours` take")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quieten()
    warnings.filterwarnings("ignore", message=".*(no `val_dataloader`|could not find the monitored key)")
    if arguments.profile:
        return print_profile(arguments.steps)
    result: dict[str, Any] = {"script": "bench_overhead"}
    result["linear"] = measure("linear", WAYS, arguments.rounds, arguments.steps, WARM)
    if arguments.net_rounds:
        ways = ("bare", "lightning", "ours", "bare+exact", "ours+exact")
        result["zf5"] = measure("zf5", ways, arguments.net_rounds, arguments.net_steps, 2)
        # Steps of a large net vary by more than what is added; so what is added to the linear one, as a share of it.
        step = result["zf5"]["bare"]["least_cpu_ms"]
        result["share_of_zf5_step_percent"] = round(100 * result["linear"]["ours"]["added_cpu_ms"] / step, 3)
    for model in ("linear", "zf5"):
        for way in WAYS:
            if way in result.get(model, {}):
                row = result[model][way]
                print(
                    f"{model:<7}{way:<17}{row['cpu_ms']:10.3f} ms CPU{row['wall_ms']:10.3f} ms"
                    f"{row['least_cpu_ms']:10.3f} ms at least"
                    f"{row['added_cpu_ms']:+10.3f} ms{row['added_percent']:+10.2f} %"
                )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
