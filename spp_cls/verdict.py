"""The verdict of `spp plan`: what limits training here, by measurement: the loader, the net, or both together."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import TypeVar

import numpy as np
import torch
from lightning import Trainer
from tqdm import tqdm

from .classifier import Classifier
from .cost import available_memory, cost, in_px, too_large
from .data import MultiSizeDataModule, Views
from .data.plan import Shape
from .data.source import TrainBatch, ViewsBatch

# Takes one training step on a batch: of regions at a shape in px, of whole pictures (None) as they come.
Step = Callable[[TrainBatch, Shape | None], None]
At = TypeVar("At", bound=Shape | None)
Batch = TypeVar("Batch", TrainBatch, ViewsBatch)

_FULL = 0.9  # this share of a rate is counted as the whole of it: measurements of seconds differ by as much
_HELD = 8  # batches that a net is measured with, where each has its own shape


@dataclass(frozen=True)
class Rates:
    """Images/s of one device at `shape` px (None: whole pictures): of the loader alone, the net alone, and both."""

    shape: Shape | None
    loader: float
    net: float
    together: float

    @property
    def limits(self) -> str:
        """`net` where it is as fast with the loader as alone, `loader` where that is, else `both`: they share cores."""
        # One after the other is the worst: where even that is as fast, what is slower is no fault of the other's.
        in_turn = 1 / (1 / self.loader + 1 / self.net)
        reached = max(self.together, in_turn)
        if reached >= _FULL * self.net:
            return "net"
        return "loader" if reached >= _FULL * self.loader else "both"


def sentence(
    rates: Sequence[Rates],
    images: Mapping[Shape | None, int],
    flops: Mapping[Shape | None, float],
    remedies: Sequence[str],
) -> str:
    """What limits at each size, what the planned sizes save, and what to change, in one sentence.

    `rates` are of all planned sizes or of some, the largest among them. `images` says how many images the run sees at
    each planned size in px, `flops` what training on one costs at sizes that were measured. `remedies` are for a loader
    that limits.
    """
    names = {
        "loader": "the loader limits",
        "net": "the net limits",
        "both": "loader and net slow each other down",
    }
    found = {limits: [r.shape for r in rates if r.limits == limits] for limits in names}
    said = ", ".join(f"{names[limits]} {_where(sizes)}" for limits, sizes in found.items() if sizes)
    together, net = ({r.shape: 1 / getattr(r, part) for r in rates} for part in ("together", "net"))  # s an image
    waits = bool(found["loader"] or found["both"])
    largest = max(images, key=_area)
    if largest is not None and len(images) > 1:
        said += (
            f"; the planned sizes save {_percent(saved(images, together))} of the time of {in_px(largest)} throughout"
            f"{f', and {_percent(saved(images, net))} if the net never had to wait' if waits else ''} "
            f"({_percent(saved(images, flops))} by its FLOPs)"
        )
    elif largest is not None:
        said += "; one size is planned, so none saves time"
    if not waits:
        return f"{said}; nothing to change"
    waiting = 1 - whole(images, net) / whole(images, together)
    return f"{said}; use {' or '.join(remedies)}, worth up to {_percent(waiting)} of the time"


def whole(images: Mapping[At, int], each: Mapping[At, float]) -> float:
    """What all `images` (shape in px → number) cost if one costs `each`; what is not given goes by the area in px."""
    shapes = sorted(each, key=_area)
    known, areas = [each[shape] for shape in shapes], [_area(shape) for shape in shapes]
    return float(sum(number * np.interp(_area(shape), areas, known) for shape, number in images.items()))


def saved(images: Mapping[At, int], each: Mapping[At, float]) -> float:
    """The share that the planned sizes save of what all images would cost at the largest of them."""
    return 1 - whole(images, each) / whole({max(images, key=_area): sum(images.values())}, each)


def _area(shape: Shape | None) -> int:
    return math.prod(shape) if shape else 0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "nothing"


def _where(shapes: Sequence[Shape | None]) -> str:
    sides = [in_px(shape).removesuffix(" px") for shape in shapes if shape]
    if not sides:
        return "on whole pictures"
    return f"at {', '.join(sides[:-1])} and {sides[-1]} px" if len(sides) > 1 else f"at {sides[0]} px"


# Measuring


def measure(
    classifier: Classifier,
    datamodule: MultiSizeDataModule,
    trainer: Trainer,
    shapes: Sequence[Shape | None],
    seconds: float,
) -> list[Rates]:
    """The rates at each of `shapes` px on the device of `trainer`, each measured for `seconds` and one batch at least.

    The classifier is for this alone: its weights stay as they are, but not its gradients, nor the averages of batch
    norm. Raises RuntimeError where the net cannot take a step on that device, or has not the memory for it.
    """
    datamodule.trainer, device = trainer, trainer.strategy.root_device
    _refuse_too_large(classifier, datamodule, trainer, _largest(datamodule, shapes))
    rates = []
    with tqdm(total=1 + 2 * len(shapes), unit="rate", leave=False, disable=None, file=sys.stderr) as bar:
        bar.set_description("measuring the loader")
        with closing(pictures(datamodule, 0)) as batches:
            loader = loader_rate(batches, seconds)
            held = list(islice(batches, _HELD if None in shapes else 1))
        bar.update()
        step = make_step(classifier, datamodule, trainer)
        # The largest first: if one does not fit into memory, it is that.
        for epoch, shape in enumerate(sorted(shapes, key=_area, reverse=True), start=1):
            at = f" at {in_px(shape)}" if shape else ""
            bar.set_description(f"measuring the net{at}")
            try:
                net = net_rate(step, held, shape, device, seconds)
            except torch.OutOfMemoryError as error:
                raise RuntimeError(_advice(datamodule, trainer, _largest(datamodule, [shape]))) from error
            bar.update()
            bar.set_description(f"measuring both{at}")
            # Pictures of another epoch: those that were read a moment ago are in memory yet.
            with closing(pictures(datamodule, epoch)) as batches:
                rates.append(Rates(shape, loader, net, together_rate(batches, step, shape, device, seconds)))
            bar.update()
    return rates[::-1]


def pictures(datamodule: MultiSizeDataModule, epoch: int) -> Generator[TrainBatch, None, None]:
    """The batches of `epoch`, over and over, by workers that live until the iterator is closed."""
    loader = datamodule.regions_loader(epoch)
    while True:
        yield from loader


def loader_rate(batches: Iterator[TrainBatch], seconds: float) -> float:
    """Images/s of the loader alone."""
    return _rate(batches, lambda _: None, torch.device("cpu"), seconds)


def net_rate(
    step: Step, held: Sequence[TrainBatch], shape: Shape | None, device: torch.device, seconds: float
) -> float:
    """Images/s of the net alone, from pictures in main memory to the optimizer, of the batches `held` in turn.

    A first step, on the largest, is not counted.
    """
    step(max(held, key=lambda batch: batch.images.numel()), shape)
    _finish(device)
    return _rate(cycle(held), lambda batch: step(batch, shape), device, seconds)


def together_rate(
    batches: Iterator[TrainBatch], step: Step, shape: Shape | None, device: torch.device, seconds: float
) -> float:
    """Images/s of both, as in training; `step` has been taken at that shape before."""
    return _rate(batches, lambda batch: step(batch, shape), device, seconds)


def seconds_to_test(
    classifier: Classifier,
    datamodule: MultiSizeDataModule,
    trainer: Trainer,
    views: Views,
    split: str,
    seconds: float,
) -> float:
    """Seconds to test all of `split` by `views` on all devices; loader and net together are measured for `seconds`.

    The batches are drawn by chance: some views take longer than others. A first one is not counted.
    """
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    datamodule.trainer = trainer
    classifier.to(device).eval()

    def test(batch: ViewsBatch) -> None:
        moved = datamodule.transfer_batch_to_device(batch, device, 0)
        images, _, _, *windows = datamodule.on_after_batch_transfer(moved, 0)
        with torch.inference_mode(), precision.test_step_context():
            classifier.scores_of_views(images, *windows).cpu()

    def forever() -> Generator[ViewsBatch, None, None]:
        loader = datamodule.views_loader(views, split, shuffled=True)
        while True:
            yield from loader

    with closing(forever()) as batches:
        test(next(batches))
        rate = _rate(batches, test, device, seconds)
    assert datamodule.index is not None
    return datamodule.index.counts[split] * len(views.passes) / rate / trainer.world_size


def _rate(batches: Iterator[Batch], work: Callable[[Batch], None], device: torch.device, seconds: float) -> float:
    """Images/s from the arrival of a first batch to that of another, after `seconds` or more.

    Batches come in bursts, one of each worker. The first of a burst is waited for, so that both ends are alike.
    """
    batch = next(batches)
    images = 0
    began = time.perf_counter()
    while not images or time.perf_counter() - began < seconds:
        work(batch)
        images += len(batch.labels)
        batch = next(batches)
    _finish(device)
    return images / (time.perf_counter() - began)


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def make_step(classifier: Classifier, datamodule: MultiSizeDataModule, trainer: Trainer) -> Step:
    """A function that takes one training step as `trainer` would, at a learning rate of 0.

    So the work is the same, the weights stay as they are, and however many steps there are, none goes astray.
    """
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    precision.convert_module(classifier)
    classifier.to(device).train()
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = classifier.optimizer(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    taken = count()

    def step(batch: TrainBatch, shape: Shape | None) -> None:
        if shape is not None:
            batch = batch._replace(shape=shape)
        batch = datamodule.transfer_batch_to_device(precision.convert_input(batch), device, 0)
        images, labels = datamodule.on_after_batch_transfer(batch, 0)
        with precision.train_step_context():
            logits = classifier(images)
            losses = classifier.losses(logits, labels)
            classifier.train_errors.update(logits.detach(), labels, losses.detach())
        losses.mean().backward()  # type: ignore[no-untyped-call]
        if next(taken) % trainer.accumulate_grad_batches == 0:  # after the first too, which finds the memory for it
            if trainer.gradient_clip_val:
                torch.nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad()

    def checked(batch: TrainBatch, shape: Shape | None) -> None:
        try:
            step(batch, shape)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # from a net or an optimizer of the user's own, anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(f"the net does not take a training step on {device}: {reason}") from error

    return checked


def _refuse_too_large(classifier: Classifier, datamodule: MultiSizeDataModule, trainer: Trainer, shape: Shape) -> None:
    """On a CPU, where otherwise the system would end the program without a word."""
    free = available_memory()
    if trainer.strategy.root_device.type != "cpu" or free is None:
        return
    with contextlib.suppress(NotImplementedError):  # a net of the user's own that cannot be measured so
        optimizer = getattr(classifier.optimizer, "func", classifier.optimizer)
        images = datamodule.plan.images_at_once(shape)
        needed = cost(classifier.net, shape).training_bytes(images, getattr(optimizer, "__name__", ""))
        if needed > free:
            advice = _advice(datamodule, trainer, shape)
            raise RuntimeError(f"{advice} ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free)")


def _advice(datamodule: MultiSizeDataModule, trainer: Trainer, shape: Shape) -> str:
    return too_large(datamodule.plan.images_at_once(shape), shape, trainer.accumulate_grad_batches)


def _largest(datamodule: MultiSizeDataModule, shapes: Sequence[Shape | None]) -> Shape:
    """The largest of `shapes`, of whole pictures the largest that comes."""
    every = (s for shape in shapes for s in ([shape] if shape else datamodule.planned_shapes(1)[0]))
    return max(every, key=lambda shape: math.prod(shape) * datamodule.plan.images_at_once(shape))
