"""The verdict: its sentence on rates made by hand, and measurements on a clock that the test turns."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import nn

from spp_cls import verdict
from spp_cls.classifier import Classifier
from spp_cls.data import FullImage, MultiSizeDataModule, Views
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.data.source import TrainBatch
from spp_cls.schedules import constant
from spp_cls.verdict import (
    Rates,
    loader_rate,
    make_step,
    measure,
    net_rate,
    saved,
    seconds_to_test,
    sentence,
    whole,
)

SMALL, LARGE = (180, 180), (224, 224)
EACH = {SMALL: 1000, LARGE: 1000}  # images of the run at each size
FLOPS = {SMALL: 5.0, LARGE: 8.0}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("loader", "net", "together", "limits"),
    [
        (300, 1000, 290, "loader"),
        (300, 1000, 320, "loader"),  # no measurement is exact
        (1000, 300, 290, "net"),
        (100, 100, 95, "net"),  # a faster loader would hardly help
        (100, 100, 55, "both"),
        (600, 10, 7, "net"),  # in turn they would make 9.8 a second: something else was in the way
        (10, 600, 7, "loader"),
        (300, 200, 120, "both"),  # 1 / (1/300 + 1/200): one core for both
    ],
)
def test_what_limits(loader: float, net: float, together: float, limits: str) -> None:
    assert Rates(LARGE, loader, net, together).limits == limits


def test_the_loader_limits() -> None:
    # 10 s at each size, as at 224 px throughout; the net alone needs 2.5 s and 5 s, and 10 s at 224 px throughout.
    rates = [Rates(SMALL, 100, 400, 100), Rates(LARGE, 100, 200, 100)]
    assert sentence(rates, EACH, FLOPS, ["data.cache=raw", "data.num_workers=8"]) == (
        "the loader limits at 180 and 224 px; the planned sizes save nothing of the time of 224 px throughout, and "
        "25 % if the net never had to wait (19 % by its FLOPs); use data.cache=raw or data.num_workers=8, worth up to "
        "62 % of the time"
    )


def test_the_net_limits() -> None:
    rates = [Rates(SMALL, 1000, 400, 400), Rates(LARGE, 1000, 200, 200)]
    assert sentence(rates, EACH, FLOPS, ["never"]) == (
        "the net limits at 180 and 224 px; the planned sizes save 25 % of the time of 224 px throughout (19 % by its "
        "FLOPs); nothing to change"
    )


def test_each_size_has_its_own_limit() -> None:
    # 1000/250 + 1000/200 = 9 s for 10 s; 1000/400 + 1000/200 = 7.5 s of the net alone, a sixth less than 9 s.
    rates = [Rates(SMALL, 250, 400, 250), Rates(LARGE, 250, 200, 200)]
    assert sentence(rates, EACH, FLOPS, ["data.cache=raw"]) == (
        "the loader limits at 180 px, the net limits at 224 px; the planned sizes save 10 % of the time of 224 px "
        "throughout, and 25 % if the net never had to wait (19 % by its FLOPs); use data.cache=raw, worth up to 17 % "
        "of the time"
    )


def test_one_size_and_whole_pictures_save_nothing_by_sizes() -> None:
    assert sentence([Rates(LARGE, 100, 50, 50)], {LARGE: 7}, {LARGE: 1.0}, []) == (
        "the net limits at 224 px; one size is planned, so none saves time; nothing to change"
    )
    assert sentence([Rates(None, 100, 100, 50)], {None: 7}, {}, ["data.cache=raw"]) == (
        "loader and net slow each other down on whole pictures; use data.cache=raw, worth up to 50 % of the time"
    )


def test_what_was_not_measured_goes_by_the_area() -> None:
    # Areas of 100, 200 and 300: half-way between 1 and 5.
    each = {(10, 10): 1.0, (10, 30): 5.0}
    assert whole({(10, 10): 1, (10, 20): 10, (10, 30): 100}, each) == pytest.approx(1 + 30 + 500)
    assert saved({(10, 20): 1, (10, 30): 1}, each) == pytest.approx(1 - 8 / 10)


# Measuring


class Clock:
    """Stands still but where the test turns it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(verdict.time, "perf_counter", lambda: self.now)


def batches(clock: Clock, seconds: float, workers: int = 1) -> Iterator[TrainBatch]:
    """Batches of 10 images, after every `seconds` as many as there are workers."""
    one = TrainBatch(torch.zeros(10, 3, 8, 8), torch.zeros(10), torch.zeros(10, 8), (8, 8), 1.0)
    while True:
        clock.now += seconds
        for _ in range(workers):
            yield one


@pytest.mark.parametrize(("workers", "expected"), [(1, 20), (4, 80)])
def test_a_loaders_rate_is_neither_that_of_its_start_nor_of_its_bursts(
    monkeypatch: pytest.MonkeyPatch, workers: int, expected: float
) -> None:
    clock = Clock(monkeypatch)
    assert loader_rate(batches(clock, 0.5, workers), seconds=1.6) == pytest.approx(expected)


def test_a_step_that_takes_longer_than_all_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    taken = []

    def step(batch: TrainBatch, shape: Any) -> None:
        clock.now += 100 if not taken else 10  # the first makes things ready
        taken.append(shape)

    held = [next(batches(clock, 0))]
    assert net_rate(step, held, SMALL, CPU, seconds=2) == pytest.approx(1)
    assert taken == [SMALL, SMALL]
    assert verdict.together_rate(batches(clock, 2.5), step, SMALL, CPU, seconds=2) == pytest.approx(10 / 12.5)
    assert len(taken) == 3


def make_classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8, 3))
    return Classifier(net, partial(torch.optim.AdamW, lr=10.0, weight_decay=0.5), constant, val_sizes=(32,), **options)


def make_datamodule(pictures: Path, sizes: Any) -> MultiSizeDataModule:
    made = MultiSizeDataModule(str(pictures), folder, sizes, batch_size=8, region=32, resize=36, num_workers=0)
    made.setup()
    return made


def make_trainer(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, **options)


@pytest.fixture
def datamodule(pictures: Path) -> MultiSizeDataModule:
    return make_datamodule(pictures, partial(alternating, sizes=[26, 32]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_are_those_of_training_and_leave_the_weights(datamodule: MultiSizeDataModule, precision: Any) -> None:
    trainer = make_trainer(precision=precision, accumulate_grad_batches=3, gradient_clip_val=1.0)
    classifier = make_classifier()
    before = copy.deepcopy(classifier.state_dict())
    seen: list[tuple[Any, ...]] = []
    classifier.net[0].register_forward_hook(lambda _, given, out: seen.append((*given[0].shape, out.dtype)))
    stepped: list[int] = []
    make = classifier.optimizer

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made = make(parameters)
        made.register_step_post_hook(lambda *_: stepped.append(len(seen)))
        return made

    classifier.optimizer = optimizer
    step = make_step(classifier, datamodule, trainer)
    batch = next(iter(datamodule.regions_loader(0)))
    for _ in range(5):
        step(batch, (26, 26))
    step(batch, None)  # as it comes
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    assert seen == [(8, 3, 26, 26, dtype)] * 5 + [(8, 3, 32, 32, dtype)]
    assert stepped == [1, 4]  # the first, and then each third
    for name, parameter in classifier.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not torch.equal(classifier.net[1].running_mean, before["net.1.running_mean"])  # they were true steps


def test_every_size_is_measured_on_pictures_of_its_own_epoch(
    datamodule: MultiSizeDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[int] = []
    loader = datamodule.regions_loader
    monkeypatch.setattr(datamodule, "regions_loader", lambda epoch: epochs.append(epoch) or loader(epoch))
    rates = measure(make_classifier(), datamodule, make_trainer(), [(26, 26), (32, 32)], 0.01)
    assert [r.shape for r in rates] == [(26, 26), (32, 32)]
    assert epochs == [0, 1, 2]
    assert all(math.isfinite(rate) and rate > 0 for r in rates for rate in (r.loader, r.net, r.together))
    assert datamodule.state_dict() == {"epoch": 0, "batch": 0}


def test_whole_pictures_are_measured_as_they_come(pictures: Path) -> None:
    datamodule = make_datamodule(pictures, FullImage(32, 8))
    classifier = make_classifier()
    seen = set()
    classifier.net[0].register_forward_pre_hook(lambda _, given: seen.add(tuple(given[0].shape[2:])))
    (rates,) = measure(classifier, datamodule, make_trainer(max_epochs=1), [None], 0.05)
    assert rates.shape is None and rates.net > 0
    assert len(seen) > 1 and seen <= set(datamodule.planned_shapes(1)[0])


def test_testing_takes_as_long_as_its_images_at_the_rate_of_some(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9 pictures, views of one at a time: a batch of one image takes a second, wherever in the split it is.
    datamodule = make_datamodule(pictures, partial(alternating, sizes=[26, 32]))
    datamodule.batch_size = 1
    clock, classifier, seen = Clock(monkeypatch), make_classifier(), []
    before = copy.deepcopy(classifier.state_dict())
    test = classifier.scores_of_views

    def scores_of_views(views: torch.Tensor, *windows: torch.Tensor) -> torch.Tensor:
        clock.now += 1
        seen.append((tuple(views.shape), classifier.training))
        return test(views, *windows)

    classifier.scores_of_views = scores_of_views  # type: ignore[method-assign]
    words = (classifier, datamodule, make_trainer())
    assert seconds_to_test(*words, Views("center_crop", 26), "test", 3.5) == pytest.approx(9)
    assert seen == [((1, 1, 3, 26, 26), False)] * 5  # the first is not counted
    assert seconds_to_test(*words, Views("ten_crop", 32), "val", 20) == pytest.approx(9)
    assert seen[5:] == [((1, 10, 3, 32, 32), False)] * 21  # more than once through the split
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_views_at_several_scales_are_measured_as_a_mixture(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = make_datamodule(pictures, partial(alternating, sizes=[26, 32]))
    datamodule.batch_size = 1
    clock, classifier, sides = Clock(monkeypatch), make_classifier(), []

    def scores_of_views(views: torch.Tensor, *windows: torch.Tensor) -> torch.Tensor:
        sides.append(min(views.shape[-2:]))
        clock.now += sides[-1]
        return torch.zeros(len(views), 1, 3)

    classifier.scores_of_views = scores_of_views  # type: ignore[method-assign]
    views = Views("multi_scale", 32)
    found = seconds_to_test(classifier, datamodule, make_trainer(), views, "test", 100_000)
    once = sum(each.shorter_side(32, 36, 32) for each in views.passes)
    assert found == pytest.approx(9 * once, rel=0.01)
    assert len(set(sides[:7])) > 3  # not one scale after the other


def test_a_picture_that_cannot_be_read_is_named_as_in_training(tmp_path: Path, pictures: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    datamodule = make_datamodule(tmp_path / "pictures", partial(alternating, sizes=[26, 32]))
    for path in (tmp_path / "pictures" / "train").rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train.*\.jpg: "):
        measure(make_classifier(), datamodule, make_trainer(), [(32, 32)], 0.01)


def test_what_does_not_fit_into_memory_is_said_with_what_to_do(
    datamodule: MultiSizeDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(26, 26), (32, 32)]
    line = r"^4 images of 32 px at once do not fit into memory: set trainer.accumulate_grad_batches=4 or a smaller data"
    monkeypatch.setattr(verdict, "available_memory", lambda: 1000)
    with pytest.raises(RuntimeError, match=line):
        measure(make_classifier(), datamodule, make_trainer(accumulate_grad_batches=2), sizes, 0.01)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verdict, "available_memory", lambda: None)
    classifier = make_classifier()
    classifier.net.register_forward_pre_hook(full)
    with pytest.raises(RuntimeError, match=line):
        measure(classifier, datamodule, make_trainer(accumulate_grad_batches=2), sizes, 0.01)


def test_a_net_that_does_not_run_is_named_with_its_reason(datamodule: MultiSizeDataModule) -> None:
    def fail(_: nn.Module, given: Any) -> None:
        if given[0].device.type == "cpu":  # its cost can be worked out
            raise TypeError("no kernel for this\nand much more")

    classifier = make_classifier()
    classifier.net.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="^the net does not take a training step on cpu: no kernel for this$"):
        measure(classifier, datamodule, make_trainer(), [(26, 26)], 0.01)
