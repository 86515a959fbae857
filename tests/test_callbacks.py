from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from spp_cls.callbacks import MemoryProbe, PlannedSize, Progress, Timing, _one_step, peak_memory
from spp_cls.classifier import Classifier
from spp_cls.cost import cost
from spp_cls.data import FullImage, MultiSizeDataModule
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import alternating
from spp_cls.schedules import constant


def make_classifier() -> Classifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 3),
    )
    return Classifier(net, partial(torch.optim.SGD, lr=0.1), constant, val_sizes=(32,))


def make_datamodule(pictures: Path) -> MultiSizeDataModule:
    sizes = partial(alternating, sizes=[26, 32])
    return MultiSizeDataModule(str(pictures), folder, sizes, batch_size=8, region=32, resize=36, num_workers=0)


def fit(
    pictures: Path,
    callbacks: list[Callback],
    *,
    epochs: int = 2,
    datamodule: MultiSizeDataModule | None = None,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=any(isinstance(callback, Progress) for callback in callbacks),
        enable_model_summary=False,
        **options,
    )
    trainer.fit(make_classifier(), datamodule=datamodule or make_datamodule(pictures))
    return trainer


def fake(**values: Any) -> Any:
    return SimpleNamespace(**values)


# PlannedSize


def planned_by_batch(epoch: int, batch: int) -> tuple[int, int]:
    size = 100 * (epoch + 1) + batch
    return size, size


@pytest.mark.parametrize(
    ("epoch", "batch_idx", "accumulation", "overfit", "size"),
    [(0, 0, 1, 0, 100), (2, 5, 1, 0, 305), (2, 5, 2, 0, 302), (2, 5, 1, 1, 105)],
)
def test_planned_size_looks_at_the_batch(
    epoch: int, batch_idx: int, accumulation: int, overfit: int, size: int
) -> None:
    trainer = fake(
        datamodule=fake(shape_at=planned_by_batch),
        current_epoch=epoch,
        accumulate_grad_batches=accumulation,
        overfit_batches=overfit,
    )
    watch = PlannedSize()
    watch.on_train_batch_start(trainer, fake(), (torch.empty(2, 3, size, size), None), batch_idx)
    for wrong in ((size + 1, size + 1), (size, size + 1)):
        with pytest.raises(
            AssertionError, match=rf"\({wrong[0]}, {wrong[1]}\) px arrived, \({size}, {size}\) were planned$"
        ):
            watch.on_train_batch_start(trainer, fake(), (torch.empty(2, 3, *wrong), None), batch_idx)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"overfit_batches": 2}])
def test_planned_size_is_content_with_the_datamodule(pictures: Path, options: dict[str, Any]) -> None:
    fit(pictures, [PlannedSize()], **options)


# MemoryProbe


def probe(pictures: Path, free: int | None, monkeypatch: pytest.MonkeyPatch, accumulation: int = 2) -> None:
    monkeypatch.setattr("spp_cls.callbacks.available_memory", lambda: free)
    datamodule = make_datamodule(pictures)
    datamodule.setup()
    classifier = make_classifier()
    trainer = fake(
        datamodule=datamodule,
        max_epochs=2,
        accumulate_grad_batches=accumulation,
        optimizers=[torch.optim.SGD(classifier.parameters())],
    )
    datamodule.trainer = fake(global_rank=0, world_size=1, accumulate_grad_batches=accumulation)
    MemoryProbe().on_train_start(trainer, classifier)


def test_memory_probe_refuses_what_does_not_fit(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = cost(make_classifier().net, (32, 32)).training_bytes(4, "SGD")  # the largest size, half of the batch
    probe(pictures, needed, monkeypatch)
    with pytest.raises(ValueError) as caught:
        probe(pictures, needed - 1, monkeypatch)
    assert str(caught.value) == (
        "4 images of 32 px at once do not fit into memory: set trainer.accumulate_grad_batches=4 or a smaller "
        f"data.batch_size ({needed / 1e9:.1f} GB needed, {(needed - 1) / 1e9:.1f} GB free)"
    )


def test_memory_probe_passes_where_the_system_does_not_say(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(pictures, None, monkeypatch)


def test_memory_probe_passes_a_net_that_cannot_be_measured(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmeasured(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("spp_cls.callbacks.cost", unmeasured)
    probe(pictures, 0, monkeypatch)


def test_memory_probe_has_no_say_about_modules_without_a_net() -> None:
    MemoryProbe().on_train_start(fake(datamodule=None, max_epochs=2), nn.Linear(1, 1))  # type: ignore[arg-type]
    MemoryProbe().on_train_start(fake(datamodule=None, max_epochs=0), make_classifier())


def test_a_run_with_a_probe_is_the_run_without(pictures: Path) -> None:
    assert fit(pictures, [MemoryProbe()]).global_step == 8


def test_one_step_leaves_no_trace() -> None:
    classifier = make_classifier().train()
    state, random = copy.deepcopy(classifier.state_dict()), torch.get_rng_state()
    # A step that is not thrown away does leave traces.
    with torch.random.fork_rng([]):
        classifier.losses(classifier.net(torch.zeros(4, 3, 32, 32)), torch.zeros(4, dtype=torch.int64)).mean()
        assert not torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(classifier.state_dict()["net.1.running_mean"], state["net.1.running_mean"])
    classifier.load_state_dict(state)

    _one_step(fake(precision_plugin=Precision()), classifier, images=4, shape=(32, 32))
    assert all(torch.equal(value, state[name]) for name, value in classifier.state_dict().items())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert torch.equal(torch.get_rng_state(), random) and classifier.net.training


# Timing


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_timing_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("spp_cls.callbacks.time.perf_counter", lambda: clock.now)
    timing = Timing(tmp_path / "run")
    datamodule = fake(device_step_seconds=0.0)
    trainer = fake(world_size=2, is_global_zero=True, current_epoch=0, datamodule=datamodule)
    module, batch = fake(device=torch.device("cpu")), (torch.empty(8, 3, 32, 32), torch.empty(8))
    timing.on_train_start(trainer, module)
    for epoch in range(2):
        trainer.current_epoch = epoch
        clock.now += 50  # what lies between two epochs belongs to none
        began = clock.now
        timing.on_train_epoch_start(trainer, module)
        for start, end in ((2, 5), (6, 10)):  # seconds 0 – 2 and 5 – 6 are waits, but for half a second of device step
            datamodule.device_step_seconds += 0.5
            clock.now = began + start
            timing.on_train_batch_start(trainer, module, batch, 0)
            clock.now = began + end
            timing.on_train_batch_end(trainer, module, None, batch, 0)
        clock.now = began + 13
        timing.on_train_epoch_end(trainer, module)
    rows = read(tmp_path / "run" / "timing.jsonl")
    assert [row.pop("epoch") for row in rows] == [0, 1]
    for row in rows:
        assert row.pop("peak_memory_mb") > 0
        assert row == {
            "images": 32,  # two batches of 8 on each of two ranks
            "train_seconds": 10.0,
            "val_seconds": 3.0,
            "images_per_s": 3.2,
            "waiting_for_data": 0.2,
        }


def test_of_a_run_that_goes_on_the_time_counts_that_its_weights_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("spp_cls.callbacks.time.perf_counter", lambda: clock.now)
    module, batch = fake(device=torch.device("cpu")), (torch.empty(8, 3, 32, 32), torch.empty(8))
    trainer = fake(world_size=1, is_global_zero=True, current_epoch=2)

    def step(timing: Timing, wait: float, seconds: float) -> None:
        clock.now += wait
        timing.on_train_batch_start(trainer, module, batch, 0)
        clock.now += seconds
        timing.on_train_batch_end(trainer, module, None, batch, 0)

    first = Timing(tmp_path)
    first.on_train_start(trainer, module)
    first.on_train_epoch_start(trainer, module)
    step(first, 0, 5)
    first.on_train_epoch_end(trainer, module)
    trainer.current_epoch = 3
    first.on_train_epoch_start(trainer, module)
    step(first, 1, 2)
    saved = copy.deepcopy(first.state_dict())
    step(first, 0, 100)  # what comes after the save is lost, with the epoch's row
    first.on_train_epoch_end(trainer, module)

    clock.now += 1000  # reading the pictures, building the net, loading the checkpoint
    second = Timing(tmp_path)
    second.load_state_dict(saved)
    second.on_train_start(trainer, module)
    step(second, 3, 4)
    second.on_train_epoch_end(trainer, module)
    rows = read(tmp_path / "timing.jsonl")
    assert [(row["epoch"], row["images"], row["train_seconds"], row["waiting_for_data"]) for row in rows] == [
        (2, 8, 5.0, 0.0),
        (3, 16, 10.0, 0.4),
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_timing_of_a_fit(pictures: Path, tmp_path: Path, accumulation: int) -> None:
    fit(pictures, [Timing(tmp_path)], accumulate_grad_batches=accumulation)
    rows = read(tmp_path / "timing.jsonl")
    assert [(row["epoch"], row["images"]) for row in rows] == [(0, 32), (1, 32)]  # 36 pictures, four dropped
    for row in rows:
        assert set(row) == {
            "epoch",
            "images",
            "train_seconds",
            "val_seconds",
            "images_per_s",
            "waiting_for_data",
            "peak_memory_mb",
        }
        assert row["train_seconds"] >= 0 and row["val_seconds"] >= 0 and row["images_per_s"] > 0
        assert 0 <= row["waiting_for_data"] <= 1


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    Timing(tmp_path).on_train_epoch_end(fake(is_global_zero=False), fake())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("platform", "peak"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_is_in_bytes(monkeypatch: pytest.MonkeyPatch, platform: str, peak: int) -> None:
    # Linux counts in kilobytes, macOS in bytes.
    monkeypatch.setattr("resource.getrusage", lambda who: fake(ru_maxrss=5))
    monkeypatch.setattr("sys.platform", platform)
    assert peak_memory(torch.device("cpu")) == peak


# Progress


def test_progress_prints_a_line_an_epoch(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timing = Timing(tmp_path)
    trainer = fit(pictures, [timing, Progress(timing)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[:2] for line in lines] == [["epoch 1/2", "26 px"], ["epoch 2/2", "32 px"]]
    assert all("loss " in line and line.endswith("waiting for data") for line in lines)
    parts = lines[1].split("  ")
    assert parts[2] == f"loss {float(trainer.callback_metrics['train/loss']):.3f}"
    assert parts[3] == f"val error {float(trainer.callback_metrics['val/top1_error']):.2f} %"


def test_progress_says_from_where_to_where_whole_pictures_go(
    pictures: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    timing = Timing(tmp_path)
    sizes = FullImage(32, 8, least=1)
    datamodule = MultiSizeDataModule(str(pictures), folder, sizes, batch_size=8, region=32, resize=36, num_workers=0)
    fit(pictures, [timing, Progress(timing)], epochs=1, datamodule=datamodule)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    shapes = datamodule.planned_shapes(1)[0]
    height, width = max(shapes, key=math.prod)
    assert line.split("  ")[1] == f"32 … {height}×{width} px" and (32, 32) in shapes


def test_an_epoch_of_which_only_the_end_was_left_has_no_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spp_cls.callbacks.TQDMProgressBar.on_train_epoch_end", lambda *_: None)
    trainer = fake(is_global_zero=True, callback_metrics={"val/top1_error": 25.0}, current_epoch=1, max_epochs=3)
    Progress(Timing(tmp_path)).on_train_epoch_end(trainer, fake())
    assert capsys.readouterr().err.startswith("epoch 2/3  val error 25.00 %  ")


def test_the_bar_shows_size_loss_speed_and_wait(pictures: Path, tmp_path: Path) -> None:
    timing = Timing(tmp_path)
    progress = Progress(timing)
    trainer = fit(pictures, [timing, progress], epochs=1)
    timing.images_per_s, timing.waiting = 123.4, 0.25
    shown = progress.get_metrics(trainer, trainer.lightning_module)
    assert list(shown) == ["px", "loss", "images/s", "wait"]
    assert (shown["px"], shown["images/s"], shown["wait"]) == ("26", 123, "25%")
    assert shown["loss"] == f"{float(progress._loss):.3f}"
