from __future__ import annotations

import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from spp_cls.classifier import Classifier
from spp_cls.data import MultiSizeDataModule, Views
from spp_cls.data.datamodule import IMAGENET_MEAN, IMAGENET_STD, read_ahead
from spp_cls.data.device import device_step
from spp_cls.data.full_image import FullImage
from spp_cls.data.layouts import folder
from spp_cls.data.sizes import Sizes, alternating, single
from spp_cls.data.source import TrainBatch, ViewsBatch, corners, read_resized, resized_shapes
from spp_cls.data.views import PROTOCOLS
from spp_cls.models import SPPNet, sppnet
from spp_cls.models.windows import geometry
from spp_cls.resume import History, read_history
from spp_cls.schedules import constant

Received = tuple[int, list[int], list[str]]  # size, labels, a fingerprint of each image
TWO_SIZES = partial(alternating, sizes=[26, 32])


def fingerprints(images: Tensor) -> list[str]:
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16] for image in images]


class Stranger(LightningModule):
    """Knows nothing of sizes, plans or this package; writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.received = nn.Linear(3, 3), list[Received]()
        self.validated: dict[int, list[Received]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.received.append((images.shape[-1], labels.tolist(), fingerprints(images)))
        return F.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        seen = self.validated.setdefault(dataloader_idx, [])
        seen.append((images.shape[-1], labels.tolist(), fingerprints(images)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Killed(Exception):
    pass


class SaveAndKill(Callback):
    """Saves a checkpoint after the optimizer step `save_at` and ends the run, with nothing saved, after `kill_at`."""

    def __init__(self, path: Path, save_at: int, kill_at: int) -> None:
        self.path, self.save_at, self.kill_at, self.received_when_saved = path, save_at, kill_at, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)
            self.received_when_saved = len(pl_module.received)
        if trainer.global_step == self.kill_at:
            raise Killed


def make(
    pictures: Path,
    *,
    sizes: Sizes | FullImage = TWO_SIZES,
    num_workers: int | str | None = 0,
    batch_size: int = 8,
    **options: Any,
) -> MultiSizeDataModule:
    options = {"region": 32, "resize": 36, **options}
    return MultiSizeDataModule(str(pictures), folder, sizes, batch_size=batch_size, num_workers=num_workers, **options)


def trainer(epochs: int, callbacks: list[Callback] | None = None, **options: Any) -> Trainer:
    return Trainer(
        num_sanity_val_steps=0,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(datamodule: MultiSizeDataModule, epochs: int, callbacks: list[Callback] | None = None, **options: Any) -> Any:
    """A stranger's module after its fit."""
    torch.manual_seed(0)
    module = Stranger()
    trainer(epochs, callbacks, **options).fit(module, datamodule=datamodule)
    return module


def one_pass(datamodule: MultiSizeDataModule) -> list[TrainBatch]:
    datamodule.setup()
    return list(datamodule.train_dataloader())


def as_rank(datamodule: MultiSizeDataModule, rank: int, ranks: int, accumulation: int = 1) -> MultiSizeDataModule:
    """`datamodule` as if that rank's trainer had it, in epoch 0."""
    datamodule.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=ranks,
        num_devices=ranks,
        accumulate_grad_batches=accumulation,
        current_epoch=0,
        overfit_batches=0,
        validating=True,
        sanity_checking=False,
    )
    return datamodule


def same(a: TrainBatch, b: TrainBatch) -> bool:
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


# What a module that knows nothing of us receives


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_strangers_module_receives_a_whole_epoch_at_each_size_in_turn(pictures: Path, num_workers: int) -> None:
    module = fit(make(pictures, num_workers=num_workers), epochs=3)
    assert [size for size, _, _ in module.received] == [26] * 4 + [32] * 4 + [26] * 4
    assert all(len(labels) == 8 for _, labels, _ in module.received)


def test_at_the_papers_sizes(pictures: Path) -> None:
    sizes = partial(alternating, sizes=[180, 224])
    module = fit(make(pictures, sizes=sizes, batch_size=12, region=224, resize=256), epochs=3)
    assert [size for size, _, _ in module.received] == [180] * 3 + [224] * 3 + [180] * 3


def test_what_arrives_is_the_device_step_of_the_regions_of_the_plan(pictures: Path) -> None:
    datamodule = make(pictures, seed=5)
    module = fit(datamodule, epochs=2)
    index, plan = datamodule.index, datamodule.plan
    assert index is not None
    rows = index.rows("train")
    expected = []
    for epoch, size in enumerate((26, 32)):
        for micro in plan.micro_batches(epoch):
            chosen = rows[micro.indices]
            shapes = resized_shapes(index.widths[chosen], index.heights[chosen], 36)
            places = corners(micro.uniforms, shapes, 32, "anywhere").tolist()
            regions = [
                read_resized(index.path(row), tuple(shape), draft=True)[:, top : top + 32, left : left + 32]
                for row, shape, (top, left) in zip(chosen.tolist(), shapes.tolist(), places, strict=True)
            ]
            images = device_step(
                torch.stack(regions),
                torch.from_numpy(micro.uniforms),
                (size, size),
                mean=datamodule.mean,
                std=datamodule.std,
            )
            expected.append((size, index.labels[rows[micro.indices]].tolist(), fingerprints(images)))
    assert module.received == expected


def test_accumulated_micro_batches_are_the_global_batch(pictures: Path) -> None:
    whole = fit(make(pictures), epochs=2).received
    parts = fit(make(pictures), epochs=2, accumulate_grad_batches=4).received
    assert len(parts) == 4 * len(whole) and all(len(labels) == 2 for _, labels, _ in parts)
    for i, (size, labels, images) in enumerate(whole):
        four = parts[4 * i : 4 * i + 4]
        assert [s for s, _, _ in four] == [size] * 4
        assert sum((part[1] for part in four), []) == labels and sum((part[2] for part in four), []) == images


def test_options_reach_the_device_step(pictures: Path) -> None:
    options = {"flip": 0.0, "colour": 0.0, "mean": (0, 0, 0), "std": (1, 1, 1), "sizes": partial(single, size=32)}
    datamodule = make(pictures, **options)
    raw = one_pass(datamodule)[0]
    images, labels = datamodule.on_after_batch_transfer(raw, 0)
    assert torch.equal(images, raw.images.float()) and torch.equal(labels, raw.labels)
    other = object()
    assert datamodule.on_after_batch_transfer(other, 0) is other


# Resume


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("save_at", "kill_at"), [(6, 7), (3, 6)])
def test_a_resumed_run_receives_what_was_still_to_come(
    pictures: Path, tmp_path: Path, num_workers: int, accumulation: int, save_at: int, kill_at: int
) -> None:
    # Four steps an epoch: saved inside the first or second epoch, killed in the same or the next.
    options = {"accumulate_grad_batches": accumulation}
    whole = fit(make(pictures), epochs=3, **options).received
    assert len(whole) == 3 * 4 * accumulation

    watch = SaveAndKill(tmp_path / "saved.ckpt", save_at, kill_at)
    torch.manual_seed(0)
    killed = Stranger()
    with pytest.raises(Killed):
        trainer(3, [watch], **options).fit(killed, datamodule=make(pictures, num_workers=num_workers))
    before = killed.received[: watch.received_when_saved]
    assert len(before) == save_at * accumulation

    resumed = Stranger()
    datamodule = make(pictures, num_workers=num_workers)
    trainer(3, **options).fit(resumed, datamodule=datamodule, ckpt_path=watch.path, weights_only=True)
    assert before + resumed.received == whole


def test_a_run_of_more_epochs_goes_on_from_the_end_of_one(pictures: Path, tmp_path: Path) -> None:
    class SaveAtEnd(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = fit(make(pictures), 4, [SaveAtEnd()]).received
    resumed = Stranger()
    trainer(4).fit(resumed, datamodule=make(pictures), ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    assert resumed.received == whole[8:]


def test_a_second_fit_begins_at_the_beginning(pictures: Path) -> None:
    datamodule = make(pictures)
    first = fit(datamodule, epochs=1).received
    assert fit(datamodule, epochs=1).received == first and len(first) == 4
    watch = SaveAndKill(Path(os.devnull), save_at=-1, kill_at=2)
    with pytest.raises(Killed):
        fit(datamodule, 1, [watch])
    assert fit(datamodule, epochs=1).received == first


# The same batches, however they are made


def test_the_number_of_workers_changes_no_bit(pictures: Path) -> None:
    none, one, two = (one_pass(make(pictures, num_workers=workers)) for workers in (0, 1, 2))
    assert len(none) == len(one) == len(two) == 4
    assert all(same(a, b) and same(a, c) for a, b, c in zip(none, one, two, strict=True))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_joined_are_one_rank(pictures: Path, accumulation: int) -> None:
    whole = one_pass(as_rank(make(pictures), 0, 1))
    ranks = [one_pass(as_rank(make(pictures), rank, 2, accumulation)) for rank in range(2)]
    micros = [batch for pair in zip(*ranks, strict=True) for batch in pair]  # rank 0, rank 1, rank 0 …
    parts = 2 * accumulation
    assert len(micros) == parts * len(whole)
    for i, batch in enumerate(whole):
        joined = micros[parts * i : parts * (i + 1)]
        assert {micro.shape for micro in joined} == {batch.shape}
        for field in ("images", "labels", "uniforms"):
            assert torch.equal(torch.cat([getattr(micro, field) for micro in joined]), getattr(batch, field))


def two_ranks(pictures: Path, out: Path, *arguments: int, ends_with: int = 0) -> list[dict[str, list[Any]]]:
    """What each of two processes received."""
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, script, pictures, out, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == ends_with, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_receive_the_planned_sizes_and_each_image_once(pictures: Path, tmp_path: Path) -> None:
    ranks = two_ranks(pictures, tmp_path, 0)

    # Two epochs of four steps of two micro-batches of two images.
    one = fit(make(pictures), epochs=2).received
    for received in ranks:
        assert [size for size, _, _ in received["train"]] == [26] * 8 + [32] * 8
    micros = [tuple(micro) for pair in zip(*(r["train"] for r in ranks), strict=True) for micro in pair]
    for i, (size, labels, images) in enumerate(one):
        joined = micros[4 * i : 4 * i + 4]
        assert {s for s, _, _ in joined} == {size}
        assert sum((labels for _, labels, _ in joined), []) == labels
        assert sum((images for _, _, images in joined), []) == images

    # Nine validation images at two sizes in each of two epochs; nine test images.
    validated = Counter((epoch, size, image) for r in ranks for epoch, size, _, images in r["val"] for image in images)
    assert set(validated.values()) == {1}
    assert Counter((epoch, size) for epoch, size, _ in validated) == {
        (epoch, size): 9 for epoch in (0, 1) for size in (26, 32)
    }
    datamodule = make(pictures)
    datamodule.setup()
    tested = Counter(row for r in ranks for _, rows in r["test"] for row in rows)
    assert datamodule.index is not None and sorted(tested) == datamodule.index.rows("test").tolist()
    assert set(tested.values()) == {7}  # six scales, and the full views
    sides = Counter(min(shape[3:]) for r in ranks for shape, rows in r["test"] for _ in rows)
    assert sides == dict.fromkeys((32, 37, 43, 51, 64, 80, 36), 9)

    # The classifier's scores are gathered: both ranks have those of one process, and its errors.
    alone = Classifier(net=sppnet("tiny", 3, width=0.25), optimizer=torch.optim.SGD, schedule=constant)
    run = trainer(1)
    run.test(alone, datamodule=make(pictures, views=Views("multi_scale_full")), verbose=False)
    for rank in range(2):
        found = json.loads((tmp_path / f"scores{rank}.json").read_text())
        assert found["errors"] == pytest.approx({k: float(v) for k, v in run.callback_metrics.items()}, abs=1e-5)
        assert {int(row): label for row, (label, _) in found["scores"].items()} == {
            row: label for row, (label, _) in alone.test_scores.items()
        }
        for row, (_, scores) in found["scores"].items():
            torch.testing.assert_close(torch.tensor(scores), alone.test_scores[int(row)][1], rtol=0, atol=1e-6)

    # The history holds each step once, and the loss of the global batch: the mean over both ranks.
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"], row["size"]) for row in history] == [
        (step // 4, step + 1, 26 if step < 4 else 32) for step in range(8)
    ]
    assert history[0]["loss"] == pytest.approx(np.log(3), abs=1e-6)  # equal weights for all classes


@pytest.mark.slow
def test_two_processes_that_are_killed_and_resumed_receive_what_one_run_does(pictures: Path, tmp_path: Path) -> None:
    whole = two_ranks(pictures, tmp_path / "whole", 2)
    before = two_ranks(pictures, tmp_path / "killed", 2, 6, ends_with=3)
    resumed = two_ranks(pictures, tmp_path / "killed", 2)
    for rank in range(2):
        assert len(before[rank]["train"]) == 6 * 2
        for stream in ("train", "val"):
            assert before[rank][stream] + resumed[rank][stream] == whole[rank][stream]
    histories = [(tmp_path / run / "history.jsonl").read_bytes() for run in ("whole", "killed")]
    assert histories[0] == histories[1]


# Validation and testing


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("crops", PROTOCOLS)
def test_every_image_is_tested_exactly_once_a_pass_over_the_ranks(pictures: Path, ranks: int, crops: str) -> None:
    passes, found = len(PROTOCOLS[crops]), list[Counter[int]]()
    for rank in range(ranks):
        datamodule = as_rank(make(pictures, views=Views(crops)), rank, ranks)
        datamodule.setup()
        loader = datamodule.test_dataloader()
        batches = list(loader)
        assert len(loader) == len(batches) >= 1  # Lightning refuses to test where a rank has no batch
        found.append(Counter(row for batch in batches for row in batch.rows.tolist()))
        assert set(found[-1].values()) == {passes}  # all passes of an image are of one rank
    assert datamodule.index is not None
    assert sorted(row for rows in found for row in rows) == datamodule.index.rows("test").tolist()


def test_each_rank_validates_where_one_batch_would_hold_all(pictures: Path) -> None:
    for rank in range(2):
        datamodule = as_rank(make(pictures, batch_size=32), rank, 2)
        datamodule.setup()
        assert [len(loader) for loader in datamodule.val_dataloader()] == [1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_sees_every_image_once_at_each_size(pictures: Path, num_workers: int) -> None:
    module = Stranger()
    datamodule = make(pictures, num_workers=num_workers, val_sizes=[32, 26, 20])
    trainer(2).fit(module, datamodule=datamodule)
    assert {i: {size for size, _, _ in seen} for i, seen in module.validated.items()} == {0: {32}, 1: {26}, 2: {20}}
    for seen in module.validated.values():
        images = [image for _, _, batch in seen for image in batch]
        assert len(images) == 2 * 9 and images[:9] == images[9:] and len(set(images)) == 9
        assert sorted(label for _, labels, _ in seen for label in labels) == [0] * 6 + [1] * 6 + [2] * 6


def test_validation_is_the_centre_crop_unmirrored_and_with_its_own_colours(pictures: Path) -> None:
    datamodule = as_rank(make(pictures), 0, 1)
    datamodule.setup()
    (loader,) = datamodule.val_dataloader()
    batch = next(iter(loader))
    images, labels = datamodule.on_after_batch_transfer(batch, 0)
    assert images.is_contiguous(memory_format=torch.channels_last) and torch.equal(labels, batch.labels)
    assert datamodule.index is not None
    picture = Image.open(datamodule.index.path(int(batch.rows[0]))).convert("RGB")
    scale = 36 / min(picture.size)
    shape = [round(side * scale) for side in picture.size]
    left, top = round((shape[0] - 32) / 2), round((shape[1] - 32) / 2)
    resized = np.asarray(picture.resize(tuple(shape), Image.Resampling.BILINEAR))
    crop = torch.from_numpy(resized[top : top + 32, left : left + 32].astype(np.float32)).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (datamodule.mean, datamodule.std))
    assert (images[0] * std + mean - crop).abs().max() < 2.01  # two grey levels


def test_without_val_sizes_the_regions_size_is_validated(pictures: Path) -> None:
    datamodule = make(pictures)
    assert datamodule.val_sizes == (32,) and datamodule.views == Views("center_crop", 32)
    assert make(pictures, views=Views("ten_crop", 26)).views == Views("ten_crop", 26)


def test_test_batches_are_views_labels_rows(pictures: Path) -> None:
    datamodule = make(pictures, views=Views("ten_crop"), batch_size=20)
    datamodule.setup()
    batches = list(datamodule.test_dataloader())
    assert [len(batch.rows) for batch in batches] == [2, 2, 2, 2, 1]
    assert all(isinstance(batch, ViewsBatch) and batch.views.shape[1:] == (10, 3, 32, 32) for batch in batches)
    views, labels, rows = datamodule.on_after_batch_transfer(batches[0], 0)
    assert views.shape == (2, 10, 3, 32, 32) and views.dtype == torch.float32
    assert torch.equal(labels, batches[0].labels) and torch.equal(rows, batches[0].rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_windows_travel_with_the_images_whose_maps_they_are_on(pictures: Path, num_workers: int) -> None:
    datamodule = make(pictures, views=Views("ten_crop_maps"), num_workers=num_workers)
    datamodule.setup()
    for batch in datamodule.test_dataloader():
        views, labels, rows, windows = datamodule.on_after_batch_transfer(batch, 0)
        images, both, colours, height, width = views.shape
        assert (images, both, colours, min(height, width)) == (len(labels), 2, 3, 36) and len(rows) == images
        assert torch.equal(views[:, 1], views[:, 0].flip(3))  # the mirror image, and not of the map
        assert windows.shape == (10, 5) and windows.dtype == torch.int64
        assert windows[1].tolist() == [0, 0, 0, 32, 32] and windows[6].tolist() == [1, 0, width - 32, 32, width]


def one_by_one(net: SPPNet, datamodule: MultiSizeDataModule, row: int) -> Tensor:
    """The mean score of the 96 + 2 views of one picture, in plain loops: every view pooled from a crop of the map."""
    assert datamodule.index is not None
    pixels = np.array(Image.open(datamodule.index.path(row)).convert("RGB"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))

    def both(shorter: int) -> list[Tensor]:
        """The resized picture (1, 3, h, w) and its mirror image."""
        shape = [max(shorter, round(side * shorter / min(pixels.shape[:2]))) for side in pixels.shape[:2]]
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        image = (F.interpolate(image, shape, mode="bilinear", antialias=True).float() - mean) / std
        return [image, image.flip(3)]

    look, scores = geometry(net.backbone), [net(image).softmax(1)[0] for image in both(36)]
    for shorter in (32, 37, 43, 51, 64, 80):  # 224 … 560 where views have 224 px; here they have 32
        for mirrored, image in enumerate(both(shorter)):
            down, right = image.shape[2] - 32, image.shape[3] - 32
            map = net.backbone(image)
            tops, lefts = (0, round(down / 2), down), (0, round(right / 2), right)
            along = list(zip(tops, lefts, strict=True))  # where one side is a view's: the longer one
            for top, left in along if shorter == 32 else itertools.product(tops, lefts):
                rows = slice(*look.window(top, 32, map.shape[2]))
                columns = slice(*look.window(right - left if mirrored else left, 32, map.shape[3]))
                scores.append(net.head(net.pyramid(map[:, :, rows, columns])).softmax(1)[0])
    assert len(scores) == 98
    return torch.stack(scores).mean(0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test pictures of four shapes, in turn: landscapes, portraits, squares, and one that is nearly square."""
    root, chance = tmp_path_factory.mktemp("mixed"), np.random.default_rng(5)
    for split, number in (("train", 3), ("val", 3), ("test", 22)):
        for i in range(number):
            width, height = ((60, 45), (45, 60), (50, 50), (51, 50))[i % 4]
            coarse = Image.fromarray(chance.integers(0, 256, (5, 6, 3), np.uint8))
            place = root / split / "abc"[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(place / f"{i:02}.png")
    return root


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_mean_over_passes_and_mixed_shapes_is_that_of_plain_loops(mixed: Path, num_workers: int) -> None:
    net = sppnet("tiny", 3, width=0.25, seed=1)
    module = Classifier(net=net, optimizer=torch.optim.SGD, schedule=constant)
    datamodule = make(mixed, views=Views("multi_scale_full"), batch_size=16, num_workers=num_workers)
    run = trainer(1)
    run.test(module, datamodule=datamodule, verbose=False)
    assert datamodule.index is not None
    rows = datamodule.index.rows("test").tolist()
    assert sorted(module.test_scores) == rows and len(rows) == 22
    with torch.no_grad():
        expected = torch.stack([one_by_one(net.eval(), datamodule, row) for row in rows])
    found = torch.stack([module.test_scores[row][1] for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std(0).min() > 1e-3  # else this would say little
    labels = torch.from_numpy(datamodule.index.labels[rows])
    assert [module.test_scores[row][0] for row in rows] == labels.tolist()
    error = 100 * float((found.argmax(1) != labels).float().mean())
    assert float(run.callback_metrics["test/top1_error"]) == pytest.approx(error)
    loss = F.nll_loss(found.log(), labels)
    assert float(run.callback_metrics["test/loss"]) == pytest.approx(float(loss), abs=1e-5)


def test_views_that_the_net_has_no_windows_for_are_refused_before_training_and_testing(pictures: Path) -> None:
    module = Classifier(net=small_resnet(), optimizer=torch.optim.SGD, schedule=constant)
    datamodule = make(pictures, views=Views("multi_scale"))
    for way in ("fit", "test"):
        with pytest.raises(ValueError, match="^views.crops=multi_scale pools windows of maps: .*; use views=ten_crop$"):
            getattr(trainer(1), way)(module, datamodule=datamodule)
    datamodule.views = datamodule.sized(Views("multi_scale_pixels"))
    trainer(1).test(module, datamodule=datamodule, verbose=False)
    assert len(module.test_scores) == 9


def small_resnet() -> SPPNet:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, input: Tensor) -> Tensor:
            return input + self.conv(input)

    class Body(nn.Sequential):
        out_channels = 4

    return SPPNet(Body(nn.Conv2d(3, 4, 3, 2), Shortcut()), 3, levels=(2, 1), fc=())


# Loops


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_a_plain_loop_each_pass_is_the_next_epoch(pictures: Path, num_workers: int) -> None:
    datamodule = make(pictures, num_workers=num_workers)
    whole = fit(make(pictures), epochs=3).received
    datamodule.setup()
    loader = datamodule.train_dataloader()
    received = []
    for _ in range(3):
        for batch in loader:
            images, labels = datamodule.on_after_batch_transfer(batch, 0)
            received.append((images.shape[-1], labels.tolist(), fingerprints(images)))
    assert received == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_that_is_broken_off_was_an_epoch_too(pictures: Path, num_workers: int) -> None:
    datamodule = make(pictures, num_workers=num_workers)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    first = next(iter(loader))
    second = list(loader)
    assert (first.shape, [batch.shape for batch in second]) == ((26, 26), [(32, 32)] * 4)
    whole = make(pictures)
    whole.setup()
    both = list(whole.train_dataloader()), list(whole.regions_loader(1))
    assert same(first, both[0][0])
    assert all(torch.equal(a.images, b.images) for a, b in zip(second, both[1], strict=True))


def test_a_plain_loop_goes_on_where_its_state_says(pictures: Path) -> None:
    def passes(datamodule: MultiSizeDataModule) -> list[list[TrainBatch]]:
        loader = datamodule.train_dataloader()
        return [list(loader), list(loader)]

    whole, stopped, resumed, ended = (make(pictures) for _ in range(4))
    for datamodule in (whole, stopped, resumed, ended):
        datamodule.setup()
    first, second = passes(whole)
    for _, _ in zip(range(3), stopped.train_dataloader(), strict=False):
        pass
    state = stopped.state_dict()
    assert state == {"epoch": 0, "batch": 3}
    resumed.load_state_dict(json.loads(json.dumps(state)))
    rest, next_epoch = passes(resumed)
    assert len(rest) == 1 and same(rest[0], first[3])
    assert all(same(a, b) for a, b in zip(next_epoch, second, strict=True))
    ended.load_state_dict({"epoch": 0, "batch": 4})
    assert all(same(a, b) for a, b in zip(passes(ended)[0], second, strict=True))


def test_a_loader_of_regions_moves_no_position(pictures: Path) -> None:
    datamodule = make(pictures)
    datamodule.setup()
    state = datamodule.state_dict()
    first = list(datamodule.regions_loader(0))
    assert [batch.images.shape[-1] for batch in first] == [32] * 4
    assert datamodule.state_dict() == state
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, one_pass(datamodule), strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_overfit_batches_gives_the_same_pictures_each_epoch(pictures: Path, num_workers: int) -> None:
    received = fit(make(pictures, num_workers=num_workers), epochs=3, overfit_batches=2).received
    assert len(received) == 6
    assert received[:2] == received[2:4] == received[4:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_limit_train_batches_takes_the_first_of_each_epoch(pictures: Path, num_workers: int) -> None:
    whole = fit(make(pictures), epochs=3).received
    received = fit(make(pictures, num_workers=num_workers), epochs=3, limit_train_batches=2).received
    assert received == whole[0:2] + whole[4:6] + whole[8:10]


def test_planned_shapes(pictures: Path) -> None:
    def by_batch(seed: int, epoch: int, batch: int) -> int:
        return 20 + epoch + 2 * (batch % 2)

    datamodule = make(pictures, sizes=by_batch)
    datamodule.setup()
    assert datamodule.planned_shapes(2) == {0: [(20, 20), (22, 22)], 1: [(21, 21), (23, 23)]}
    assert datamodule.planned_shapes(2, batches=1) == {0: [(20, 20)], 1: [(21, 21)]}
    module = fit(datamodule, epochs=2, accumulate_grad_batches=2)
    assert [size for size, _, _ in module.received] == [20, 20, 22, 22] * 2 + [21, 21, 23, 23] * 2


def test_workers_end_with_the_fit_and_with_the_loader(pictures: Path) -> None:
    fit(make(pictures, num_workers=2), epochs=1)
    assert not multiprocessing.active_children()
    datamodule = make(pictures, num_workers=2)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    assert len(list(loader)) == 4 and len(multiprocessing.active_children()) == 2
    gc.disable()  # no circle of references may keep the loader
    try:
        del loader
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


# Caches, threads, whole pictures, and the last, short batch


WHOLE = FullImage(32, 8, least=1)


def losses_of_a_fit(pictures: Path, **options: Any) -> list[Any]:
    """What a stranger's module receives in two epochs; rows in batches of 8, whatever way they come."""
    return list(fit(make(pictures, **options), epochs=2).received)


@pytest.mark.parametrize("sizes", [TWO_SIZES, WHOLE], ids=["regions", "whole"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 2},
        {"num_workers": "thread"},
        {"cache": "raw"},
        {"cache": "raw", "num_workers": None},
        {"cache": "raw", "num_workers": 2},
    ],
    ids=str,
)
def test_every_way_to_read_gives_the_same_bits(
    pictures: Path, tmp_path: Path, sizes: Sizes | FullImage, options: dict[str, Any]
) -> None:
    if "cache" in options:
        options = {**options, "cache_folder": str(tmp_path)}
    expected = losses_of_a_fit(pictures, sizes=sizes)
    assert losses_of_a_fit(pictures, sizes=sizes, **options) == expected
    assert len({print for _, _, prints in expected for print in prints}) > 36  # nothing is twice the same


def test_a_jpeg_cache_gives_pictures_that_are_near(pictures: Path, tmp_path: Path) -> None:
    files = one_pass(make(pictures))
    cached = one_pass(make(pictures, cache="jpeg", cache_folder=str(tmp_path)))
    for a, b in zip(files, cached, strict=True):
        assert torch.equal(a.labels, b.labels) and torch.equal(a.uniforms, b.uniforms)
        assert 0 < (a.images.float() - b.images.float()).abs().mean() < 4


def test_a_raw_cache_is_read_by_a_thread_and_files_by_processes(pictures: Path, tmp_path: Path) -> None:
    datamodule = make(pictures, cache="raw", cache_folder=str(tmp_path), num_workers=None)
    datamodule.setup()
    assert datamodule._train_workers() == "thread" and datamodule._workers() != "thread"
    for _ in datamodule.train_dataloader():
        assert "spp_cls reader" in {thread.name for thread in threading.enumerate()}
        break
    gc.collect()
    assert "spp_cls reader" not in {thread.name for thread in threading.enumerate()}


def test_read_ahead_hands_on_what_comes_and_what_goes_wrong() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="^gone$"):
        for number in read_ahead(numbers()):
            seen.append(number)
    assert seen == list(range(5))
    assert list(read_ahead(range(100), depth=1)) == list(range(100)) and list(read_ahead([])) == []

    taken = []
    ahead = read_ahead((taken.append(i) or i for i in range(1000)), depth=3)  # type: ignore[func-returns-value]
    assert next(ahead) == 0
    ahead.close()
    assert len(taken) <= 6 and threading.active_count() == len(threading.enumerate())  # and its thread has ended
    assert "spp_cls reader" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_whole_pictures_once_an_epoch_and_two_ranks_joined_are_one(pictures: Path, accumulation: int) -> None:
    options: dict[str, Any] = {"sizes": WHOLE, "batch_size": 18}
    datamodule = as_rank(make(pictures, **options), 0, 1)
    whole = one_pass(datamodule)
    assert sum(len(batch.labels) for batch in whole) == 36 and len(whole) == len(datamodule.plan)
    assert len({batch.shape for batch in whole}) > 1
    for batch in whole:
        assert batch.images.shape[2:] == batch.shape and batch.weight == 1
    if accumulation == 2:
        with pytest.raises(ValueError, match="as few as 3, which do not divide among 2 devices × 2 accumulated"):
            one_pass(as_rank(make(pictures, **options), 0, 2, accumulation))
        return
    ranks = [one_pass(as_rank(make(pictures, **options), rank, 2, accumulation)) for rank in range(2)]
    micros = [batch for pair in zip(*ranks, strict=True) for batch in pair]  # rank 0, rank 1, rank 0 …
    parts = 2 * accumulation
    for i, batch in enumerate(whole):
        joined = micros[parts * i : parts * (i + 1)]
        assert {micro.shape for micro in joined} == {batch.shape}
        assert torch.equal(torch.cat([micro.images for micro in joined]), batch.images)
        assert sum(micro.weight * 1 / parts for micro in joined) == pytest.approx(1)


def test_whole_pictures_go_on_where_a_checkpoint_says(pictures: Path, tmp_path: Path) -> None:
    whole = fit(make(pictures, sizes=WHOLE), epochs=2).received
    saver = SaveAndKill(tmp_path / "a.ckpt", save_at=len(whole) // 2 + 2, kill_at=len(whole) // 2 + 3)
    with pytest.raises(Killed):
        fit(make(pictures, sizes=WHOLE), epochs=2, callbacks=[saver])
    module = Stranger()
    trainer(2).fit(module, datamodule=make(pictures, sizes=WHOLE), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert module.received == whole[saver.received_when_saved :]


def test_our_classifier_counts_each_image_the_same(pictures: Path, tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 5):  # the last batch of 6 images in five parts
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        for parameter in net.parameters():
            nn.init.constant_(parameter, 0.01)
        module = Classifier(net, partial(torch.optim.SGD, lr=0.1), constant, val_sizes=(32,))
        datamodule = make(pictures, batch_size=10, last_batch="keep")
        history = History(tmp_path / str(accumulation))
        trainer(1, [history], accumulate_grad_batches=accumulation).fit(module, datamodule=datamodule)
        losses = [row["loss"] for row in read_history(tmp_path / str(accumulation)) if "loss" in row]
        found.append((losses, [parameter.detach() for parameter in net.parameters()]))
    assert len(found[0][0]) == 4 and found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


class MeanOverTheGlobalBatch(LightningModule):
    """One linear layer, and the gradients of each optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gradients = nn.Linear(3, 3), list[Tensor]()
        nn.init.constant_(self.layer.weight, 0.01)
        nn.init.zeros_(self.layer.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        losses = F.cross_entropy(self.layer(images.mean((2, 3))), labels, reduction="none")
        return losses.mean() * self.trainer.datamodule.batch_weight  # type: ignore[attr-defined]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert self.layer.weight.grad is not None
        self.gradients.append(self.layer.weight.grad.clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("sizes", [partial(single, size=32), WHOLE], ids=["regions", "whole"])
def test_each_image_counts_the_same_however_a_batch_is_divided(pictures: Path, sizes: Sizes | FullImage) -> None:
    found = []
    for accumulation in (1, 2, 5):  # 36 images in batches of 10: the last has 6, which 5 does not divide
        if sizes is WHOLE and accumulation == 5:
            continue  # a batch of whole pictures has as few as 3 here
        module = MeanOverTheGlobalBatch()
        options: dict[str, Any] = {"sizes": sizes, "batch_size": 10 if sizes is not WHOLE else 20}
        datamodule = make(pictures, last_batch="keep", **options)
        trainer(1, accumulate_grad_batches=accumulation).fit(module, datamodule=datamodule)
        found.append(module.gradients)
    assert sizes is WHOLE or len(found[0]) == 4
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_last_short_batch_is_kept_by_choice(pictures: Path) -> None:
    kept = one_pass(make(pictures, last_batch="keep", batch_size=10))
    assert [len(batch.labels) for batch in kept] == [10, 10, 10, 6]
    dropped = one_pass(make(pictures, batch_size=10))
    assert len(dropped) == 3 and all(same(a, b) for a, b in zip(dropped, kept[:3], strict=True))


def test_pictures_that_cannot_be_read_are_left_out_by_choice(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pictures, tmp_path / "p")
    broken = tmp_path / "p" / "train" / "b" / "01.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    datamodule = make(tmp_path / "p", on_bad="skip", max_bad=0.1)
    datamodule.setup()
    assert datamodule.index is not None and datamodule.index.checked
    assert len(datamodule.index) == 53 and datamodule.index.bad[0].path == "train/b/01.jpg"
    assert sum(len(batch.labels) for batch in one_pass(make(tmp_path / "p", on_bad="skip", max_bad=0.1))) == 32
    with pytest.raises(ValueError, match=r"1.85% of the pictures are bad, more than data.max_bad=1.00%"):
        make(tmp_path / "p", on_bad="skip").setup()


def test_a_picture_so_long_that_it_would_be_huge_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (40, 40 + i)).save(tmp_path / name / f"{i}.png")
    Image.new("RGB", (2000, 2)).save(tmp_path / "b" / "long.png")
    with pytest.raises(ValueError, match=r"long.png: is 2000×2 px, and 512000×512 with the shorter side at 512"):
        make(tmp_path, region=224, resize=512).setup()


# The user's mistakes


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_picture_is_named_in_one_line(pictures: Path, tmp_path: Path, num_workers: int, split: str) -> None:
    for path in sorted(pictures.rglob("*.jpg")):
        copy = tmp_path / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = tmp_path / split / "b" / "01.jpg"
    broken.write_bytes(broken.read_bytes()[:400])  # the header is whole, so that the index takes it
    with pytest.raises(ValueError) as caught:
        trainer(1).fit(Stranger(), datamodule=make(tmp_path, num_workers=num_workers))
    assert str(caught.value).startswith(f"{broken}: ") and "\n" not in str(caught.value)


def test_refused(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.region=40 is more than data.resize=36: a region is cut from it$"):
        make(pictures, region=40)
    with pytest.raises(ValueError, match=r"^data.place='centre': use one of anywhere, five$"):
        make(pictures, place="centre")
    with pytest.raises(ValueError, match=r"^data.mean=\[1, 2\], data.std=\[.*\]: give three grey levels each"):
        make(pictures, mean=(1, 2))
    with pytest.raises(ValueError, match="std above 0$"):
        make(pictures, std=(1, 1, 0))
    with pytest.raises(ValueError, match=r"^data.num_workers='threads': use a number of processes, thread, or null$"):
        make(pictures, num_workers="threads")
    with pytest.raises(ValueError, match=r"^data.cache='png': use raw, jpeg, auto, or null$"):
        make(pictures, cache="png")
    for options, line in (
        ({"batch_size": 4.5}, r"data.batch_size=4.5: use a whole number of at least 1"),
        ({"region": 0}, r"data.region=0: use a whole number of at least 1"),
        ({"val_sizes": [32, 0]}, r"data.val_sizes=0: use a whole number of at least 1"),
        ({"num_workers": -1}, r"data.num_workers=-1: use a number of processes, thread, or null"),
        ({"flip": 3.0}, r"data.flip=3.0: use a share from 0 to 1"),
        ({"colour": -1}, r"data.colour=-1: use 0 or more"),
        ({"last_batch": "drp"}, r"data.last_batch='drp': use one of drop, keep"),
        ({"max_bad": -1}, r"data.on_bad='stop', data.max_bad=-1: use stop or skip, and a share from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=f"^{line}$"):
            make(pictures, **options)
    datamodule = make(pictures)
    with pytest.raises(RuntimeError, match="^call setup"):
        _ = datamodule.classes
    datamodule.setup()
    assert datamodule.classes == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"^split='all': use one of train, val, test$"):
        datamodule.views_loader(Views("center_crop"), "all")


def test_a_size_above_the_region_is_refused_when_it_comes(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"^sizes gave 40 px for epoch 1, more than data.region=32: "):
        fit(make(pictures, sizes=partial(alternating, sizes=[32, 40])), epochs=2)


def test_workers_are_shared_among_the_devices(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, devices, expected in [(2, 1, 2), (64, 1, 8), (64, 16, 4), (4, 8, 1), (None, 1, 1)]:
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        datamodule = as_rank(make(pictures), 0, devices)
        datamodule.num_workers = None
        assert datamodule._workers() == expected
