"""`spp plan`: what a training run would do and cost, before anything runs."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from .door import open_door
from .words import operations

if TYPE_CHECKING:
    from lightning import Trainer
    from torch import nn

    from .classifier import Classifier
    from .data import MultiSizeDataModule, Plan
    from .data.plan import Shape


def plan(
    net: nn.Module,
    datamodule: MultiSizeDataModule,
    planned: Mapping[int, Sequence[Shape]],
    ranks: int,
    accumulation: int,
    optimizer: str,
    accelerator: str = "cpu",
) -> str:
    """The plan for people: data, net, epoch → size → steps, FLOPs and memory at each size.

    `planned` are the shapes (height, width) in px of each epoch, as `planned_shapes` gives them.
    """
    from .cost import available_memory, cost, gpu_memory, in_px, too_large
    from .verdict import saved, whole

    assert datamodule.index is not None
    batches = dataclasses.replace(datamodule.plan, rank=0, world_size=ranks, accumulation=accumulation)
    lines = [datamodule.index.describe(), ""]

    lines.append(f"{'epochs':>12} {'size px':>16} {'steps':>8}")
    steps, epochs = batches.num_batches, len(planned)
    each = {epoch: tuple(sorted(shapes, key=_size)) for epoch, shapes in planned.items()}
    runs = [(shapes, [e for e, _ in same]) for shapes, same in groupby(each.items(), key=lambda item: item[1])]
    shown = runs if len(runs) <= 12 else [*runs[:8], None, *runs[-3:]]
    for entry in shown:
        if entry is None:
            lines.append(f"{'…':>12}")
            continue
        which, members = entry
        span = str(members[0]) if len(members) == 1 else f"{members[0]}–{members[-1]}"
        many = ", ".join(map(_sides, which)) if len(which) <= 4 else f"{_sides(which[0])} … {_sides(which[-1])}"
        lines.append(f"{span:>12} {many:>16} {steps * len(members):>8}")
    lines.append(f"{'all':>12} {'':>16} {steps * epochs:>8}")
    left = batches.num_images - sum(batches.counts)
    lines.append(f"\n{_step(datamodule, batches)}; {left} of {batches.num_images} left over in each epoch")

    images = images_at(datamodule, planned)
    every = sorted(images, key=_size)
    chosen = every if len(every) <= 8 else [every[0], *every[1 : -1 : -(-len(every) // 6)], every[-1]]
    costs = {shape: cost(net, shape) for shape in chosen}
    lines.append(f"\nnet: {costs[every[0]].parameters:,} parameters")
    lines.append(f"{'size px':>12} {'map':>9} {'GFLOP/image':>12} {'to train':>9} {'memory at once':>15}")
    for shape, c in costs.items():
        memory = c.training_bytes(batches.images_at_once(shape), optimizer) / 1e9
        map_size = f"{c.map_size[0]}×{c.map_size[1]}" if c.map_size[0] else "–"
        forward, training = c.forward_flops / 1e9, c.training_flops / 1e9
        lines.append(f"{_sides(shape):>12} {map_size:>9} {forward:>12.3f} {training:>9.3f} {memory:>12.2f} GB")
    flops = {shape: c.training_flops for shape, c in costs.items()}
    less = saved(images, flops) if batches.cut is None else 0
    note = f", {less:.0%} less than all at {in_px(every[-1])}" if less > 0 else ""
    lines.append(f"{operations(whole(images, flops))} in all{note}")
    free, gpu = available_memory(), gpu_memory(accelerator)
    if gpu:
        name, total = gpu
        needed = {shape: c.training_bytes(batches.images_at_once(shape), optimizer) for shape, c in costs.items()}
        most = max(needed, key=lambda shape: needed[shape])
        lines.append(
            f"memory of the GPU, {name}: {total / 1e9:.1f} GB; in float32 {needed[most] / 1e9:.1f} GB are needed"
        )
        if needed[most] > total:
            lines.append(f"note: in float32 {too_large(batches.images_at_once(most), most, accumulation)}")
    if free:
        lines.append(f"main memory free: {free / 1e9:.1f} GB")
    last = planned[epochs - 1][-1]
    if batches.cut is None and last != every[-1]:
        lines.append(f"note: the last epoch trains at {in_px(last)}, not at {_sides(every[-1])}")
    return "\n".join(lines)


def _step(datamodule: MultiSizeDataModule, batches: Plan) -> str:
    """How the images of an optimizer step are dealt out."""
    at_once = f"{batches.micro_batch_size} at once × {batches.world_size} devices × {batches.accumulation} accumulated"
    if batches.cut is None:
        return f"{datamodule.batch_size} images a step = {at_once}"
    counts = batches.counts
    return f"{min(counts)} to {max(counts)} whole pictures a step, at most {at_once}"


def _size(shape: Shape) -> tuple[int, Shape]:
    return math.prod(shape), shape


def _sides(shape: Shape) -> str:
    from .cost import in_px

    return in_px(shape).removesuffix(" px")


def images_at(datamodule: MultiSizeDataModule, planned: Mapping[int, Sequence[Shape]]) -> dict[Shape, int]:
    """Shape in px → images that the run sees at it; `planned` are the shapes of each epoch."""
    batches = datamodule.plan
    images: Counter[Shape] = Counter()
    for epoch, shapes in planned.items():
        if len(shapes) == 1:
            images[shapes[0]] += sum(batches.counts)
        elif batches.cut is not None:
            for (height, width), count in zip(batches.cut.shapes.tolist(), batches.counts, strict=True):
                images[height, width] += count
        else:
            for batch, count in enumerate(batches.counts):
                images[datamodule.shape_at(epoch, batch)] += count
    return dict(images)


def verdict(
    classifier: Classifier,
    datamodule: MultiSizeDataModule,
    trainer: Trainer,
    images: Mapping[Shape, int],
    seconds: float,
    validations: int = 0,
    test: bool = False,
) -> str:
    """The verdict for people: the rates that were measured, what limits, what to change, and the hours of the run.

    `images` says how many images the run sees at each shape in px; each rate is measured for `seconds`. The hours are
    those of training, of so many `validations`, and of the `test`. Raises RuntimeError where nothing can be measured
    here.
    """
    import torch

    from .callbacks import peak_memory
    from .cost import available_memory, cost
    from .data import Views
    from .data.cache import is_made
    from .verdict import measure, seconds_to_test, sentence, whole
    from .words import duration

    kind = datamodule.cache_kind
    if kind and not is_made(datamodule.files, kind, datamodule.cache_folder):
        raise RuntimeError(f"the {kind} cache is not there yet; make it by spp cache data.cache={kind} …")
    every = sorted(images, key=_size)
    chosen: list[Shape | None] = list(every)
    seen: dict[Shape | None, int] = dict(images.items())
    if datamodule.plan.cut is not None:  # of too many shapes to measure each
        chosen, seen = [None], {None: sum(images.values())}
    elif len(every) > 4:
        chosen = [every[i * (len(every) - 1) // 3] for i in range(4)]
    if test:
        datamodule.views.check(classifier.net)
    rates = measure(classifier, datamodule, trainer, chosen, seconds)
    ranks, device = trainer.world_size, trainer.strategy.root_device
    one = f", on one of {ranks} devices" if ranks > 1 else ""
    lines = [
        f"\nimages/s, {datamodule.plan.micro_batch_size} at once on {trainer.strategy.root_device}{one}",
        f"{'size px':>12} {'loader':>9} {'net':>9} {'together':>9} {'limits':>9}",
    ]
    for r in rates:
        name = _sides(r.shape) if r.shape else "whole"
        lines.append(f"{name:>12} {r.loader:>9.1f} {r.net:>9.1f} {r.together:>9.1f} {r.limits:>9}")
    flops: dict[Shape | None, float] = {
        shape: float(cost(classifier.net, shape).training_flops) for shape in chosen if shape
    }
    lines.append(f"verdict: {sentence(rates, seen, flops, remedies(datamodule, trainer))}")
    used = peak_memory(device) / 1e9
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 1e9
        lines.append(f"memory of the GPU in use, at most: {used:.1f} of {total:.1f} GB")
    else:
        lines.append(f"main memory in use, at most: {used:.1f} GB; {(available_memory() or 0) / 1e9:.1f} GB are free")
    took = {"of training": whole(seen, {r.shape: 1 / r.together for r in rates}) / ranks}
    if validations:
        each = (Views("center_crop", size) for size in datamodule.val_sizes)
        once = sum(seconds_to_test(classifier, datamodule, trainer, views, "val", seconds) for views in each)
        took[f"of {validations} validations"] = validations * once
    if test:
        by = datamodule.views
        took[f"of the test by {by.crops}"] = seconds_to_test(classifier, datamodule, trainer, by, "test", seconds)
    parts = ", ".join(f"{duration(part)} {what}" for what, part in took.items())
    lines.append(f"about {duration(sum(took.values()))} in all: {parts}")
    return "\n".join(lines)


def validations(trainer: Trainer, epochs: int, batches: int) -> int:
    """How often `trainer` validates in so many epochs, of so many micro-batches each."""
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    if not trainer.limit_val_batches:
        return 0
    steps = max(1, int(interval * batches)) if isinstance(interval, float) else interval or batches
    return epochs // every * (batches // steps) if every else epochs * batches // steps


def remedies(datamodule: MultiSizeDataModule, trainer: Trainer) -> list[str]:
    """What would make the loader faster on this machine."""
    from .cost import available_memory
    from .data.cache import num_bytes

    found = []
    fits = 2 * num_bytes(datamodule.files, "raw") <= (available_memory() or 0)
    if datamodule.cache_kind not in ("raw", "raw" if fits else "jpeg"):
        found.append(f"data.cache={'raw' if fits else 'jpeg'} (spp cache)")
    cores = max(1, (os.cpu_count() or 1) // trainer.num_devices)
    workers = min(8, cores) if datamodule.num_workers is None else datamodule.num_workers
    if datamodule.cache_kind != "raw" and (isinstance(workers, str) or workers < cores):
        found.append(f"data.num_workers={cores}")
    return found or ["more cores or a faster disk"]


def run(config: DictConfig) -> None:
    """Everything that `spp plan` does with a config."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from . import build

    build.check_run(config)
    epochs, seconds = config.trainer.max_epochs, config.measure
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"trainer.max_epochs={epochs}: a plan is of a number of epochs, at least 1")
    if seconds is None or seconds < 0:
        raise ValueError(f"measure={seconds}: give the seconds of each measurement, or 0 for no verdict")
    datamodule = build.build_datamodule(config)
    identity = build.identity(config, datamodule)
    classifier = build.build_classifier(config, identity, build.class_weights(config, datamodule))
    accelerator = config.trainer.accelerator
    ranks = _devices(config.trainer.devices, accelerator) * config.trainer.num_nodes
    optimizer = str(config.optimizer._target_).rpartition(".")[2]
    planned, accumulation = datamodule.planned_shapes(epochs), config.trainer.accumulate_grad_batches
    print(plan(classifier.net, datamodule, planned, ranks, accumulation, optimizer, accelerator), flush=True)
    if not seconds:
        return
    try:
        trainer = build.build_trainer(config, None)
    except (ValueError, MisconfigurationException) as error:  # a plan may be for another machine
        print(_none(error))
        return
    images = images_at(datamodule, planned)
    often = validations(trainer, epochs, datamodule.plan.num_batches * accumulation)
    try:
        print(verdict(classifier, datamodule, trainer, images, seconds, often, config.test))
    except RuntimeError as error:
        print(_none(error))


def _devices(devices: Any, accelerator: str) -> int:
    """How many `trainer.devices` asks for; as many GPUs as are here for all of them, and one CPU."""
    import torch

    if OmegaConf.is_list(devices):
        return len(devices)
    if str(devices) in ("-1", "auto"):
        return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1
    return int(devices)


def _none(error: Exception) -> str:
    return f"no verdict: {' '.join(str(error).split())}"


def main(arguments: list[str] | None = None) -> None:
    """The door: the same settings as `spp train`."""
    open_door("plan", run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
